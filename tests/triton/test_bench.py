"""scripts/bench on a real server, as its reader runs it: figures, pictures, and what it leaves of an interrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.paths import repository_root
from scripts.benchmarks.redis import redis_is_installed

pytestmark = [
    pytest.mark.triton,
    pytest.mark.weights,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("BATON_LONG"), reason="BATON_LONG=1 runs it: minutes"),
]


@contextmanager
def _started(out: Path, *parts: str) -> Iterator[subprocess.Popen[bytes]]:
    """Ends with the block, and takes its servers along."""
    command = [sys.executable, "-m", "scripts.bench", "all", *parts, "--repetitions", "1", "--out", str(out)]
    with subprocess.Popen(command, cwd=repository_root()) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)  # it does nothing to one that has ended


def _written(out: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return written


def test_prefixes_come_from_the_worker_and_from_stores(tmp_path: Path) -> None:
    with _started(tmp_path, "prefix") as process:
        assert process.wait(800) == (0 if redis_is_installed() else 1)
    written = _written(tmp_path)
    values = {(each["quantity"], each["contender"]): each["values"][0] for each in written["figures"]}
    for store in ("node store", "Redis") if redis_is_installed() else ("node store",):
        quantity = f"TTFT, 2000 tokens, with {store}"
        assert values[quantity, "seen before, in the worker"] < values[quantity, "new"] / 4
        assert values[quantity, "seen before, in the store"] < values[quantity, "new"] / 2
    assert (tmp_path / "prefix.png").is_file()


def test_an_interrupted_run_keeps_the_parts_before(tmp_path: Path) -> None:
    with _started(tmp_path, "start", "handoff") as process:
        deadline = time.monotonic() + 600
        while not (tmp_path / "bench.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert {each["part"] for each in _written(tmp_path)["figures"]} == {"start"}
    assert (tmp_path / "start.png").is_file()
