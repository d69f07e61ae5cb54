"""Injected: what happens to workers and routers while requests wait for a worker, or were just meant for one."""

from __future__ import annotations

import signal
from collections.abc import Callable

from router.lifecycle import State
from scripts.injection.load import OpenAIWay
from scripts.injection.routers import hold_up_router, kill_router
from scripts.injection.scene import WAITING, Hit, Scene, Signals, Strike, at_every_worker
from scripts.injection.signals import pause_worker, signal_worker

_CROWDED = Signals({"engine": {"max_batch": 1}})
"""Fewer places at workers than clients: requests wait, and it takes the router a turn of its loop to have one go on."""


def _at_the_router(what: str, make: Callable[[State], Callable[[Scene], Hit]]) -> list[Strike]:
    return [Strike(what, "router", state.value, make(state), OpenAIWay, _CROWDED) for state in (State.QUEUED, State.ROUTED)]


STRIKES = [
    *at_every_worker("kill -9", lambda role, state: signal_worker(signal.SIGKILL, role, state), WAITING, _CROWDED),
    *at_every_worker("SIGSTOP", lambda role, state: signal_worker(signal.SIGSTOP, role, state), WAITING, _CROWDED),
    *at_every_worker("SIGSTOP, SIGCONT", pause_worker, WAITING, _CROWDED),
    *_at_the_router("kill -9", kill_router),
    *_at_the_router("SIGSTOP, SIGCONT", hold_up_router),
]
