"""Real tritonservers for the tests of this folder, on free ports of 127.0.0.1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking

FAKE = """
workers:
  - {role: prefill, engine: fake}
  - {role: decode, engine: fake}
  - {role: aggregated, engine: fake}
engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 50, step_us: 4000}}
router: {worker_wait_s: 15}
"""
REAL = """
workers:
  - {role: prefill}
  - {role: decode}
  - {role: aggregated}
engine: {kv_pool_mib: 256}
"""


@pytest.fixture(scope="package")
def fake_server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    """Engine `fake`: no weights, only the tokenizer."""
    config = tmp_path_factory.mktemp("fake") / "fake.yaml"
    config.write_text(FAKE)
    with TritonServer(config) as server:
        yield server


@pytest.fixture(scope="package")
def real_server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    """SmolLM2-135M-Instruct on the PyTorch engine."""
    config = tmp_path_factory.mktemp("real") / "real.yaml"
    config.write_text(REAL)
    with TritonServer(config) as server:
        yield server


@pytest.fixture
def asking(fake_server: TritonServer) -> Iterator[Asking]:
    client = Asking(fake_server)
    yield client
    client.close()
