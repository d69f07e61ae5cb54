"""Injected: workers that die, or that stand still for a while or for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from python_backends.core.types import Role
from router.lifecycle import State
from scripts.injection.scene import Hit, Scene, Signals, Strike, all_well, at_every_worker, back, stopped, victim

_PAUSE_S = 0.7  # a worker that is stopped for so long is only late
_LONG_PAUSE_S = 3.0  # Triton gives up calls to it after a second
_PATIENT = Signals({"health": {"silent_s": 10.0}})  # nobody takes its silence for death


def signal_worker(number: int, role: Role, state: State) -> Callable[[Scene], Hit]:
    """The worker's process is dead, or stands still until it is replaced."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        os.kill(worker.pid, number)
        return Hit(at, clients, back(scene, worker, new_life=True))

    return strike


def pause_worker(role: Role, state: State) -> Callable[[Scene], Hit]:
    """It stands still for a moment that nobody takes for death."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        with stopped(worker.pid):
            time.sleep(_PAUSE_S)
        return Hit(at, clients, back(scene, worker, new_life=False))

    return strike


def _pause_long(role: Role, state: State) -> Callable[[Scene], Hit]:
    """So long that what Triton shares with it would be spoiled if it went on where it was: it is replaced before, or was not
    given anything meanwhile.
    """

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        with stopped(worker.pid):
            time.sleep(_LONG_PAUSE_S)
        return Hit(at, clients, all_well(scene))

    return strike


STRIKES: list[Strike] = [
    *at_every_worker("kill -9", lambda role, state: signal_worker(signal.SIGKILL, role, state)),
    *at_every_worker("SIGSTOP", lambda role, state: signal_worker(signal.SIGSTOP, role, state)),
    *at_every_worker("SIGSTOP, SIGCONT", pause_worker),
    *at_every_worker("held up 3 s", _pause_long, means=_PATIENT),
]
