"""The router without Triton: an event loop on a thread of its own, with house, channel and supervision on it.

`accept` and `cancel` may be called from any thread; they return at once. However many requests run, there is one thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from python_backends.core.config import Deployment
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import BatonError, Cancelled, DeadlineExceeded, EngineFailure, Unavailable
from python_backends.core.messages import Abort, Lend, Locate, ReleaseLease, Work
from python_backends.core.types import BlockHash, LeaseEnd, RequestId, WorkerId
from router.admission import SHUTTING_DOWN
from router.channel import RouterChannel
from router.discovery import Discovery, Source
from router.drain import Drains
from router.health import Health
from router.house import House
from router.run import Run
from router.seams import Destination, Ending, Failed, Observer, Reply
from router.serve import serve
from router.supervisor import ModelControl, Supervisor
from router.tokenizer import Tokenizer
from router.types import ClientRequest
from router.warm_up import WarmUp

log = logging.getLogger(__name__)

_START_S = 10.0
_STOP_S = 5.0


class Submit(Protocol):
    """Hands work to a worker by a short call, from any thread; `failed` is told if that didn't work."""

    def __call__(self, worker: Destination, work: Work, failed: Failed) -> None: ...


@dataclass(frozen=True, slots=True)
class Channels:
    """Where the channels of workers are. `place`: what only one living router can have. `own`: of this server's workers."""

    place: str
    keys: CurveKeys
    own: Sequence[str]
    sources: Sequence[Source] = ()


class RouterService:
    def __init__(
        self,
        deployment: Deployment,
        channels: Channels,
        tokenizer: Tokenizer,
        submit: Submit,
        control: ModelControl | None,
        observer: Observer,
        ending: Ending | None = None,
    ) -> None:
        """Without `ending` only `close` ends it."""
        self._deployment = deployment
        self._channels = channels
        self._submit = submit
        self._control = control
        self._ending = ending
        self._tasks: dict[Run, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self.house = House(deployment, tokenizer, calls=self, observer=observer)

    def start(self) -> None:
        """Looks for workers when it returns."""
        self._thread.start()
        self._on_loop(self._open()).result(_START_S)

    def attend(self, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `chore` on the loop, beginning before this returns, until the service closes. Raises what making it raises."""
        self._on_loop(self._adopt(chore)).result(_START_S)

    def accept(self, request: ClientRequest, reply: Reply) -> Run:
        """Serve a request; the reply hears of everything, errors too."""
        run = Run(request, reply, self.house, arrival=self.house.clock.now())
        self._loop.call_soon_threadsafe(self._begin, run)
        return run

    def cancel(self, run: Run) -> None:
        """The client is gone. No-op for a request that has ended."""
        self._loop.call_soon_threadsafe(self._interrupt, run, Cancelled("the client cancelled the request"))

    def close(self) -> None:
        """Answer what runs with an error, then stop. Idempotent."""
        if self._thread.is_alive():
            self._on_loop(self._shut()).result(_STOP_S)
        self._end_loop()
        self.house.close()

    def _end_loop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_S)
        self._loop.close()

    # --- requests, on the loop ---

    def _begin(self, run: Run) -> None:
        task = self._tasks[run] = self._loop.create_task(self._serve(run))
        task.add_done_callback(partial(self._ended, run))

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        del self._tasks[run]
        run.fail(run.interruption)  # only if interrupted before its first step: then `serve` has seen nothing of it

    async def _serve(self, run: Run) -> None:
        late = DeadlineExceeded("the request's deadline passed before its last token; give a longer timeout or fewer tokens")
        timer = self._loop.call_later(run.deadline - self.house.clock.now(), self._interrupt, run, late)
        try:
            await serve(run)
        except Exception:  # the per-request guard: a bug in one request must not leave its client waiting
            log.exception("internal error while serving a request")
            run.fail(EngineFailure("internal error in the router; its log has the details"))
        finally:
            timer.cancel()

    def _interrupt(self, run: Run, why: BatonError) -> None:
        task = self._tasks.get(run)
        if task is not None:
            run.interrupt(task, why)

    # --- Calls: what the house says to workers, on the loop ---

    def submit(self, worker: WorkerId, work: Work) -> None:
        request_id, destination = work.request.request_id, self.house.destination(worker)

        def failed(why: str, *, wrecked: bool = False) -> None:
            self._loop.call_soon_threadsafe(partial(self.house.mailroom.fail, [request_id], why, never_tried=wrecked))
            if wrecked and destination is not None:
                self._loop.call_soon_threadsafe(self._end_wreck, destination)

        if destination is None:
            failed(f"worker {worker} has left")
        else:
            self._submit(destination, work, failed)

    def _end_wreck(self, worker: Destination) -> None:
        """See Failed."""
        if self.house.fleet.is_current(worker.worker, worker.epoch):
            self._supervisor.end(worker.worker, "stood still when it was handed work")

    def abort(self, worker: WorkerId, request_id: RequestId) -> None:
        self._channel.send(worker, Abort([request_id]))

    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None:
        self._channel.send(worker, ReleaseLease([lease_id], end))

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        self._channel.send(worker, Lend(request_id, list(hashes)))

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        self._channel.send(worker, Locate(request_id, list(hashes)))

    # --- opening and shutting, on the loop ---

    async def _adopt(self, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._chores.append(self._loop.create_task(chore()))

    async def _open(self) -> None:
        health = self._deployment.health
        self._supervisor = Supervisor(self.house, health, self._control)
        channels = self._channels
        self._channel = RouterChannel(self.house, self._supervisor, channels.place, channels.keys, health)
        self.drains = Drains(self.house, self._channel.send, self._supervisor, self._control)
        discovery = Discovery(channels.own, channels.sources, self._channel.connect)
        self._chores = [
            self._loop.create_task(chore)
            for chore in (
                discovery.watch(),
                self.drains.take_over(),
                self._channel.beat(),
                self._supervisor.watch(),
                WarmUp(self.house).watch(),
                Health(self.house, self._deployment, self._supervisor.take_out).watch(),
                self._refresh(),
            )
        ]

    def _end_requests(self) -> None:
        """Answer what runs with an error, and whoever comes from now on."""
        self.house.admission.close()
        for run in self._tasks:
            self._interrupt(run, Unavailable(SHUTTING_DOWN))

    async def _shut(self) -> None:
        self._end_requests()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        self._supervisor.close()
        self._channel.close()

    async def _refresh(self) -> None:
        idle = False
        while True:
            if self._ending is not None:
                idle = self._follow(self._ending, idle)
            states = Counter(run.state for run in self._tasks)
            self.house.observer.refresh(self.house.snapshot(states))
            self.house.node_memory.tidy(self.house.clock.now())
            await asyncio.sleep(self._deployment.health.heartbeat_s)

    def _follow(self, ending: Ending, was_idle: bool) -> bool:
        """Do what the server's end asks for. Returns whether nothing runs; twice in a row, all answers have left, too."""
        if ending.stopping():  # Triton would wait for the requests that run, and stop the workers under them
            self._end_requests()
        elif ending.draining():
            self.house.admission.close()
            if was_idle and not self._tasks:
                ending.drained()
        return not self._tasks

    def _on_loop(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
