"""What time it is, for all of the router: the machine's clocks in production, a virtual one in the simulator."""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks. Any thread may ask."""

    def now(self) -> float:
        """Monotonic seconds; what differences and waits are counted in."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()
