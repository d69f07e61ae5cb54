from __future__ import annotations

import pytest

from python_backends.engines.trtllm.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(stall_s=10, prompt_stall_s=60, clock=clock)


@pytest.mark.parametrize(("streams", "prompts", "limit"), [(1, 0, 10), (1, 5, 10), (0, 1, 60)])
def test_silence_with_requests_running(watchdog: Watchdog, clock: Clock, streams: int, prompts: int, limit: int) -> None:
    watchdog.running(streams, prompts)
    clock.now += limit
    assert watchdog.fault() == ""
    clock.now += 0.1
    assert f"nothing for {limit} s with {streams + prompts} requests" in watchdog.fault()
    watchdog.heard()
    assert watchdog.fault() == ""


def test_silence_without_requests_is_peace(watchdog: Watchdog, clock: Clock) -> None:
    clock.now += 1e6
    assert watchdog.fault() == ""
    watchdog.running(0, 1)
    assert watchdog.fault() == "", "it counts from the first request on"


def test_a_loop_that_does_not_turn(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.posted()
    clock.now += 6
    watchdog.posted()  # the oldest counts
    clock.now += 5
    assert "event loop has stood still for 11 s" in watchdog.fault()
    watchdog.turned()
    assert watchdog.fault() == ""


def test_the_first_failure_for_good_is_the_one_that_is_told(watchdog: Watchdog) -> None:
    watchdog.broken("CUDA error")
    watchdog.broken("its consequence")
    watchdog.heard()
    assert watchdog.fault() == "CUDA error"


def test_handoffs_in_a_row_that_fail(watchdog: Watchdog, clock: Clock) -> None:
    for _ in range(4):
        assert watchdog.fault() == ""
        clock.now += 1
        began = clock.now
        clock.now += 5
        watchdog.handoff_failed(began)
    assert "4 handoffs in a row" in watchdog.fault()


def test_a_success_in_between_starts_the_count_again(watchdog: Watchdog, clock: Clock) -> None:
    for _ in range(10):
        watchdog.handoff_failed(clock.now)
        clock.now += 5
        watchdog.handoff_failed(clock.now)
        watchdog.handoff_arrived()
    assert watchdog.fault() == ""


def test_handoffs_begun_before_the_first_failure_do_not_count(watchdog: Watchdog, clock: Clock) -> None:
    began = clock.now
    for _ in range(50):
        clock.now += 0.1
        watchdog.handoff_failed(began)
    assert watchdog.fault() == ""


def test_requests_in_a_row_that_are_not_taken(watchdog: Watchdog) -> None:
    for _ in range(2):
        watchdog.rejected("RuntimeError: it is gone")
        watchdog.rejected("RuntimeError: it is gone")
        assert watchdog.fault() == ""
        watchdog.heard()
    for _ in range(3):
        watchdog.rejected("RuntimeError: it is gone")
    assert watchdog.fault() == "TensorRT-LLM takes no requests: RuntimeError: it is gone"
