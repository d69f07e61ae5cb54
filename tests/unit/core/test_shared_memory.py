from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.shared_memory import create_memory, hold, join, open_memory, sweep

NAME = "baton-test"


def create() -> int:
    return create_memory(NAME, 8192, "the test's memory", "the.test")[0]


def anything(fd: int) -> bool:
    return True


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_memory_is_there_zeroed_and_sealed() -> None:
    fd, memory = create_memory(NAME, 10_000, "the test's memory", "the.test")
    assert len(memory) == 10_000
    assert memory[:] == bytes(10_000)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{fd}", 0)
    os.close(fd)


def test_too_much_memory_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"the test's memory of .* MiB .* lower the\.test"):
        create_memory(NAME, 1 << 60, "the test's memory", "the.test")


def test_only_sealed_memory_of_the_name_is_opened() -> None:
    fd = create()
    opened = open_memory(f"/proc/self/fd/{fd}", NAME, os.O_RDONLY)
    assert inode(opened) == inode(fd)
    unsealed = os.memfd_create(NAME, os.MFD_CLOEXEC)
    for path, name in ((f"/proc/self/fd/{fd}", "other"), (f"/proc/self/fd/{unsealed}", NAME)):
        with pytest.raises(ValueError, match=name):
            open_memory(path, name, os.O_RDONLY)
    for descriptor in (fd, opened, unsealed):
        os.close(descriptor)


def test_members_share_and_the_last_one_clears_away(tmp_path: Path) -> None:
    place = tmp_path / "place"
    members = [join(place, NAME, create, anything) for _ in range(3)]
    assert len({inode(member.fd) for member in members}) == 1
    assert len({member.fd for member in members}) == 3
    for member in members:
        assert place.is_dir()
        member.close()
        member.close()
    assert not place.exists()


def test_what_is_written_by_one_is_read_by_another(tmp_path: Path) -> None:
    one, two = (join(tmp_path / "place", NAME, create, anything) for _ in range(2))
    with mmap.mmap(one.fd, 0) as theirs, mmap.mmap(two.fd, 0) as ours:
        theirs[:5] = b"hello"
        assert ours[:5] == b"hello"
    one.close()
    two.close()


def test_other_memory_at_the_place_is_not_taken(tmp_path: Path) -> None:
    place = tmp_path / "place"
    one = join(place, NAME, create, anything)
    two = join(place, NAME, create, lambda fd: inode(fd) != inode(one.fd))
    assert inode(one.fd) != inode(two.fd)
    one.close()
    two.close()


def test_all_at_once_get_the_same_memory(tmp_path: Path) -> None:
    """Also while others leave, which takes the place away between two of their steps."""
    place = tmp_path / "place"
    for _ in range(20):
        seen: list[int] = []
        barrier = threading.Barrier(6)
        threads = [threading.Thread(target=visit, args=(place, seen, barrier)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(seen) == 6
        assert len(set(seen)) == 1
        assert not place.exists()


def visit(place: Path, seen: list[int], together: threading.Barrier) -> None:
    member = join(place, NAME, create, anything)
    seen.append(inode(member.fd))
    together.wait(10)
    member.close()


def test_holding_does_not_wait(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert hold(place, NAME) is None
    member = join(place, NAME, create, anything)
    turn = os.open(place, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    began = time.monotonic()
    assert hold(place, NAME) is None
    assert time.monotonic() - began < 0.5
    os.close(turn)
    holder = hold(place, NAME)
    assert holder is not None
    member.close()
    assert inode(holder.fd)
    holder.close()
    assert not place.exists()


def test_sweeping_takes_away_what_the_dead_have_left_and_nothing_else(tmp_path: Path) -> None:
    dead, living = tmp_path / "dead", tmp_path / "living"
    dead.mkdir()
    (dead / "999999999.3").symlink_to("/proc/999999999/fd/3")
    member = join(living, NAME, create, anything)
    (living / "999999999.3").symlink_to("/proc/999999999/fd/3")
    for place in (dead, living):
        sweep(place, NAME)
    assert not dead.exists()
    again = join(living, NAME, create, anything)
    assert inode(again.fd) == inode(member.fd)
    member.close()
    again.close()
    assert not living.exists()
