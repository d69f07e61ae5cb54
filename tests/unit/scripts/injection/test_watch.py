"""Whom a strike hits, by what the router says of its requests."""

from __future__ import annotations

import msgspec

from python_backends.core.types import Role, WorkerId, WorkerLoad
from router.door.messages import News, WorkerNews
from router.journal import Record
from router.lifecycle import State
from router.types import RouteDecision
from scripts.injection.watch import find_victim
from tests.unit.router.journals import LOCAL, REMOTE, entry


def _worker(name: str, role: Role, requests: int = 0, resting: str = "") -> WorkerNews:
    return WorkerNews(WorkerId(name), role, True, resting, 1, "1", 0.0, requests, WorkerLoad(), 16, 1024)


def _record(client: str, state: State, decision: RouteDecision | None = None) -> Record:
    made = entry(client, client_id=client)
    if decision is not None:
        made.routed(decision)
    made.state = state
    return made.record()


def _news(live: list[Record], workers: list[WorkerNews]) -> News:
    return News("r", "", 0, False, [], live, len(live), 0, 0, workers)


WORKERS = [_worker("prefill", Role.PREFILL), _worker("decode", Role.DECODE, 1), _worker("decode_1", Role.DECODE, 3)]


def test_a_request_that_is_queued_waits_for_the_busiest() -> None:
    elsewhere = msgspec.structs.replace(REMOTE, decode=WorkerId("decode_1"))
    live = [_record("a", State.QUEUED), _record("b", State.DECODING, LOCAL), _record("c", State.DECODING, elsewhere)]
    found = find_victim(_news(live, WORKERS), Role.DECODE, State.QUEUED)
    assert found == (WORKERS[2], ["a", "c"])
    assert find_victim(_news(live[1:], WORKERS), Role.DECODE, State.QUEUED) is None


def test_a_request_that_was_just_routed_is_meant_for_two() -> None:
    news = _news([_record("a", State.ROUTED, REMOTE)], WORKERS)
    assert find_victim(news, Role.PREFILL, State.ROUTED) == (WORKERS[0], ["a"])
    assert find_victim(news, Role.DECODE, State.ROUTED) == (WORKERS[1], ["a"])
    assert find_victim(_news([_record("a", State.ROUTED, LOCAL)], WORKERS), Role.PREFILL, State.ROUTED) is None


def test_nobody_is_hit_while_one_of_the_role_rests() -> None:
    workers = [*WORKERS[:2], _worker("decode_1", Role.DECODE, resting="it fails canaries")]
    news = _news([_record("a", State.DECODING, LOCAL)], workers)
    assert find_victim(news, Role.DECODE, State.DECODING) is None
    assert find_victim(news, Role.PREFILL, State.DECODING) is None
