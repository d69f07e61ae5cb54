"""The router's end of the channel: one socket on the event loop, one message per engine step for all of its streams."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

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
from python_backends.core.types import Epoch, WorkerId
from router.house import House

log = logging.getLogger(__name__)

_HIGH_WATER_MARK = 100_000


class Watcher(Protocol):
    """Who looks after the lives of workers."""

    def seen(self, heartbeat: Heartbeat) -> None: ...

    def left(self, worker: WorkerId, epoch: Epoch) -> None: ...


class RouterChannel:
    """Create it and use it on the event loop."""

    def __init__(self, address: str, name: str, heartbeat_s: float) -> None:
        self._name = name
        self._heartbeat_s = heartbeat_s
        self._identities: dict[WorkerId, bytes] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self.close()
            raise

    def send(self, worker: WorkerId, message: ToWorker) -> None:
        """Never blocks. What is sent to a worker that isn't there is lost, which its epoch makes harmless."""
        identity = self._identities.get(worker)
        if identity is not None:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)

    async def listen(self, house: House, watcher: Watcher) -> None:
        """Take in messages until cancelled."""
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                message = from_worker_decoder.decode(b"".join(frames))
            except msgspec.MsgspecError as error:
                log.warning("a message that is not of this version came from %r: %s", identity, error)
                continue
            self._hear(identity, message, house, watcher)

    def _hear(self, identity: bytes, message: FromWorker, house: House, watcher: Watcher) -> None:
        if isinstance(message, Outputs):
            house.hear_outputs(message)
        elif isinstance(message, BlockEvents):
            if house.hear_events(message):
                self.send(message.worker, Resync())
        elif isinstance(message, Heartbeat):
            if house.fleet.is_over(message.epoch):
                return
            if self._identities.get(message.worker) != identity:
                self._identities[message.worker] = identity
                self.send(message.worker, RouterHeartbeat(self._name))  # it should know at once whom it works for
            if house.hear_heartbeat(message, house.clock.now()):
                self.send(message.worker, Resync())
            watcher.seen(message)
        else:
            watcher.left(message.worker, message.epoch)

    async def beat(self) -> None:
        """Tell the workers that this router lives, until cancelled."""
        while True:
            for worker in list(self._identities):
                self.send(worker, RouterHeartbeat(self._name))
            await asyncio.sleep(self._heartbeat_s)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.destroy(linger=0)
