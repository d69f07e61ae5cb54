"""Whether the engine still works, by what comes out of it. TensorRT-LLM answers health checks while it is stuck.

Five things say that it can't go on: it failed in a way that isn't one request's; it takes no request any more; its event
loop stands still; requests run and nothing comes out; no handoff succeeds any more although the other workers live. Which
end of a handoff is at fault can't be seen, so both count; one with healthy partners has successes in between. Time is
monotonic seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_FAILED_HANDOFFS = 3
_REJECTED = 3  # in a row, and nothing heard meanwhile: one alone may be the request's own fault


class Watchdog:
    """Written on the engine's loop, read from any thread."""

    def __init__(self, stall_s: float, prompt_stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s = stall_s
        self._prompt_stall_s = prompt_stall_s
        self._clock = clock
        self._heard = clock()
        self._posted: float | None = None  # the oldest call to the loop that it has not taken
        self._streams = 0
        self._prompts = 0
        self._failed_since: float | None = None  # first handoff in a row that failed
        self._failed = 0  # of those sent after that
        self._rejected = 0  # requests in a row
        self._broken = ""

    def posted(self) -> None:
        """Something was handed to the loop."""
        if self._posted is None:
            self._posted = self._clock()

    def turned(self) -> None:
        """The loop has taken what was handed to it."""
        self._posted = None

    def running(self, streams: int, prompts: int) -> None:
        """What TensorRT-LLM is computing now: requests with and without a first output."""
        if not self._streams and not self._prompts:
            self._heard = self._clock()
        self._streams, self._prompts = streams, prompts

    def heard(self) -> None:
        """Anything came out."""
        self._heard = self._clock()
        self._rejected = 0

    def rejected(self, why: str) -> None:
        """TensorRT-LLM took a request not at all, and not because of what is in it: as it does after it has failed idle."""
        self._rejected += 1
        if self._rejected >= _REJECTED:
            self.broken(f"TensorRT-LLM takes no requests: {why}")

    def handoff_arrived(self) -> None:
        self._failed_since, self._failed = None, 0

    def handoff_failed(self, arrived: float) -> None:
        """A good ticket brought no KV in time. `arrived`: when it came here, or was made here.

        Handoffs with a worker that died fail, too, but none of them can have begun after the first failure was noticed.
        """
        if self._failed_since is None:
            self._failed_since = self._clock()
        elif arrived > self._failed_since:
            self._failed += 1

    def broken(self, why: str) -> None:
        """For good."""
        self._broken = self._broken or why

    def fault(self) -> str:
        """Why the engine can't go on, or an empty string."""
        now = self._clock()
        if self._broken:
            return self._broken
        posted = self._posted
        if posted is not None and now - posted > self._stall_s:
            return f"its event loop has stood still for {now - posted:.0f} s"
        quiet, running = now - self._heard, self._streams + self._prompts
        if running and quiet > (self._stall_s if self._streams else self._prompt_stall_s):
            return f"TensorRT-LLM has said nothing for {quiet:.0f} s with {running} requests running"
        if self._failed >= _FAILED_HANDOFFS:
            return f"KV no longer arrives: {self._failed + 1} handoffs in a row have timed out"
        return ""
