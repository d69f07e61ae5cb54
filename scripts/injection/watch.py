"""What is looked for while things break: workers with their processes, requests with their states."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News, WorkerNews
from router.journal import Record
from router.lifecycle import State
from scripts.router_door import RouterDoor

_EVERY_S = 0.002

_Found = TypeVar("_Found")


def wait_for(door: RouterDoor, find: Callable[[News], _Found | None], within_s: float, what: str) -> _Found:
    """The first thing found in the router's news. Raises Unavailable that says `what` was waited for."""
    end = time.monotonic() + within_s
    while True:
        news = door.news()
        found = find(news) if news is not None else None
        if found is not None:
            return found
        if time.monotonic() > end:
            raise Unavailable(f"{what}: not within {within_s:.0f} s")
        time.sleep(_EVERY_S)


def worker_of(record: Record, role: Role) -> str:
    """The worker of this role that has something to do for the request now, or is meant to have; empty: none."""
    if record.state is State.ROUTED:
        remote = record.prefill_worker != record.decode_worker
        return (record.prefill_worker if remote else "") if role is Role.PREFILL else record.decode_worker
    if role is Role.PREFILL:
        busy = record.state in (State.PREFILLING, State.HANDING_OFF) and record.prefill_worker != record.decode_worker
        return record.prefill_worker if busy else ""
    return record.decode_worker if record.state in (State.HANDING_OFF, State.DECODING) else ""


def find_victim(news: News, role: Role, state: State) -> tuple[WorkerNews, list[str]] | None:
    """A worker of the role that has a request in this state, and the clients whose requests are there now.

    A request that is queued waits for any of them: then it is the one that has most to do, and who waits counts, too.
    None also while a worker of the role is down or rests: the next failure is to be the only one.
    """
    workers = {str(worker.id): worker for worker in news.workers if worker.role is role}
    if not all(worker.up and not worker.resting for worker in workers.values()):
        return None
    queued = [record.client_id for record in news.live if record.state is state] if state is State.QUEUED else []
    if queued:
        busiest = max(workers.values(), key=lambda worker: worker.requests)
        return busiest, queued + _clients_at(news, busiest)
    for record in news.live:
        name = worker_of(record, role)
        if record.state is state and name in workers:
            return workers[name], _clients_at(news, workers[name])
    return None


def _clients_at(news: News, worker: WorkerNews) -> list[str]:
    return [record.client_id for record in news.live if worker_of(record, worker.role) == worker.id]
