"""The worker's end of the channel: outputs, events and heartbeats to the router; aborts and releases from it.

One thread owns the ZeroMQ socket to the router. The engine's thread hands it finished messages over an in-process
socket, one per engine step. When the router is gone messages are dropped, not collected: whoever waited for them is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from python_backends.core.messages import FromWorker, Heartbeat, RouterHeartbeat, ToWorker, encode, to_worker_decoder

_HIGH_WATER_MARK = 100_000  # messages queued for a router that does not read
_LAST_WORDS_MS = 300  # how long closing waits for the router to take what was said last


class ChannelListener(Protocol):
    """What the channel tells its owner, on the channel's thread."""

    def heartbeat(self) -> Heartbeat: ...

    def told(self, message: ToWorker) -> None: ...

    def router_lost(self, successor: str | None) -> FromWorker | None:
        """The router fell silent, or the one named `successor` took its place: nobody waits for what it had begun.

        Returns what to tell it, should it only have been held up.
        """


class WorkerChannel:
    """`send` may be called from any thread; everything else happens on the channel's own."""

    def __init__(self, address: str, identity: str, heartbeat_s: float, silent_s: float, listener: ChannelListener) -> None:
        self._listener = listener
        self._heartbeat_s = heartbeat_s
        self._silent_s = silent_s
        self._router: str | None = None
        self._router_heard = 0.0
        self._context = zmq.Context()
        self._outbox_name = "inproc://outbox"
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(self._outbox_name)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(_HIGH_WATER_MARK)
        self._outbox.connect(self._outbox_name)
        self._outbox_lock = threading.Lock()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        self._socket.connect(address)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        """Queue a message; never blocks. A message that doesn't fit any more is dropped."""
        try:
            with self._outbox_lock:
                self._outbox.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return

    def close(self) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        for socket in (self._inbox, self._outbox, self._socket):
            socket.close()
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        next_heartbeat = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= next_heartbeat:
                heartbeat = encode(self._listener.heartbeat())
                self._drain(self._inbox, self._post)  # the events that it counts go first
                self._post(heartbeat)
                self._check_router(now)
                next_heartbeat = now + self._heartbeat_s
            ready = dict(poller.poll(timeout=max(0, int((next_heartbeat - now) * 1000))))
            if self._inbox in ready:
                self._drain(self._inbox, self._post)
            if self._socket in ready:
                self._drain(self._socket, self._read)
        self._drain(self._inbox, self._post)

    def _drain(self, socket: zmq.Socket[bytes], take: Callable[[bytes], None]) -> None:
        try:
            while True:
                take(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return

    def _post(self, payload: bytes) -> None:
        try:
            self._socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            return

    def _read(self, payload: bytes) -> None:
        try:
            message = to_worker_decoder.decode(payload)
        except msgspec.MsgspecError:
            return  # of another version; its sender learns nothing from an answer here
        if isinstance(message, RouterHeartbeat):
            if message.router != self._router:  # also the first one heard: work of an earlier one may be here
                self._lose_router(message.router)
            self._router = message.router
            self._router_heard = time.monotonic()
        self._listener.told(message)

    def _check_router(self, now: float) -> None:
        if self._router is not None and now - self._router_heard > self._silent_s:
            self._router = None
            self._lose_router(None)

    def _lose_router(self, successor: str | None) -> None:
        last_words = self._listener.router_lost(successor)
        if last_words is not None:
            self._post(encode(last_words))
