"""Injected: engines that hang in a step, as in a driver that does not return, while all else of their process goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.door.messages import News, WorkerNews
from router.lifecycle import State
from scripts.injection.scene import FAKE, Hit, Scene, Strike, at_every_worker, back, same_lives, victim, worker_in
from scripts.injection.watch import wait_for

_OUT_S = 10.0  # as promised


class _Hangs:
    """A process whose number is the name of a file in a directory computes no step. The engine `fake` looks there."""

    def __init__(self) -> None:
        self._directory = Path("/nowhere")  # until it is ready

    @property
    def settings(self) -> dict[str, object]:
        return {"engine": {"fake": {**FAKE, "hang_dir": str(self._directory)}}}

    @contextmanager
    def ready(self, engine: str) -> Iterator[None]:
        if engine != "fake":
            raise Unavailable("only the engine `fake` can be made to hang")
        with tempfile.TemporaryDirectory() as directory:
            self._directory = Path(directory)
            yield

    @contextmanager
    def hung(self, worker: WorkerNews) -> Iterator[None]:
        file = self._directory / str(worker.pid)
        file.touch()
        try:
            yield
        finally:
            file.unlink()


_HANGS = _Hangs()


def _hang(role: Role, state: State) -> Callable[[Scene], Hit]:
    """Its heartbeats say that all is well: canaries tell. It is used again by itself once it computes."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        with _HANGS.hung(worker):
            _wait_until_out(scene, worker)
        served = back(scene, worker, new_life=False)
        same_lives(scene, [worker], "though it computes again")
        return Hit(at, clients, served)

    return strike


def _hang_for_good(role: Role, state: State) -> Callable[[Scene], Hit]:
    """It is replaced when canaries have failed for half a minute."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        with _HANGS.hung(worker):
            _wait_until_out(scene, worker)
            return Hit(at, clients, back(scene, worker, new_life=True))

    return strike


def _wait_until_out(scene: Scene, worker: WorkerNews) -> None:
    """Raises Unavailable when it is still given work after so long."""

    def is_out(news: News) -> bool | None:
        return bool(worker_in(news, worker).resting) or None

    wait_for(scene.door, is_out, _OUT_S, f"{worker.id}, whose engine hangs, is out")


STRIKES: list[Strike] = [
    *at_every_worker("engine hangs", _hang, means=_HANGS),
    *at_every_worker("engine hangs for good", _hang_for_good, [(Role.DECODE, State.DECODING)], _HANGS),
]
