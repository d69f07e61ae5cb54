"""An event loop whose time jumps to the next timer: hours pass in the time that their events take to compute.

The router runs on it unchanged. Nothing on it may wait for the outside: there are no sockets and no threads.
"""

from __future__ import annotations

import asyncio
import selectors

from router.clock import Clock

_EPOCH_S = 1_700_000_000.0  # what the wall clock shows at time 0: any day


class Stalled(RuntimeError):
    """Nothing will ever happen again, and somebody still waits."""


class _Jump(selectors.SelectSelector):
    """Instead of waiting for a file it lets the time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stalled("the simulation has no more events, and has not ended")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


class VirtualClock(Clock):
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return _EPOCH_S + self._loop.time()
