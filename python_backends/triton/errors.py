"""Our errors as Triton's."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError


def triton_error(error: BatonError) -> Any:
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code.value))
