"""Mends what keeps an instance's threads from computing, where there are no cores to spare.

vLLM's NIXL connector binds the worker's main thread, which computes, and its own threads to the machine's last core, whatever
VLLM_CPU_OMP_THREADS_BIND says. On two cores that is the other instance's, and both compute on one. And NIXL asks for news
without a pause, all the time: half of a core that another thread computes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Set
from contextlib import suppress

import psutil

_LOOK_S = 1.0
_BUSY = 0.1  # share of that time; what has nothing to do takes far less
_LEAST = 19  # of niceness: some 1.5% of a core that another thread wants


def bind(pid: int, cores: Set[int]) -> int:
    """Bind what is bound elsewhere, of a process and all that it started, to `cores`. Returns how many threads that were.

    Threads that may run anywhere stay so: HTTP and scheduling are nobody's computing.
    """
    everywhere = os.sched_getaffinity(0)
    moved = 0
    for thread in _threads(pid):
        with suppress(ProcessLookupError):  # it has ended
            bound_to = os.sched_getaffinity(thread)
            if bound_to < everywhere and not bound_to <= cores:
                os.sched_setaffinity(thread, cores)
                moved += 1
    return moved


def calm(pid: int) -> int:
    """Let others go first of what is busy though nothing was asked, of a process and all that it started.

    Looks for a second. Returns how many threads that were.
    """
    before = _threads(pid)
    time.sleep(_LOOK_S)
    busy = [thread for thread, seconds in _threads(pid).items() if seconds - before.get(thread, seconds) > _BUSY * _LOOK_S]
    for thread in busy:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, _LEAST)  # Linux does so with one thread
    return len(busy)


def _threads(pid: int) -> dict[int, float]:
    """CPU seconds of each, by number."""
    return dict(_times(psutil.Process(pid)))


def _times(process: psutil.Process) -> Iterator[tuple[int, float]]:
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            yield from ((thread.id, thread.user_time + thread.system_time) for thread in one.threads())
