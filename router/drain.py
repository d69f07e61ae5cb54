"""Workers that are to be stopped without anybody noticing: drained, restarted, given another role, or used again.

A drained worker says so in its heartbeats, so every router stops giving it work. What it has it finishes within the grace
period; after that it hands the rest back, and routers have it continued elsewhere, exactly.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.messages import Drain, Resume, ToWorker
from python_backends.core.types import Role, WorkerId
from router.fleet import WorkerView
from router.house import House
from router.seams import Destination
from router.supervisor import ModelControl, Supervisor

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.05
_PATIENCE_S = 10.0  # beyond the grace period
_BACK_S = 60.0  # from loaded to used
_SETTLED_S = 2.0  # after which a new router has mostly heard of every worker that is up


class Drains:
    """Belongs to the router's event loop. All of it raises Unavailable, which says what did not happen."""

    def __init__(
        self,
        house: House,
        say: Callable[[WorkerId, ToWorker], None],
        supervisor: Supervisor,
        control: ModelControl | None,
    ) -> None:
        """`say`: a message to a worker by its channel. `supervisor`: it must not take a restart for a death."""
        self._house = house
        self._say = say
        self._supervisor = supervisor
        self._control = control
        self._role_changes = asyncio.Lock()  # two at once might each count on the other's worker to decode
        self._reloading: set[WorkerId] = set()

    async def drain(self, worker: WorkerId, grace_s: float) -> None:
        """Return when the worker does nothing any more. Where nobody else can do its work, nothing is waited for."""
        view = self._up(worker)
        grace_s = grace_s if self._replaceable(view) else 0.0
        log.info("worker %s is drained, within %.1f s", worker, grace_s)
        self._say(worker, Drain(grace_s))
        await self._until(lambda: self._is_idle(view), grace_s + _PATIENCE_S, f"worker {worker} is still at work")

    def resume(self, worker: WorkerId) -> None:
        """Use a drained worker again."""
        self._up(worker)
        self._say(worker, Resume())

    async def restart(self, worker: WorkerId, grace_s: float) -> None:
        """Drain the worker, load its model anew, and return when it is given work again."""
        self._up(worker)
        await self._reload(worker, grace_s, None)
        log.info("worker %s was restarted as asked", worker)

    async def change_role(self, worker: WorkerId, role: Role, grace_s: float) -> None:
        """Restart the worker in another role, which it keeps. If it can't be loaded in that, it comes back in the old one."""
        async with self._role_changes:
            former = self._up(worker).role
            if former is role:
                raise Unavailable(f"worker {worker} is {role.value} already; name another role or another worker")
            if role is Role.PREFILL and not self._others_decode(worker):
                raise Unavailable(
                    f"worker {worker} can't become prefill: no other decode or aggregated worker is in use; "
                    "make another one decode or aggregated first, or resume a drained one"
                )
            try:
                await self._reload(worker, grace_s, role)
            except BatonError as error:
                raise Unavailable(f"worker {worker} did not become {role.value}: {error}") from error
            now = self._house.fleet.get(worker)
            if now is not None and now.role is not role:
                raise Unavailable(f"worker {worker} is {now.role.value}: somebody else has restarted it meanwhile; try again")
        log.info("worker %s, which was %s, is %s as asked", worker, former.value, role.value)

    async def take_over(self) -> None:
        """Bring back the workers that the last router of this server was restarting when it died."""
        interrupted = self._control.interrupted() if self._control is not None else []
        for destination in interrupted:
            log.warning("worker %s was being restarted when the last router died", destination.worker)
            self._supervisor.bring_back(destination, patience_s=_SETTLED_S)
        await asyncio.gather(*map(self._use_again, interrupted))

    async def _use_again(self, interrupted: Destination) -> None:
        """However late it is heard of: a worker that was not unloaded yet is still drained. Its mark goes when it is used."""
        assert self._control is not None, "who was interrupted is told by it"
        worker = interrupted.worker

        def is_up() -> bool:
            view = self._house.fleet.get(worker)
            return view is not None and view.up

        with self._control.marked(interrupted):
            try:
                await self._until(
                    is_up, _BACK_S, f"worker {worker} was being restarted when the last router died and is not up"
                )
            except Unavailable as error:  # its restart goes on being tried
                log.error("%s", error)
                return
            if self._up(worker).heartbeat.draining:
                self.resume(worker)

    async def _reload(self, worker: WorkerId, grace_s: float, role: Role | None) -> None:
        """Drained, loaded - in `role`, if one is given - and used again."""
        destination = self._house.destination(worker)
        if self._control is None or destination is None:
            raise Unavailable("nothing here can restart models: see ModelControl")
        if worker in self._reloading:  # the mark and the model are one restart's
            raise Unavailable(f"worker {worker} is being restarted already; try again when it is back")
        self._reloading.add(worker)
        try:
            await self._reload_alone(destination, self._control, grace_s, role)
        finally:
            self._reloading.discard(worker)

    async def _reload_alone(self, destination: Destination, control: ModelControl, grace_s: float, role: Role | None) -> None:
        worker, epoch = destination.worker, destination.epoch
        with control.marked(destination):
            await self.drain(worker, grace_s)
            self._supervisor.left(worker, epoch)
            try:
                await asyncio.get_running_loop().run_in_executor(None, control.restart, destination, role)
            except BatonError:
                self._supervisor.bring_back(destination)
                raise

        def is_back() -> bool:
            now = self._house.fleet.get(worker)
            return now is not None and now.available and now.epoch != epoch

        await self._until(is_back, _BACK_S, f"worker {worker} was restarted and is not used yet")

    def _up(self, worker: WorkerId) -> WorkerView:
        view = self._house.fleet.get(worker)
        if view is None or not view.up:
            known = ", ".join(sorted(other.id for other in self._house.fleet.up())) or "none"
            raise Unavailable(f"no worker {worker} is up; those that are: {known}")
        return view

    def _others_decode(self, worker: WorkerId) -> bool:
        return any(other.role is not Role.PREFILL and other.id != worker for other in self._house.fleet.available())

    def _replaceable(self, view: WorkerView) -> bool:
        """Whether another worker can take its work now: prefill can be done by anybody who decodes."""
        others = [other for other in self._house.fleet.available() if other.id != view.id]
        return any(other.role is not Role.PREFILL or view.role is Role.PREFILL for other in others)

    def _is_idle(self, view: WorkerView) -> bool:
        now = self._house.fleet.get(view.id)
        if now is None or not now.up or now.epoch != view.epoch:
            return True  # it is gone altogether
        load = now.heartbeat.load
        at_work = load.queued_requests or load.running_requests or load.active_leases
        return now.heartbeat.draining and not now.requests and not at_work

    async def _until(self, condition: Callable[[], bool], within_s: float, trouble: str) -> None:
        end = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end:
                raise Unavailable(f"{trouble} after {within_s:.0f} s")
            await asyncio.sleep(_LOOK_EVERY_S)
