"""The configurations that workers' models are loaded with when they are given a role."""

from __future__ import annotations

from typing import Any

import pytest

from python_backends.core.errors import Unavailable
from python_backends.core.types import Epoch, Role, WorkerId
from router.seams import Destination
from router.triton.model_config import in_role

WORKER = Destination(WorkerId("decode_1"), "decode_1", "", Epoch(1))
PLAIN: dict[str, Any] = {"name": "decode_1", "parameters": {"EXECUTION_ENV_PATH": {"string_value": "/opt/env"}}}


def test_the_role_is_added_to_all_that_was_there() -> None:
    changed = in_role(WORKER, PLAIN, Role.PREFILL)
    assert changed == {**PLAIN, "parameters": {**PLAIN["parameters"], "role": {"string_value": "prefill"}}}
    assert "role" not in PLAIN["parameters"]
    assert in_role(WORKER, changed, Role.AGGREGATED)["parameters"]["role"] == {"string_value": "aggregated"}
    assert in_role(WORKER, {"name": "decode_1"}, Role.DECODE)["parameters"] == {"role": {"string_value": "decode"}}


def test_without_a_configuration_nothing_is_changed() -> None:
    with pytest.raises(Unavailable, match="a role is changed on servers that scripts/serve has started"):
        in_role(WORKER, None, Role.PREFILL)
