"""The router's end of the channel: one connection to each worker, all on the event loop.

Every connection brings one message per engine step for all of this router's streams. Which addresses there are is told by
`Directory`s (this server's own workers, lists, DNS, a registry); who is at an address, by the worker's heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from python_backends.core.config import HealthConfig
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import UNREADABLE
from python_backends.core.host import host_id
from python_backends.core.messages import (
    BlockEvents,
    FromWorker,
    Heartbeat,
    Outputs,
    Resync,
    RouterHeartbeat,
    ToWorker,
    encode,
    from_worker_decoder,
)
from python_backends.core.pulse import idle_heartbeat_s
from python_backends.core.types import Epoch, WorkerId
from router.house import House

log = logging.getLogger(__name__)

_HIGH_WATER_MARK = 100_000
_CONNECT_TIMEOUT_MS = 1_000


class Watcher(Protocol):
    """Who looks after the lives of workers."""

    def seen(self, heartbeat: Heartbeat) -> None: ...

    def faulty(self, heartbeat: Heartbeat) -> None:
        """The worker lives and says that it can't work."""

    def left(self, worker: WorkerId, epoch: Epoch) -> None: ...

    def cut_off(self, worker: WorkerId) -> None:
        """The connection is broken."""

    def removed(self, worker: WorkerId) -> None:
        """Its address is none of the deployment's any more. It may live, and be one of its workers again."""


class _Connection:
    """To whoever listens at one address."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket
        self.worker: WorkerId | None = None  # as its last heartbeat said
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, message: ToWorker) -> None:
        """Never blocks. What is sent while nobody is there is lost, which epochs make harmless."""
        sent = self.socket.send(encode(message), zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)
        sent.add_done_callback(_ignore)

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.socket.disable_monitor()
        self.socket.close(linger=0)


def _ignore(sent: asyncio.Future[object]) -> None:
    if not sent.cancelled():
        sent.exception()


class RouterChannel:
    """Create it and use it on the event loop."""

    def __init__(self, house: House, watcher: Watcher, place: str, keys: CurveKeys, health: HealthConfig) -> None:
        """`place`: what only one living router can have, such as the run directory of its server."""
        self._house = house
        self._watcher = watcher
        self._keys = keys
        self._heartbeat_s = health.heartbeat_s
        self._idle_heartbeat_s = idle_heartbeat_s(health.heartbeat_s, health.silent_s)
        self._silent_s = health.silent_s
        self._greeting = RouterHeartbeat(house.name, os.getpid(), host_id(), place)
        self._connections: dict[str, _Connection] = {}  # by address
        self._workers: dict[WorkerId, _Connection] = {}
        self._context = zmq.asyncio.Context()

    def connect(self, addresses: Iterable[str]) -> None:
        """Be connected to exactly these from now on. ipc addresses are of this host; others are encrypted."""
        wanted = set(addresses)
        for address in wanted - self._connections.keys():
            self._connections[address] = self._open(address)
        for address in self._connections.keys() - wanted:
            self._drop(self._connections.pop(address))

    def send(self, worker: WorkerId, message: ToWorker) -> None:
        """See _Connection.send."""
        connection = self._workers.get(worker)
        if connection is not None:
            connection.send(message)

    async def beat(self) -> None:
        """Tell the workers that this router lives, until cancelled. Workers that come back wait for it."""
        while True:
            for connection in self._connections.values():
                connection.send(self._greet(connection))
            is_waited_for = any(not self._hears(connection) for connection in self._connections.values())
            await asyncio.sleep(self._heartbeat_s if is_waited_for else self._idle_heartbeat_s)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._context.destroy(linger=0)

    def _open(self, address: str) -> _Connection:
        socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(_HIGH_WATER_MARK)
        socket.setsockopt(zmq.IDENTITY, self._house.name.encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is collected for a worker that isn't there
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        if not address.startswith("ipc:"):
            self._keys.connect(socket)
            # A connection through which nothing comes is given up and made anew. TCP itself would keep it for a quarter of an
            # hour, and after a long silence of the network wait minutes before it tries again.
            silent_ms = int(self._silent_s * 1e3)
            socket.setsockopt(zmq.HEARTBEAT_IVL, silent_ms // 2)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, silent_ms)
            socket.setsockopt(zmq.HEARTBEAT_TTL, silent_ms)  # the worker's end, too
            socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
        socket.connect(address)
        connection = _Connection(socket)
        loop = asyncio.get_running_loop()
        connection.tasks = [loop.create_task(self._listen(connection)), loop.create_task(self._watch(connection))]
        return connection

    def _greet(self, connection: _Connection) -> RouterHeartbeat:
        view = self._house.fleet.get(connection.worker) if connection.worker is not None else None
        if view is None:
            return self._greeting
        return msgspec.structs.replace(self._greeting, uses=not view.resting, promised=view.requests - view.sent)

    def _hears(self, connection: _Connection) -> bool:
        return connection.worker is not None and self._house.fleet.is_up(connection.worker)

    def _drop(self, connection: _Connection) -> None:
        """Its address is not one of the deployment's any more."""
        connection.close()
        if connection.worker is not None and self._workers.get(connection.worker) is connection:
            del self._workers[connection.worker]
            self._watcher.removed(connection.worker)

    async def _listen(self, connection: _Connection) -> None:
        """Take in messages until cancelled."""
        while True:
            payload = await connection.socket.recv()
            try:
                message = from_worker_decoder.decode(payload)
            except UNREADABLE as error:
                log.warning("a message that is not of this version came from %s: %s", connection.worker or "a worker", error)
                continue
            self._hear(connection, message)

    async def _watch(self, connection: _Connection) -> None:
        """Tell of broken connections until cancelled. On one host that is a process's end, which its supervisor sees, too."""
        monitor = connection.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        while True:
            await recv_monitor_message(monitor)
            if connection.worker is not None:
                self._watcher.cut_off(connection.worker)

    def _hear(self, connection: _Connection, message: FromWorker) -> None:
        house = self._house
        if isinstance(message, Outputs):
            house.hear_outputs(message)
        elif isinstance(message, BlockEvents):
            if house.hear_events(message):
                connection.send(Resync())
        elif isinstance(message, Heartbeat):
            if house.fleet.is_over(message.epoch):
                return
            connection.worker = message.worker
            self._workers[message.worker] = connection
            if message.load.fault:
                self._watcher.faulty(message)
                return
            if house.hear_heartbeat(message, house.clock.now()):
                connection.send(Resync())
            self._watcher.seen(message)
        else:
            self._watcher.left(message.worker, message.epoch)
