"""Workers of other hosts that are only cut off: nobody restarts them, not even when the network is whole again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import msgspec
import pytest

from python_backends.core.config import HealthConfig
from python_backends.core.errors import Unavailable
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Role, WorkerId
from router import supervisor as module
from router.house import House
from router.seams import Destination
from router.supervisor import Supervisor
from tests.flow.house import Counts, NumberTokenizer, deployment
from tests.unit.router.fleet_views import heartbeat

DECODE = WorkerId("decode")


class Control:
    """A server that can be reached or not. Implements router.supervisor.ModelControl."""

    def __init__(self) -> None:
        self.reachable = False
        self.asked = 0
        self.restarts = 0

    def reach(self, worker: Destination) -> None:
        self.asked += 1
        if not self.reachable:
            raise Unavailable("no route to host")

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        self.restarts += 1

    def marked(self, worker: Destination) -> AbstractContextManager[None]:
        return nullcontext()

    def interrupted(self) -> list[Destination]:
        return []


Play = Callable[[House, Control, Heartbeat], Coroutine[Any, Any, None]]


def _cut_off(play: Play, monkeypatch: pytest.MonkeyPatch) -> Control:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(module, "_RECONNECT_S", 0.2)
    monkeypatch.setattr(module, "_BACKOFF_S", (0.01,))
    control = Control()

    async def run() -> None:
        house = House(deployment(), cast(Any, NumberTokenizer()), cast(Any, None), Counts())
        supervisor = Supervisor(house, HealthConfig(), control)
        beat = msgspec.structs.replace(heartbeat("decode"), host="elsewhere")
        house.hear_heartbeat(beat, time.monotonic())
        supervisor.cut_off(DECODE)
        assert not house.fleet.is_up(DECODE)
        await play(house, control, beat)
        supervisor.close()
        house.close()

    asyncio.run(run())
    return control


async def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_heard_again_soon_after_its_server_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(house: House, control: Control, beat: Heartbeat) -> None:
        await _until(lambda: control.asked > 3)
        control.reachable = True
        asked = control.asked
        await _until(lambda: control.asked > asked)
        house.hear_heartbeat(beat, time.monotonic())
        await asyncio.sleep(0.5)

    assert _cut_off(play, monkeypatch).restarts == 0


def test_silent_although_its_server_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(house: House, control: Control, beat: Heartbeat) -> None:
        control.reachable = True
        await _until(lambda: control.restarts)

    assert _cut_off(play, monkeypatch).restarts == 1


def test_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is none of the deployment's any more: nobody goes on asking for it."""

    async def play(house: House, control: Control, beat: Heartbeat) -> None:
        await _until(lambda: control.asked)
        house.forget(DECODE)
        await asyncio.sleep(0.1)
        asked = control.asked
        await asyncio.sleep(0.2)
        assert control.asked == asked

    assert _cut_off(play, monkeypatch).restarts == 0
