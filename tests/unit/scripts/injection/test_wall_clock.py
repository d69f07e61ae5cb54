"""A process whose wall clock jumps, and whose waits follow it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from python_backends.core.errors import Unavailable
from scripts.injection.wall_clock import WallClock

HOUR_S = 3600.0

# Says what it sees, a line each, whenever it is asked. A wait of the wall clock, begun by a thread, is to last a minute.
CHILD = """
    import ctypes, threading, time

    class Instant(ctypes.Structure):
        _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]

    library, semaphore = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(64)
    library.sem_init(semaphore, 0, 0)

    def wait():
        library.sem_timedwait(semaphore, ctypes.byref(Instant(int(time.time()) + 60, 0)))
        print("over", flush=True)

    began, wall = time.monotonic(), time.time()
    print("ready", flush=True)
    while True:
        word = input()
        if word == "wait":
            threading.Thread(target=wait, daemon=True).start()
        else:
            print(round(time.time() - wall - (time.monotonic() - began)), flush=True)
"""

needs_compiler = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler")


@contextmanager
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert heard(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str], word: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if word:
        process.stdin.write(f"{word}\n")
    return process.stdout.readline().strip()


@needs_compiler
def test_clocks_jump_together_or_alone() -> None:
    clock = WallClock()
    with clock.ready("fake"), child() as one, child() as other:
        clock.check([one.pid, other.pid])
        assert heard(one, "now") == "0"
        clock.set(HOUR_S)
        assert (heard(one, "now"), heard(other, "now")) == ("3600", "3600")
        clock.set(-2 * HOUR_S, other.pid)
        assert (heard(one, "now"), heard(other, "now")) == ("3600", "-3600")
        clock.set(0.0)
        assert (heard(one, "now"), heard(other, "now")) == ("0", "-7200")


@needs_compiler
def test_a_wait_that_has_begun_ends_when_the_clock_jumps_over_its_end() -> None:
    clock = WallClock()
    with clock.ready("fake"), child() as process:
        assert process.stdin is not None
        process.stdin.write("wait\n")
        assert heard(process, "now") == "0"
        clock.set(HOUR_S)
        assert heard(process) == "over"  # or pytest-timeout ends it


def test_a_process_without_the_library_is_told() -> None:
    with child() as process, pytest.raises(Unavailable, match=f"clock of process {process.pid} can't be made to jump"):
        WallClock().check([process.pid])


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="apt install gcc"), WallClock().ready("fake"):
        pass
