"""What every injection needs: a server under load, the moment to strike, and how to know that what was hit is back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News, WorkerNews
from router.lifecycle import State
from scripts.injection.load import OpenAIWay, TritonWay
from scripts.injection.watch import find_victim, wait_for
from scripts.router_door import RouterDoor
from scripts.tritonserver import TritonServer

VICTIM_S = 30.0
BACK_S = 60.0
SILENT_S = 1.5  # health.silent_s of the deployments here: a worker that is stopped for longer is replaced
LEASE_S = 2.0  # transfer.lease_s of them
GRACE_S = 10.0  # for what a worker has begun when it is drained

PLACES = [
    (Role.PREFILL, State.PREFILLING),
    (Role.PREFILL, State.HANDING_OFF),
    (Role.DECODE, State.HANDING_OFF),
    (Role.DECODE, State.DECODING),
    (Role.AGGREGATED, State.DECODING),
]
"""Every role, with every state in which a worker of it has something to do."""

STATES = (State.PREFILLING, State.HANDING_OFF, State.DECODING)


@dataclass(frozen=True, slots=True)
class Scene:
    """A server under load, and what is known about it."""

    server: TritonServer
    door: RouterDoor


@dataclass(frozen=True, slots=True)
class Hit:
    """An injection that was made. Instants are monotonic seconds."""

    at: float
    clients: list[str]  # whose requests were at what was hit
    back: float  # when that served again


class Means(Protocol):
    """What injections need of the machine."""

    def ready(self) -> AbstractContextManager[None]:
        """Servers that are started meanwhile can be hit. Raises Unavailable, which says what is missing."""


class _Signals:
    """They are always there."""

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()


SIGNALS = _Signals()


@dataclass(frozen=True, slots=True)
class Strike:
    """`strike` raises Unavailable when there is nothing to hit, or when what was hit does not come back."""

    what: str
    where: str
    when: str
    strike: Callable[[Scene], Hit]
    only: type[TritonWay | OpenAIWay] | None = None  # clients that can survive it
    means: Means = SIGNALS


def at_every_worker(what: str, make: Callable[[Role, State], Callable[[Scene], Hit]]) -> list[Strike]:
    return [Strike(what, role.value, state.value, make(role, state)) for role, state in PLACES]


def news_of(scene: Scene) -> News:
    return wait_for(scene.door, lambda news: news, VICTIM_S, "the router answers")


def victim(scene: Scene, role: Role, state: State) -> tuple[WorkerNews, list[str]]:
    """A worker with a request in this state, and the clients whose requests are there."""
    what = f"a request {state.value} at a {role.value} worker"
    return wait_for(scene.door, lambda news: find_victim(news, role, state), VICTIM_S, what)


def request_in(scene: Scene, state: State) -> News:
    """The news of a moment in which a request is in this state and nothing is wrong."""

    def find(news: News) -> News | None:
        return news if not in_trouble(news) and any(record.state is state for record in news.live) else None

    return wait_for(scene.door, find, VICTIM_S, f"a request {state.value}")


def in_trouble(news: News) -> bool:
    return bool(news.trouble) or any(not worker.up or worker.resting for worker in news.workers)


def back(scene: Scene, worker: WorkerNews, *, new_life: bool) -> float:
    """When the worker is given work again."""

    def is_back(news: News) -> bool | None:
        now = worker_in(news, worker)
        return (now.up and not now.resting and (not new_life or now.epoch != worker.epoch)) or None

    wait_for(scene.door, is_back, BACK_S, f"{worker.id} is back")
    return time.monotonic()


def worker_in(news: News, worker: WorkerNews) -> WorkerNews:
    """The same worker as it is now; as it was where the router, a new one, has not heard of it yet."""
    return next((other for other in news.workers if other.id == worker.id), worker)


def kill_router(scene: Scene) -> Hit:
    """Back: when another one serves."""
    pid = scene.door.router_pid()
    if pid is None:
        raise Unavailable("the router does not answer")
    news = news_of(scene)
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_for(
        scene.door,
        lambda later: (later.router != news.router and not later.trouble) or None,
        BACK_S,
        "another router is there",
    )
    return Hit(at, clients_of(news), time.monotonic())


def clients_of(news: News) -> list[str]:
    return [record.client_id for record in news.live]
