"""Our errors as Triton's."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError


def triton_error(error: BatonError, with_code: bool = False) -> Any:
    """with_code: the message begins with the code's name."""
    code = error.code.value
    return pb_utils.TritonError(f"{code}: {error}" if with_code else str(error), getattr(pb_utils.TritonError, code))
