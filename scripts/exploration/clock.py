"""A world whose time and chance belong to one seed: what happens in it happens again, in the time that it takes to compute.

Inside `pretended` the process's clocks and its random numbers are the world's. Code that asks for them runs unchanged and
knows nothing of it. Nothing in there may sleep, or wait for a thread or a socket.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

_WALL_S = 1_700_000_000.0  # what the wall clock shows at time 0: any day


class Stalled(AssertionError):
    """Nothing will ever happen again, and somebody still waits."""


class VirtualTime:
    """Seconds since the world began."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return _WALL_S + self.now

    def wall_ns(self) -> int:
        return int(self.wall() * 1e9)


@contextmanager
def pretended(seed: int) -> Iterator[VirtualTime]:
    """One world of this process at a time; afterwards everything is as before."""
    clock, chance = VirtualTime(), random.Random(seed)
    swapped = [
        (time, "monotonic", clock.monotonic),
        (time, "time", clock.wall),
        (time, "time_ns", clock.wall_ns),
        (secrets, "token_hex", lambda size: chance.randbytes(size).hex()),
        (secrets, "randbits", chance.getrandbits),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in swapped]
    state = random.getstate()
    random.seed(seed)
    for module, name, instead in swapped:
        setattr(module, name, instead)
    try:
        yield clock
    finally:
        for module, name, real in before:
            setattr(module, name, real)
        random.setstate(state)


class _Jump(selectors.SelectSelector):
    """Instead of waiting for files it lets the time pass."""

    def __init__(self, clock: VirtualTime) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stalled("nothing will happen any more, and somebody still waits")
        self._clock.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps from timer to timer."""

    def __init__(self, clock: VirtualTime) -> None:
        self._clock = clock
        super().__init__(cast(selectors.BaseSelector, _Jump(clock)))

    def time(self) -> float:
        return self._clock.now
