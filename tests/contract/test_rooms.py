"""What import-linter can't see: knowledge of one room in another."""

from __future__ import annotations

import re

import pytest

from python_backends.core.paths import repository_root

_ROOMS = ("router", "python_backends/kv", "python_backends/worker", "python_backends/triton")


@pytest.mark.parametrize("room", _ROOMS)
def test_nothing_outside_engines_asks_which_engine_runs(room: str) -> None:
    """An engine is known by its contract alone: no name of one in the code of others."""
    files = sorted((repository_root() / room).rglob("*.py"))
    assert files
    named = [path.name for path in files if re.search(r"\btrtllm\b|tensorrt_llm|\.engine ==", path.read_text())]
    assert named == []
