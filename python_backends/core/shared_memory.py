"""Anonymous shared memory (memfd), and how processes that never knew each other come to share one.

A memfd has no name, so nothing is left behind however its users die, and it isn't bound by the size of /dev/shm (64 MiB
in many containers). Other processes of the same user open it through /proc/<pid>/fd/<fd>. Sealed against shrinking
(memfd_create(2)), it can't be pulled away from under whoever has it mapped.

A `Membership` is one user's share in memory that must outlive any single user. Every member keeps the memory open and has
an entry at a meeting place, a directory of links to the members' descriptors; who comes later opens what any living
member has. With the last member, the kernel frees the memory; whatever entries a crash has left are worth nothing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from python_backends.core.errors import ConfigError, Unavailable

NODE_MEMORY = "baton-node"
"""Name of the node store's memory: workers use it, and the router holds it while they are being restarted."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14; Python has no name for it
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1
_JOIN_TIMEOUT_S = 300.0  # others join only after whoever makes the memory has it from the kernel, page by page
_LEAVE_TIMEOUT_S = 1.0  # what could not be cleared away is cleared by whoever comes next
_POLL_S = 0.005


def create_memory(name: str, size: int, what: str, key: str) -> tuple[int, mmap.mmap]:
    """New zeroed memory of `size` bytes: its descriptor and a writable mapping, both the caller's.

    Every page is there and mapped: the first write to one runs at memory speed (a fault costs 10 us and more in a virtual
    machine), and a lack of memory shows now. Raises ConfigError that calls the memory `what` and says to lower `key`.
    """
    available = _available_bytes()
    if size > available:  # the kernel would find out by killing processes
        raise _too_large(size, what, key, f"{available >> 20} MiB available")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size)
        with suppress(OSError):  # an older kernel: then the pages are there, but not mapped yet
            memory.madvise(_MADV_POPULATE_WRITE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise _too_large(size, what, key, str(error.strerror)) from error
    return fd, memory


def open_memory(path: str, name: str, flags: int) -> int:
    """A descriptor of one's own for another process's memory, known to be a sealed memfd called `name`.

    `path` is /proc/<pid>/fd/<fd>. Raises OSError when the other is gone, ValueError when it is something else.
    """
    # By its name first: opening whatever else has this number (a pipe, a device) could block or have effects.
    if os.readlink(path) != f"/memfd:{name} (deleted)":
        raise ValueError(f"{path} is no {name} memory")
    fd = os.open(path, flags | os.O_CLOEXEC)
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != _SEALS:
        os.close(fd)
        raise ValueError(f"{path} is no sealed {name} memory")
    return fd


class Membership:
    """One member's share: `fd` is open from construction to `close`. Make it by `join` or `hold`."""

    def __init__(self, place: Path, name: str, fd: int) -> None:
        self.fd = fd
        self._place = place
        self._name = name
        self._entry = place / f"{os.getpid()}.{fd}"
        with suppress(FileExistsError):  # an earlier process of this number left it; it leads to our descriptor now
            self._entry.symlink_to(_path_of(self._entry.name))

    def close(self) -> None:
        """Leave; the last one clears the meeting place away. Idempotent."""
        if self.fd < 0:
            return
        self._entry.unlink(missing_ok=True)
        sweep(self._place, self._name, patience_s=_LEAVE_TIMEOUT_S)
        os.close(self.fd)
        self.fd = -1


def join(place: Path, name: str, create: Callable[[], int], is_it: Callable[[int], bool]) -> Membership:
    """Become a member: of what the members at `place` share, else of what `create` makes.

    `is_it` looks at an open descriptor and tells whether it is the memory that is meant. Raises what `create` raises, and
    Unavailable when another one holds up the meeting place for minutes.
    """
    with _alone_at(place):
        fd = _open_any(place, name, is_it)
        return Membership(place, name, create() if fd is None else fd)


def hold(place: Path, name: str) -> Membership | None:
    """Keep alive what the members at `place` share, without using it. None when there is nothing, or it can't be had now."""
    if not place.is_dir():
        return None
    try:
        with _alone_at(place, patience_s=0.0):
            fd = _open_any(place, name, lambda fd: True)
            return None if fd is None else Membership(place, name, fd)
    except (OSError, Unavailable):
        return None


def sweep(place: Path, name: str, patience_s: float = 0.0) -> None:
    """Remove a meeting place whose members have all died. Does nothing where one lives, or somebody stays at it."""
    with suppress(OSError, Unavailable), _alone_at(place, patience_s):
        fd = _open_any(place, name, lambda fd: True)
        if fd is None:
            place.rmdir()
        else:
            os.close(fd)


def _open_any(place: Path, name: str, is_it: Callable[[int], bool]) -> int | None:
    """The memory of any living member. Entries that lead nowhere, or elsewhere, are cleared away."""
    for entry in sorted(place.iterdir()):
        try:
            fd = open_memory(_path_of(entry.name), name, os.O_RDWR)
        except PermissionError:
            continue  # alive, but not ours to open
        except (OSError, ValueError):
            entry.unlink(missing_ok=True)
            continue
        if is_it(fd):
            return fd
        os.close(fd)
        entry.unlink(missing_ok=True)
    return None


def _path_of(entry: str) -> str:
    pid, _, fd = entry.partition(".")
    return f"/proc/{pid}/fd/{fd}"


@contextmanager
def _alone_at(place: Path, patience_s: float = _JOIN_TIMEOUT_S) -> Iterator[None]:
    """The directory exists and nobody else is inside this context. The kernel ends a dead process's turn."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        try:
            turn = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the last member left just now
        try:
            if _take_turn(turn, deadline) and _is_at(turn, place):
                yield
                return
        finally:
            os.close(turn)
        if time.monotonic() > deadline:
            raise Unavailable(f"another process holds up {place}; remove that directory if its server is gone")


def _take_turn(turn: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def _is_at(turn: int, place: Path) -> bool:
    """Whether the directory we have the turn for is still the one that others come to."""
    try:
        return os.path.samestat(os.fstat(turn), os.stat(place))
    except FileNotFoundError:
        return False


def _too_large(size: int, what: str, key: str, why: str) -> ConfigError:
    return ConfigError(f"{what} of {size >> 20} MiB does not fit in memory ({why}); lower {key}")


def _available_bytes() -> int:
    """What can be allocated without swapping (MemAvailable of proc(5)), within the container's limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limits = [path.read_text().strip() for path in _CGROUP_LIMITS if path.exists()]
    return min([available, *(int(limit) for limit in limits if limit.isdecimal())])  # "max": no limit
