"""Who watches over the workers' lives: notices death at once and silence soon, takes the worker out, restarts it.

A dead process is told by the kernel (a pidfd becomes readable), a wedged or stopped one by missing heartbeats, and one
whose engine can't go on says so in its heartbeats. These two are killed first, since nothing else ends them. A restarted
worker has a new epoch, so nothing of its old life counts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Protocol

from python_backends.core.config import HealthConfig
from python_backends.core.errors import BatonError
from python_backends.core.host import host_id
from python_backends.core.messages import Heartbeat
from python_backends.core.pulse import idle_heartbeat_s
from python_backends.core.types import Epoch, Role, WorkerId
from router.house import House
from router.seams import Destination

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # with workers of other hosts
_RECONNECT_S = 2.0  # within which the channel is back once the network is
_BACKOFF_S = (0.2, 1.0, 3.0, 10.0)  # before the first, second ... try to restart; the last one repeats


class ModelControl(Protocol):
    """The hold on models, of this server and of others."""

    def reach(self, worker: Destination) -> None:
        """Blocks shortly. Raises BatonError when the worker's server can't be reached now.

        A restart that is sent off into a broken network arrives when it is whole again, and ends a worker that is well.
        """

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        """Load the worker's model anew; blocks until it is up. Raises BatonError.

        `role`: what it is from then on, also after restarts that don't say. If that fails, its next restart is in the old one.
        """

    def marked(self, worker: Destination) -> AbstractContextManager[None]:
        """Should this router die meanwhile, its successor knows that the worker was being restarted."""

    def interrupted(self) -> list[Destination]:
        """Those that were marked when the last router of this server died."""


class Supervisor:
    """Belongs to the router's event loop; restarts run on threads of their own."""

    def __init__(self, house: House, health: HealthConfig, control: ModelControl | None) -> None:
        """Without `control`, or with health.restart off, workers are taken out but not restarted."""
        self._house = house
        self._health = health
        self._control = control if health.restart else None
        self._pidfds: dict[WorkerId, tuple[Epoch, int]] = {}
        self._left: set[Epoch] = set()
        self._restarts: dict[WorkerId, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._left_alone: dict[WorkerId, str] = {}  # why their servers can't be reached, as the log says already
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="restart")
        self._reaching = ThreadPoolExecutor(4, thread_name_prefix="reach")  # never behind a model that is being loaded

    # --- from the channel ---

    def seen(self, heartbeat: Heartbeat) -> None:
        """Watch the process of a life that is new. Of another host there is nothing to watch: connection and silence tell."""
        watched = self._pidfds.get(heartbeat.worker)
        if heartbeat.host != host_id() or (watched is not None and watched[0] == heartbeat.epoch):
            return
        self._unwatch(heartbeat.worker)
        try:
            pidfd = os.pidfd_open(heartbeat.pid)
        except OSError:
            return  # gone since, or can't be watched; silence will tell
        self._pidfds[heartbeat.worker] = (heartbeat.epoch, pidfd)
        asyncio.get_running_loop().add_reader(pidfd, self._died, heartbeat.worker, heartbeat.epoch)
        log.info("worker %s is up (process %d)", heartbeat.worker, heartbeat.pid)

    def faulty(self, heartbeat: Heartbeat) -> None:
        """The worker says that it can't go on. While it says so it is out, restarted or not."""
        self.seen(heartbeat)
        self.end(heartbeat.worker, f"can't go on: {heartbeat.load.fault}")

    def end(self, worker: WorkerId, why: str, ill: Epoch | None = None) -> None:
        """Take the worker out, whoever can reach it; one of this host is killed at once.

        `ill`: the life that is to end, of a worker that goes on saying that it lives.
        """
        if self._house.lose(worker, f"worker {worker} {why}"):
            log.warning("worker %s %s; taking it out", worker, why)
        watched = self._pidfds.get(worker)
        if watched is None:
            self._begin_restart(worker, ill, _PATIENCE_S)
        elif self._control is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched[1], signal.SIGKILL)  # its death is then noticed by _died

    def take_out(self, worker: WorkerId, why: str) -> None:
        """The worker lives and does not work: kill it, so that it is restarted.

        No-op where nobody restarts it, and where its server can't be reached: then it is this router that fails to ask anything
        of the worker, which others may be served by.
        """
        destination = self._house.destination(worker)
        if self._control is not None and destination is not None:
            ending = asyncio.get_running_loop().create_task(self._take_out_if_reached(destination, why, self._control))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    def cut_off(self, worker: WorkerId) -> None:
        """The connection is broken. If only that, its next heartbeat brings it back; of this host the kernel tells more."""
        if self._house.lose(worker, f"the connection to worker {worker} is broken"):
            log.warning("the connection to worker %s is broken", worker)
            if worker not in self._pidfds:
                self._begin_restart(worker, None, _PATIENCE_S)

    def removed(self, worker: WorkerId) -> None:
        """Its address is none of the deployment's any more. It may live, and be one of its workers again."""
        self._unwatch(worker)
        self._left_alone.pop(worker, None)
        self._house.lose(worker, f"worker {worker} was removed from the deployment", died=False)
        self._house.forget(worker)

    def left(self, worker: WorkerId, epoch: Epoch) -> None:
        """The worker ended because it was told to."""
        self._left.add(epoch)
        self._house.fleet.bury(epoch)
        if self._house.fleet.is_current(worker, epoch):
            self._house.lose(worker, f"worker {worker} was unloaded", died=False)

    def bring_back(self, worker: Destination, patience_s: float = 0.0) -> None:
        """Somebody has unloaded the worker and can't load it: try again and again. `patience_s`: as _begin_restart."""
        self._begin_restart(worker.worker, None, patience_s, worker)

    # --- the watch ---

    async def watch(self) -> None:
        """Look for silent workers until cancelled."""
        pause_s = idle_heartbeat_s(self._health.heartbeat_s, self._health.silent_s)
        while True:
            began = self._house.clock.now()
            await asyncio.sleep(pause_s)
            if self._house.clock.now() - began > pause_s + self._health.silent_s / 2:
                continue  # this router was held up itself: what the workers said meanwhile is not read yet
            for worker in self._house.fleet.silent(self._house.clock.now() - self._health.silent_s):
                self.end(worker.id, f"has been silent for {self._health.silent_s:.1f} s")

    def close(self) -> None:
        for worker in list(self._pidfds):
            self._unwatch(worker)
        for task in (*self._restarts.values(), *self._endings):
            task.cancel()
        for threads in (self._threads, self._reaching):
            threads.shutdown(wait=False, cancel_futures=True)

    def _died(self, worker: WorkerId, epoch: Epoch) -> None:
        self._unwatch(worker)
        self._house.fleet.bury(epoch)
        if epoch in self._left:
            return
        log.warning("worker %s died", worker)
        if self._house.fleet.is_current(worker, epoch):
            self._house.lose(worker, f"worker {worker} died")
        self._begin_restart(worker, epoch)

    async def _take_out_if_reached(self, worker: Destination, why: str, control: ModelControl) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._reaching, control.reach, worker)
        except BatonError as error:
            self._leave_alone(worker.worker, why, str(error))
            return
        self._left_alone.pop(worker.worker, None)
        if self._is_ill(worker.worker, worker.epoch):  # still
            self.end(worker.worker, why, worker.epoch)

    def _is_ill(self, worker: WorkerId, epoch: Epoch) -> bool:
        """It lives, and is given no work for that."""
        view = self._house.fleet.get(worker)
        return view is not None and self._house.fleet.is_current(worker, epoch) and bool(view.resting)

    def _leave_alone(self, worker: WorkerId, why: str, unreached: str) -> None:
        if self._left_alone.get(worker) != unreached:
            log.warning("worker %s %s; its server can't be reached, so it is left alone: %s", worker, why, unreached)
        self._left_alone[worker] = unreached
        view = self._house.fleet.get(worker)
        if view is not None and view.resting:  # maybe for what was wrong when it began, such as a port not open yet
            self._house.fleet.rest(worker, f"its server can't be reached: {unreached}")

    def _begin_restart(
        self, worker: WorkerId, over: Epoch | None, patience_s: float = 0.0, unheard: Destination | None = None
    ) -> None:
        """`over`: the life that has ended, or is to.

        `patience_s`: it may come back by itself, or another router may see to it, so first wait for about so long. `unheard`:
        where it is, should this router never have heard of it.
        """
        running = self._restarts.get(worker)
        if self._control is not None and (running is None or running.done()):
            task = self._bring_back(worker, over, patience_s, unheard, self._control)
            self._restarts[worker] = asyncio.get_running_loop().create_task(task)

    async def _bring_back(
        self, worker: WorkerId, over: Epoch | None, patience_s: float, unheard: Destination | None, control: ModelControl
    ) -> None:
        def is_back() -> bool:
            return self._house.fleet.is_up(worker) and not (over is not None and self._is_ill(worker, over))

        await asyncio.sleep(patience_s * (1 + random.random()))
        for attempt in range(1_000_000):
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            destination = self._house.destination(worker) or unheard
            if destination is None or is_back():
                return
            if over in self._left:  # its goodbye was read after its death was seen: somebody unloads it on purpose
                return
            loop = asyncio.get_running_loop()
            try:
                if patience_s:
                    await loop.run_in_executor(self._threads, control.reach, destination)
                    await asyncio.sleep(_RECONNECT_S)
                    if is_back():
                        return
                with control.marked(destination):
                    await loop.run_in_executor(self._threads, control.restart, destination)
            except BatonError as error:
                log.error("worker %s could not be restarted: %s", worker, error)
            else:
                log.info("worker %s was restarted", worker)
                return

    def _unwatch(self, worker: WorkerId) -> None:
        watched = self._pidfds.pop(worker, None)
        if watched is not None:
            asyncio.get_running_loop().remove_reader(watched[1])
            os.close(watched[1])
