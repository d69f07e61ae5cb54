from __future__ import annotations

from random import Random

import pytest

from router.censored_mean import CensoredMean


def test_before_anything_has_ended_it_is_at_least_what_has_passed() -> None:
    mean = CensoredMean(0.05)
    assert mean.value == 0.0
    mean.add(7.0)
    mean.add(5.0)
    assert mean.value == 12.0
    mean.end()
    assert mean.value == pytest.approx(12 * 0.95)


def test_a_first_guess_counts_as_one_end() -> None:
    mean = CensoredMean(0.02, first=128)
    assert mean.value == 128
    mean.add(500)
    mean.end()
    assert mean.value == pytest.approx((128 + 500) / 2, rel=0.02)


@pytest.mark.parametrize("at_once", [1, 50])
def test_it_becomes_the_mean_however_many_last_at_once(at_once: int) -> None:
    dice, mean, left = Random(1), CensoredMean(0.01), [0] * at_once
    values = []
    for step in range(40_000):
        for index in range(at_once):
            if not left[index]:
                left[index] = 1 + dice.randrange(199)  # 100 on average
            left[index] -= 1
            mean.add(1)
            if not left[index]:
                mean.end()
        if step > 20_000:
            values.append(mean.value)
    assert sum(values) / len(values) == pytest.approx(100, rel=0.1)


def test_what_lasts_long_is_known_long_before_its_end() -> None:
    """Many short ones are over, but as many go on, and on."""
    mean = CensoredMean(0.02)
    for _ in range(20):
        mean.add(10)
        mean.end()
    assert mean.value == pytest.approx(10, rel=0.1)
    for _ in range(100):
        mean.add(20)  # one step of the others
    assert mean.value > 100
