"""Workers that answer and don't work: they are out within seconds, their requests go on elsewhere, and they are in again."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.messages import Work
from python_backends.core.types import Role, SamplingParams, WorkerId
from python_backends.worker.door import WorkersDoor
from router.fleet import Fleet
from router.health import Breaker, Circuit, _pair
from router.lifecycle import State
from router.seams import Destination, Failed
from tests.flow.house import Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference
from tests.unit.router.fleet_views import put

SAMPLING = SamplingParams(seed=3, max_tokens=40)
ROUTER = RouterConfig(mode="always-remote", worker_wait_s=8)


def _deployment(prefill: int = 2, decode: int = 2) -> Any:
    return deployment(prefill, decode, router=ROUTER, engine=fake_engine(step_us=3000), canary_s=0.1)


@contextmanager
def _wedged(house: FlowHouse, name: str) -> Iterator[None]:
    """The engine's thread is stuck in a step, as in a driver that does not return; heartbeats go on."""
    go_on = threading.Event()
    runner = house.workers[name].worker._engine._runner
    step = runner.step

    def stuck(batch: Any) -> Any:
        go_on.wait(30)
        return step(batch)

    runner.step = stuck
    try:
        yield
    finally:
        runner.step = step
        go_on.set()


def _available(house: FlowHouse, name: str) -> Callable[[], bool]:
    def look() -> bool:
        view = house.service.house.fleet.get(WorkerId(name))
        return view is not None and view.available

    return look


def _asked(house: FlowHouse, count: int) -> list[Answer]:
    return [house.begin(prompt(60, i), SAMPLING) for i in range(count)]


def _assert_whole(answers: list[Answer]) -> None:
    for i, answer in enumerate(answers):
        assert answer.wait().error is None, repr(answer.error)
        assert answer.ids == reference(prompt(60, i), SAMPLING)


@pytest.mark.parametrize("name", ["prefill_0", "decode_0"])
def test_a_wedged_worker_is_out_and_in_again(name: str) -> None:
    with FlowHouse(_deployment()) as house:
        state = State.PREFILLING if name == "prefill_0" else State.DECODING
        answers = _asked(house, 6)
        assert eventually(lambda: any(answer.state is state for answer in answers), 5)
        with _wedged(house, name):
            answers += [house.begin(prompt(60, i), SAMPLING) for i in range(6, 10)]
            assert eventually(lambda: not _available(house, name)(), 5)
            _assert_whole(answers)
            assert house.is_up(name), "its heartbeats go on"
            assert (name, "failed") in house.counts.canaries
        assert eventually(_available(house, name), 5)
        assert house.ask(prompt(60, 0), SAMPLING).ids == answers[0].ids
        assert eventually(lambda: not house.held(0.0), 3), house.held(0.0)


def test_a_wedged_worker_says_so_to_its_own_server() -> None:
    """That its engine stands still it knows itself; that it is given no work, from its router."""
    with FlowHouse(_deployment()) as house, WorkersDoor({"decode_0": house.address("decode_0")}) as door:

        def seen() -> tuple[int, bool, bool]:
            condition = door.look()["decode_0"]
            return condition.standing_s, condition.used, condition.idle

        assert eventually(lambda: seen() == (0, True, True), 5)
        with _wedged(house, "decode_0"):
            assert eventually(lambda: seen()[0] > 1 and not seen()[1], 10)
            assert door.look()["decode_0"].fault == ""
        assert eventually(lambda: seen() == (0, True, True), 5)


def test_a_new_lifes_canary_that_is_lost_is_followed_by_another_one() -> None:
    config = deployment(1, 2, router=ROUTER, engine=fake_engine(step_us=3000), canary_s=0.1, canary_timeout_s=0.3)
    with FlowHouse(config, processes=True, restart=True) as house:
        before, submit, lost = house.epoch("decode_0"), house.service._submit, list[Work]()

        def lossy(worker: Destination, work: Work, failed: Failed) -> None:
            if worker.worker == "decode_0" and worker.epoch != before and not lost:
                lost.append(work)
            else:
                submit(worker, work, failed)

        house.service._submit = lossy
        house.kill("decode_0")
        assert eventually(lambda: house.is_up("decode_0", other_than=before), 15)
        after = house.epoch("decode_0")
        assert eventually(_available(house, "decode_0"), 2.5)
        assert (len(lost), house.epoch("decode_0")) == (1, after)


def test_readiness_follows() -> None:
    with FlowHouse(_deployment(1, 1)) as house:
        assert house.service.house.trouble == ""
        with _wedged(house, "decode_0"):
            assert eventually(lambda: house.service.house.trouble, 5)
            assert "decode_0, which rests: it fails canaries" in house.service.house.trouble
            waiting = house.begin(prompt(60, 0), SAMPLING)
        assert eventually(lambda: not house.service.house.trouble, 5)
        _assert_whole([waiting])


def test_under_load_nobody_is_out() -> None:
    """A canary that comes late behind a long prompt is no sign of anything while tokens come out."""
    config = deployment(
        1, 1, router=ROUTER, engine=fake_engine(prefill_us_per_token=500, step_us=20_000, kv_pool_mib=32), canary_s=0.1
    )
    with FlowHouse(config) as house:
        answers = [house.begin(prompt(60, i), SAMPLING) for i in range(12)]
        _assert_whole(answers)
        assert house.counts.retries == 0
        assert "failed" not in {verdict for _, verdict in house.counts.canaries}


def test_steps_that_take_longer_than_a_canary_may_are_learned() -> None:
    """At first the worker is taken for wedged; its late answers say otherwise."""
    config = deployment(0, 1, router=ROUTER, engine=fake_engine(prefill_us_per_token=7000), canary_s=0.05)
    with FlowHouse(config) as house:
        for i in range(3):
            answer = house.begin(prompt(256, 10 + i), SAMPLING)  # 1.8 s a step, 0.5 s for a canary
            assert answer.wait().ids == reference(prompt(256, 10 + i), SAMPLING)
            assert eventually(_available(house, "decode_0"), 5)
        assert answer.proof.attempts == 1


def test_canaries_end_at_the_worker_as_well() -> None:
    """By the clock of the process, as of all requests: a router that forgets one leaves nothing behind."""
    with FlowHouse(_deployment(1, 1)) as house:
        left: list[float] = []
        submit = house._submit

        def seen(worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
            left.append(work.request.deadline - time.monotonic())
            submit(worker, work, failed)

        house.service._submit = seen
        assert eventually(lambda: len(left) >= 4, 5)
        assert all(0 < seconds < 120 for seconds in left), left


def test_pairs_are_tried_and_told() -> None:
    with FlowHouse(_deployment(2, 2)) as house:
        pairs = {(p, d) for p in ("prefill_0", "prefill_1") for d in ("decode_0", "decode_1")}
        assert eventually(lambda: {(p, d) for p, d, _ in house.counts.pairs} == pairs, 5)
        assert {verdict for _, _, verdict in house.counts.pairs} == {"verified"}
        cached = sum(view.heartbeat.load.cached_blocks for view in house.service.house.fleet)
        assert cached == 0, "canaries leave nothing in prefix caches"


def test_each_pair_that_exchanges_kv_has_its_turn() -> None:
    fleet = Fleet()
    assert _pair(fleet, 1) == (None, 0)
    for prefill, fingerprint in (("p0", "a"), ("p1", "b"), ("p2", "a"), ("p3", "of nobody else")):
        put(fleet, prefill, Role.PREFILL, fingerprint=fingerprint)
    for decode, fingerprint in (("d0", "a"), ("d1", "a"), ("d2", "b")):
        put(fleet, decode, Role.DECODE, fingerprint=fingerprint)
    tried = [pair for turn in range(8) if (pair := _pair(fleet, turn)[0]) is not None]
    assert len(tried) == 8
    assert {(prefill.id, decode.id) for prefill, decode in tried} == {
        ("p0", "d0"),
        ("p0", "d1"),
        ("p1", "d2"),
        ("p2", "d0"),
        ("p2", "d1"),
    }


def test_kv_that_does_not_move_is_told_and_takes_nobody_out() -> None:
    config = deployment(1, 1, router=ROUTER, faults={"corrupt": 1.0}, canary_s=0.05)
    with FlowHouse(config) as house:
        assert eventually(lambda: len(house.counts.pairs) >= 3, 5)
        assert {verdict for _, _, verdict in house.counts.pairs} == {"digest_mismatch"}
        assert _available(house, "decode_0")()
        _assert_whole(_asked(house, 2))


def test_the_next_life_is_used_after_a_canary() -> None:
    with FlowHouse(_deployment(), processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        house.kill("decode_0")
        assert eventually(lambda: house.is_up("decode_0", other_than=before), 15)
        assert eventually(_available(house, "decode_0"), 5)
        _assert_whole(_asked(house, 6))


def test_one_that_stays_wedged_is_replaced() -> None:
    """With somebody to restart it. Here the process is stopped only so long that its silence is not noticed."""
    config = deployment(1, 2, router=ROUTER, engine=fake_engine(step_us=3000), canary_s=0.1, silent_s=30.0)
    with FlowHouse(config, processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        answers = _asked(house, 6)
        assert eventually(lambda: any(answer.state is State.DECODING for answer in answers), 5)
        house.signal("decode_0", signal.SIGSTOP)
        _assert_whole(answers)
        assert eventually(lambda: house.is_up("decode_0", other_than=before), 15)
        assert eventually(_available(house, "decode_0"), 5)


def test_the_circuit() -> None:
    breaker = Breaker()
    assert not breaker.failed()
    assert not breaker.passed(), "it was never open"
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, True, False]
    seen = []
    while not breaker.hopeless:
        breaker.probe()
        seen.append(breaker.circuit)
        assert not breaker.failed()
        seen.append(breaker.circuit)
    assert seen == [Circuit.HALF_OPEN, Circuit.OPEN] * 7
    breaker.probe()
    assert breaker.passed()
    assert (breaker.circuit, breaker.failures, breaker.hopeless) == (Circuit.CLOSED, 0, False)


def test_idle_workers_get_fewer_canaries() -> None:
    with FlowHouse(_deployment()) as house:
        counts, watched_s = house.counts, 2.0
        assert eventually(lambda: bool(counts.canaries and counts.pairs), 10)
        before, pairs = len(counts.canaries), len(counts.pairs)
        time.sleep(watched_s)
        # At most: a slow machine makes them later only. One to each worker may have been under way.
        assert len(counts.canaries) - before <= len(house.workers) * (watched_s / 0.15 + 1)
        each = Counter(pair[:2] for pair in counts.pairs[pairs:])
        assert max(each.values(), default=0) <= watched_s / 0.8 + 1


def test_a_worker_that_rests_is_not_given_what_was_meant_for_it_before() -> None:
    """It is put to rest while another one computes the prompt: its canaries would not be the only ones to get no answer."""
    with FlowHouse(_deployment()) as house:
        answers = _asked(house, 6)
        assert eventually(lambda: any(answer.state is State.PREFILLING for answer in answers), 5)
        house.on_loop(lambda: house.service.house.rest(WorkerId("decode_0"), "the test says so"))
        _assert_whole(answers)
        house.on_loop(lambda: house.service.house.fleet.resume(WorkerId("decode_0")))
        assert eventually(lambda: not house.held(0.0), 3), house.held(0.0)


def test_one_that_stood_still_when_it_was_handed_work_is_replaced() -> None:
    """Before anybody takes its silence for death: should it go on, it would spoil what Triton shares with it."""
    config = deployment(1, 2, router=ROUTER, engine=fake_engine(step_us=3000), silent_s=30.0)
    with FlowHouse(config, processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        submit = house._submit

        def not_answered(worker: Destination, work: Work, failed: Failed) -> None:
            if worker.epoch == before:
                failed("Stub process 'decode_0_0_0' is not healthy.", wrecked=True)
            else:
                submit(worker, work, failed)

        house.service._submit = not_answered
        _assert_whole(_asked(house, 6))
        assert eventually(lambda: house.is_up("decode_0", other_than=before), 15)


def test_workers_that_stood_still_before_a_request_came_have_not_died_of_it() -> None:
    """All that decode stand still at once, more of them than a request may kill."""
    config = deployment(1, 5, router=ROUTER, engine=fake_engine(step_us=3000), silent_s=30.0)
    with FlowHouse(config, processes=True, restart=True) as house:
        stopped = {house.epoch(f"decode_{i}") for i in range(5)}
        submit = house._submit

        def not_answered(worker: Destination, work: Work, failed: Failed) -> None:
            if worker.epoch in stopped:
                failed("Stub process 'decode_0_0_0' is not healthy.", wrecked=True)
            else:
                submit(worker, work, failed)

        house.service._submit = not_answered
        _assert_whole(_asked(house, 3))
