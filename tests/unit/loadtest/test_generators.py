"""The built-in workloads against the statistics that were published of the traces they stand for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from loadtest.generators import (
    MOONCAKE_BLOCK,
    Percentiles,
    azure_code,
    azure_conversation,
    conversation,
    fixed,
    periodic,
)
from loadtest.workload import Planned


def _first(source: Iterator[Planned], count: int) -> list[Planned]:
    return list(itertools.islice(source, count))


def _percentiles(values: Sequence[float], *percents: float) -> list[float]:
    return [float(value) for value in np.percentile(values, percents)]


def _rate(requests: Sequence[Planned]) -> float:
    return len(requests) / requests[-1].time_s


def test_a_distribution_has_the_percentiles_and_the_mean_it_says() -> None:
    distribution = Percentiles(1, 2, 4, 5, 8, 10, 30, 80, 90, 95, 99, 100)
    rng = random.Random(1)
    drawn = [distribution.draw(rng) for _ in range(40_000)]
    assert _percentiles(drawn, 5, 25, 50, 75, 90) == pytest.approx([4, 8, 10, 30, 80], rel=0.05)
    assert np.mean(drawn) == pytest.approx(distribution.mean(), rel=0.02)
    assert Percentiles(*[7] * 12).mean() == pytest.approx(7)


def test_azure_conversation_lengths() -> None:
    """Splitwise, section 3: median prompt 1,020 tokens, median output 129; means 1,155 and 211 in the trace."""
    requests = _first(azure_conversation(random.Random(2), 5.0), 20_000)
    inputs, outputs = ([getattr(r, name) for r in requests] for name in ("input_tokens", "output_tokens"))
    assert _percentiles(inputs, 50, 90) == pytest.approx([1020, 2734], rel=0.04)
    assert _percentiles(outputs, 50, 90) == pytest.approx([129, 424], rel=0.04)
    assert (np.mean(inputs), np.mean(outputs)) == pytest.approx((1155, 211), rel=0.04)
    assert _rate(requests) == pytest.approx(5.0, rel=0.03)
    assert len({r.blocks for r in requests}) == len(requests), "nothing is shared"


def test_azure_code_lengths_and_clusters() -> None:
    """Splitwise, section 3: median prompt 1,500 tokens, median output 13."""
    requests = _first(azure_code(random.Random(3), 2.0), 20_000)
    assert _percentiles([r.input_tokens for r in requests], 50, 90) == pytest.approx([1469, 5188], rel=0.04)
    assert _percentiles([r.output_tokens for r in requests], 50, 90) == pytest.approx([13, 55], rel=0.05)
    assert _rate(requests) == pytest.approx(2.0, rel=0.05)
    gaps = np.diff([r.time_s for r in requests])
    assert gaps.std() / gaps.mean() > 1.5, "more clustered than Poisson"


def test_mooncake_conversation() -> None:
    """FAST 2025, table 1: 12,035 tokens in and 343 out on average, 40% of blocks found again."""
    requests = _first(conversation(random.Random(4), 3.4, 1.0), 12_000)
    inputs = [r.input_tokens for r in requests]
    assert np.mean(inputs) == pytest.approx(12_035, rel=0.1)
    assert _percentiles(inputs, 25, 50, 75, 90) == pytest.approx([2306, 6909, 15367, 27367], rel=0.25)
    assert np.mean([r.output_tokens for r in requests]) == pytest.approx(343, rel=0.05)
    assert _share_found_again(requests) == pytest.approx(0.38, abs=0.06)
    assert [r.time_s for r in requests] == sorted(r.time_s for r in requests)
    later = [r for r in requests if r.time_s > requests[-1].time_s / 2]
    assert len(later) / (later[-1].time_s - later[0].time_s) == pytest.approx(3.4, rel=0.1)


def _share_found_again(requests: Sequence[Planned]) -> float:
    """Of all blocks, those that a prompt shares with the beginning of an earlier one: what an endless cache would hit."""
    seen: set[int] = set()
    found = total = 0
    for request in requests:
        found += sum(1 for _ in itertools.takewhile(seen.__contains__, request.blocks))
        total += len(request.blocks)
        seen.update(request.blocks)
    return found / total


def test_a_turn_continues_the_one_before() -> None:
    requests = _first(conversation(random.Random(5), 3.0, 1.0), 3_000)
    assert {r.blocks[0] for r in requests} == {0}, "the system prompt"
    assert all(len(r.blocks) == -(-r.input_tokens // MOONCAKE_BLOCK) for r in requests)
    last: dict[int, Planned] = {}
    continued = 0
    for request in requests:
        before = next((last[block] for block in request.blocks[1:] if block in last), None)
        if before is not None:
            continued += 1
            full = before.input_tokens // MOONCAKE_BLOCK
            assert request.blocks[:full] == before.blocks[:full]
            assert request.input_tokens > before.input_tokens
            assert request.time_s > before.time_s
        last.update(dict.fromkeys(request.blocks[1:], request))
    assert 0.2 < continued / len(requests) < 0.5


def test_people_answer_faster_at_a_higher_time_scale() -> None:
    slow, fast = (_first(conversation(random.Random(6), 3.0, scale), 2_000) for scale in (1.0, 30.0))
    assert _share_found_again(fast[:300]) > 2 * _share_found_again(slow[:300])


def test_fixed_and_periodic() -> None:
    requests = _first(fixed(random.Random(7), 4.0, 128, 64, "fixed"), 4_000)
    assert {(r.input_tokens, r.output_tokens) for r in requests} == {(128, 64)}
    assert _rate(requests) == pytest.approx(4.0, rel=0.05)
    long = _first(periodic(random.Random(8), 6.0, (2000, 4000), 16, "long", 100), 50)
    assert [r.time_s for r in long[:3]] == [3.0, 9.0, 15.0]
    assert all(2000 <= r.input_tokens <= 4000 for r in long)
    assert len({r.blocks for r in long}) == 50


def test_the_seed_is_all_there_is_to_a_workload() -> None:
    one, same, other = (_first(conversation(random.Random(seed), 3.0, 2.0), 50) for seed in (1, 1, 2))
    assert one == same
    assert one != other
