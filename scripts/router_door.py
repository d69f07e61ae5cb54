"""A script's way to the router of a server on this machine: its door, a socket that only the server's own user can reach."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

import zmq
from rich.console import Console

from python_backends.core.errors import BatonError, InvalidRequest, Unavailable
from python_backends.core.paths import run_base
from python_backends.core.types import Role, WorkerId
from router.door.messages import (
    FromRouter,
    Hello,
    Manage,
    Managed,
    News,
    ToRouter,
    Watch,
    Welcome,
    encode,
    from_router_decoder,
)
from scripts.terminal import print_error

_ANSWER_S = 0.5
_NEWEST = 1 << 62  # a sequence that nothing has come after

LOAD_S = 400.0
"""For a worker to load its weights: so long a restart may take beyond its grace period."""


class RouterDoor:
    """Asks one thing at a time; for one thread. A context manager."""

    def __init__(self, run_dir: Path) -> None:
        self._address = f"ipc://{run_dir}/door"
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._managed = 0

    def __enter__(self) -> RouterDoor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def news(self) -> News | None:
        """How things stand; None when no router answers."""
        answer = self._ask(Watch(_NEWEST), _ANSWER_S)
        return answer if isinstance(answer, News) else None

    def router_pid(self) -> int | None:
        """None when no router answers."""
        answer = self._ask(Hello(os.getpid()), _ANSWER_S)
        return answer.pid if isinstance(answer, Welcome) else None

    def manage(
        self,
        action: Literal["drain", "resume", "restart"],
        worker: str,
        grace_s: float,
        timeout_s: float,
        role: Role | None = None,
    ) -> None:
        """Returns when it is done. Raises Unavailable, in the router's words or because it does not answer.

        `role`: that a restarted worker is to have.
        """
        self._managed += 1
        answer = self._ask(Manage(self._managed, action, WorkerId(worker), grace_s, role), timeout_s)
        if not isinstance(answer, Managed):
            raise Unavailable(f"the router did not say within {timeout_s:.0f} s what became of {action} {worker}")
        if answer.error:
            raise Unavailable(answer.error)

    def _ask(self, message: ToRouter, timeout_s: float) -> FromRouter | None:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(self._address)
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1e3))
        with suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)
            answer: FromRouter = from_router_decoder.decode(self._socket.recv())
            return answer
        self._socket.close()  # whatever still comes is the answer to an old question
        self._socket = None
        return None


ROUTER = ("door", "router's door")
WORKERS = ("worker-*", "worker's channel")


def find_server(given: Path | None, wanted: tuple[str, str] = ROUTER) -> Path:
    """The run directory of the server: `given`, else of the only one that runs. Raises InvalidRequest, Unavailable.

    `wanted`: what must be in it, as a pattern and in words.
    """
    pattern, words = wanted
    if given is not None:
        if not any(given.glob(pattern)):
            raise InvalidRequest(f"--run-dir {given}: there is no {words} in it; scripts/serve prints the directory")
        return given
    found = {path.parent for path in run_base().glob(f"*/{pattern}") if _listens(path)}
    if not found:
        raise Unavailable("no server of yours runs on this machine; start one with `make serve`")
    if len(found) > 1:
        raise InvalidRequest(f"several servers run: give one of them with --run-dir: {' '.join(map(str, sorted(found)))}")
    return found.pop()


def _listens(path: Path) -> bool:
    """Whether somebody does at this socket: a server that was killed with its guardian leaves its directory behind."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(1.0)
        try:
            caller.connect(str(path))
        except OSError:
            return False
    return True


def add_door_options(parser: argparse.ArgumentParser, grace_help: str) -> None:
    """--grace and --run-dir of the scripts that manage workers."""
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help=grace_help)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the server, where several run")


def at_door(run_dir: Path | None, manage: Callable[[RouterDoor, Console], None]) -> int:
    """Let `manage` talk to the router of the server; what goes wrong is printed. Returns the exit status."""
    console = Console(stderr=True)
    try:
        with RouterDoor(find_server(run_dir)) as door:
            manage(door, console)
    except BatonError as error:
        print_error(console, error)
        return 1
    return 0
