"""The worker's end of the channel: outputs, events and heartbeats to its routers; aborts and releases from them.

The worker listens, routers connect: any number of them, from this host (ipc) and from others (tcp, encrypted). One thread
owns the sockets. Other threads hand it finished messages over an in-process socket, the engine's one per step and router.
What is meant for a router that is gone is dropped, not collected: whoever waited for it is gone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import zmq

from python_backends.core.curve import CurveKeys
from python_backends.core.errors import UNREADABLE, ConfigError
from python_backends.core.host import host_id
from python_backends.core.messages import (
    Condition,
    Drain,
    FromWorker,
    Heartbeat,
    Look,
    Resume,
    RouterHeartbeat,
    ToWorker,
    encode,
    to_worker_decoder,
)
from python_backends.core.pulse import idle_heartbeat_s

log = logging.getLogger(__name__)

_HIGH_WATER_MARK = 100_000  # messages queued for a router that does not read
_LAST_WORDS_MS = 300  # how long closing waits for routers to take what was said last
_OUTBOX = "inproc://outbox"
_EVERYBODY = b""
_NOBODY = b"\0"  # no router's name


class ChannelListener(Protocol):
    """What the channel tells its owner, on the channel's thread. Routers are known by their names."""

    def heartbeat(self) -> Heartbeat: ...

    def condition(self, used: bool, promised: int) -> Condition: ...

    def told(self, message: ToWorker) -> None: ...

    def router_found(self, router: str) -> None:
        """It has been heard for the first time, or again after it was lost. Nobody submits work before."""

    def router_lost(self, router: str) -> FromWorker | None:
        """The router died, fell silent or was replaced: nobody waits for what it had begun.

        Returns what to tell it, should it only have been held up.
        """


class Channel(Protocol):
    """What a worker needs of its channel; WorkerChannel has the words."""

    def start(self) -> None: ...

    def wait_for_router(self, timeout_s: float) -> bool: ...

    def send(self, message: FromWorker, router: str | None = None) -> None: ...

    def stir(self) -> None: ...

    def close(self) -> None: ...


ChannelFactory = Callable[[str, str, CurveKeys, float, float, ChannelListener], Channel]
"""As WorkerChannel is made."""


@dataclass(slots=True)
class _Router:
    name: str
    place: str
    socket: zmq.Socket[bytes]
    identity: bytes
    heard: float  # monotonic, s
    uses: bool  # it gives this worker work
    promised: int  # see RouterHeartbeat
    pidfd: int | None


class WorkerChannel:
    """`send` may be called from any thread; everything else happens on the channel's own."""

    def __init__(
        self, address: str, remote_address: str, keys: CurveKeys, heartbeat_s: float, silent_s: float, listener: ChannelListener
    ) -> None:
        """`remote_address`: where routers of other hosts connect, with `keys`; empty: nowhere.

        Raises ConfigError when an address can't be bound.
        """
        self._listener = listener
        self._heartbeat_s = heartbeat_s
        self._idle_heartbeat_s = idle_heartbeat_s(heartbeat_s, silent_s)
        self._silent_s = silent_s
        self._last_heartbeat = b""
        self._happened = False  # something was sent or heard since, besides heartbeats
        self._routers: dict[bytes, _Router] = {}  # by identity
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(_HIGH_WATER_MARK)
        self._inbox.bind(_OUTBOX)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(_HIGH_WATER_MARK)
        self._outbox.connect(_OUTBOX)
        self._outbox_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._answered = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        try:
            self._listen(address, None)
            if remote_address:
                self._listen(remote_address, keys)
        except ConfigError:
            self.close()
            raise

    def start(self) -> None:
        self._thread.start()

    def wait_for_router(self, timeout_s: float) -> bool:
        """Whether a router has been heard by then. It knows this worker."""
        return self._answered.wait(timeout_s)

    def send(self, message: FromWorker, router: str | None = None) -> None:
        """Queue a message for one router, or for all; never blocks. A message that doesn't fit any more is dropped."""
        to = _EVERYBODY if router is None else router.encode()
        with suppress(zmq.Again), self._outbox_lock:
            self._outbox.send_multipart([to, encode(message)], zmq.NOBLOCK)

    def stir(self) -> None:
        """Something has happened that heartbeats tell: the next one is due soon."""
        with suppress(zmq.Again), self._outbox_lock:
            self._outbox.send_multipart([_NOBODY, b""], zmq.NOBLOCK)

    def close(self) -> None:
        self._closing.set()
        self.stir()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        for router in list(self._routers.values()):
            self._forget(router)
        for socket in (self._inbox, self._outbox, *self._sockets):
            socket.close()
        self._context.term()

    def _listen(self, address: str, keys: CurveKeys | None) -> None:
        socket = self._context.socket(zmq.ROUTER)
        self._sockets.append(socket)
        socket.set_hwm(_HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            keys.serve(socket)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"the channel can't listen at {address}: {error}; check channel.listen") from error
        self._poller.register(socket, zmq.POLLIN)

    # --- on the channel's thread ---

    def _run(self) -> None:
        next_heartbeat = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if self._happened:
                next_heartbeat, self._happened = min(next_heartbeat, now + self._heartbeat_s), False
            if now >= next_heartbeat:
                next_heartbeat = now + (self._heartbeat_s if self._beat(now) else self._idle_heartbeat_s)
            ready = dict(self._poller.poll(timeout=max(0, int((next_heartbeat - now) * 1000))))
            if self._inbox in ready:
                self._drain(self._inbox, self._post)
            for socket in self._sockets:
                if socket in ready:
                    self._drain(socket, lambda frames, socket=socket: self._read(socket, frames))  # type: ignore[misc]
            for router in [router for router in self._routers.values() if router.pidfd in ready]:
                self._lose(router, "died")
        self._drain(self._inbox, self._post)

    def _beat(self, now: float) -> bool:
        """Returns whether there was anything new to tell."""
        heartbeat = encode(self._listener.heartbeat())
        is_new, self._last_heartbeat = heartbeat != self._last_heartbeat, heartbeat
        self._drain(self._inbox, self._post)  # the events that it counts go first
        for router in list(self._routers.values()):
            self._tell(router, heartbeat)
            if now - router.heard > self._silent_s:
                self._lose(router, "fell silent")
        return is_new

    def _drain(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        try:
            while True:
                take(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return

    def _post(self, frames: list[bytes]) -> None:
        to, payload = frames
        self._happened = True
        for router in self._routers.values():
            if to in (_EVERYBODY, router.name.encode()):
                self._tell(router, payload)

    def _tell(self, router: _Router, payload: bytes) -> None:
        self._say(router.socket, router.identity, payload)

    def _say(self, socket: zmq.Socket[bytes], identity: bytes, payload: bytes) -> None:
        with suppress(zmq.Again):
            socket.send_multipart([identity, payload], zmq.NOBLOCK)

    def _is_used(self) -> bool:
        """As Condition has it."""
        return not self._routers or any(router.uses for router in self._routers.values())

    def _read(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        identity, *parts = frames
        try:
            message = to_worker_decoder.decode(b"".join(parts))
        except UNREADABLE:
            return  # of another version; its sender learns nothing from an answer here
        if isinstance(message, RouterHeartbeat):
            self._hear_router(socket, identity, message)
        elif isinstance(message, Look):
            promised = sum(router.promised for router in self._routers.values())
            self._say(socket, identity, encode(self._listener.condition(self._is_used(), promised)))
        elif identity in self._routers or isinstance(message, Drain | Resume):  # a server drains its own workers, too
            self._happened = True
            self._listener.told(message)

    def _hear_router(self, socket: zmq.Socket[bytes], identity: bytes, message: RouterHeartbeat) -> None:
        known = self._routers.get(identity)
        if known is not None:
            known.heard, known.uses, known.promised = time.monotonic(), message.uses, message.promised
            return
        for other in [other for other in self._routers.values() if message.place and other.place == message.place]:
            self._lose(other, "was replaced")
        pidfd = _watch(message)
        router = _Router(
            message.router, message.place, socket, identity, time.monotonic(), message.uses, message.promised, pidfd
        )
        self._routers[identity] = router
        self._happened = True  # it does not know this worker yet
        self._listener.router_found(router.name)
        if pidfd is not None:
            self._poller.register(pidfd, zmq.POLLIN)
        self._tell(router, encode(self._listener.heartbeat()))  # it should know at once that we are here
        self._answered.set()

    def _lose(self, router: _Router, why: str) -> None:
        log.warning("router %s %s", router.name, why)
        last_words = self._listener.router_lost(router.name)
        if last_words is not None:
            self._tell(router, encode(last_words))
        self._forget(router)

    def _forget(self, router: _Router) -> None:
        del self._routers[router.identity]
        if router.pidfd is not None:
            self._poller.unregister(router.pidfd)
            os.close(router.pidfd)


def _watch(message: RouterHeartbeat) -> int | None:
    """A pidfd of a router on this host; None for others, whose silence has to tell."""
    if message.host != host_id():
        return None
    try:
        return os.pidfd_open(message.pid)
    except OSError:
        return None
