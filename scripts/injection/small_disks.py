"""File systems that can be filled to the last byte without harm to others: small ones, in a mount namespace of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from python_backends.core.errors import Unavailable
from scripts.injection.environment import environment

SHM = Path("/dev/shm")
_SIZE = "64m"  # that of /dev/shm in a container, if nobody says otherwise
_OUTSIDE = "BATON_CHAOS_OUTSIDE"  # the mount namespace that this process has left
_CHUNKS = (1 << 20, 1 << 12, 1)
_COMMAND_S = 10.0


def enter_own_mounts(module: str, arguments: Sequence[str]) -> None:
    """Go on as `python -m module arguments` in a mount namespace of its own, where that can be had and it is not in one."""
    if os.environ.get(_OUTSIDE):
        return
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if _works([*command, "mount", "-t", "tmpfs", "tmpfs", str(SHM)]):
            os.environ[_OUTSIDE] = _namespace()
            os.execvp(command[0], [*command, sys.executable, "-m", module, *arguments])


class SmallDisks:
    """What is written by servers that are started while it is `ready`, and /dev/shm."""

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}

    @contextmanager
    def ready(self, engine: str) -> Iterator[None]:
        """run_base() is elsewhere meanwhile. Raises Unavailable in the mount namespace of others."""
        if os.environ.get(_OUTSIDE, _namespace()) == _namespace():
            raise Unavailable(
                "file systems can't be filled without mounts of one's own; run it as root, or where `unshare -Urm` works"
            )
        with tempfile.TemporaryDirectory() as directory, _mounted(Path(directory)), _mounted(SHM):
            former, tempfile.tempdir = tempfile.tempdir, directory
            try:
                with environment(TMPDIR=directory):
                    yield
            finally:
                tempfile.tempdir = former

    @contextmanager
    def full(self, place: Path) -> Iterator[None]:
        """Not a byte more can be written at `place` meanwhile."""
        filler = place / "filler"  # of everything that lies on the same file system
        try:
            with filler.open("wb", buffering=0) as file:
                for chunk in _CHUNKS:
                    with suppress(OSError):  # no space left
                        while file.write(bytes(chunk)) == chunk:
                            pass
            yield
        finally:
            filler.unlink()


@contextmanager
def _mounted(place: Path) -> Iterator[None]:
    _run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=0700", "tmpfs", str(place)])
    try:
        yield
    finally:
        _run(["umount", "--lazy", str(place)])  # a process that is just ending may still use it


def _namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=False).returncode == 0
    except OSError:
        return False


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if ended.returncode:
        raise Unavailable(f"{' '.join(command)}: {ended.stderr.strip()}")
