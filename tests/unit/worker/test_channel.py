"""The worker's end of the channel, with a socket as a router has it at the other end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from python_backends.core.curve import CurveKeys
from python_backends.core.host import host_id
from python_backends.core.layout import KVLayout
from python_backends.core.messages import (
    BlockEvents,
    Condition,
    Drain,
    FromWorker,
    Heartbeat,
    RouterHeartbeat,
    ToWorker,
    encode,
    from_worker_decoder,
)
from python_backends.core.types import Epoch, Role, WorkerId, WorkerLoad
from python_backends.worker.channel import WorkerChannel

BUSY_S, IDLE_S = 0.1, 0.5
WORKER, EPOCH = WorkerId("decode"), Epoch(1)


class Listener:
    def __init__(self) -> None:
        self.running = 0
        self.standing_s = 0
        self.draining = False

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=WORKER,
            model="decode",
            server="",
            role=Role.DECODE,
            epoch=EPOCH,
            pid=os.getpid(),
            host=host_id(),
            load=WorkerLoad(running_requests=self.running),
            layout=KVLayout(2, 1, 8, 16, "float32"),
            fingerprint="f",
            max_context=100,
            step_tokens=64,
            max_batch=4,
            events_sequence=0,
        )

    def condition(self, used: bool, promised: int) -> Condition:
        return Condition(EPOCH, os.getpid(), self.draining, not (self.running or promised), used, self.standing_s, "")

    def told(self, message: ToWorker) -> None:
        self.draining = isinstance(message, Drain)

    def router_found(self, router: str) -> None: ...
    def router_lost(self, router: str) -> FromWorker | None: ...


class Router:
    """Says hello and reads."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"router")
        self._socket.connect(address)
        self._socket.send(encode(RouterHeartbeat("router", os.getpid(), host_id(), "here")))

    def heartbeats(self, seconds: float) -> int:
        """How many come within that time."""
        count, end = 0, time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            if self._socket.poll(int(left_s * 1e3) + 1):
                count += isinstance(from_worker_decoder.decode(self._socket.recv()), Heartbeat)
        return count

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def listener() -> Listener:
    return Listener()


def open_channel(directory: Path, listener: Listener) -> WorkerChannel:
    return WorkerChannel(f"ipc://{directory}/channel", "", CurveKeys.derive(b"key"), BUSY_S, 5 * IDLE_S, listener)


@pytest.fixture
def channel(listener: Listener, tmp_path: Path) -> Iterator[WorkerChannel]:
    made = open_channel(tmp_path, listener)
    made.start()
    yield made
    made.close()


@pytest.fixture
def router(channel: WorkerChannel, tmp_path: Path) -> Iterator[Router]:
    made = Router(f"ipc://{tmp_path}/channel")
    assert channel.wait_for_router(5.0)
    made.heartbeats(IDLE_S)
    yield made
    made.close()


def test_heartbeats_are_seldom_while_there_is_nothing_to_tell(router: Router) -> None:
    assert 1 <= router.heartbeats(4 * IDLE_S) <= 5


def test_and_frequent_while_something_happens(channel: WorkerChannel, listener: Listener, router: Router) -> None:
    count = 0
    for sequence in range(6):
        listener.running += 1
        if sequence % 2:
            channel.send(BlockEvents(WORKER, EPOCH, sequence, [], []))
        else:
            channel.stir()
        count += router.heartbeats(2 * BUSY_S)
    assert count >= 5


def test_closing_does_not_wait_for_the_next_one(listener: Listener, tmp_path: Path) -> None:
    channel = open_channel(tmp_path, listener)
    channel.start()
    time.sleep(2 * BUSY_S)
    began = time.monotonic()
    channel.close()
    assert time.monotonic() - began < IDLE_S / 2
