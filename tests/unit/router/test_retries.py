"""Budgets of attempts and of workers, and who goes on alone."""

from __future__ import annotations

import asyncio

import pytest

from python_backends.core.errors import EngineFailure, WorkerLost
from router.retries import Poisoned, Quarantine, RetryBudget

LOST = WorkerLost("worker decode died")


def _budget(max_attempts: int = 4, max_deaths: int = 3) -> RetryBudget:
    return RetryBudget(Quarantine(max_attempts, max_deaths))


def test_attempts_are_counted_in_a_row() -> None:
    budget = _budget(max_attempts=3)
    for tokens in (0, 1):  # one token comes from every prefill: no progress
        budget.failed(LOST, tokens, died=False)
    budget.progress(20)
    for tokens in (20, 21):
        budget.failed(LOST, tokens, died=False)
    with pytest.raises(WorkerLost):
        budget.failed(LOST, 22, died=False)


def test_dead_workers_are_counted_apart() -> None:
    budget = _budget()
    budget.failed(LOST, 0, died=True)
    budget.failed(LOST, 1, died=True)
    budget.failed(LOST, 2, died=False)
    with pytest.raises(Poisoned, match=r"3 workers died in a row .*max_worker_deaths"):
        budget.failed(LOST, 3, died=True)


def test_who_may_cost_no_further_worker_goes_on_alone() -> None:
    async def play() -> None:
        quarantine = Quarantine(4, 3)
        first, second, fresh = (RetryBudget(quarantine) for _ in range(3))
        for suspect in (first, second):
            await suspect.turn()
            suspect.failed(LOST, 0, died=True)
            await suspect.turn()
            suspect.failed(LOST, 1, died=True)
        await asyncio.wait_for(first.turn(), 1)
        await asyncio.wait_for(first.turn(), 1)  # it has it
        waiting = asyncio.create_task(second.turn())
        await asyncio.wait_for(fresh.turn(), 1)
        assert not waiting.done()
        first.progress(2)
        await asyncio.sleep(0)
        assert not waiting.done()
        first.progress(9)
        await asyncio.wait_for(waiting, 1)
        second.leave()
        second.leave()
        assert quarantine._alone._value == 1

    asyncio.run(play())


def test_one_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    async def play() -> None:
        quarantine = Quarantine(4, 2)
        first, second = RetryBudget(quarantine), RetryBudget(quarantine)
        first.failed(LOST, 0, died=True)
        second.failed(LOST, 0, died=True)
        await first.turn()
        waiting = asyncio.create_task(second.turn())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        second.leave()
        first.leave()
        assert quarantine._alone._value == 1

    asyncio.run(play())


def test_a_prompt_that_killed_is_refused_for_a_while() -> None:
    now = 0.0
    quarantine = Quarantine(4, 3, now=lambda: now)
    quarantine.remember([1, 2], "tenant")
    with pytest.raises(EngineFailure, match="3 workers"):
        quarantine.check([1, 2], "tenant")
    quarantine.check([1, 2], "another")
    quarantine.check([1, 2, 3], "tenant")
    now = 301.0
    quarantine.check([1, 2], "tenant")


def test_little_is_remembered() -> None:
    quarantine = Quarantine(4, 3)
    for number in range(1500):
        quarantine.remember([number], "")
    assert len(quarantine._killers) == 1000
    quarantine.check([0], "")
    with pytest.raises(EngineFailure):
        quarantine.check([1499], "")
