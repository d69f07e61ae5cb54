"""How the load changes over a run: levels in (0, 1] that hold for a while.

For streams the level is the share of them that is at work. For arrivals it slows time: a request due at second s of the
plan is sent when the level, summed up over time, has reached s. So order, spacing and prefixes stay those of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

RAMP_LEVELS = 6
_BURST_LOW, _BURST_LOW_S, _BURST_HIGH_S = 0.25, 10.0, 5.0


@dataclass(frozen=True, slots=True)
class Shape:
    """`steps`: (second it begins, level), the first at 0; each holds until the next, the last until the end."""

    steps: tuple[tuple[float, float], ...]

    def level(self, time_s: float) -> float:
        return next(level for start, level in reversed(self.steps) if start <= max(time_s, 0.0))

    def when(self, planned_s: float) -> float:
        """The second at which the load that the plan has due by `planned_s` has been sent."""
        done = 0.0
        for (start, level), end in zip(self.steps, [start for start, _ in self.steps[1:]] + [float("inf")], strict=True):
            if done + (end - start) * level >= planned_s:
                return start + (planned_s - done) / level
            done += (end - start) * level
        raise AssertionError("the last step has no end")

    def windows(self, duration_s: float) -> list[tuple[float, float]]:
        """(start, end) of every step of a run."""
        starts = [start for start, _ in self.steps if start < duration_s]
        return list(zip(starts, [*starts[1:], duration_s], strict=True))


def constant() -> Shape:
    return Shape(((0.0, 1.0),))


def ramp(duration_s: float) -> Shape:
    """RAMP_LEVELS equal steps up to the full load."""
    levels = range(RAMP_LEVELS)
    return Shape(tuple((duration_s * i / RAMP_LEVELS, (i + 1) / RAMP_LEVELS) for i in levels))


def burst(duration_s: float) -> Shape:
    """A quarter of the load, and every 15 s all of it for 5 s."""
    return Shape(tuple(_bursts(duration_s)))


def _bursts(duration_s: float) -> Iterator[tuple[float, float]]:
    start = 0.0
    while start == 0.0 or start < duration_s:
        yield start, _BURST_LOW
        yield start + _BURST_LOW_S, 1.0
        start += _BURST_LOW_S + _BURST_HIGH_S
