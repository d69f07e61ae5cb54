from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from python_backends.core.types import Epoch, WorkerId
from router.fleet import Fleet
from tests.unit.router.fleet_views import heartbeat

D = WorkerId("decode")


def test_a_worker_is_up_from_its_first_heartbeat() -> None:
    fleet = Fleet()
    assert fleet.get(D) is None
    assert fleet.hear(heartbeat(), now=1.0)
    assert not fleet.hear(heartbeat(sequence=7), now=2.0)
    (worker,) = fleet.up()
    assert (worker.id, worker.epoch, worker.heard, worker.heartbeat.events_sequence) == (D, 1, 2.0, 7)


def test_a_lost_worker_is_known_but_not_up() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    assert fleet.lose(D)
    assert not fleet.lose(D)
    assert not fleet.lose(WorkerId("nobody"))
    assert fleet.up() == []
    assert [worker.up for worker in fleet] == [False]


def test_messages_count_only_in_the_present_life() -> None:
    fleet = Fleet()
    assert not fleet.is_current(D, Epoch(1))
    fleet.hear(heartbeat(epoch=1), now=1.0)
    assert fleet.is_current(D, Epoch(1))
    assert not fleet.is_current(D, Epoch(2))
    fleet.lose(D)
    assert not fleet.is_current(D, Epoch(1))
    fleet.hear(heartbeat(epoch=2), now=2.0)
    assert fleet.is_current(D, Epoch(2))
    assert not fleet.is_current(D, Epoch(1))


def test_a_life_that_is_over_is_known_as_such() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(epoch=1), now=1.0)
    assert not fleet.is_over(Epoch(1))
    fleet.hear(heartbeat(epoch=2), now=2.0)
    assert fleet.is_over(Epoch(1))
    fleet.bury(Epoch(2))
    assert fleet.is_over(Epoch(2))


def test_a_silent_worker_that_speaks_again_is_up_again_and_owes_nothing() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    fleet.charge(D, 10)
    fleet.lose(D)
    assert fleet.hear(heartbeat(), now=9.0)
    assert [(worker.requests, worker.prefill_tokens) for worker in fleet.up()] == [(0, 0)]


def test_silence_is_told_by_the_time_of_the_last_heartbeat() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat("old"), now=1.0)
    fleet.hear(heartbeat("new"), now=5.0)
    assert [worker.id for worker in fleet.silent(since=3.0)] == ["old"]
    fleet.lose(WorkerId("old"))
    assert fleet.silent(since=3.0) == []


def test_charges_count_and_are_undone_once() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    first, second = fleet.charge(D, 10), fleet.charge(D, 5)
    assert (worker.requests, worker.prefill_tokens) == (2, 15)
    for _ in range(2):
        first.prefilled()
    assert (worker.requests, worker.prefill_tokens) == (2, 5)
    for _ in range(2):
        first.undo()
        second.undo()
    assert (worker.requests, worker.prefill_tokens) == (0, 0)


def test_a_charge_to_an_earlier_life_is_void() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(epoch=1), now=1.0)
    old = fleet.charge(D, 10)
    fleet.hear(heartbeat(epoch=2), now=2.0)
    new = fleet.charge(D, 3)
    old.undo()
    (worker,) = fleet.up()
    assert (worker.requests, worker.prefill_tokens) == (1, 3)
    new.undo()
    fleet.charge(WorkerId("nobody"), 3).undo()


def test_who_waits_is_woken_by_every_change() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        changes: list[Callable[[], object]] = [
            lambda: fleet.hear(heartbeat(), 1.0),
            lambda: fleet.lose(D),
            lambda: fleet.hear(heartbeat(epoch=2), 1.0),
        ]
        for change in changes:
            waiting = [asyncio.create_task(fleet.wait_for_change(60)) for _ in range(3)]
            await asyncio.sleep(0)
            change()
            await asyncio.wait_for(asyncio.gather(*waiting), 1)

    asyncio.run(scenario())


def test_waiting_ends_with_the_time() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        began = time.monotonic()
        await fleet.wait_for_change(0.02)
        await fleet.wait_for_change(-1)
        assert 0.015 < time.monotonic() - began < 1

    asyncio.run(scenario())


def test_a_change_does_not_swallow_a_cancellation() -> None:
    """Both in one turn of the loop: the request was cancelled, whoever came up."""

    async def scenario() -> None:
        fleet = Fleet()
        waiting = asyncio.create_task(fleet.wait_for_change(60))
        await asyncio.sleep(0.01)
        fleet.hear(heartbeat(), 1.0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()

    asyncio.run(scenario())
