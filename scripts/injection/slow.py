"""Injected: workers that compute several times slower for some seconds, as beside a neighbour that takes their cores."""

from __future__ import annotations

import time
from collections.abc import Callable

from python_backends.core.types import Role
from router.lifecycle import State
from scripts.injection.scene import Hit, Scene, Strike, all_well, at_every_worker, same_lives, stopped, victim

_SLOW_S = 4.0
_STOPPED_S, _RUNS_S = 0.04, 0.01  # a fifth of its time is left, in turns shorter than a heartbeat


def _slow_down(role: Role, state: State) -> Callable[[Scene], Hit]:
    """Nothing says so but its pace. It is not taken for dead, and is normal again afterwards."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        while time.monotonic() < at + _SLOW_S:
            with stopped(worker.pid):
                time.sleep(_STOPPED_S)
            time.sleep(_RUNS_S)
        back = all_well(scene)
        same_lives(scene, [worker], "because it was slow")
        return Hit(at, clients, back)

    return strike


STRIKES: list[Strike] = at_every_worker("slow", _slow_down)
