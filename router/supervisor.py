"""Who watches over the workers' lives: notices death at once and silence soon, takes the worker out, restarts it.

A dead process is told by the kernel (a pidfd becomes readable), a wedged or stopped one by missing heartbeats; that one
is killed first, since nothing else ends it. A restarted worker has a new epoch, so nothing of its old life counts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from python_backends.core.config import HealthConfig
from python_backends.core.errors import BatonError
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, WorkerId
from router.house import House

log = logging.getLogger(__name__)

_BACKOFF_S = (0.2, 1.0, 3.0, 10.0)  # before the first, second ... try to restart; the last one repeats


class ModelControl(Protocol):
    """The server's hold on its models."""

    def restart(self, worker: WorkerId) -> None:
        """Load the worker's model anew; blocks until it is up. Raises BatonError."""


class Supervisor:
    """Belongs to the router's event loop; restarts run on a thread of their own."""

    def __init__(self, house: House, health: HealthConfig, control: ModelControl | None) -> None:
        """Without `control`, or with health.restart off, workers are taken out but not restarted."""
        self._house = house
        self._health = health
        self._control = control if health.restart else None
        self._pidfds: dict[WorkerId, tuple[Epoch, int, int]] = {}  # epoch, pid, pidfd
        self._left: set[Epoch] = set()
        self._restarts: dict[WorkerId, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="restart")

    # --- from the channel ---

    def seen(self, heartbeat: Heartbeat) -> None:
        """Watch the process of a life that is new."""
        watched = self._pidfds.get(heartbeat.worker)
        if watched is not None and watched[0] == heartbeat.epoch:
            return
        self._unwatch(heartbeat.worker)
        try:
            pidfd = os.pidfd_open(heartbeat.pid)
        except OSError:
            return  # gone since, or can't be watched; silence will tell
        self._pidfds[heartbeat.worker] = (heartbeat.epoch, heartbeat.pid, pidfd)
        asyncio.get_running_loop().add_reader(pidfd, self._died, heartbeat.worker, heartbeat.epoch)
        log.info("worker %s is up (process %d)", heartbeat.worker, heartbeat.pid)

    def left(self, worker: WorkerId, epoch: Epoch) -> None:
        """The worker ended because it was told to."""
        self._left.add(epoch)
        self._house.fleet.bury(epoch)
        if self._house.fleet.is_current(worker, epoch):
            self._house.lose(worker, f"worker {worker} was unloaded")

    # --- the watch ---

    async def watch(self) -> None:
        """Look for silent workers until cancelled."""
        while True:
            began = self._house.clock.now()
            await asyncio.sleep(self._health.heartbeat_s)
            if self._house.clock.now() - began > self._health.heartbeat_s + self._health.silent_s / 2:
                continue  # this router was held up itself: what the workers said meanwhile is not read yet
            for worker in self._house.fleet.silent(self._house.clock.now() - self._health.silent_s):
                self._wedged(worker.id)

    def close(self) -> None:
        for worker in list(self._pidfds):
            self._unwatch(worker)
        for task in self._restarts.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _died(self, worker: WorkerId, epoch: Epoch) -> None:
        self._unwatch(worker)
        self._house.fleet.bury(epoch)
        if epoch in self._left:
            self._left.discard(epoch)
            return
        log.warning("worker %s died", worker)
        self._house.lose(worker, f"worker {worker} died")
        self._begin_restart(worker)

    def _wedged(self, worker: WorkerId) -> None:
        log.warning("worker %s has been silent for %.1f s; taking it out", worker, self._health.silent_s)
        self._house.lose(worker, f"worker {worker} fell silent")
        watched = self._pidfds.get(worker)
        if watched is not None and self._control is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched[2], signal.SIGKILL)  # its death is then noticed by _died

    def _begin_restart(self, worker: WorkerId) -> None:
        running = self._restarts.get(worker)
        if self._control is not None and (running is None or running.done()):
            self._restarts[worker] = asyncio.get_running_loop().create_task(self._bring_back(worker, self._control))

    async def _bring_back(self, worker: WorkerId, control: ModelControl) -> None:
        for attempt in range(1_000_000):
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, control.restart, worker)
            except BatonError as error:
                log.error("worker %s could not be restarted: %s", worker, error)
            else:
                log.info("worker %s was restarted", worker)
                return

    def _unwatch(self, worker: WorkerId) -> None:
        watched = self._pidfds.pop(worker, None)
        if watched is not None:
            asyncio.get_running_loop().remove_reader(watched[2])
            os.close(watched[2])
