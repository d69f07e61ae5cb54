from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.kv.store.node import NodeStore
from router.node_memory import NodeMemory

KEY = b"k" * 32


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def store(base: Path) -> NodeStore:
    return NodeStore(1 << 16, 4096, KEY, base)


def test_memory_that_was_named_outlives_its_workers(place: Path) -> None:
    memory, worker = NodeMemory(), store(place)
    identity = worker._membership.fd
    memory.named(str(worker.place), now=1.0)
    memory.named(str(worker.place), now=2.0)
    worker._generations[5] = 42
    worker.close()
    assert identity >= 0
    assert store_content(place) == 42
    memory.close()
    memory.close()
    assert not list(place.iterdir())
    assert store_content(place) == 0


def store_content(base: Path) -> int:
    worker = store(base)
    value = int(worker._generations[5])
    worker.close()
    return value


def test_memory_that_nobody_names_any_more_is_let_go(place: Path) -> None:
    memory, worker = NodeMemory(), store(place)
    memory.named(str(worker.place), now=0.0)
    worker.close()
    memory.tidy(now=599.0)
    assert list(place.iterdir())
    memory.tidy(now=601.0)
    assert not list(place.iterdir())
    memory.close()


def test_a_place_that_is_not_here_is_no_error(place: Path) -> None:
    memory = NodeMemory()
    memory.named(str(place / "another-host"), now=0.0)
    memory.tidy(now=1000.0)
    memory.close()


def test_a_worker_that_comes_later_is_held_too(place: Path) -> None:
    memory = NodeMemory()
    memory.named(str(place / "node-x"), now=0.0)
    worker = store(place)
    memory.named(str(worker.place), now=1.0)
    worker.close()
    assert list(place.iterdir())
    memory.close()
