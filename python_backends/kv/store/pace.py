"""How fast things are, as measured: what decides whether fetching KV beats computing it."""

from __future__ import annotations

import threading
import time

_WEIGHT = 0.25  # of a new measurement
_FORGOTTEN_S = 15.0  # a tier that was too slow is tried again after so long


class Pace:
    """A learned seconds = latency + amount / rate. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latency: float | None = None  # s
        self._rate: float | None = None  # amount per s
        self._measured = 0.0  # monotonic, s

    def measure(self, amount: float, seconds: float) -> None:
        """So much was done in so many seconds; an amount of 0 measures the latency alone."""
        with self._lock:
            self._measured = time.monotonic()
            if amount <= 0:
                self._latency = _mixed(self._latency, seconds)
            else:
                beyond = max(seconds - (self._latency or 0.0), seconds / 10)
                self._rate = _mixed(self._rate, amount / max(beyond, 1e-9))

    def seconds(self, amount: float) -> float | None:
        """How long this would take. None: unknown, or measured too long ago to be believed."""
        with self._lock:
            if (self._latency is None and self._rate is None) or time.monotonic() - self._measured > _FORGOTTEN_S:
                return None
            return (self._latency or 0.0) + (amount / self._rate if self._rate is not None else 0.0)

    def beats(self, amount: float, other: Pace, other_amount: float) -> bool:
        """Whether this way is the faster one. What is not known yet is tried."""
        ours, theirs = self.seconds(amount), other.seconds(other_amount)
        return ours is None or theirs is None or ours < theirs


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
