"""The way to the workers of a server for its own processes: to see how they are, and to have them drained.

It goes through the channels' local sockets, which only the server's own user can reach, and needs neither a router nor a key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

import zmq

from python_backends.core.messages import Condition, Drain, Look, Resume, ToWorker, condition_decoder, encode

_ANSWER_S = 3.0  # however busy a worker is; one that says nothing by then is not waited for
_LOOK_EVERY_S = 0.1
_SETTLED_S = 2.0  # within which routers have heard of it and have said what they promised, and what they had sent has come in
_STUCK_S = 20  # an engine that has stood for so long finishes nothing any more: its routers have taken its requests elsewhere
_HAND_BACK_S = 2.0  # beyond the grace period: for what is handed back, and the KV that goes with it


class WorkersDoor:
    """For one thread at a time. A context manager."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        """`addresses`: where each worker's channel listens for this host, by the worker's name."""
        self._addresses = dict(addresses)
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def __enter__(self) -> WorkersDoor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def look(self, within_s: float = _ANSWER_S) -> dict[str, Condition]:
        """How the workers are, of those that answer in time."""
        poller, asked = zmq.Poller(), {}
        for name in self._addresses:
            self._say(name, Look())
            asked[self._sockets[name]] = name
            poller.register(self._sockets[name], zmq.POLLIN)
        conditions: dict[str, Condition] = {}
        end = time.monotonic() + within_s
        while asked and (left_s := end - time.monotonic()) > 0:
            for socket, _ in poller.poll(int(left_s * 1e3) + 1):
                conditions[asked.pop(socket)] = condition_decoder.decode(socket.recv())
                poller.unregister(socket)
        for socket, name in asked.items():  # whatever still comes there is the answer to an old question
            socket.close(linger=0)
            del self._sockets[name]
        return conditions

    def resume(self) -> None:
        for name in self._addresses:
            self._say(name, Resume())
        self.look()  # they have heard it then

    def drain(self, grace_s: float, is_over: Callable[[], bool] = lambda: False) -> list[str]:
        """Have all workers take nothing new and finish what they have; after `grace_s` they hand the rest back to the routers.

        Return when nothing is left at any, or `is_over`; the names of those that still have something then. A worker that does
        not answer or whose engine is stuck has nothing: routers have given it up.
        """
        began = time.monotonic()
        self._begin(self._addresses, grace_s)
        while True:
            passed_s = time.monotonic() - began
            conditions = self.look()
            at_work = [name for name, condition in conditions.items() if not _is_done(condition)]
            if is_over() or passed_s > grace_s + _HAND_BACK_S or (passed_s > _SETTLED_S and not at_work):
                return at_work
            self._begin([name for name in at_work if not conditions[name].draining], grace_s - passed_s)
            time.sleep(_LOOK_EVERY_S)

    def _begin(self, workers: Iterable[str], grace_s: float) -> None:
        for name in workers:
            self._say(name, Drain(max(grace_s, 0.0)))

    def _say(self, worker: str, message: ToWorker) -> None:
        socket = self._sockets.get(worker)
        if socket is None:
            socket = self._sockets[worker] = self._context.socket(zmq.DEALER)
            socket.connect(self._addresses[worker])
        socket.send(encode(message), zmq.NOBLOCK)


def _is_done(condition: Condition) -> bool:
    stuck = bool(condition.fault) or condition.standing_s > _STUCK_S
    return condition.draining and (condition.idle or stuck)
