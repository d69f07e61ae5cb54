"""Injected: no space left where a server writes while serving, nor in /dev/shm, through which Triton talks to its models."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from python_backends.core.paths import run_base
from python_backends.core.types import Role
from router.lifecycle import State
from scripts.injection.load import OpenAIWay, TritonWay
from scripts.injection.scene import (
    STATES,
    Hit,
    Scene,
    Strike,
    all_well,
    back,
    clients_of,
    kill_front_end,
    lose_router,
    request_in,
    victim,
)
from scripts.injection.small_disks import SHM, SmallDisks

_FULL_S = 3.0
_DISKS = SmallDisks()


def _fill(place: Callable[[], Path], state: State) -> Callable[[Scene], Hit]:
    """Nothing needs to be replaced; new requests come while it is full."""

    def strike(scene: Scene) -> Hit:
        news = request_in(scene, state)
        at = time.monotonic()
        with _DISKS.full(place()):
            time.sleep(_FULL_S)
        return Hit(at, clients_of(news), all_well(scene))

    return strike


def _kill_worker(scene: Scene) -> Hit:
    """It is back while the disk is still full."""
    worker, clients = victim(scene, Role.DECODE, State.DECODING)
    with _DISKS.full(run_base()):
        at = time.monotonic()
        os.kill(worker.pid, signal.SIGKILL)
        return Hit(at, clients, back(scene, worker, new_life=True))


def _kill_router(scene: Scene) -> Hit:
    """As above."""
    request_in(scene, State.DECODING)
    with _DISKS.full(run_base()):
        return lose_router(scene, signal.SIGKILL)


def _kill_front_end(scene: Scene) -> Hit:
    """As above. Its own clients lose their connections; others notice nothing."""
    news = request_in(scene, State.DECODING)
    with _DISKS.full(run_base()):
        return Hit(time.monotonic(), clients_of(news), kill_front_end(scene))


def _kill_worker_without_shm(scene: Scene) -> Hit:
    """Triton can't load it while /dev/shm is full. Others go on, and it is back by itself when there is room."""
    worker, clients = victim(scene, Role.DECODE, State.DECODING)
    with _DISKS.full(SHM):
        at = time.monotonic()
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(_FULL_S)
    back(scene, worker, new_life=True)
    return Hit(at, clients, all_well(scene))


STRIKES = [
    *[Strike("disk full", "server", state.value, _fill(run_base, state), means=_DISKS) for state in STATES],
    Strike("disk full, kill -9", "decode", "decoding", _kill_worker, means=_DISKS),
    Strike("disk full, kill -9", "router", "decoding", _kill_router, OpenAIWay, _DISKS),
    Strike("disk full, kill -9", "front end", "decoding", _kill_front_end, TritonWay, _DISKS),
    *[Strike("/dev/shm full", "server", state.value, _fill(lambda: SHM, state), means=_DISKS) for state in STATES],
    Strike("/dev/shm full, kill -9", "decode", "decoding", _kill_worker_without_shm, means=_DISKS),
]
