"""When workers are restarted, and how soon."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import msgspec
import pytest

from python_backends.core.config import HealthConfig
from python_backends.core.errors import Unavailable
from python_backends.core.host import host_id
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, Role, WorkerId
from router import supervisor as module
from router.house import House
from router.seams import Destination
from router.supervisor import Supervisor
from tests.flow.house import Counts, NumberTokenizer, deployment
from tests.unit.router.fleet_views import heartbeat

DECODE = WorkerId("decode")


class Control:
    """Remembers when it was asked to restart what."""

    def __init__(self) -> None:
        self.restarted: list[tuple[float, str]] = []
        self.problem = ""  # why no server can be reached

    def reach(self, worker: Destination) -> None:
        if self.problem:
            raise Unavailable(self.problem)

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        self.restarted.append((time.monotonic(), worker.model))

    def marked(self, worker: Destination) -> AbstractContextManager[None]:
        return nullcontext()

    def interrupted(self) -> list[Destination]:
        return []


class Silent:
    """Nothing reaches a worker."""

    def submit(self, *_: object) -> None: ...

    def abort(self, *_: object) -> None: ...

    def release(self, *_: object) -> None: ...


def _watch(play: Callable[[House, Supervisor, Heartbeat, subprocess.Popen[bytes]], Any], *, here: bool) -> Control:
    """A worker's process, known by its heartbeat; `play` on the loop."""
    control = Control()

    async def run(process: subprocess.Popen[bytes]) -> None:
        house = House(deployment(), cast(Any, NumberTokenizer()), cast(Any, Silent()), Counts())
        supervisor = Supervisor(house, HealthConfig(), control)
        beat = msgspec.structs.replace(heartbeat("decode"), pid=process.pid, host=host_id() if here else "elsewhere")
        house.hear_heartbeat(beat, time.monotonic())
        supervisor.seen(beat)
        await play(house, supervisor, beat, process)
        supervisor.close()
        house.close()

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        asyncio.run(run(process))
    finally:
        process.kill()
        process.communicate()
    return control


async def _until(condition: Callable[[], object], within_s: float = 3.0) -> bool:
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return bool(condition())


def test_its_connection_breaks_before_its_death_is_known() -> None:
    """The patience with connections of other hosts is not for it: 5 s would pass before the restart."""

    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        supervisor.cut_off(DECODE)
        assert not house.fleet.is_up(DECODE)
        process.kill()
        assert await _until(lambda: control_of(supervisor).restarted)

    def control_of(supervisor: Supervisor) -> Control:
        return cast(Control, supervisor._control)

    assert [model for _, model in _watch(play, here=True).restarted] == ["decode"]


@pytest.mark.parametrize("problem", ["", "its certificate is not vouched for"])
def test_a_worker_that_fails_canaries_is_killed_only_by_who_can_reach_its_server(
    problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the fault may be the asking router's alone: a wrong certificate authority, say, on a host of several servers."""

    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        cast(Control, supervisor._control).problem = problem
        house.rest(DECODE, "nobody listened at first")
        supervisor.take_out(DECODE, "has failed canaries")
        await asyncio.sleep(0.1)
        supervisor.take_out(DECODE, "has failed canaries")
        assert await _until(lambda: process.poll() is not None, 0.5 if problem else 3) is not bool(problem)
        assert house.fleet.is_up(DECODE) is bool(problem)
        view = house.fleet.get(DECODE)
        assert view is not None
        assert not problem or view.resting == f"its server can't be reached: {problem}"
        cast(Control, supervisor._control).problem = ""

    _watch(play, here=True)
    assert caplog.text.count(f"so it is left alone: {problem}") == bool(problem)


def test_one_that_recovers_while_its_server_is_reached_lives_on() -> None:
    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        control = cast(Control, supervisor._control)
        control.reach = lambda worker: time.sleep(0.3)  # type: ignore[method-assign]
        house.rest(DECODE, "it fails canaries")
        supervisor.take_out(DECODE, "has failed canaries")
        house.fleet.resume(DECODE)
        assert not await _until(lambda: process.poll() is not None, 0.8)
        assert house.fleet.is_up(DECODE)

    _watch(play, here=True)


@pytest.mark.parametrize("recovers", [False, True])
def test_one_elsewhere_that_says_it_lives_and_fails_canaries_is_restarted(
    recovers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no process to kill, and its heartbeats go on."""
    for name, value in {"_PATIENCE_S": 0.1, "_RECONNECT_S": 0.1, "_BACKOFF_S": (0.01,)}.items():
        monkeypatch.setattr(module, name, value)

    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        control = cast(Control, supervisor._control)
        house.rest(DECODE, "it fails canaries")
        supervisor.take_out(DECODE, "has failed canaries")
        end = time.monotonic() + (1.0 if recovers else 3.0)
        while not control.restarted and time.monotonic() < end:
            house.hear_heartbeat(beat, time.monotonic())
            if recovers:
                house.fleet.resume(DECODE)
            await asyncio.sleep(0.02)

    assert [model for _, model in _watch(play, here=False).restarted] == ([] if recovers else ["decode"])


def test_its_goodbye_is_read_after_its_death() -> None:
    """Who unloads it loads it again; a second restart would take away the next life."""

    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        assert await _until(lambda: not house.fleet.is_up(DECODE))
        supervisor.left(DECODE, beat.epoch)
        await asyncio.sleep(0.5)

    assert _watch(play, here=True).restarted == []


def test_somebody_else_has_restarted_it() -> None:
    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        assert await _until(lambda: not house.fleet.is_up(DECODE))
        house.hear_heartbeat(msgspec.structs.replace(beat, epoch=Epoch(2)), time.monotonic())
        await asyncio.sleep(0.5)

    assert _watch(play, here=True).restarted == []


@pytest.mark.parametrize("here", [True, False])
def test_only_the_connection_breaks(here: bool) -> None:
    """Its next heartbeat brings it back; it is not restarted."""

    async def play(house: House, supervisor: Supervisor, beat: Heartbeat, process: subprocess.Popen[bytes]) -> None:
        supervisor.cut_off(DECODE)
        assert not house.fleet.is_up(DECODE)
        house.hear_heartbeat(beat, time.monotonic())
        assert house.fleet.is_up(DECODE)
        await asyncio.sleep(0.5)

    assert _watch(play, here=here).restarted == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_worker_that_this_router_has_never_heard_of(comes_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last router was restarting it. Triton may still be loading it."""
    monkeypatch.setattr(module, "_RECONNECT_S", 0.1)
    monkeypatch.setattr(module, "_BACKOFF_S", (0.01,))
    control = Control()

    async def run() -> None:
        house = House(deployment(), cast(Any, NumberTokenizer()), cast(Any, Silent()), Counts())
        supervisor = Supervisor(house, HealthConfig(), control)
        supervisor.bring_back(Destination(DECODE, "decode", "", Epoch(0)), patience_s=0.1)
        if comes_back:
            house.hear_heartbeat(msgspec.structs.replace(heartbeat("decode"), host="elsewhere"), time.monotonic())
            await asyncio.sleep(0.6)
        else:
            assert await _until(lambda: control.restarted)
        supervisor.close()
        house.close()

    asyncio.run(run())
    assert [model for _, model in control.restarted] == ([] if comes_back else ["decode"])
