"""The arithmetic against figures computed by hand, and that every unit cost is measured."""

from __future__ import annotations

import dataclasses

import pytest

from scripts import capacity
from scripts.capacity import Sessions, UnitCosts, needs

COSTS = UnitCosts(
    hash_token_s=1e-7,
    tokenize_token_s=2e-6,
    message_token_s=2e-7,
    event_s=1e-6,
    index_block_bytes=300,
    index_holder_bytes=100,
    router_request_s=1e-3,
    router_token_s=4e-5,
    front_end_request_s=2e-3,
    front_end_token_s=5e-5,
)
SESSIONS = Sessions(
    count=1200,
    tokens_s=20,
    prompt=1000,
    new=160,
    output=200,
    pause_s=20,
    token_bytes=1000,
    worker_streams=50,
    prefill_rate=3200,
    index_lifetime_s=100,
)


def test_turns_and_streams() -> None:
    """An answer takes 10 s and a pause 20: 40 requests per second, 400 streams."""
    assert SESSIONS.turns_s == pytest.approx(40)
    assert SESSIONS.streams == pytest.approx(400)


def test_what_so_many_need() -> None:
    found = needs(SESSIONS, COSTS)
    assert found.tokens_s == pytest.approx(8000)
    assert found.router_cores == pytest.approx(40 * (1e-3 + 1e-4) + 8000 * 4e-5)
    assert found.front_end_cores == pytest.approx(40 * (2e-3 + 2e-3) + 8000 * 5e-5)
    assert found.decode_workers == pytest.approx(8)
    assert found.prefill_workers == pytest.approx(2)
    assert found.messages_s == pytest.approx(160)
    # 400 blocks a second are new in prompts, 500 in answers; the former are cached twice
    assert found.events_s == pytest.approx(2600)
    assert found.events_share == pytest.approx(2.6e-3)
    assert found.index_blocks == pytest.approx(90_000)
    assert found.index_bytes == pytest.approx(90_000 * 300 + 40_000 * 100)
    assert found.link_bytes_s == pytest.approx(40 * 160 * 1000)


def test_needs_grow_with_the_sessions() -> None:
    one, ten = needs(SESSIONS, COSTS), needs(dataclasses.replace(SESSIONS, count=12_000), COSTS)
    assert all(getattr(ten, field.name) == pytest.approx(10 * getattr(one, field.name)) for field in dataclasses.fields(one))


def test_costs_without_a_server_are_measured() -> None:
    assert 0 < capacity._hash_token_s(1024) < 1e-3
    assert 0 < capacity._message_token_s(20) < 1e-3
    assert 0 < capacity._event_s(2000) < 1e-3
    one, two = capacity._index_bytes(2000, 1), capacity._index_bytes(2000, 2)
    assert 50 < one < two < 2 * one


def test_the_arithmetic_takes_medians_and_the_table_shows_the_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = iter([dataclasses.replace(COSTS, router_token_s=seconds) for seconds in (2e-5, 9e-5, 4e-5)])
    monkeypatch.setattr(capacity, "measure", lambda *options: next(runs))
    monkeypatch.setenv("COLUMNS", "200")
    assert capacity.main(["--repetitions", "3", "--sessions", "1000"]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("router token"))
    assert row.split() == ["router", "token", "40.00", "us", "20.00", "us", "90.00", "us"]
    assert "Medians of 3 runs." in shown
