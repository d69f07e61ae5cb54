"""Whether workers that say they live also work: a canary on a timer for each of them, and a circuit breaker that follows it.

closed      it is given work. Two failures in a row open the circuit: canaries that failed, or times in which one was waited
            for in vain, and in which the worker did nothing else either.
open        it is given no work, and what it had goes on elsewhere.
half-open   one canary is under way to it. If that passes, the circuit is closed again; if not, it stays open.

A drained worker gets no canaries, which it would refuse. One whose circuit stays open is taken out, hence killed and
restarted where somebody does that. The next life of a worker begins half-open. An answer that comes late after all shows how
slow a step may be here, and gives the next ones more time.

Handoffs are tried too, pair by pair; one that fails opens nothing, since it costs a recompute and no request.

A canary computes, so those of idle workers are further apart: they would be nearly all that an idle server uses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum

from python_backends.core.config import Deployment
from python_backends.core.place import place_of
from python_backends.core.types import Epoch, Role, WorkerId
from router.canary import MOVED, Canary
from router.fleet import Fleet, WorkerView
from router.house import House

log = logging.getLogger(__name__)

_SALT = "baton canary"
_OPENS_AFTER = 2  # failures in a row
_GIVES_UP_AFTER = 10
_PAUSE_S = 0.2  # before a canary that failed at once is repeated
_ANSWER_S = 60.0  # no answer is waited for longer than that ...
_WAITS = 3  # ... and at first only for so many times the patience: it may have been lost. Each in vain doubles it
_HELD_UP_S = 1.0  # waiting that took so much longer says more about this router than about the worker
_REMEMBERED_S = 60.0  # half of the patience that a slow answer has taught is forgotten after so long
_START_S = 300.0
_LOOK_EVERY_S = 60.0
_IDLE = 1.5  # so many times as far apart while a worker has no requests: a wedged one is still out within ten seconds
_IDLE_PAIRS = 8.0  # ... and those of one pair while nobody has any; few enough that a broken link raises its alert
_SLOW_S = 60.0  # of workers whose first handoff, say, may take long


class Verdict(str, Enum):
    PASSED = "passed"
    FAILED = "failed"
    BUSY = "busy"  # no answer in time, but the worker has worked meanwhile: nothing is known


class Circuit(str, Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """One worker's circuit, in one life of it."""

    def __init__(self, circuit: Circuit = Circuit.CLOSED) -> None:
        self.circuit = circuit
        self.failures = 0  # in a row

    @property
    def hopeless(self) -> bool:
        return self.circuit is Circuit.OPEN and self.failures >= _GIVES_UP_AFTER

    def passed(self) -> bool:
        """Returns whether the circuit is closed only since now."""
        was, self.circuit, self.failures = self.circuit, Circuit.CLOSED, 0
        return was is not Circuit.CLOSED

    def failed(self) -> bool:
        """Returns whether the circuit is open only since now."""
        self.failures += 1
        was = self.circuit
        if was is Circuit.HALF_OPEN or self.failures >= _OPENS_AFTER:
            self.circuit = Circuit.OPEN
        return was is Circuit.CLOSED and self.circuit is Circuit.OPEN

    def probe(self) -> None:
        """A canary is sent."""
        if self.circuit is Circuit.OPEN:
            self.circuit = Circuit.HALF_OPEN


class Health:
    """Belongs to the router's event loop. `take_out`: ends a worker that can't be helped, and says why."""

    def __init__(self, house: House, deployment: Deployment, take_out: Callable[[WorkerId, str], None]) -> None:
        self._house = house
        self._canary = Canary(house, _SALT)
        self._config = deployment.health
        self._handoff_s = deployment.health.canary_timeout_s + deployment.transfer.timeout_s
        self._take_out = take_out
        self._own = {place_of(deployment, worker).worker for worker in deployment.workers}
        self._tasks: dict[Epoch, asyncio.Task[None]] = {}
        house.fleet.on_probation = self._config.canary_s > 0

    async def watch(self) -> None:
        """Look after every worker that is up, until cancelled. Returns at once when there are to be no canaries."""
        if not self._config.canary_s:
            return
        await self._until_started()
        pairs = asyncio.create_task(self._try_pairs())
        try:
            while True:
                for view in self._house.fleet.up():
                    task = self._tasks.get(view.epoch)
                    if task is None or task.done():
                        self._tasks[view.epoch] = asyncio.create_task(self._look_after(view.id, view.epoch))
                self._tasks = {epoch: task for epoch, task in self._tasks.items() if not task.done()}
                await self._house.fleet.wait_for_change(_LOOK_EVERY_S)
        finally:
            tasks = [pairs, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_started(self) -> None:
        """Triton 24.10 aborts at times when models are called while others are still loading for the first time."""
        end = self._house.clock.now() + _START_S
        while not self._own <= {view.id for view in self._house.fleet} and self._house.clock.now() < end:
            await self._house.fleet.wait_for_change(_LOOK_EVERY_S)
        await asyncio.sleep(self._config.canary_s)

    async def _look_after(self, worker: WorkerId, epoch: Epoch) -> None:
        """One life of a worker, as long as it is up."""
        fleet = self._house.fleet
        view = fleet.get(worker)
        breaker = Breaker(Circuit.HALF_OPEN if view is not None and view.resting else Circuit.CLOSED)
        patience_s = self._config.canary_timeout_s
        answer_s = _WAITS * patience_s
        while (view := fleet.get(worker)) is not None and fleet.is_current(worker, epoch):
            if _is_drained(view):
                await asyncio.sleep(self._config.canary_s)
                continue
            breaker.probe()
            began = self._house.clock.now()
            why = await self._probe(view, breaker, _SLOW_S if view.heartbeat.warm_up else patience_s, answer_s)
            if not fleet.is_current(worker, epoch):
                return
            if why and _is_drained(view):
                continue  # it refused the canary, or handed it back
            self._judge(view, breaker, Verdict.FAILED if why else Verdict.PASSED, why)
            if why:
                answer_s = min(2 * answer_s, _ANSWER_S)
                repeat = breaker.circuit is Circuit.CLOSED
                await asyncio.sleep(min(_PAUSE_S, self._config.canary_s) if repeat else self._config.canary_s)
                continue
            took_s = self._house.clock.now() - began
            forgotten = 0.5 ** ((took_s + self._config.canary_s) / _REMEMBERED_S)
            patience_s = max(self._config.canary_timeout_s, min(_SLOW_S, 2 * took_s), patience_s * forgotten)
            answer_s = _WAITS * patience_s
            await self._pause(_IDLE, lambda: _is_idle(fleet.get(worker)))

    async def _pause(self, times: float, idle: Callable[[], bool]) -> None:
        """`canary_s`, or up to so many times as long while there is nothing to do."""
        while times > 0:
            await asyncio.sleep(min(times, 1.0) * self._config.canary_s)
            times = times - 1 if idle() else 0

    async def _probe(self, view: WorkerView, breaker: Breaker, patience_s: float, answer_s: float) -> str:
        """One canary, which is given up after `answer_s`. Every `patience_s` in which it is waited for in vain counts as a
        failure. Returns as Canary.compute.
        """
        fleet = self._house.fleet
        answer = asyncio.create_task(self._canary.compute(view, max(answer_s, patience_s)))
        try:
            while True:
                began = self._house.clock.now()
                await asyncio.wait({answer}, timeout=patience_s)
                if answer.done():
                    return answer.result()
                current = fleet.get(view.id)
                if current is None or not fleet.is_current(view.id, view.epoch):
                    return "it was lost"
                held_up = self._house.clock.now() - began > patience_s + _HELD_UP_S
                verdict = Verdict.BUSY if held_up or current.spoke > began else Verdict.FAILED
                self._judge(view, breaker, verdict, f"no answer within {patience_s:.1f} s")
        finally:
            answer.cancel()

    def _judge(self, view: WorkerView, breaker: Breaker, verdict: Verdict, why: str) -> None:
        self._house.observer.probed(view, verdict.value)
        if verdict is Verdict.PASSED:
            if breaker.passed():
                self._house.fleet.resume(view.id)
                log.info("worker %s passed a canary: it is given work", view.id)
        elif verdict is Verdict.FAILED and breaker.failed():
            log.warning("worker %s fails canaries (%s): it is given no work", view.id, why)
            self._house.rest(view.id, f"it fails canaries: {why}")
        if breaker.hopeless:
            breaker.failures = _OPENS_AFTER
            self._take_out(view.id, f"has failed {_GIVES_UP_AFTER} canaries in a row: {why}")

    # --- handoffs ---

    async def _try_pairs(self) -> None:
        """Each pair of a prefill and a decode worker of one model in turn, one every `canary_s`."""
        turn, times, fleet = 0, 1.0, self._house.fleet
        while True:
            await self._pause(times, lambda: all(_is_idle(view) for view in fleet.up()))
            turn += 1
            pair, count = _pair(fleet, turn)
            if pair is None:
                continue
            times = max(_IDLE_PAIRS / count, 1.0)
            prefill, decode = pair
            verdict = await self._canary.hand_over(prefill, decode, self._handoff_s)
            if not (self._is_as_before(prefill) and self._is_as_before(decode)):
                continue
            self._house.observer.paired(prefill.id, decode.id, verdict)
            if verdict not in MOVED:
                log.warning("a canary's KV did not get from %s to %s: %s", prefill.id, decode.id, verdict)

    def _is_as_before(self, view: WorkerView) -> bool:
        return self._house.fleet.is_current(view.id, view.epoch) and not view.resting


def _pair(fleet: Fleet, turn: int) -> tuple[tuple[WorkerView, WorkerView] | None, int]:
    """The pair whose turn it is, and how many there are if all prefill workers have as many partners.

    Only one worker's partners are listed: of a large fleet all pairs would be millions.
    """
    able = [view for view in fleet.available() if not view.heartbeat.warm_up]
    prefills = [view for view in able if view.role is Role.PREFILL]
    decodes = [view for view in able if view.role is Role.DECODE]
    for offset in range(len(prefills)):
        prefill = prefills[(turn + offset) % len(prefills)]
        partners = [decode for decode in decodes if prefill.exchanges_with(decode)]
        if partners:
            return (prefill, partners[turn // len(prefills) % len(partners)]), len(prefills) * len(partners)
    return None, 0


def _is_idle(view: WorkerView | None) -> bool:
    """It has no requests but canaries."""
    return view is not None and not view.requests and not view.foreign_requests


def _is_drained(view: WorkerView) -> bool:
    """Now: what a view says changes while something is waited for."""
    return view.heartbeat.draining
