"""The phases of a request: where each begins and ends, and that they add up."""

from __future__ import annotations

import msgspec
import pytest

from router.phases import Phase, phases
from router.types import Outcome
from tests.unit.router.journals import LOCAL, REMOTE, Clock, entry, remote_record


def _by_name(made: list[Phase]) -> dict[str, Phase]:
    return {phase.name: phase for phase in made}


def test_a_remote_request_in_all_its_parts() -> None:
    found = {phase.name: phase for phase in phases(remote_record())}
    expected = {
        "request": (-3, 100, ""),
        "front end": (-3, 0, "request"),
        "tokenize": (-1, 0, "front end"),
        "router": (0, 100, "request"),
        "queue": (0, 5, "router"),
        "prefill": (5, 20, "router"),
        "handoff": (20, 24, "router"),
        "transfer": (22, 24, "handoff"),
        "decode": (24, 100, "router"),
        "first decode": (24, 30, "decode"),
    }
    assert list(found) == list(expected), "parents come first"
    for name, (start, end, parent) in expected.items():
        assert (found[name].start_ms, found[name].end_ms) == pytest.approx((start, end)), name
        assert found[name].parent == parent


def test_parts_add_up_to_the_first_and_the_second_token() -> None:
    record = remote_record()
    made = _by_name(phases(record))
    assert made["queue"].ms + made["prefill"].ms == pytest.approx(record.ttft_ms)
    parts = sum(made[name].ms for name in ("queue", "prefill", "handoff", "first decode"))
    assert parts == pytest.approx(record.second_token_ms)


def test_a_local_request_has_no_handoff() -> None:
    proof = msgspec.structs.replace(remote_record().proof, route="local", handoff_ms=0.0, first_decode_ms=0.0, transport="")  # type: ignore[type-var]
    record = msgspec.structs.replace(remote_record(front_end=False), proof=proof)
    made = _by_name(phases(record))
    assert set(made) == {"request", "router", "queue", "prefill", "decode", "first decode"}
    assert made["first decode"].start_ms == pytest.approx(20)
    assert sum(made[name].ms for name in ("queue", "prefill", "first decode")) == pytest.approx(record.second_token_ms)


def test_requests_that_did_not_come_far() -> None:
    clock = Clock()
    made = entry("r", clock)
    clock.after_ms(7)
    refused = made.record(Outcome.REFUSED, "the queue is full")
    assert [phase.name for phase in phases(refused)] == ["request", "router", "queue and prefill"]
    assert [phase.ms for phase in phases(refused)] == pytest.approx([7, 7, 7])
    made.routed(REMOTE)
    made.tokens(1)
    clock.after_ms(5)
    lost = made.record(Outcome.FAILED, "all workers died")
    assert [phase.name for phase in phases(lost)] == ["request", "router", "queue and prefill"]
    made.routed(LOCAL)
    made.tokens(1)
    assert [phase.name for phase in phases(made.record())][-2:] == ["decode", "first decode"]


def test_a_front_end_whose_clock_is_behind_makes_no_part_negative() -> None:
    record = remote_record()
    assert record.front_end is not None
    late = msgspec.structs.replace(record.front_end, received_ns=record.arrival_ns + 5_000_000, tokenize_ms=9.0)
    assert all(phase.ms >= 0 for phase in phases(msgspec.structs.replace(record, front_end=late)))
