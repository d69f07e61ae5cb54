"""How scripts find the server that they manage."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from rich.console import Console

from python_backends.core.errors import InvalidRequest, Unavailable
from scripts import router_door
from scripts.drain import drain_own
from scripts.router_door import WORKERS, find_server


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(router_door, "run_base", lambda: tmp_path)
    return tmp_path


def _listen(directory: Path) -> socket.socket:
    directory.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "worker-decode"))
    listener.listen()
    return listener


def test_what_a_killed_server_left_is_none(base: Path) -> None:
    """As in a pod whose container was killed as a whole, guardian and all: its /tmp outlives it."""
    _listen(base / "old").close()
    with pytest.raises(Unavailable, match="no server of yours runs"):
        find_server(None, WORKERS)
    with _listen(base / "new"):
        assert find_server(None, WORKERS) == base / "new"
        with _listen(base / "other"), pytest.raises(InvalidRequest, match=r"several servers run.*new.*other"):
            find_server(None, WORKERS)


def test_workers_of_a_server_with_a_router_are_not_all_drained_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "door").touch()
    with pytest.raises(InvalidRequest, match="name the workers, such as decode_1, or give --all"):
        drain_own(tmp_path, 1.0, resume=False, console=Console())
