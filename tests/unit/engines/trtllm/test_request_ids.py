from __future__ import annotations

import time

import pytest

from python_backends.engines.trtllm.request_ids import RequestIds


def test_ids_are_63_bits_above_the_local_ones_and_never_the_same() -> None:
    ids = RequestIds(worker=3, life=12345)
    made = [ids.new() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert made == sorted(made)
    assert all(2**40 <= id_ < 2**63 for id_ in made)


def test_workers_and_lives_do_not_collide_within_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)
    made = {RequestIds(worker, life).new() for worker in range(256) for life in range(64)}
    assert len(made) == 256 * 64


def test_a_clock_that_goes_back_makes_no_id_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_800_000_000_000_000_000]
    monkeypatch.setattr(time, "time_ns", lambda: now[0])
    ids = RequestIds(1, 1)
    made = [ids.new() for _ in range(2000)]
    now[0] -= 10**9
    made += [ids.new() for _ in range(2000)]
    assert len(set(made)) == 4000
