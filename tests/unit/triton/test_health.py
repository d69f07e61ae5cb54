"""What the probes of a server without a router are told of a worker, seen after seen."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from python_backends.core.config import HealthConfig
from python_backends.core.messages import Condition
from python_backends.core.types import Epoch
from python_backends.triton.health import WorkerWatch

LOAD_S = 600.0


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """Its process."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch() -> Iterator[WorkerWatch]:
    made = WorkerWatch("decode", HealthConfig(canary_timeout_s=3.0), LOAD_S, now=0.0)
    yield made
    made.close()


def condition(
    pid: int = 0, *, draining: bool = False, idle: bool = True, used: bool = True, standing_s: int = 0, fault: str = ""
) -> Condition:
    return Condition(Epoch(pid), pid or os.getpid(), draining, idle, used, standing_s, fault)


@pytest.mark.parametrize(
    ("seen", "trouble", "wedged"),
    [
        (condition(), "", ""),
        (condition(idle=False, standing_s=5), "", ""),  # a long step
        (condition(idle=False, standing_s=20), "has stood still for 20 s", ""),
        (condition(idle=False, standing_s=90), "has stood still for 90 s", "has stood still for 90 s"),
        (condition(draining=True, idle=False), "is drained", ""),
        (condition(used=False), "no router gives work to worker decode", ""),
        (condition(fault="out of luck"), "can't go on: out of luck", "can't go on: out of luck"),
        (None, "does not answer", ""),  # it is being loaded for the first time
    ],
)
def test_what_is_said_of_a_worker(seen: Condition | None, trouble: str, wedged: str, watch: WorkerWatch) -> None:
    watch.saw(seen, 0.0)
    assert trouble in watch.trouble()
    assert bool(trouble) is bool(watch.trouble())
    assert wedged in watch.wedged(0.0)
    assert bool(wedged) is bool(watch.wedged(0.0))


def test_a_stopped_process_is_wedged_after_a_minute(worker: subprocess.Popen[bytes], watch: WorkerWatch) -> None:
    watch.saw(condition(worker.pid), 1000.0)
    worker.send_signal(signal.SIGSTOP)
    watch.saw(None, 1005.0)
    watch.saw(None, 1060.0)
    assert "does not answer" in watch.trouble()
    assert watch.wedged(1060.0) == ""
    watch.saw(None, 1066.0)
    assert "has not answered for 61 s" in watch.wedged(1066.0)
    watch.saw(condition(worker.pid), 1067.0)
    assert watch.wedged(1067.0) == watch.trouble() == ""
    watch.saw(None, 1068.0)
    assert watch.wedged(1120.0) == ""


def test_one_that_was_never_up_is_given_the_time_of_a_load(watch: WorkerWatch) -> None:
    """As of this process: it may have been started anew while the worker stood still."""
    watch.saw(None, 1.0)
    assert watch.wedged(LOAD_S) == ""
    assert "has not answered" in watch.wedged(LOAD_S + 400)


def test_one_that_has_ended_is_given_the_time_of_a_load(worker: subprocess.Popen[bytes], watch: WorkerWatch) -> None:
    watch.saw(condition(worker.pid), 0.0)
    worker.kill()
    worker.wait()
    watch.saw(None, 1.0)
    assert watch.wedged(LOAD_S) == ""
    assert "has not answered" in watch.wedged(LOAD_S + 400)
    watch.saw(condition(), LOAD_S + 401)
    assert watch.wedged(LOAD_S + 401) == ""


def test_where_steps_may_be_long_patience_is_too() -> None:
    watch = WorkerWatch("decode", HealthConfig(canary_timeout_s=30.0), LOAD_S, now=0.0)
    watch.saw(condition(idle=False, standing_s=59), 0.0)
    assert watch.trouble() == ""
    watch.saw(condition(idle=False, standing_s=299), 0.0)
    assert watch.trouble()
    assert watch.wedged(0.0) == ""
    watch.close()
