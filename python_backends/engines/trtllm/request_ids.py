"""Ids that a context request and its other half share (`disagg_request_id`, since 1.3): 63 bits, never the same twice.

    39 bits milliseconds | 8 bits worker | 6 bits life of the worker | 10 bits counter

the layout of NVIDIA's own generator, so that ids of both never collide with the small local ids below 2**40.
"""

from __future__ import annotations

import time


class RequestIds:
    def __init__(self, worker: int, life: int) -> None:
        """`worker`: its place in the deployment. `life`: anything that differs when its process is another one."""
        self._suffix = (worker % 256) << 16 | (life % 64) << 10
        self._last = (0, 0)  # milliseconds, counter

    def new(self) -> int:
        now = time.time_ns() // 1_000_000 % 2**39
        last, counter = self._last
        if now <= last:
            now, counter = (last, counter + 1) if counter < 1023 else (last + 1, 0)
        else:
            counter = 0
        self._last = (now, counter)
        return now << 24 | self._suffix | counter
