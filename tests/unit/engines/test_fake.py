"""The fake engine's injected fault. That it serves as every engine does is in tests/engines/test_conformance.py."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import pytest

from python_backends.core.config import Deployment, EngineConfig, FakeConfig, WorkerConfig
from python_backends.core.types import Role
from python_backends.engines.fake import FakeRunner


def test_a_step_hangs_while_a_file_says_so(tmp_path: Path) -> None:
    engine = EngineConfig(fake=FakeConfig(step_us=0, hang_dir=str(tmp_path)))
    runner = FakeRunner(Deployment(workers=(WorkerConfig(Role.DECODE, "decode", engine="fake"),), engine=engine))
    (tmp_path / "1").touch()  # another process
    assert runner.step([]) == []
    mine = tmp_path / str(os.getpid())
    mine.touch()
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(runner.step, [])
        with pytest.raises(NotYet):
            step.result(timeout=0.1)
        mine.unlink()
        assert step.result(timeout=5) == []
