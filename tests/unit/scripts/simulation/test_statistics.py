from __future__ import annotations

import statistics
from random import Random

import pytest

from scripts.simulation.statistics import Histogram


def test_quantiles_are_right_to_a_percent() -> None:
    random = Random(0)
    values = [random.lognormvariate(3, 1) for _ in range(5000)]
    histogram = Histogram(values)
    cuts = statistics.quantiles(values, n=100)
    for percent in (1, 10, 50, 90, 99):
        assert histogram.quantile(percent / 100) == pytest.approx(cuts[percent - 1], rel=0.02)
    assert histogram.mean == pytest.approx(statistics.mean(values))


def test_a_value_may_be_added_many_times() -> None:
    histogram = Histogram()
    histogram.add(10, 99)
    histogram.add(1000)
    histogram.add(5, 0)
    histogram.add(5, -3)
    assert histogram.count == 100
    assert histogram.quantiles() == {
        "mean": pytest.approx(19.9),
        "p50": pytest.approx(10, rel=0.01),
        "p90": pytest.approx(10, rel=0.01),
        "p99": pytest.approx(10, rel=0.01),
    }


def test_nothing_has_no_quantiles() -> None:
    assert set(Histogram().quantiles().values()) == {0.0}
