"""Puts an instance's threads onto its cores.

vLLM's NIXL connector binds the worker's main thread, which computes, and its own threads to the machine's last core, whatever
VLLM_CPU_OMP_THREADS_BIND says. On two cores that is the other instance's, and both compute on one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path

import psutil


def bind(pid: int, cores: Set[int]) -> int:
    """Bind what is bound elsewhere, of a process and all that it started, to `cores`. Returns how many threads that were.

    Threads that may run anywhere stay so: HTTP and scheduling are nobody's computing.
    """
    everywhere = os.sched_getaffinity(0)
    moved = 0
    for thread in _threads(pid):
        try:
            bound_to = os.sched_getaffinity(thread)
            if bound_to < everywhere and not bound_to <= cores:
                os.sched_setaffinity(thread, cores)
                moved += 1
        except ProcessLookupError:  # it has ended
            continue
    return moved


def _threads(pid: int) -> Iterator[int]:
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        try:
            yield from (int(entry.name) for entry in Path(f"/proc/{one.pid}/task").iterdir())
        except FileNotFoundError:  # it has ended
            continue
