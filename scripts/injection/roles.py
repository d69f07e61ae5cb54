"""Injected: workers that take another role while they have requests, and what may go wrong meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News, WorkerNews
from router.lifecycle import State
from scripts.injection.load import OpenAIWay
from scripts.injection.scene import (
    BACK_S,
    GRACE_S,
    VICTIM_S,
    Hit,
    Scene,
    Strike,
    at_every_worker,
    back,
    lose_router,
    news_of,
    victim,
    worker_in,
)
from scripts.injection.watch import wait_for
from scripts.router_door import RouterDoor

_TOLD_S = 5.0


def _change_role(role: Role, state: State) -> Callable[[Scene], Hit]:
    """As scripts/role does, there and back."""
    other = Role.PREFILL if role is Role.DECODE else Role.DECODE

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = monotonic()
        scene.door.manage("restart", worker.id, GRACE_S, BACK_S, other)
        changed = _in_role(scene, worker, other)
        scene.door.manage("restart", worker.id, GRACE_S, BACK_S, role)
        return Hit(at, clients, back(scene, changed, new_life=True))

    return strike


def _kill_changed(scene: Scene) -> Hit:
    """A worker dies whose role was changed: it comes back in the role that it was given."""
    worker, clients = victim(scene, Role.DECODE, State.DECODING)
    at = monotonic()
    scene.door.manage("restart", worker.id, GRACE_S, BACK_S, Role.PREFILL)
    changed = _in_role(scene, worker, Role.PREFILL)
    os.kill(changed.pid, signal.SIGKILL)
    back(scene, changed, new_life=True)
    changed = _in_role(scene, worker, Role.PREFILL)
    scene.door.manage("restart", worker.id, GRACE_S, BACK_S, worker.role)
    return Hit(at, clients, back(scene, changed, new_life=True))


def _kill_router_amid(scene: Scene) -> Hit:
    """The worker is drained or unloaded by then, and the router dies that would have loaded it again.

    Which of the two it was decides whether it comes back in a new life or in the one it had.
    """
    worker, _ = victim(scene, Role.DECODE, State.DECODING)
    asking = threading.Thread(target=_ask, args=(scene, worker, Role.PREFILL))
    asking.start()
    wait_for(scene.door, lambda news: not worker_in(news, worker).up or None, VICTIM_S, f"{worker.id} is unloaded")
    hit = lose_router(scene, signal.SIGKILL)
    asking.join()
    wait_for(scene.door, lambda news: _is_used(news, worker) or None, BACK_S, f"{worker.id} is back")
    served = monotonic()
    now = worker_in(news_of(scene), worker)
    if now.role is not worker.role:
        scene.door.manage("restart", worker.id, GRACE_S, BACK_S, worker.role)
        back(scene, now, new_life=True)
    return Hit(hit.at, hit.clients, served)


def _is_used(news: News, worker: WorkerNews) -> bool:
    """Whether the router, which may be new, has heard of it and gives it work."""
    return any(now.id == worker.id and now.up and not now.resting for now in news.workers)


def _ask(scene: Scene, worker: WorkerNews, role: Role) -> None:
    with RouterDoor(scene.server.run_dir) as door, suppress(Unavailable):  # who is asked is killed
        door.manage("restart", worker.id, 0.0, _TOLD_S, role)


def _in_role(scene: Scene, worker: WorkerNews, role: Role) -> WorkerNews:
    """The worker as it is now. Raises Unavailable when it has another role."""

    def find(news: News) -> WorkerNews | None:
        now = worker_in(news, worker)
        return now if now.up and now.role is role else None

    return wait_for(scene.door, find, _TOLD_S, f"{worker.id} is a {role.value} worker")


STRIKES = [
    *at_every_worker("role change, back", _change_role),
    Strike("role change, kill -9", "decode", "decoding", _kill_changed),
    Strike("role change, kill -9", "router", "decoding", _kill_router_amid, OpenAIWay),
]
