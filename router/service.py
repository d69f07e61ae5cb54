"""The router without Triton: an event loop on a thread of its own, with house, channel and supervision on it.

`accept` and `cancel` may be called from any thread; they return at once. However many requests run, there is one thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from python_backends.core.config import Deployment
from python_backends.core.errors import Cancelled, DeadlineExceeded, EngineFailure, Unavailable
from python_backends.core.messages import Abort, Lend, Locate, ReleaseLease, Work
from python_backends.core.types import BlockHash, RequestId, WorkerId
from router.channel import RouterChannel
from router.house import House
from router.run import Run
from router.seams import Observer, Reply
from router.serve import serve
from router.supervisor import ModelControl, Supervisor
from router.tokenizer import Tokenizer
from router.types import ClientRequest

log = logging.getLogger(__name__)

_START_S = 10.0
_STOP_S = 5.0


class Submit(Protocol):
    """Hands work to a worker by a short call, from any thread; `failed` is told if that didn't work, on any thread."""

    def __call__(self, worker: WorkerId, work: Work, failed: Callable[[str], None]) -> None: ...


class RouterService:
    def __init__(
        self,
        deployment: Deployment,
        channel_address: str,
        tokenizer: Tokenizer,
        submit: Submit,
        control: ModelControl | None,
        observer: Observer,
    ) -> None:
        self._deployment = deployment
        self._address = channel_address
        self._submit = submit
        self._control = control
        self._tasks: dict[Run, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self.house = House(deployment, tokenizer, calls=self, observer=observer)

    def start(self) -> None:
        """Listens for workers when it returns. Raises zmq.ZMQError when the address can't be bound."""
        self._thread.start()
        try:
            self._on_loop(self._open()).result(_START_S)
        except BaseException:
            self._end_loop()
            raise

    def accept(self, request: ClientRequest, reply: Reply) -> Run:
        """Serve a request; the reply hears of everything, errors too."""
        run = Run(request, reply, self.house, arrival=time.monotonic())
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
        timer = self._loop.call_later(run.deadline - time.monotonic(), self._interrupt, run, late)
        try:
            await serve(run)
        except Exception:  # the per-request guard: a bug in one request must not leave its client waiting
            log.exception("internal error while serving a request")
            run.fail(EngineFailure("internal error in the router; its log has the details"))
        finally:
            timer.cancel()

    def _interrupt(self, run: Run, why: Cancelled | DeadlineExceeded) -> None:
        task = self._tasks.get(run)
        if task is not None:
            run.interrupt(task, why)

    # --- Calls: what the house says to workers, on the loop ---

    def submit(self, worker: WorkerId, work: Work) -> None:
        request_id = work.request.request_id

        def failed(why: str) -> None:
            self._loop.call_soon_threadsafe(self.house.mailroom.fail, [request_id], why)

        self._submit(worker, work, failed)

    def abort(self, worker: WorkerId, request_id: RequestId) -> None:
        self._channel.send(worker, Abort([request_id]))

    def release(self, worker: WorkerId, lease_id: str) -> None:
        self._channel.send(worker, ReleaseLease([lease_id]))

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        self._channel.send(worker, Lend(request_id, list(hashes)))

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        self._channel.send(worker, Locate(request_id, list(hashes)))

    # --- opening and shutting, on the loop ---

    async def _open(self) -> None:
        health = self._deployment.health
        self._channel = RouterChannel(self._address, self.house.name, health.heartbeat_s)
        self._supervisor = Supervisor(self.house, health, self._control)
        self._chores = [
            self._loop.create_task(chore)
            for chore in (
                self._channel.listen(self.house, self._supervisor),
                self._channel.beat(),
                self._supervisor.watch(),
                self._refresh(),
            )
        ]

    async def _shut(self) -> None:
        for run, task in list(self._tasks.items()):
            run.interruption = Unavailable("the server is shutting down; send the request again elsewhere or later")
            task.cancel()
        running = [*self._tasks.values()]
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*running, *self._chores, return_exceptions=True)
        self._supervisor.close()
        self._channel.close()

    async def _refresh(self) -> None:
        while True:
            self.house.observer.refresh(self.house)
            self.house.node_memory.tidy(time.monotonic())
            await asyncio.sleep(self._deployment.health.heartbeat_s)

    def _on_loop(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
