"""The journal: what is kept of requests, how they are found, and how much of it there is at most."""

from __future__ import annotations

import pytest

from router.journal import Journal, Record
from router.trace_context import TraceContext
from router.types import Outcome
from tests.unit.router.journals import LOCAL, REMOTE, Clock, entry, remote_record


def _filled(count: int, size: int = 2000) -> Journal:
    journal = Journal(size)
    for number in range(count):
        clock = Clock()
        made = entry(f"router.{number}", clock, client_id=f"client-{number}", answer_id=f"chatcmpl-{number:04}")
        journal.begin(made)
        clock.after_ms(number if number != 3 else 500)
        journal.end(made, Outcome.OK)
    return journal


def test_a_record_tells_the_times_as_they_were() -> None:
    record = remote_record()
    assert (record.ttft_ms, record.second_token_ms, record.age_ms) == pytest.approx((20, 30, 100))
    assert record.longest_gap_ms == pytest.approx(70)
    assert record.itl_ms == pytest.approx(80 / 9)
    assert (record.prompt_tokens, record.output_tokens) == (101, 10)
    assert (record.route, record.prefill_worker, record.decode_worker) == ("remote", "prefill", "decode")


def test_a_request_in_flight_is_told_as_far_as_it_has_come() -> None:
    clock, journal = Clock(), Journal()
    made = entry("r.1", clock)
    journal.begin(made)
    clock.after_ms(5)
    (record,) = journal.live(10)
    assert (record.outcome, record.route, record.ttft_ms) == (None, "", 0)
    assert record.age_ms == pytest.approx(5)
    made.routed(LOCAL)
    clock.after_ms(5)
    made.failed_attempt("worker decode died")
    made.routed(REMOTE)
    made.tokens(1)
    (record,) = journal.live(10)
    assert (record.attempts, record.route, record.itl_ms) == (2, "remote", 0)
    assert [trouble.why for trouble in record.troubles] == ["worker decode died"]
    assert record.troubles[0].ms == pytest.approx(10)
    assert journal.live(0) == []
    journal.end(made, Outcome.FAILED, "it was lost")
    assert journal.live(10) == []


def test_an_answer_that_is_gone_on_with_counts_only_its_own_tokens() -> None:
    clock = Clock()
    made = entry("r.2", clock, output_ids=[7] * 10)
    for _ in range(3):
        clock.after_ms(10)
        made.tokens(1)
    record = made.record(Outcome.OK)
    assert (record.output_tokens, record.resumed_tokens) == (13, 10)
    assert record.itl_ms == pytest.approx(10)


def test_several_tokens_at_once_are_a_second_token() -> None:
    clock = Clock()
    made = entry("r", clock)
    clock.after_ms(4)
    assert made.tokens(3) == 0
    assert made.record().second_token_ms == pytest.approx(4)


def test_prompts_of_one_family_begin_alike_and_tenants_are_kept_apart() -> None:
    def prefix(tokens: list[int], salt: str = "") -> str:
        made = entry("r", salt=salt)
        made.tokenized(tokens)
        return made.record().prefix

    same = list(range(32))
    assert prefix([*same, 1, 2]) == prefix([*same, 3]) != prefix([*same[1:], 5])
    assert prefix(same) != prefix(same, salt="tenant")


def test_the_ring_is_bounded_and_read_in_pieces() -> None:
    journal = _filled(50, size=20)
    assert journal.sequence == 50
    assert [record.id for record in journal.after(0, 3)] == ["router.30", "router.31", "router.32"]
    assert [record.id for record in journal.after(48, 10)] == ["router.48", "router.49"]
    assert journal.after(50, 10) == []


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("router.7", ["router.7"]),  # although router.70 begins so
        ("client-12", ["router.12"]),
        ("chatcmpl-0005", ["router.5"]),
        ("chatcmpl-000", [f"router.{n}" for n in range(10)]),
        ("latest", ["router.79"]),
        ("slowest", ["router.3"]),
        ("client", []),  # too short for a beginning
        ("nobody-knows", []),
        ("", []),
    ],
)
def test_requests_are_found_by_any_id(what: str, found: list[str]) -> None:
    assert [record.id for record in _filled(80).find(what)] == found


def test_requests_in_flight_are_found_too() -> None:
    journal = Journal()
    assert journal.find("latest") == []
    journal.begin(entry("r.1", trace=TraceContext("d" * 32, "e" * 16)))
    assert [record.id for record in journal.find("d" * 32)] == ["r.1"]


def test_listeners_hear_of_every_end() -> None:
    journal = Journal()
    heard: list[Record] = []
    journal.listeners.append(heard.append)
    journal.end(entry("r.1"), Outcome.REFUSED, "the queue is full")
    assert [(record.id, record.outcome, record.error) for record in heard] == [("r.1", Outcome.REFUSED, "the queue is full")]


def test_a_crowd_of_ids_of_any_length_takes_bounded_time() -> None:
    assert _filled(2000).find("x" * 10_000) == []
