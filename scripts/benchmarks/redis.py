"""A Redis server of one's own, on a free port, for as long as it is measured."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from python_backends.core.errors import Unavailable

_LOOPBACK = "127.0.0.1"
_PROGRAM = "redis-server"
_OPTIONS = ("--save", "", "--appendonly", "no", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
_START_TIMEOUT_S = 10.0
_POLL_S = 0.02


def redis_is_installed() -> bool:
    return shutil.which(_PROGRAM) is not None


@contextmanager
def redis_server() -> Iterator[str]:
    """Its URL. Raises Unavailable when it is not installed or does not start."""
    if not redis_is_installed():
        raise Unavailable(f"{_PROGRAM} is not installed; with Debian and Ubuntu: apt-get install redis-server")
    with socket.create_server((_LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen(
            [_PROGRAM, *_OPTIONS, "--bind", _LOOPBACK, "--port", str(port), "--dir", directory],
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for who measures
        )
        try:
            _await_port(port)
            yield f"redis://{_LOOPBACK}:{port}"
        finally:
            server.kill()
            server.wait()


def _await_port(port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((_LOOPBACK, port)) == 0:
                return
        time.sleep(_POLL_S)
    raise Unavailable(f"{_PROGRAM} does not answer after {_START_TIMEOUT_S:.0f} s")
