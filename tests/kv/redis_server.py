"""Real Redis servers for tests, on free ports of 127.0.0.1, with nothing kept on disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

BINARY = "redis-server"
_START_S = 10.0


def require_redis() -> str:
    """The program's path. Without it the test is skipped, loudly; in CI it fails."""
    path = shutil.which(BINARY)
    if path is None:
        reason = f"{BINARY} is not on PATH; install it (Debian, Ubuntu: apt install redis-server)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """One server. `arguments` as on its command line; it can be killed, stopped and started again on the same port."""

    def __init__(self, *arguments: str, tls: Sequence[str] = (), password: str = "") -> None:
        """`tls`: arguments for TLS; the server then speaks nothing else."""
        self._program = require_redis()
        self.port = free_port()
        self.url = f"{'rediss' if tls else 'redis'}://127.0.0.1:{self.port}"
        self._password = password
        self._directory = Path(tempfile.mkdtemp(prefix="baton-redis"))
        port = ("--port", "0", "--tls-port", str(self.port), *tls) if tls else ("--port", str(self.port))
        secret = ("--requirepass", password) if password else ()
        self._arguments = [
            *("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._directory)),
            *port,
            *secret,
            *arguments,
        ]
        self._tls = bool(tls)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Returns when it listens."""
        log = (self._directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen([self._program, *self._arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._listens():
            assert self._process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self, **options: Any) -> redis.Redis:
        """For looking into it; without TLS only."""
        return redis.Redis(port=self.port, password=self._password or None, protocol=2, **options)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
