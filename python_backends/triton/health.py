"""What machines ask of a server without a router: whether its workers really compute. scripts/serve starts it with the server.

/health       200 when Triton is ready and every worker computes and is given work: it answers, its engine's loop turns, it is
              not drained, and a router gives it work, if there is a router. Else 503 and why not.
/health/live  503 when only a restart can help: Triton does not answer, or a worker has stood still for long. A worker that is
              busy, drained or being loaded again is no reason.

BATON_CONFIG, BATON_RUN_DIR and BATON_TRITON say which server, as for the model processes.
"""

from __future__ import annotations

import argparse
import http.client
import os
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

import msgspec

from python_backends.core.config import HealthConfig
from python_backends.core.errors import BatonError
from python_backends.core.messages import Condition
from python_backends.core.types import Epoch
from python_backends.triton.home import Home, find_home
from python_backends.worker.door import WorkersDoor

_ANSWER_S = 1.0  # of workers and of Triton; probes wait a little longer
_FRESH_S = 0.5  # what was seen so long ago need not be looked at again
_STEPS = 2  # as long as so many canaries may take, the engine's loop may stand: routers are as patient
_LONG_STEPS = 10  # and after so many only a restart helps
_LONG_S = 60.0  # at least
_LOAD_S = 300.0  # beyond what engines may take: as long as scripts/serve waits for a start


class WorkerWatch:
    """What has been seen of one worker. Times are monotonic seconds."""

    def __init__(self, name: str, health: HealthConfig, load_timeout_s: float, now: float) -> None:
        self._name = name
        self._step_s = _STEPS * health.canary_timeout_s
        self._long_s = max(_LONG_STEPS * health.canary_timeout_s, _LONG_S)
        self._load_s = load_timeout_s + _LOAD_S
        self._began = now
        self._condition: Condition | None = None
        self._silent_since: float | None = None
        self._process: tuple[Epoch, int] | None = None  # the life that answered last, and a pidfd of it

    def saw(self, condition: Condition | None, now: float) -> None:
        """None: it did not answer."""
        self._condition = condition
        if condition is None:
            self._silent_since = now if self._silent_since is None else self._silent_since
            return
        self._silent_since = None
        if self._process is None or self._process[0] != condition.epoch:
            self._follow(condition)

    def trouble(self) -> str:
        """Why it does not do its work, or an empty string."""
        seen = self._condition
        if seen is None:
            return f"worker {self._name} does not answer"
        if seen.fault:
            return f"worker {self._name} can't go on: {seen.fault}"
        if seen.standing_s > self._step_s:
            return f"worker {self._name} has stood still for {seen.standing_s} s"
        if seen.draining:
            return f"worker {self._name} is drained"
        return "" if seen.used else f"no router gives work to worker {self._name}: it does not pass their canaries"

    def wedged(self, now: float) -> str:
        """Why only a restart helps, or an empty string. What was never up is being loaded, for as long as that may take."""
        seen = self._condition
        if seen is not None and seen.fault:
            return f"worker {self._name} can't go on: {seen.fault}"
        if seen is not None:
            stood = seen.standing_s > self._long_s
            return f"worker {self._name} has stood still for {seen.standing_s} s" if stood else ""
        if self._silent_since is None:
            return ""
        silent_s = now - (self._silent_since if self._process else self._began)
        lives = self._process is not None and not self._has_ended(self._process[1])
        allowed_s = self._long_s if lives else self._load_s
        return f"worker {self._name} has not answered for {silent_s:.0f} s" if silent_s > allowed_s else ""

    def close(self) -> None:
        if self._process is not None:
            os.close(self._process[1])
            self._process = None

    def _follow(self, condition: Condition) -> None:
        self.close()
        with suppress(OSError):  # it has ended since
            self._process = condition.epoch, os.pidfd_open(condition.pid)

    def _has_ended(self, pidfd: int) -> bool:
        return bool(select.select([pidfd], [], [], 0)[0])


class Health:
    """Of one server; any thread may ask."""

    def __init__(self, home: Home) -> None:
        deployment = home.deployment
        names = [worker.name for worker in deployment.workers]
        self._door = WorkersDoor({name: home.channel_address(name) for name in names})
        now = time.monotonic()
        self._watches = {name: WorkerWatch(name, deployment.health, deployment.load_timeout_s, now) for name in names}
        self._triton = home.triton_address
        self._lock = threading.Lock()
        self._looked: float | None = None

    def ready(self) -> str:
        """Why it can't be used now, or an empty string."""
        return self._first(WorkerWatch.trouble) or self._ask_triton("/v2/health/ready")

    def live(self) -> str:
        """Why only a restart helps, or an empty string."""
        return self._first(lambda watch: watch.wedged(time.monotonic())) or self._ask_triton("/v2/health/live")

    def _first(self, trouble: Callable[[WorkerWatch], str]) -> str:
        with self._lock:
            if self._looked is None or time.monotonic() - self._looked > _FRESH_S:
                conditions = self._door.look(_ANSWER_S)
                self._looked = time.monotonic()
                for name, watch in self._watches.items():
                    watch.saw(conditions.get(name), self._looked)
            return next(filter(None, map(trouble, self._watches.values())), "")

    def _ask_triton(self, path: str) -> str:
        connection = http.client.HTTPConnection(self._triton, timeout=_ANSWER_S)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            if connection.getresponse().status == HTTPStatus.OK:
                return ""
        return f"tritonserver does not answer {path}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "baton", ""
    timeout = 5.0

    def do_GET(self) -> None:
        question = {"/health": self.server.health.ready, "/health/live": self.server.health.live}.get(self.path)
        if question is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        trouble = question()
        body = msgspec.json.encode({"status": "unavailable" if trouble else "ok", "trouble": trouble})
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Probes come all the time."""


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: str, port: int, health: Health) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.health = health
        super().__init__((address, port), _Handler)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m python_backends.triton.health", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--address", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=9000)
    options = parser.parse_args()
    try:
        server = _Server(options.address, options.port, Health(find_home()))
    except (BatonError, OSError) as error:
        print(f"health: error: {error}", file=sys.stderr)
        return 1
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
