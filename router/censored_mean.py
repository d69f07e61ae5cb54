"""How much something comes to in the end, on average, while most of what is seen has not ended yet.

All that has passed, of those that ended and of those that go on, divided by how many have ended: the maximum likelihood for
ends that come by chance (Epstein and Sobel, "Life Testing", J. American Statistical Association 48, 1953). A mean of what has
ended would know nothing before the first end, and for long only of what ended soon.
"""

from __future__ import annotations


class CensoredMean:
    """Older ends count for less: those of the last 1 / `rate` or so are remembered."""

    def __init__(self, rate: float, first: float = 0.0) -> None:
        """first: a guess that counts as one end."""
        self._rate = rate
        self._passed = first
        self._ends = 1.0 if first else 0.0

    @property
    def value(self) -> float:
        """As long as nothing has ended, all that has passed: at least so much."""
        return self._passed / max(self._ends, 1.0)

    def add(self, amount: float) -> None:
        """So much more has passed, of one or of many."""
        self._passed += amount

    def end(self) -> None:
        """One has ended."""
        keep = 1 - self._rate
        self._passed *= keep
        self._ends = self._ends * keep + 1
