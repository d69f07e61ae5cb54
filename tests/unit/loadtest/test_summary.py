"""Figures of runs whose every time is known."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.options import Options
from loadtest.record import UNFINISHED
from loadtest.summary import figures, gaps_inside, goodput_points, waiting_tokens
from tests.unit.loadtest.made import failed, record, run


def test_only_the_window_counts() -> None:
    """Seconds 2 to 10. Request 0 begins before it, 3 ends after it."""
    records = [
        record(0, 1.5, 0.1, [0.1] * 9),  # arrivals at 1.6 ... 2.5
        record(1, 3.0, 0.1, [0.1] * 9),
        record(2, 5.0, 0.3, [0.2] * 9),
        record(3, 9.0, 0.5, [0.25] * 9),  # arrivals at 9.5, 9.75, then 10.0 and later
    ]
    (found,) = figures(run(), records)
    assert found.requests == 3
    assert found.ttft.p50 == pytest.approx(300)
    assert found.ttft.max == pytest.approx(500)
    assert found.request_rate == pytest.approx(3 / 8)
    assert found.itl.n == 6 + 9 + 9 + 1, "gaps that ended inside"
    assert found.output_rate == pytest.approx((6 + 10 + 10 + 2) / 8)
    assert found.input_rate == pytest.approx(300 / 8), "prompts whose first token came inside"
    assert found.tpot.p50 == pytest.approx(200)


def test_failures_and_goodput() -> None:
    records = [
        record(0, 3.0, 0.1, [0.01] * 9),
        record(1, 4.0, 1.5, [0.01] * 9),  # first token late
        record(2, 5.0, 0.1, [0.2] * 9),  # not smooth
        failed(3, 6.0, "refused"),
        failed(4, 7.0, UNFINISHED),
    ]
    (found,) = figures(run(), records)
    assert (found.requests, found.failed, found.good) == (5, 2, 1)
    assert found.goodput == pytest.approx(1 / 8)
    assert found.ttft.n == 3


def test_goodput_under_a_second_slo() -> None:
    records = [record(0, 3.0, 0.1, [0.01] * 9), record(1, 4.0, 0.6, [0.01] * 9), record(2, 5.0, 1.5, [0.01] * 9)]
    (one,) = figures(run(), records)
    assert one.second_slo is None
    (both,) = figures(run(Options(duration=10.0, warmup=2.0, second_slo="ttft=500,itl=20")), records)
    assert (both.good, both.second_good, both.second_goodput) == (2, 1, 1 / 8)


def test_kinds_and_all_of_them() -> None:
    records = [record(0, 3.0, 0.1, [0.01]), record(1, 4.0, 2.0, [0.01], kind="long", input_tokens=3000)]
    stream, long, everything = figures(run(kinds=("stream", "long")), records)
    assert [found.kind for found in (stream, long, everything)] == ["stream", "long", "all"]
    assert (stream.requests, long.requests, everything.requests) == (1, 1, 2)
    assert everything.total_rate == pytest.approx(stream.total_rate + long.total_rate)
    assert everything.slo is None


def test_a_servers_count_of_tokens_wins() -> None:
    one = record(0, 3.0, 0.1, [0.1] * 4)
    one.output_tokens_counted = 20  # in five pieces
    (found,) = figures(run(), [one])
    assert found.output_rate == pytest.approx(20 / 8)
    assert found.tpot.p50 == pytest.approx(400 / 19)


def test_gaps_are_in_order_of_time() -> None:
    end_s, gap_ms = gaps_inside([record(0, 5.0, 0.1, [0.5, 0.5]), record(1, 4.9, 0.1, [0.4])], run())
    assert end_s.tolist() == pytest.approx([5.4, 5.6, 6.1])
    assert gap_ms.tolist() == pytest.approx([400, 500, 500])


def test_prefill_load() -> None:
    """A request is load from sending to its first token; one that failed without any was none; an unfinished one stays."""
    records = [
        record(0, 1.0, 2.0, []),
        record(1, 2.0, 2.0, [], input_tokens=50),
        failed(2, 2.0, "refused"),
        failed(3, 5.0, UNFINISHED),
    ]
    tokens = waiting_tokens(records, np.array([0.5, 1.5, 2.5, 3.5, 4.5, 9.0]))
    assert tokens.tolist() == [0, 100, 150, 50, 0, 100]


def test_goodput_by_steps_of_the_load() -> None:
    levels = ((0.0, 0.5), (5.0, 1.0))
    records = [record(n, 2.0 + n, 0.1, []) for n in range(3)]  # seconds 2, 3, 4
    records += [record(3 + n, 5.0 + n / 2, 0.1 if n % 2 else 3.0, []) for n in range(10)]
    points = goodput_points(run(levels=levels), records)
    assert [(point.rate, point.goodput) for point in points] == [(pytest.approx(1.0), pytest.approx(1.0)), (2.0, 1.0)]
    assert [(point.level, point.second_goodput) for point in points] == [(0.5, None), (1.0, None)]
    options = Options(duration=10.0, warmup=2.0, second_slo="ttft=50,itl=20")
    assert [point.second_goodput for point in goodput_points(run(options, levels=levels), records)] == [0, 0]


def test_goodput_of_a_steady_load_is_cut_into_pieces() -> None:
    points = goodput_points(run(Options(duration=42.0, warmup=2.0)), [record(n, 2.0 + n, 0.1, []) for n in range(40)])
    assert len(points) == 10
    assert all(point.rate == pytest.approx(1.0) and point.goodput == point.rate for point in points)


def test_nothing_at_all() -> None:
    assert figures(run(), []) == []
    (found,) = figures(run(), [failed(0, 3.0, "refused")])
    assert (found.requests, found.failed, found.ttft.n, found.output_rate) == (1, 1, 0, 0.0)
