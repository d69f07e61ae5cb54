"""The machine that figures were measured on, in the words that stand under them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import psutil

_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
_TIMEOUT_S = 10.0


class Machine(msgspec.Struct, frozen=True):
    """`cores`: those this process may use. `gpus`: name and memory of each."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{self.cores} cores of {self.cpu}",
            f"{self.memory_gib:.0f} GiB",
            *self.gpus,
            self.system,
            f"Python {self.python}",
        ]
        return ", ".join(parts)


def this_machine() -> Machine:
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpus=_gpus(),
    )


def cpu_name() -> str:
    """The processor's name as the kernel has it, else its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpus() -> tuple[str, ...]:
    if shutil.which(_GPU_QUERY[0]) is None:
        return ()
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
