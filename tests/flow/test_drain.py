"""Drained workers take nothing new and lose nothing; all workers are restarted one by one under load, and nobody notices."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import Unavailable
from python_backends.core.types import Role, SamplingParams, WorkerId
from python_backends.worker.door import WorkersDoor
from python_backends.worker.drain import DrainState
from router.lifecycle import State
from router.seams import Destination
from router.types import Wish
from tests.flow.house import TIMEOUT_S, Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference

SAMPLING = SamplingParams(seed=4, max_tokens=60)
ROUTER = RouterConfig(mode="always-remote", worker_wait_s=15)


def _wait(house: FlowHouse, coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run_coroutine_threadsafe(coroutine, house.service._loop).result(TIMEOUT_S)


def _drain(house: FlowHouse, worker: str, grace_s: float) -> None:
    _wait(house, house.service.drains.drain(WorkerId(worker), grace_s))


def _begin(house: FlowHouse, count: int, sampling: SamplingParams = SAMPLING) -> list[Answer]:
    return [house.begin(prompt(50, i), sampling) for i in range(count)]


def _assert_whole(answers: list[Answer], sampling: SamplingParams = SAMPLING) -> None:
    for i, answer in enumerate(answers):
        assert answer.wait().error is None, repr(answer.error)
        assert answer.ids == reference(prompt(50, i), sampling)
        assert answer.late == 0


@pytest.mark.parametrize("worker", ["prefill_0", "decode_0"])
def test_it_finishes_what_it_has_and_takes_nothing_new(worker: str) -> None:
    config = deployment(2, 2, router=ROUTER, engine=fake_engine(prefill_us_per_token=300, step_us=5000))
    with FlowHouse(config) as house:
        answers = _begin(house, 6)
        assert eventually(lambda: any(answer.state is State.DECODING for answer in answers), 5)
        _drain(house, worker, 10.0)
        _assert_whole(answers)
        assert house.counts.retries == 0
        more = _begin(house, 6)
        _assert_whole(more)
        assert worker not in {name for answer in more for name in (answer.proof.prefill_worker, answer.proof.decode_worker)}
        house.on_loop(lambda: house.service.drains.resume(WorkerId(worker)))
        view = house.service.house.fleet.get(WorkerId(worker))
        assert view is not None
        assert eventually(lambda: view.available, 5)
        again = _begin(house, 6)
        _assert_whole(again)
        assert worker in {name for answer in again for name in (answer.proof.prefill_worker, answer.proof.decode_worker)}
        house.assert_nothing_held()


def test_it_stays_drained_though_it_would_fail_canaries() -> None:
    """It refuses them. A worker that fails so many is killed, where somebody restarts it."""
    with FlowHouse(deployment(1, 2, router=ROUTER, canary_s=0.05), processes=True, restart=True) as house:
        epoch = house.epoch("decode_0")
        _drain(house, "decode_0", 0.0)
        time.sleep(1.5)
        assert house.epoch("decode_0") == epoch
        assert house.counts.canaries.count(("decode_0", "failed")) <= 1, "one may have been on its way when it was drained"
        house.on_loop(lambda: house.service.drains.resume(WorkerId("decode_0")))
        view = house.service.house.fleet.get(WorkerId("decode_0"))
        assert view is not None
        assert eventually(lambda: view.available, 5)


def test_the_router_dies_in_the_middle_of_a_restart() -> None:
    """One worker is drained by then, the other unloaded, and nobody would end that."""
    with FlowHouse(deployment(1, 2, router=ROUTER), processes=True, restart=True) as house:
        drained, unloaded = (house.service.house.destination(WorkerId(name)) for name in ("decode_0", "decode_1"))
        assert drained is not None
        assert unloaded is not None
        house._marks |= {drained, unloaded}
        _drain(house, "decode_0", 0.0)
        house.on_loop(lambda: house.service._supervisor.left(unloaded.worker, unloaded.epoch))
        house.workers["decode_1"].unload()
        house.replace_router()

        def available() -> set[str]:
            return {view.id for view in house.service.house.fleet.available()}

        assert eventually(lambda: available() == {"prefill_0", "decode_0", "decode_1"}, TIMEOUT_S)
        assert house.epoch("decode_0") == drained.epoch
        assert house.epoch("decode_1") != unloaded.epoch
        assert eventually(lambda: not house._marks, 5), "or the next router would take them for interrupted, too"
        assert house.ask(prompt(50, 0), SAMPLING).ids == reference(prompt(50, 0), SAMPLING)


def test_a_drained_worker_is_used_again_however_late_the_next_router_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.drain._SETTLED_S", 0.02)
    with FlowHouse(deployment(1, 2, router=ROUTER), processes=True, restart=True) as house:
        drained = house.service.house.destination(WorkerId("decode_0"))
        assert drained is not None
        house._marks.add(drained)
        _drain(house, "decode_0", 0.0)
        house.replace_router()
        assert eventually(lambda: len(house.service.house.fleet.available()) == 3, TIMEOUT_S)
        assert eventually(lambda: not house._marks, 5)


def test_what_is_not_finished_in_time_goes_on_elsewhere() -> None:
    long = SamplingParams(seed=4, max_tokens=400)
    with FlowHouse(deployment(1, 2, router=ROUTER, engine=fake_engine(step_us=5000))) as house:
        answers = _begin(house, 4, long)
        assert eventually(lambda: all(len(answer.ids) > 5 for answer in answers), 5)
        streams = {worker.id: worker.requests for worker in house.service.house.fleet if worker.role is Role.DECODE}
        drained = max(streams, key=lambda worker: streams[worker])
        began = time.monotonic()
        _drain(house, drained, 0.2)
        assert time.monotonic() - began < 1.5, "the streams take more than 2 s"
        _assert_whole(answers, long)
        assert {answer.proof.decode_worker for answer in answers} == set(streams) - {drained}
        assert house.counts.retries > 0
        house.assert_nothing_held()


@pytest.mark.parametrize("worker", ["prefill_0", "decode_0"])
def test_its_own_server_drains_it(worker: str) -> None:
    """Without the router, which hears of it from the worker."""
    config = deployment(2, 2, router=ROUTER, engine=fake_engine(prefill_us_per_token=300, step_us=5000))
    with FlowHouse(config) as house, WorkersDoor({worker: house.address(worker)}) as door:
        answers = _begin(house, 6)
        assert eventually(lambda: any(answer.state is State.DECODING for answer in answers), 5)
        assert door.drain(10.0) == []
        view = house.service.house.fleet.get(WorkerId(worker))
        assert view is not None
        assert (view.requests, view.available) == (0, False)
        _assert_whole(answers)
        assert house.counts.retries == 0
        door.resume()
        assert eventually(lambda: view.available, 5)


def test_what_its_own_server_can_not_wait_for_goes_on_elsewhere() -> None:
    long = SamplingParams(seed=4, max_tokens=1000)
    with FlowHouse(deployment(1, 2, router=ROUTER, engine=fake_engine(step_us=5000))) as house:
        answers = _begin(house, 4, long)
        assert eventually(lambda: all(len(answer.ids) > 5 for answer in answers), 5)
        with WorkersDoor({"decode_0": house.address("decode_0")}) as door:
            assert door.drain(0.2) == []
        _assert_whole(answers, long)
        assert {answer.proof.decode_worker for answer in answers} == {"decode_1"}
        assert house.counts.retries > 0


def test_the_only_one_of_its_kind_is_not_waited_for() -> None:
    """Its requests wait for whoever comes: the worker itself here, told to go on."""
    long = SamplingParams(seed=4, max_tokens=100)
    with FlowHouse(deployment(1, 1, router=ROUTER, engine=fake_engine(step_us=5000))) as house:
        answers = _begin(house, 2, long)
        assert eventually(lambda: all(len(answer.ids) > 5 for answer in answers), 5)
        _drain(house, "decode_0", 15.0)
        assert "decode_0, which rests: it is drained" in house.service.house.trouble
        assert not any(answer.ended.is_set() for answer in answers)
        house.on_loop(lambda: house.service.drains.resume(WorkerId("decode_0")))
        _assert_whole(answers, long)
        assert house.service.house.trouble == ""


def test_unknown_and_unrestartable_workers_are_named() -> None:
    with FlowHouse(deployment()) as house:
        with pytest.raises(Unavailable, match="no worker nobody is up; those that are: decode_0, prefill_0"):
            _drain(house, "nobody", 1.0)
        with pytest.raises(Unavailable, match="restart"):
            _wait(house, house.service.drains.restart(WorkerId("decode_0"), 1.0))
        assert house.service.house.trouble == ""


@contextmanager
def _under_load(house: FlowHouse) -> Iterator[list[tuple[list[int], Answer]]]:
    asked: list[tuple[list[int], Answer]] = []
    ended = threading.Event()

    def send() -> None:
        number = 0
        while not ended.wait(0.03):
            ids = prompt(40 + number % 60, number)
            asked.append((ids, house.begin(ids, SAMPLING)))
            number += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield asked
    finally:
        ended.set()
        thread.join(5)


def test_all_are_restarted_one_by_one_under_load() -> None:
    engine = fake_engine(prefill_us_per_token=100, step_us=3000)
    config = deployment(2, 2, router=ROUTER, engine=engine, canary_s=0.1, canary_timeout_s=5.0)
    with FlowHouse(config, processes=True, restart=True) as house:
        before = {name: house.epoch(name) for name in house.workers}
        with _under_load(house) as asked:
            for name in before:
                _wait(house, house.service.drains.restart(WorkerId(name), 5.0))
        for ids, answer in asked:
            assert answer.wait().error is None, repr(answer.error)
            assert answer.ids == reference(ids, SAMPLING)
        assert all(house.epoch(name) != epoch for name, epoch in before.items())
        assert len(asked) > 20
        assert house.counts.retries == 0
        house.assert_nothing_held()


def test_a_restart_that_does_not_work_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlowHouse(deployment(1, 1, router=ROUTER), processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        restart = house.restart

        def once(worker: Destination, role: Role | None) -> None:
            monkeypatch.setattr(house, "restart", restart)
            raise Unavailable("the server does not load it")

        monkeypatch.setattr(house, "restart", once)
        with pytest.raises(Unavailable, match="does not load it"):
            _wait(house, house.service.drains.restart(WorkerId("decode_0"), 1.0))
        assert eventually(lambda: house.is_up("decode_0", other_than=before), TIMEOUT_S)
        assert house.ask(prompt(50, 0), SAMPLING).ids == reference(prompt(50, 0), SAMPLING)


def test_a_worker_that_is_being_restarted_is_not_restarted_by_somebody_else() -> None:
    with FlowHouse(deployment(1, 1, router=ROUTER, engine=fake_engine(step_us=5000)), processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        answer = house.begin(prompt(50, 0), SAMPLING)
        drains = house.service.drains
        first = asyncio.run_coroutine_threadsafe(drains.restart(WorkerId("decode_0"), 5.0), house.service._loop)
        assert eventually(lambda: bool(drains._reloading), 5)
        with pytest.raises(Unavailable, match="decode_0 is being restarted already; try again when it is back"):
            _wait(house, drains.restart(WorkerId("decode_0"), 5.0))
        first.result(TIMEOUT_S)
        assert answer.wait().ids == reference(prompt(50, 0), SAMPLING)
        once = house.epoch("decode_0")
        assert once != before
        _wait(house, drains.restart(WorkerId("decode_0"), 5.0))
        assert house.epoch("decode_0") != once


def _change_role(house: FlowHouse, worker: str, role: Role) -> None:
    _wait(house, house.service.drains.change_role(WorkerId(worker), role, 5.0))


def _role(house: FlowHouse, worker: str) -> Role:
    view = house.service.house.fleet.get(WorkerId(worker))
    assert view is not None
    return view.role


def test_a_worker_takes_every_role_under_load_and_keeps_it_when_it_dies() -> None:
    engine = fake_engine(prefill_us_per_token=100, step_us=3000)
    config = deployment(1, 2, router=ROUTER, engine=engine, canary_s=0.1, canary_timeout_s=5.0)
    with FlowHouse(config, processes=True, restart=True) as house:
        with _under_load(house) as asked:
            _change_role(house, "decode_1", Role.PREFILL)
            before = house.epoch("decode_1")
            house.kill("decode_1")
            assert eventually(lambda: house.is_up("decode_1", other_than=before), TIMEOUT_S)
            assert _role(house, "decode_1") is Role.PREFILL
            _wait(house, house.service.drains.restart(WorkerId("prefill_0"), 5.0))
            _change_role(house, "decode_1", Role.AGGREGATED)
            aggregated = house.ask(prompt(50, 999), SAMPLING, Wish.AGGREGATED)
            _change_role(house, "decode_1", Role.DECODE)
        for ids, answer in asked:
            assert answer.wait().error is None, repr(answer.error)
            assert answer.ids == reference(ids, SAMPLING)
        assert aggregated.ids == reference(prompt(50, 999), SAMPLING)
        assert aggregated.proof.decode_worker == "decode_1"
        assert "decode_1" in {answer.proof.prefill_worker for _, answer in asked}
        assert _role(house, "decode_1") is Role.DECODE
        house.assert_nothing_held()


def test_role_changes_that_are_refused_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlowHouse(deployment(1, 1, router=ROUTER), processes=True, restart=True) as house:
        before = house.epoch("decode_0")
        with pytest.raises(Unavailable, match="no worker nobody is up; those that are: decode_0, prefill_0"):
            _change_role(house, "nobody", Role.DECODE)
        with pytest.raises(Unavailable, match="decode_0 is decode already; name another"):
            _change_role(house, "decode_0", Role.DECODE)
        with pytest.raises(Unavailable, match=r"can't become prefill: no other .* make another one decode or aggregated first"):
            _change_role(house, "decode_0", Role.PREFILL)
        assert house.epoch("decode_0") == before
        restart = house.restart

        def once(worker: Destination, role: Role | None) -> None:
            monkeypatch.setattr(house, "restart", restart)
            raise Unavailable("gpus '0' are 1, but 2 are needed")

        monkeypatch.setattr(house, "restart", once)
        with pytest.raises(Unavailable, match="decode_0 did not become aggregated: gpus '0' are 1"):
            _change_role(house, "decode_0", Role.AGGREGATED)
        assert eventually(lambda: house.is_up("decode_0", other_than=before), TIMEOUT_S)
        assert _role(house, "decode_0") is Role.DECODE
        assert house.ask(prompt(50, 0), SAMPLING).ids == reference(prompt(50, 0), SAMPLING)


def test_the_state_of_a_drain() -> None:
    now = 0.0
    state = DrainState(now=lambda: now)

    def look() -> tuple[bool, bool, bool]:
        return state.draining, state.over, state.is_time_to_leave()

    assert look() == (False, False, False)
    state.begin(2.0)
    assert look() == (True, False, False)
    now = 2.0
    assert look() == (True, True, True)
    assert look() == (True, True, False)
    state.end()
    assert look() == (False, False, False)
    state.begin(0.0)
    assert look() == (True, True, True)
