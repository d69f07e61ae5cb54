"""Shapes: levels over time, and plans that are slowed by them."""

from __future__ import annotations

import pytest

from loadtest.shapes import RAMP_LEVELS, Shape, burst, constant, ramp


def test_a_constant_load_keeps_every_time() -> None:
    assert [constant().when(s) for s in (0.0, 1.5, 99.0)] == [0.0, 1.5, 99.0]
    assert constant().windows(30.0) == [(0.0, 30.0)]


def test_a_ramp_goes_up_in_equal_steps() -> None:
    shape = ramp(60.0)
    assert [shape.level(t) for t in (0, 9.9, 10, 59)] == pytest.approx([1 / 6, 1 / 6, 2 / 6, 1.0])
    assert len(shape.windows(60.0)) == RAMP_LEVELS
    assert shape.windows(60.0)[-1] == (50.0, 60.0)


def test_bursts_come_every_fifteen_seconds() -> None:
    shape = burst(60.0)
    assert [shape.level(t) for t in (0, 9, 10, 14.9, 15, 26, 31)] == [0.25, 0.25, 1.0, 1.0, 0.25, 1.0, 0.25]


@pytest.mark.parametrize("shape", [constant(), ramp(30.0), burst(30.0), Shape(((0.0, 0.5), (4.0, 1.0), (8.0, 0.1)))])
def test_when_is_the_inverse_of_the_load_so_far(shape: Shape) -> None:
    step = 0.001
    for planned in (0.0, 0.3, 1.9, 4.0, 7.7, 12.0):
        at = shape.when(planned)
        assert sum(shape.level(i * step) * step for i in range(round(at / step))) == pytest.approx(planned, abs=0.01)


def test_arrivals_of_a_ramp_are_as_many_as_its_levels_say() -> None:
    """Ten requests per second at full load."""
    shape = ramp(60.0)
    times = [shape.when(n / 10) for n in range(10_000)]
    counts = [sum(start <= t < end for t in times) for start, end in shape.windows(60.0)]
    assert counts == pytest.approx([100 * (i + 1) / 6 for i in range(6)], abs=1.01)
