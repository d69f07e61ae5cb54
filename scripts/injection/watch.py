"""What the router knows, asked at its door while things break: workers with their processes, requests with their states."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import zmq

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import Hello, News, Watch, Welcome, WorkerNews, encode, from_router_decoder
from router.journal import Record
from router.lifecycle import State
from scripts.tritonserver import TritonServer

_ANSWER_MS = 500
_EVERY_S = 0.002

_Found = TypeVar("_Found")


class DoorWatch:
    """Asks one thing at a time; for one thread. A router that is gone just doesn't answer."""

    def __init__(self, server: TritonServer) -> None:
        self._address = f"ipc://{server.run_dir}/door"
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def close(self) -> None:
        self._context.destroy(linger=0)

    def news(self) -> News | None:
        answer = self._ask(Watch(1 << 62))
        return answer if isinstance(answer, News) else None

    def router_pid(self) -> int | None:
        answer = self._ask(Hello(os.getpid()))
        return answer.pid if isinstance(answer, Welcome) else None

    def wait_for(self, find: Callable[[News], _Found | None], within_s: float, what: str) -> _Found:
        """The first thing found. Raises Unavailable that says `what` was waited for."""
        end = time.monotonic() + within_s
        while True:
            news = self.news()
            found = find(news) if news is not None else None
            if found is not None:
                return found
            if time.monotonic() > end:
                raise Unavailable(f"{what} not within {within_s:.0f} s")
            time.sleep(_EVERY_S)

    def _ask(self, message: Watch | Hello) -> object:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)
            self._socket.connect(self._address)
        with suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)
            return from_router_decoder.decode(self._socket.recv())
        self._socket.close()  # whatever still comes is the answer to an old question
        self._socket = None
        return None


def worker_of(record: Record, role: Role) -> str:
    """The worker of this role that has something to do for the request now; empty: none."""
    if role is Role.PREFILL:
        busy = record.state in (State.PREFILLING, State.HANDING_OFF) and record.prefill_worker != record.decode_worker
        return record.prefill_worker if busy else ""
    return record.decode_worker if record.state in (State.HANDING_OFF, State.DECODING) else ""


def find_victim(news: News, role: Role, state: State) -> tuple[WorkerNews, list[str]] | None:
    """A worker of the role that has a request in this state, and the clients whose requests are there now."""
    workers = {worker.id: worker for worker in news.workers if worker.up and worker.role is role}
    if len(workers) < sum(worker.role is role for worker in news.workers):
        return None  # the last one that was hit is not back yet
    for record in news.live:
        name = worker_of(record, role)
        if record.state is state and name in workers:
            return workers[name], [other.client_id for other in news.live if worker_of(other, role) == name]  # type: ignore[index]
    return None
