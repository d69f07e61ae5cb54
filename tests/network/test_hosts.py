"""Networks that were left behind, and delays that are real."""

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


_ECHO = """
import socket, sys
with socket.create_server(("", 7)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    while data := connection.recv(100):
        connection.sendall(data)
"""
_ASK = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7))
for _ in range(3):
    began = time.monotonic()
    connection.sendall(b"?")
    connection.recv(100)
    print(time.monotonic() - began)
"""


def test_a_delay_is_of_one_way_and_ends(tmp_path: Path) -> None:
    require_namespaces()
    network = Network()
    try:
        one, other = network.add("one"), network.add("other")

        def round_trip() -> float:
            """The shortest of three: the machine may be busy."""
            echo = subprocess.Popen(other.inside(sys.executable, "-c", _ECHO), stdout=subprocess.PIPE, text=True)
            assert echo.stdout is not None
            echo.stdout.readline()
            asked = subprocess.run(
                one.inside(sys.executable, "-c", _ASK, other.address), capture_output=True, text=True, timeout=30, check=True
            )
            echo.communicate(timeout=10)
            return min(float(line) for line in asked.stdout.split())

        assert round_trip() < 0.1
        network.delay(other, 0.1)
        assert 0.1 <= round_trip() < 0.2
        network.delay(one, 0.15)
        assert round_trip() >= 0.25
        network.heal()
        assert round_trip() < 0.1
    finally:
        network.close()
