from __future__ import annotations

import pytest

from python_backends.core.messages import PrefillDone, StepSample
from python_backends.core.types import KVReport, RequestId, WorkerId
from router.clock import Clock
from router.fleet import Fleet, WorkerView
from router.lessons import Lessons
from tests.unit.router.fleet_views import heartbeat

D = WorkerId("decode")
CONSTANT_MS, TOKEN_MS, STREAM_MS = 6.0, 0.03, 0.2  # of a worker that does not tell


class HandClock(Clock):
    """Shows what it is set to."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    fleet.hear(heartbeat(step_tokens=8192, max_batch=64), 0.0)
    return fleet


def _view(fleet: Fleet) -> WorkerView:
    (view,) = fleet.up()
    return view


def done(computed: int, ms: float) -> PrefillDone:
    return PrefillDone(RequestId("r"), 1, None, None, b"", "lease", 0, computed, ms)


def prefill(fleet: Fleet, clock: HandClock, tokens: int, hop_ms: float = 0.0) -> None:
    """A prompt on the worker, which takes as long as its rates say for all prompts that are there."""
    lessons = Lessons(fleet, clock)
    charge = fleet.charge(D, tokens, tokens, tokens)
    lessons.submitted(D, tokens)
    ms = CONSTANT_MS + TOKEN_MS * _view(fleet).prefill_tokens
    clock.seconds += (ms + hop_ms) / 1e3
    lessons.prefilled(D, done(tokens, ms))
    charge.undo()


def test_rates_of_a_worker_that_tells_no_steps_are_learned_from_its_requests(fleet: Fleet, clock: HandClock) -> None:
    busy = fleet.charge(D, 3000, 3000, 3000)  # also from requests that were not alone
    for i in range(200):
        prefill(fleet, clock, 100 + 37 * (i % 50))
    busy.undo()
    for i in range(200):
        streams = [fleet.charge(D, 0, 500) for _ in range(1 + i % 16)]
        Lessons(fleet, clock).gap(D, 8, 1, (CONSTANT_MS + STREAM_MS * len(streams)) / 1e3)
        for stream in streams:
            stream.undo()
    model = _view(fleet).model
    assert model.step_ms(2000, 2000 * 1000, 0, 0) == pytest.approx(CONSTANT_MS + TOKEN_MS * 2000, rel=0.1)
    assert model.step_ms(0, 0, 8, 4000) == pytest.approx(CONSTANT_MS + STREAM_MS * 8, rel=0.1)


def test_a_worker_that_tells_its_steps_is_believed_more_than_its_requests(fleet: Fleet, clock: HandClock) -> None:
    fleet.stepped(D, [StepSample(0, 0.0, 1, 10, ms=5.0)])
    samples = _view(fleet).model.samples
    prefill(fleet, clock, 1000)
    Lessons(fleet, clock).gap(D, 8, 1, 0.05)
    assert _view(fleet).model.samples == samples


def test_the_hop_is_what_computing_does_not_explain(fleet: Fleet, clock: HandClock) -> None:
    for _ in range(100):
        prefill(fleet, clock, 64, hop_ms=4.0)
    assert _view(fleet).hop_ms == pytest.approx(4.0, rel=0.01)
    beside = fleet.charge(D, 0, 10)
    prefill(fleet, clock, 64, hop_ms=400.0)  # others were there: it may have waited for them
    beside.undo()
    assert _view(fleet).hop_ms == pytest.approx(4.0, rel=0.01)


def test_links_are_learned_from_handoffs(fleet: Fleet, clock: HandClock) -> None:
    for _ in range(100):
        lessons = Lessons(fleet, clock)
        lessons.submitted(D, 0)
        clock.seconds += 0.013
        lessons.kv_ready(D, KVReport(received_tokens=100, received_bytes=10_000_000, transfer_ms=10.0))
    link = _view(fleet).link
    assert link.bytes_per_ms == pytest.approx(1e6, rel=0.01)
    assert link.overhead_ms == pytest.approx(3.0, rel=0.01)


def test_lessons_about_a_worker_that_has_left_are_lost() -> None:
    lessons = Lessons(Fleet(), Clock())
    lessons.submitted(D, 10)
    lessons.prefilled(D, done(10, 1.0))
    lessons.first_token(D, 0, 10)
    lessons.kv_ready(D, KVReport())
    lessons.gap(D, 8, 1, 0.1)
