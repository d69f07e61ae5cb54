"""The configurations that workers' models are loaded with: whole, with a role only where one was given, and not forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from python_backends.core.errors import Unavailable
from python_backends.core.types import Epoch, Role, WorkerId
from router.seams import Destination
from router.triton.model_config import ModelConfigs

WORKER = Destination(WorkerId("decode_1"), "decode_1", "", Epoch(1))
PLAIN: dict[str, Any] = {"name": "decode_1", "parameters": {"EXECUTION_ENV_PATH": {"string_value": "/opt/env"}}}


def test_a_role_is_added_and_then_kept() -> None:
    triton: dict[str, Any] | None = PLAIN
    configs = ModelConfigs(lambda worker: triton)
    assert configs.to_load(WORKER, None) is None, "the repository's own"
    changed = configs.to_load(WORKER, Role.PREFILL)
    assert changed is not None
    assert changed["parameters"] == {**PLAIN["parameters"], "role": {"string_value": "prefill"}}
    assert "role" not in PLAIN["parameters"]
    triton = changed
    assert configs.to_load(WORKER, None) == changed
    again = configs.to_load(WORKER, Role.AGGREGATED)
    assert again is not None
    assert again["parameters"]["role"] == {"string_value": "aggregated"}


def test_a_load_that_failed_leaves_the_one_before() -> None:
    triton: dict[str, Any] | None = PLAIN
    configs = ModelConfigs(lambda worker: triton)
    changed = triton = configs.to_load(WORKER, Role.PREFILL)
    assert configs.to_load(WORKER, Role.DECODE) != changed
    triton = None  # it is not loaded now
    assert configs.to_load(WORKER, None) == changed


def test_without_a_configuration_nothing_is_changed() -> None:
    configs = ModelConfigs(lambda worker: None)
    assert configs.to_load(WORKER, None) is None
    with pytest.raises(Unavailable, match="a role is changed on servers that scripts/serve has started"):
        configs.to_load(WORKER, Role.PREFILL)
