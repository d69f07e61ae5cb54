"""Many measurements in little room: counts in buckets whose bounds grow by one percent."""

from __future__ import annotations

import math
from collections.abc import Iterable

_GROWTH = math.log(1.01)
_LEAST = 1e-3


class Histogram:
    """Of non-negative numbers; quantiles are right to half a percent."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.sum = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float, times: int = 1) -> None:
        if times <= 0:
            return
        bucket = int(math.log(max(value, _LEAST) / _LEAST) / _GROWTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + times
        self.count += times
        self.sum += value * times

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value that `share` of all are at most; nan when there are none."""
        wanted = share * self.count
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return _LEAST * math.exp((bucket + 0.5) * _GROWTH)
        return math.nan

    def quantiles(self) -> dict[str, float]:
        """mean, p50, p90, p99; 0 when there are no measurements."""
        if not self.count:
            return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
        return {"mean": self.mean} | {f"p{percent}": self.quantile(percent / 100) for percent in (50, 90, 99)}
