"""Networks that were left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.network.hosts import Network, remove_abandoned, require_namespaces

_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.network.hosts import Network

host = Network().add("host")
print(host.namespace, host.start(["sleep", "600"], {}, Path(sys.argv[1])).process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def has_ended(process: psutil.Process) -> bool:
    """Within ten seconds. It is nobody's child: whether somebody collects it does not matter."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True).stdout


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    require_namespaces()
    network = Network()
    try:
        host = network.add("host")
        mine = host.start(["sleep", "600"], {}, tmp_path / "mine.log")
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, str(tmp_path / "left.log")], capture_output=True, text=True, timeout=60, check=False
        )
        assert killed.stdout, killed.stderr
        namespace, pid = killed.stdout.split()
        left = psutil.Process(int(pid))
        assert namespace in _namespaces()
        assert (Path("/etc/netns") / namespace).exists()

        remove_abandoned()
        assert has_ended(left)
        assert namespace not in _namespaces()
        assert not (Path("/etc/netns") / namespace).exists()
        assert host.namespace in _namespaces()
        assert mine.process.poll() is None
        mine.stop()
    finally:
        network.close()
    assert host.namespace not in _namespaces()
