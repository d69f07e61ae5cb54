"""What every injection needs: a server under load, the moment to strike, and how to know that what was hit is back."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News, WorkerNews
from router.lifecycle import State
from scripts.injection.load import OpenAIWay, TritonWay
from scripts.injection.watch import find_victim, wait_for
from scripts.router_door import RouterDoor
from scripts.tritonserver import TritonServer

VICTIM_S = 90.0  # some states last for a turn of the router's loop
BACK_S = 60.0
SILENT_S = 1.5  # health.silent_s of the deployments here: a worker that is stopped for longer is replaced
LEASE_S = 2.0  # transfer.lease_s of them
FAKE = {"prefill_us_per_token": 300, "step_us": 6000}  # engine.fake of them
GRACE_S = 10.0  # for what a worker has begun when it is drained
_LOOK_EVERY_S = 0.02

PLACES = [
    (Role.PREFILL, State.PREFILLING),
    (Role.PREFILL, State.HANDING_OFF),
    (Role.DECODE, State.HANDING_OFF),
    (Role.DECODE, State.DECODING),
    (Role.AGGREGATED, State.DECODING),
]
"""Every role, with every state in which a worker of it has something to do."""

WAITING = [(role, state) for state in (State.QUEUED, State.ROUTED) for role in Role]
"""Every role, with the states of a request that is not at a worker yet: it waits for one, or was just meant for one."""

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
    """What injections need of the machine, and of the deployment."""

    @property
    def settings(self) -> dict[str, object]:
        """Of the deployment, by section, over the usual ones. Known while it is ready."""

    def ready(self, engine: str) -> AbstractContextManager[None]:
        """Servers that are started meanwhile can be hit. Raises Unavailable, which says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """They are always there."""

    settings: dict[str, object] = field(default_factory=dict)

    def ready(self, engine: str) -> AbstractContextManager[None]:
        return nullcontext()


SIGNALS = Signals()


@dataclass(frozen=True, slots=True)
class Strike:
    """`strike` raises Unavailable when there is nothing to hit, or when what was hit does not come back."""

    what: str
    where: str
    when: str
    strike: Callable[[Scene], Hit]
    only: type[TritonWay | OpenAIWay] | None = None  # clients that can survive it
    means: Means = SIGNALS


def at_every_worker(
    what: str,
    make: Callable[[Role, State], Callable[[Scene], Hit]],
    places: Sequence[tuple[Role, State]] = PLACES,
    means: Means = SIGNALS,
) -> list[Strike]:
    return [Strike(what, role.value, state.value, make(role, state), means=means) for role, state in places]


def news_of(scene: Scene) -> News:
    return wait_for(scene.door, lambda news: news, VICTIM_S, "the router answers")


def victim(scene: Scene, role: Role, state: State) -> tuple[WorkerNews, list[str]]:
    """A worker with a request in this state, and the clients whose requests are there."""
    what = f"a request {state.value}, and a {role.value} worker for it"
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


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still; nothing happens to it afterwards if somebody has ended it by then."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def all_well(scene: Scene) -> float:
    """When every worker is used."""
    wait_for(scene.door, lambda news: None if in_trouble(news) else True, BACK_S, "every worker is used")
    return time.monotonic()


def same_lives(scene: Scene, workers: Iterable[WorkerNews], why: str, router: str = "") -> None:
    """Raises Unavailable that says `why` when one of them is in another life, or another router than that one is there."""
    news = news_of(scene)
    replaced = [str(worker.id) for worker in workers if worker_in(news, worker).epoch != worker.epoch]
    if router and news.router != router:
        replaced.append("the router")
    if replaced:
        raise Unavailable(f"{', '.join(replaced)} was replaced {why}")


def router_pid(scene: Scene) -> int:
    pid = scene.door.router_pid()
    if pid is None:
        raise Unavailable("the router does not answer")
    return pid


def lose_router(scene: Scene, number: int) -> Hit:
    """It gets the signal. Back: when another one serves."""
    pid = router_pid(scene)
    news = news_of(scene)
    at = time.monotonic()
    os.kill(pid, number)
    wait_for(
        scene.door,
        lambda later: (later.router != news.router and not later.trouble) or None,
        BACK_S,
        "another router is there",
    )
    return Hit(at, clients_of(news), time.monotonic())


def kill_front_end(scene: Scene) -> float:
    """When another one answers."""
    (former,) = front_ends(scene.server)
    os.kill(former, signal.SIGKILL)
    end = time.monotonic() + BACK_S
    while not (front_ends(scene.server) - {former} and _answers(scene.server)):
        if time.monotonic() > end:
            raise Unavailable(f"another front end is there: not within {BACK_S:.0f} s")
        time.sleep(_LOOK_EVERY_S)
    return time.monotonic()


def front_ends(server: TritonServer) -> set[int]:
    """Their processes."""
    guardian = psutil.Process(server.pid).parent()
    children = guardian.children() if guardian is not None else []
    with suppress(psutil.NoSuchProcess):  # ended meanwhile: asked again
        return {child.pid for child in children if "router.http" in child.cmdline()}
    return set()


def _answers(server: TritonServer) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://{server.host}:{server.openai_port}/health/live", timeout=1.0):
        return True
    return False


def clients_of(news: News) -> list[str]:
    return [record.client_id for record in news.live]
