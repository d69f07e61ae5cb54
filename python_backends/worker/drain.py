"""Whether a worker takes new work, and until when it may finish what it has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class DrainState:
    """Told on the channel's thread, asked on any."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._leave_by: float | None = None
        self._left = False

    @property
    def draining(self) -> bool:
        """Routers are to send nothing new. What they had on its way is still welcome."""
        return self._leave_by is not None

    @property
    def over(self) -> bool:
        """The grace period has ended: nothing at all is taken."""
        leave_by = self._leave_by
        return leave_by is not None and self._now() >= leave_by

    def begin(self, grace_s: float) -> None:
        with self._lock:
            self._leave_by = self._now() + grace_s
            self._left = False

    def end(self) -> None:
        """Work is welcome again."""
        with self._lock:
            self._leave_by = None

    def is_time_to_leave(self) -> bool:
        """True once, when the grace period is over: what is still here is to be handed back now."""
        with self._lock:
            due = self.over and not self._left
            self._left = self._left or due
            return due
