"""A share of a core for processes that run, as `resources.limits.cpu` of a container: by cgroup, version 2 or 1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

_PERIOD_US = 100_000  # as Kubernetes has it
_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


class CpuLimit:
    """For these processes and all that they start. `close` when they have ended."""

    def __init__(self, name: str, cores: float, root: psutil.Process) -> None:
        """root: limited with all its descendants. Skips the test where cgroups can't be made; in CI that is a failure."""
        self._parent = _V1 if (_V1 / "cpu.cfs_quota_us").exists() else _V2
        self._group = self._parent / f"baton-{os.getpid()}-{name}"
        quota = int(cores * _PERIOD_US)
        try:
            self._group.mkdir()
            if self._parent is _V1:
                (self._group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (self._group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (self._group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
            for process in (root, *root.children(recursive=True)):
                (self._group / "cgroup.procs").write_text(str(process.pid))
        except OSError as error:
            self.close()
            _give_up(error)

    def throttled(self) -> tuple[int, int]:
        """Periods in which the limit was reached, and all in which there was something to do, so far."""
        counts = dict(line.split() for line in (self._group / "cpu.stat").read_text().splitlines())
        return int(counts["nr_throttled"]), int(counts["nr_periods"])

    def close(self) -> None:
        """What still runs is limited no more. Idempotent."""
        if not self._group.exists():
            return
        for pid in (self._group / "cgroup.procs").read_text().split():
            (self._parent / "cgroup.procs").write_text(pid)
        self._group.rmdir()


def _give_up(error: OSError) -> NoReturn:
    message = f"no cgroup with a CPU limit here: {error}; run as root on Linux, with the controller `cpu`"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
