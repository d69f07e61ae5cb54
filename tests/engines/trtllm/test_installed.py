"""The conformance suite as scripts/verify-gpu runs it: over an installed tensorrt_llm, each engine in its own process.

Here the fake is what is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.conformance import run_conformance
from tests.engines.trtllm.playing import FAKES

CONFIG = """
model: {path: MODEL, dtype: bfloat16, max_context: 2048}
workers:
  - {role: prefill, engine: trtllm, gpus: "0"}
  - {role: decode, engine: trtllm, gpus: "1"}
engine: {trtllm: {cache_transceiver_config: {backend: UCX}, load_timeout_s: 30}}
"""


@pytest.fixture
def config(tmp_path: Path, tiny: Path) -> Path:
    file = tmp_path / "deployment.yaml"
    file.write_text(CONFIG.replace("MODEL", str(tiny)))
    return file


def test_what_is_installed_is_held_to_the_contract(config: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")]))
    (result,) = run_conformance(config, tiny, "greedy or one_use or events or close_answers or other_weights or salt")
    assert result.ok, result.detail
    assert result.detail == "5 of 5 tests held, 1 skipped"


def test_where_nothing_is_installed_every_test_says_so(config: Path) -> None:
    suite, *failed = run_conformance(config, None, "one_use")
    assert suite.ok is False
    (named,) = failed
    assert "tensorrt_llm can't be imported" in named.detail
