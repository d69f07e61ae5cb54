"""A server's own processes at the door of its workers, with real channels behind it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import zmq

from python_backends.core.host import host_id
from python_backends.core.messages import RouterHeartbeat, encode
from python_backends.worker import door
from python_backends.worker.channel import WorkerChannel
from python_backends.worker.door import WorkersDoor
from tests.unit.worker.test_channel import Listener, channel, listener, open_channel

__all__ = ["channel", "listener"]


@pytest.fixture
def address(channel: WorkerChannel, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/channel"


def test_whoever_looks_is_no_router(address: str, channel: WorkerChannel) -> None:
    with WorkersDoor({"decode": address}) as workers:
        condition = workers.look()["decode"]
        assert (condition.pid, condition.used, condition.idle) == (os.getpid(), True, True)
        assert not channel.wait_for_router(0.0)


def test_a_worker_is_used_as_long_as_one_router_uses_it(address: str) -> None:
    context = zmq.Context()
    routers = {name: context.socket(zmq.DEALER) for name in ("one", "other")}
    try:
        with WorkersDoor({"decode": address}) as workers:
            for name, socket in routers.items():
                socket.connect(address)
                socket.send(encode(RouterHeartbeat(name, os.getpid(), host_id(), name)))
                socket.recv()  # it is known now
            for one, other in ((True, False), (False, True), (False, False), (True, True)):
                for (name, socket), uses in zip(routers.items(), (one, other), strict=True):
                    socket.send(encode(RouterHeartbeat(name, os.getpid(), host_id(), name, uses)))
                end = time.monotonic() + 5
                while workers.look()["decode"].used is not (one or other):
                    assert time.monotonic() < end, (one, other)
    finally:
        context.destroy(linger=0)


def test_one_that_does_not_answer_is_not_waited_for(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_SETTLED_S", 0.0)
    with WorkersDoor({"decode": address, "gone": f"ipc://{tmp_path}/nobody"}) as workers:
        began = time.monotonic()
        assert workers.look(0.3).keys() == {"decode"}
        assert 0.2 < time.monotonic() - began < 2
        assert workers.look(0.3).keys() == {"decode"}


def test_draining_waits_and_gives_up(address: str, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_SETTLED_S", 0.0)
    monkeypatch.setattr(door, "_HAND_BACK_S", 0.1)
    with WorkersDoor({"decode": address}) as workers:
        listener.running = 1
        assert workers.drain(0.2) == ["decode"]
        assert listener.draining
        assert workers.drain(60.0, is_over=lambda: True) == ["decode"]
        listener.running = 0
        assert workers.drain(60.0) == []
        workers.resume()
        assert not listener.draining


def test_what_a_router_has_promised_is_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of it that another worker computes now."""
    monkeypatch.setattr(door, "_SETTLED_S", 0.0)
    monkeypatch.setattr(door, "_HAND_BACK_S", 0.1)
    context = zmq.Context()
    try:
        with WorkersDoor({"decode": address}) as workers:
            router = context.socket(zmq.DEALER)
            router.connect(address)
            router.send(encode(RouterHeartbeat("one", os.getpid(), host_id(), "one", promised=2)))
            router.recv()  # it is known now
            assert workers.drain(0.2) == ["decode"]
            router.send(encode(RouterHeartbeat("one", os.getpid(), host_id(), "one", promised=0)))
            assert workers.drain(5.0) == []
    finally:
        context.destroy(linger=0)


def test_an_engine_that_stands_still_is_not_waited_for(
    address: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_SETTLED_S", 0.0)
    with WorkersDoor({"decode": address}) as workers:
        listener.running, listener.standing_s = 1, 60
        began = time.monotonic()
        assert workers.drain(60.0) == []
        assert time.monotonic() - began < 10


def test_a_worker_that_comes_back_is_seen_again(listener: Listener, tmp_path: Path) -> None:
    with WorkersDoor({"decode": f"ipc://{tmp_path}/channel"}) as workers:
        assert workers.look(0.2) == {}
        late = open_channel(tmp_path, listener)
        late.start()
        try:
            assert workers.look().keys() == {"decode"}
        finally:
            late.close()
