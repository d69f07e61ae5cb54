"""Injected: wall clocks that jump, of everything that belongs to a server, or of one process as if it were on another host."""

from __future__ import annotations

import time
from collections.abc import Callable

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News
from router.lifecycle import State
from scripts.injection.scene import (
    LEASE_S,
    STATES,
    Hit,
    Scene,
    Strike,
    clients_of,
    in_trouble,
    news_of,
    request_in,
    router_pid,
    same_lives,
    victim,
)
from scripts.injection.wall_clock import WallClock

_HOUR_S = 3600.0
_WRONG_S = LEASE_S + 1.0  # so long; what it may hurt has ended by then, or never does
_CLOCK = WallClock()


def _all_jump(seconds: float, state: State) -> Callable[[Scene], Hit]:
    def strike(scene: Scene) -> Hit:
        news = request_in(scene, state)
        return _jump(scene, news, clients_of(news), seconds, 0)

    return strike


def _one_jumps(seconds: float, role: Role, state: State) -> Callable[[Scene], Hit]:
    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        return _jump(scene, news_of(scene), clients, seconds, worker.pid)

    return strike


def _router_jumps(seconds: float) -> Callable[[Scene], Hit]:
    def strike(scene: Scene) -> Hit:
        news = request_in(scene, State.DECODING)
        return _jump(scene, news, clients_of(news), seconds, router_pid(scene))

    return strike


def _jump(scene: Scene, before: News, clients: list[str], seconds: float, pid: int) -> Hit:
    """There, and later back. Nobody may be taken for dead meanwhile."""
    _CLOCK.check(worker.pid for worker in before.workers)
    at = time.monotonic()
    try:
        _CLOCK.set(seconds, pid)
        time.sleep(_WRONG_S)
    finally:
        _CLOCK.set(0.0, pid)
    same_lives(scene, before.workers, "because the clock jumped", before.router)
    if in_trouble(news_of(scene)):
        raise Unavailable("a worker is not used because the clock jumped")
    return Hit(at, clients, time.monotonic())


STRIKES = [
    Strike(f"clock {name}, back", where, state.value, strike, means=_CLOCK)
    for name, seconds in (("+1 h", _HOUR_S), ("-1 h", -_HOUR_S))
    for where, state, strike in (
        *(("all", state, _all_jump(seconds, state)) for state in STATES),
        ("prefill", State.HANDING_OFF, _one_jumps(seconds, Role.PREFILL, State.HANDING_OFF)),
        ("decode", State.HANDING_OFF, _one_jumps(seconds, Role.DECODE, State.HANDING_OFF)),
        ("router", State.DECODING, _router_jumps(seconds)),
    )
]
