"""Keeps the life of one tritonserver, of all its model processes and of its companions in one hand.

A process of its own between `TritonServer` and the server, so that nothing outlives a parent that was killed:
- its socket to the parent closes when the parent ends, however that happens; then it stops the server and cleans up;
- orphans are given to it by the kernel (it is a subreaper), so the model processes of a killed server can't escape;
- server and companions are killed by the kernel if this process itself is.
Companions are processes beside the server, such as the front end; one that ends by itself is started again.

The parent says `stop`, `stop SECONDS` (in which requests may end) or `kill`, a message each; this process says `pid <n>`
and, if the server ends by itself, `exit <code>`. It ends when it was told to stop and nothing is left. Only the standard
library: it starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_TIMEOUT_S = 5.0  # only a process stuck in the kernel takes longer
_POLL_S = 0.02
_DRAIN_POLL_S = 0.05
_RESTART_PAUSE_S = 0.5
SEPARATOR = "+++"
# as in python_backends/triton/home.py, which is not imported: this starts in milliseconds
DRAINING, DRAINED, STOPPING = "draining", "drained", "stopping"


def remove_traces(run_dir: Path, shm_prefix: str) -> None:
    """Remove the run directory and the shared-memory files of a server that has ended. Idempotent."""
    shutil.rmtree(run_dir, ignore_errors=True)
    for path in Path("/dev/shm").glob(f"{shm_prefix}*"):
        path.unlink(missing_ok=True)


class Process:
    """A child that the kernel kills if this process dies."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        self.ended = os.pidfd_open(self.process.pid)

    def restart(self) -> None:
        """After it has ended. Output of this process goes to the server's log."""
        os.close(self.ended)
        line = f"companion {' '.join(self._command[:4])} ended with code {self.process.wait()}; starting it again\n"
        with suppress(OSError):  # a full disk
            os.write(sys.stdout.fileno(), line.encode())
        time.sleep(_RESTART_PAUSE_S)
        self.start()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def split(arguments: list[str]) -> list[list[str]]:
    """Commands separated by SEPARATOR."""
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == SEPARATOR:
            commands.append([])
        else:
            commands[-1].append(argument)
    return commands


def main(arguments: list[str]) -> None:
    """FD GRACE_S RUN_DIR SHM_PREFIX COMMAND [+++ COMPANION]...: run them until told to stop; their output is this process's."""
    descriptor, grace_s, run_dir, shm_prefix, *commands = arguments
    # Handlers, not SIG_IGN: the server would inherit that. Whoever signals the whole group means the parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    channel = socket.socket(fileno=int(descriptor))
    server, *companions = [Process(command) for command in split(commands)]
    _say(channel, f"pid {server.process.pid}")
    _supervise(channel, server, companions, Path(run_dir), float(grace_s))
    remove_traces(Path(run_dir), shm_prefix)


def _supervise(channel: socket.socket, server: Process, companions: list[Process], run_dir: Path, grace_s: float) -> None:
    """Return when told to stop, or left alone by the parent, and no process is left."""
    while True:
        ready = _await([channel.fileno(), server.ended, *(companion.ended for companion in companions)])
        if server.ended in ready:
            _kill_all(server.process)
            _say(channel, f"exit {server.process.returncode}")
            _await([channel.fileno()])
            return
        if channel.fileno() in ready:
            break
        for companion in companions:
            if companion.ended in ready:
                companion.restart()
    said = _hear(channel)
    if said != "kill":
        _drain(channel, server.ended, run_dir, float(said.partition(" ")[2] or 0))
        _leave_mark(run_dir / STOPPING)
        for process in (server, *companions):
            process.process.send_signal(signal.SIGTERM)
        _await_end(channel, server.ended, grace_s)
    _kill_all(server.process)


def _drain(channel: socket.socket, ended: int, run_dir: Path, seconds: float) -> None:
    """Until the router has nothing to do, `seconds` have passed, the server has ended or the parent says another word."""
    if not seconds:
        return
    _leave_mark(run_dir / DRAINING)
    deadline = time.monotonic() + seconds
    while not (run_dir / DRAINED).exists() and time.monotonic() < deadline:
        if _await([channel.fileno(), ended], _DRAIN_POLL_S):
            return  # what the parent says is heard by whoever awaits the end


def _leave_mark(path: Path) -> None:
    with suppress(OSError):  # a full disk: then requests are not told that the server ends
        path.touch()


def _await_end(channel: socket.socket, ended: int, grace_s: float) -> None:
    """Until the server has ended, `grace_s` have passed, or the parent is in a hurry."""
    deadline = time.monotonic() + grace_s
    sources = [channel.fileno(), ended]
    while (left := deadline - time.monotonic()) > 0:
        ready = _await(sources, left)
        if ended in ready:
            return
        if channel.fileno() in ready:
            said = _hear(channel)
            if said == "kill":
                return
            if not said:  # the parent is gone: that is no reason to hurry
                sources.remove(channel.fileno())


def _await(descriptors: list[int], timeout_s: float | None = None) -> list[int]:
    """Those that can be read. Without a time-out only where the parent's end, too, wakes us."""
    return select.select(descriptors, [], [], timeout_s)[0]


def _kill_all(server: subprocess.Popen[bytes]) -> None:
    """Kill and reap every descendant: when a parent dies, its children become ours, until there are none."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (children := _children()) and time.monotonic() < deadline:
        for pid in children:
            if pid == server.pid:
                server.kill()
                server.poll()
            else:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(_POLL_S)


def _children() -> list[int]:
    """Our direct children, zombies included: the field after the state in /proc/<pid>/stat is the parent (proc(5))."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if int(stat.rpartition(b")")[2].split()[1]) == os.getpid():
            found.append(int(entry))
    return found


def _hear(channel: socket.socket) -> str:
    """One message; empty when the parent is gone."""
    try:
        return channel.recv(64).decode()
    except OSError:
        return ""


def _say(channel: socket.socket, message: str) -> None:
    try:
        channel.sendall(message.encode())
    except OSError:  # the parent is gone; the caller notices by listening
        return


if __name__ == "__main__":
    main(sys.argv[1:])
