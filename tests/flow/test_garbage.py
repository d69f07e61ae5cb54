"""Bytes that are no message, at every socket: they are passed over, and what is served goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from python_backends.core.messages import Resync, encode
from python_backends.worker.channel import WorkerChannel
from router.door.door import Door
from router.types import Wish
from tests.flow.house import GREEDY, FlowHouse, InProcess, deployment, prompt, reference

GARBAGE = [
    encode(Resync()).replace(b"y", b"\xff"),  # no UTF-8
    encode(Resync())[:-1],
    encode(Resync()) + b"\0",
    b"\x91" * 100_000,  # lists in lists in lists
    b"",
    bytes(range(256)),
]


@pytest.fixture(scope="module")
def house() -> Iterator[FlowHouse]:
    with FlowHouse(deployment()) as house:
        yield house


def still_serves(house: FlowHouse, seed: int) -> None:
    answer = house.ask(prompt(40, seed), GREEDY, Wish.REMOTE)
    assert answer.ids == reference(prompt(40, seed), GREEDY)
    house.assert_nothing_held()


def knock(address: str) -> None:
    """All of the garbage, from a stranger."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 1000)
        stranger.connect(address)
        for data in GARBAGE:
            stranger.send(data)


def test_a_worker_passes_over_what_it_can_not_read(house: FlowHouse) -> None:
    for worker in house.workers:
        knock(house.address(worker))
    still_serves(house, 1)


def test_a_router_passes_over_what_a_worker_should_not_say(house: FlowHouse) -> None:
    for worker in house.workers.values():
        assert isinstance(worker, InProcess)
        channel = worker.worker._channel
        assert isinstance(channel, WorkerChannel)
        with channel._outbox_lock:
            for data in GARBAGE:
                channel._outbox.send_multipart([b"", data])
    still_serves(house, 2)


def test_a_door_passes_over_who_can_not_speak(house: FlowHouse, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/door"
    house.service.attend(lambda: Door(house.service, address).attend())
    knock(address)
    still_serves(house, 3)
    knock(address)
    still_serves(house, 4)
