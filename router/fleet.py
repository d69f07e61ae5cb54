"""The workers as the router sees them: who is up, in which life, and how much it has given them to do.

Reported load is as old as the last heartbeat; what the router itself has sent is known exactly and at once, so choices
are made on the latter (`requests`, `prefill_tokens`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, Role, WorkerId


@dataclass(slots=True)
class WorkerView:
    heartbeat: Heartbeat
    heard: float  # monotonic, s
    up: bool = True
    requests: int = 0  # routed here and not ended
    prefill_tokens: int = 0  # routed here and not computed, as far as the router knows

    @property
    def id(self) -> WorkerId:
        return self.heartbeat.worker

    @property
    def role(self) -> Role:
        return self.heartbeat.role

    @property
    def epoch(self) -> Epoch:
        return self.heartbeat.epoch


class Charge:
    """One request's load on one worker. A charge to an earlier life of the worker is void."""

    def __init__(self, worker: WorkerView | None, prefill_tokens: int) -> None:
        self._worker = worker
        self._prefill_tokens = prefill_tokens
        if worker is not None:
            worker.requests += 1
            worker.prefill_tokens += prefill_tokens

    def prefilled(self) -> None:
        """The prompt is computed. Idempotent."""
        if self._worker is not None:
            self._worker.prefill_tokens -= self._prefill_tokens
            self._prefill_tokens = 0

    def undo(self) -> None:
        """The request has left the worker. Idempotent."""
        self.prefilled()
        if self._worker is not None:
            self._worker.requests -= 1
            self._worker = None


class Fleet:
    """Belongs to the router's event loop."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, WorkerView] = {}
        self._over: set[Epoch] = set()
        self._changed: asyncio.Future[None] | None = None

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def up(self) -> list[WorkerView]:
        return [worker for worker in self._workers.values() if worker.up]

    def get(self, worker: WorkerId) -> WorkerView | None:
        return self._workers.get(worker)

    def hear(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take in a heartbeat. Returns whether the worker is up only since now: new, restarted or back again."""
        known = self._workers.get(heartbeat.worker)
        if known is not None and known.epoch == heartbeat.epoch and known.up:
            known.heartbeat, known.heard = heartbeat, now
            return False
        if known is not None and known.epoch != heartbeat.epoch:
            self.bury(known.epoch)
        self._workers[heartbeat.worker] = WorkerView(heartbeat, now)
        self._wake()
        return True

    def lose(self, worker: WorkerId) -> bool:
        """Take a worker out. Returns whether it was up."""
        known = self._workers.get(worker)
        if known is None or not known.up:
            return False
        known.up = False
        self._wake()
        return True

    def forget(self, worker: WorkerId) -> None:
        """It is none of the deployment's any more. Should it be heard again it is a new one."""
        self.lose(worker)
        self._workers.pop(worker, None)

    def bury(self, epoch: Epoch) -> None:
        """This life of a worker is over; what is still on its way from it does not bring it back."""
        self._over.add(epoch)

    def is_over(self, epoch: Epoch) -> bool:
        return epoch in self._over

    def is_up(self, worker: WorkerId) -> bool:
        known = self._workers.get(worker)
        return known is not None and known.up

    def is_current(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether a message of this life of the worker still counts."""
        known = self._workers.get(worker)
        return known is not None and known.up and known.epoch == epoch

    def silent(self, since: float) -> list[WorkerView]:
        return [worker for worker in self.up() if worker.heard < since]

    async def wait_for_change(self, timeout: float) -> None:
        """Until a worker comes up or goes down, or the time is over."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the change.
        await asyncio.wait({self._changed}, timeout=timeout)

    def charge(self, worker: WorkerId, prefill_tokens: int) -> Charge:
        """Count a request, and the prompt tokens it will compute there, as load of this life of a worker."""
        return Charge(self._workers.get(worker), prefill_tokens)

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)
