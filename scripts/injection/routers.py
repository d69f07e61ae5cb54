"""Injected: routers and front ends that die, or that stand still for a while or for good."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import psutil

from python_backends.core.errors import Unavailable
from router.lifecycle import State
from scripts.injection.load import OpenAIWay, TritonWay
from scripts.injection.scene import (
    SILENT_S,
    STATES,
    Hit,
    Scene,
    Strike,
    all_well,
    clients_of,
    front_ends,
    kill_front_end,
    lose_router,
    request_in,
    router_pid,
    same_lives,
    stopped,
)

_ROUTER_HELD_UP_S = 2 * SILENT_S  # workers give up what they do for it; front ends do not give it up
_FRONT_END_HELD_UP_S = 6.0  # longer than a front end waits for a router that says nothing


def kill_router(state: State) -> Callable[[Scene], Hit]:
    def strike(scene: Scene) -> Hit:
        request_in(scene, state)
        return lose_router(scene, signal.SIGKILL)

    return strike


def _stop_router(state: State) -> Callable[[Scene], Hit]:
    """It stands still until it is replaced, and must not be there any more then: continued, it would fight its successor."""

    def strike(scene: Scene) -> Hit:
        request_in(scene, state)
        pid = router_pid(scene)
        hit = lose_router(scene, signal.SIGSTOP)
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            raise Unavailable("the router that stood still is there beside its successor")
        return hit

    return strike


def hold_up_router(state: State) -> Callable[[Scene], Hit]:
    """It goes on with its requests, and takes no worker for dead because it has not heard of it meanwhile.

    Without calls of Triton's own protocols: Triton may abort when such a call was made while the router stood still.
    """

    def strike(scene: Scene) -> Hit:
        news = request_in(scene, state)
        at = time.monotonic()
        with stopped(router_pid(scene)):
            time.sleep(_ROUTER_HELD_UP_S)
        back = all_well(scene)
        same_lives(scene, news.workers, "because the router stood still", news.router)
        return Hit(at, clients_of(news), back)

    return strike


def _kill_front_end(scene: Scene) -> Hit:
    """Its own clients lose their connections; others notice nothing."""
    news = request_in(scene, State.DECODING)
    return Hit(time.monotonic(), clients_of(news), kill_front_end(scene))


def _hold_up_front_end(state: State) -> Callable[[Scene], Hit]:
    """Its own clients wait for so long; others notice nothing. It does not blame the router for what it has not heard."""

    def strike(scene: Scene) -> Hit:
        news = request_in(scene, state)
        (pid,) = front_ends(scene.server)
        at = time.monotonic()
        with stopped(pid):
            time.sleep(_FRONT_END_HELD_UP_S)
        back = all_well(scene)
        same_lives(scene, news.workers, "because the front end stood still", news.router)
        return Hit(at, clients_of(news), back)

    return strike


STRIKES = [
    *[Strike("kill -9", "router", state.value, kill_router(state), OpenAIWay) for state in STATES],
    *[Strike("SIGSTOP", "router", state.value, _stop_router(state), OpenAIWay) for state in STATES],
    *[Strike("SIGSTOP, SIGCONT", "router", state.value, hold_up_router(state), OpenAIWay) for state in STATES],
    Strike("kill -9", "front end", State.DECODING.value, _kill_front_end, TritonWay),
    *[Strike("SIGSTOP, SIGCONT", "front end", state.value, _hold_up_front_end(state)) for state in STATES],
]
