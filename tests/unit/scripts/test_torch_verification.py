"""The checks of scripts/verify-gpu for the PyTorch engine, over a device that this host plays."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.config import Deployment, EngineConfig, ModelConfig, WorkerConfig
from python_backends.core.types import Role
from scripts.torch_verification import Sizes, verify_torch
from scripts.verification import Result
from scripts.verify_gpu import main
from tests.engines.host_device import HostDevice
from tests.engines.tiny_model import write_tiny_llama

SIZES = Sizes(streams=(1, 3), context=140, prompt=64, handoff_mib=1)


def verified(path: Path, make: type[HostDevice] = HostDevice) -> dict[str, Result]:
    deployment = Deployment(
        model=ModelConfig(path=str(path)), workers=(WorkerConfig(Role.DECODE),), engine=EngineConfig(block_size=16)
    )
    told: list[Result] = []
    results = verify_torch(deployment, make, told.append, SIZES)
    assert told == results
    return {result.name: result for result in results}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


class NoGraphs(HostDevice):
    def flex(self, kinds: int) -> None:  # type: ignore[override]
        raise RuntimeError("no compiler here")


def test_a_device_that_does_it_all(tmp_path: Path) -> None:
    results = verified(write_tiny_llama(tmp_path / "model"))
    assert [result.name for result in results.values() if not result.ok] == [], results
    assert results["graphs"].detail.startswith("96 of 96 tokens the same, logits at most 0.00% apart")
    assert "3 streams" in results["decode"].detail
    assert "tokens/s" in results["prefill"].detail
    assert "GiB/s), digests checked" in results["handoff"].detail


def test_a_check_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    results = verified(write_tiny_llama(tmp_path / "model"), NoGraphs)
    assert [result.ok for result in results.values()] == [False, False, True, True]
    assert results["graphs"].detail == "no steps were prepared: see the log"


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "gpu.yaml"
    config.write_text("model: {}\nworkers:\n  - role: aggregated\n    device: cuda\n")
    assert main(["--config", str(config)]) == 1
    assert "workers are on cuda, and torch sees 0 GPUs here" in " ".join(capsys.readouterr().out.split())
