"""The wall clock of a server's processes, made to jump: a library of our own that is preloaded into them (wall_clock.c)."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from python_backends.core.errors import Unavailable
from scripts.injection.environment import environment

_SOURCE = Path(__file__).with_suffix(".c")
_ENTRY = struct.Struct("q")
_COMPILE_S = 60.0


class WallClock:
    """One for all servers that are started while it is `ready`. Clocks of this process are those of the machine."""

    def __init__(self) -> None:
        self._table = Path("/nowhere")  # until it is ready
        self.settings: dict[str, object] = {}

    @contextmanager
    def ready(self, engine: str) -> Iterator[None]:
        """Processes that are begun meanwhile have a wall clock that can jump. Raises Unavailable where none can be made."""
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "wall_clock.so"
            _compile(library)
            self._table = Path(directory) / "table"
            with self._table.open("wb") as table:  # nearly all of it is a hole
                table.truncate(_ENTRY.size * (int(Path("/proc/sys/kernel/pid_max").read_text()) + 1))
            preloaded = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
            with environment(LD_PRELOAD=preloaded, BATON_CHAOS_CLOCK=str(self._table)):
                yield

    def set(self, seconds: float, pid: int = 0) -> None:
        """From now on the clock of this process - 0: of all - is so far from the machine's."""
        with self._table.open("r+b", buffering=0) as table:
            table.seek(_ENTRY.size * pid)
            table.write(_ENTRY.pack(int(seconds * 1e9)))

    def check(self, pids: Iterable[int]) -> None:
        """Raises Unavailable when one of the processes has not got such a clock."""
        for pid in pids:
            if str(self._table) not in Path(f"/proc/{pid}/maps").read_text():
                raise Unavailable(f"the clock of process {pid} can't be made to jump: the library was not loaded into it")


def _compile(library: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable(
            "clocks can't be made to jump without a C compiler; install one (Debian, Ubuntu: apt install gcc libc6-dev)"
        )
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
    if ended.returncode:
        raise Unavailable(f"clocks can't be made to jump: {' '.join(command)} says {ended.stderr.strip()}")
