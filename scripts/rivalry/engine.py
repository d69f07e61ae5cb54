"""A rival's engine, driven from here: a process of its own environment that stands still except while it computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from python_backends.core.errors import Unavailable
from python_backends.core.paths import repository_root

_LAST_WORDS = 1500  # characters


class RivalEngine:
    """A program of scripts/rivalry/engines. Ready after construction; `close` ends it."""

    def __init__(self, name: str, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        """Raises Unavailable with the program's last words when it can't load the model."""
        self.name = name
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(repository_root()), "PYTHONSAFEPATH": "1", **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self._receive()
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        """Seconds to the first tokens, and of each greedy step after them. Raises Unavailable when the program ended."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"prompts": [list(prompt) for prompt in prompts], "steps": steps}).encode())
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            answer = self._receive()
            return answer["first"], answer["steps"]
        except BrokenPipeError as error:
            raise self._ended() from error
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Idempotent."""
        self._signal(signal.SIGKILL)  # there is nothing to be saved
        self._process.communicate()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> Unavailable:
        self.close()
        return Unavailable(f"{self.name} has ended: {self._log.read_text(errors='replace').strip()[-_LAST_WORDS:]}")

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has ended
            return
