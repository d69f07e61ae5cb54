"""What prefill does to streams, from runs whose every time is known."""

from __future__ import annotations

import pytest

from loadtest.interference import cache_potential, computed_tokens, gaps_of, prefill_seconds
from loadtest.options import Options
from loadtest.record import Record
from tests.unit.loadtest.made import failed, record, run


def _stream(number: int, gap_s: float = 0.02, count: int = 200) -> Record:
    """First token at 2.1 s."""
    return record(number, 2.0, 0.1, [gap_s] * count, input_tokens=100)


def test_gaps_are_disturbed_while_another_prompt_is_in_prefill() -> None:
    long = record(1, 3.0, 0.5, [0.02], kind="long", input_tokens=3000)
    gaps = gaps_of(run(kinds=("stream", "long")), [_stream(0), long])
    assert gaps.disturbed.sum() == pytest.approx(0.5 / 0.02, abs=2), "those of the half second"
    assert gaps.only(True).ms.size + gaps.only(False).ms.size == gaps.ms.size == 201


def test_its_own_prefill_disturbs_no_stream() -> None:
    assert not gaps_of(run(), [_stream(0)]).disturbed.any()


def test_a_request_that_failed_disturbs_nobody_and_one_that_is_waited_for_does() -> None:
    assert not gaps_of(run(), [_stream(0), failed(1, 3.0, "refused")]).disturbed.any()
    waiting = failed(1, 3.0, "not finished when the run ended")
    assert gaps_of(run(), [_stream(0), waiting]).disturbed.mean() == pytest.approx(3.1 / 4, abs=0.02)


def test_steps_and_time_are_counted_once_for_all_streams() -> None:
    """Four streams of one engine get a token each per step."""
    gaps = gaps_of(run(), [_stream(number) for number in range(4)])
    assert gaps.streams == pytest.approx(4)
    assert gaps.steps == pytest.approx(200)
    assert gaps.seconds == pytest.approx(4.0)
    assert gaps.context.min() == 101
    assert gaps.context.max() == 300


def test_the_time_lost_is_what_disturbed_gaps_are_longer() -> None:
    gaps_s = [0.02] * 50 + [0.08] * 10 + [0.02] * 50
    stream = record(0, 2.0, 0.1, gaps_s)
    long = record(1, 3.105, 0.79, [], kind="long")
    gaps = gaps_of(run(kinds=("stream", "long")), [stream, long])
    assert gaps.disturbed.sum() == 10
    assert gaps.lost_share(20.0) == pytest.approx(0.6 / sum(gaps_s))


def test_prefill_time_is_counted_once_and_only_in_the_window() -> None:
    prompts = [record(0, 1.0, 2.0, []), record(1, 2.5, 1.0, []), record(2, 6.0, 0.5, []), failed(3, 7.0, "refused")]
    assert prefill_seconds(run(), prompts) == pytest.approx(1.5 + 0.5), "2.0 to 3.5 and 6.0 to 6.5"


def test_tokens_found_in_a_cache_were_not_computed() -> None:
    one = record(0, 3.0, 0.1, [], input_tokens=100)
    one.cached_tokens = 64
    early = record(1, 1.0, 0.1, [], input_tokens=500)
    assert computed_tokens(run(), [one, early]) == 36


def test_nothing_answered_is_no_gap() -> None:
    gaps = gaps_of(run(), [failed(0, 3.0, "refused")])
    assert gaps.ms.size == 0
    assert gaps.lost_share(20.0) == 0.0


def test_what_an_endless_cache_would_find() -> None:
    """Conversations come back with all they had; lengths of one kind drawn anew share nothing."""
    options = Options(scenario="conversation", time_scale=30.0, rate=2.0, duration=200.0, warmup=0.0)
    sent = [record(number, 1.0, 0.1, [], kind="conversation") for number in range(300)]
    assert 0.2 < cache_potential(options, sent) < 0.7
    assert cache_potential(options, sent[:1]) == 0.0
    fixed = Options(scenario="fixed", streams=4, duration=20.0)
    assert cache_potential(fixed, [record(number, 1.0, 0.1, [], kind="fixed") for number in range(20)]) == 0.0
