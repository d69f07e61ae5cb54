"""A rival's engine, driven from here: a process of its own environment that stands still except while it computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from python_backends.core.errors import Unavailable
from python_backends.core.paths import repository_root
from scripts.rivalry.environments import ENVIRONMENTS
from scripts.rivalry.models import gguf_of, most_tokens, onnx_of
from scripts.rivalry.servers import vllm_variables

_LAST_WORDS = 1500  # characters


class RivalEngine:
    """A program that answers calls (scripts/rivalry/engines/calls.py). Ready after construction; `close` ends it."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """`log`: the file of what it prints. Raises Unavailable with its last words when it can't load the model."""
        self.name = name
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(repository_root()), "PYTHONSAFEPATH": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # all its processes get our signals
            )
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        """Compute prompts of one length together: seconds to the first tokens, and of each of so many greedy steps.

        Raises Unavailable with its last words when it ended.
        """
        call = json.dumps({"prompts": [list(prompt) for prompt in prompts], "steps": steps})
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(call.encode() + b"\n")
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
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

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


def _openvino(model: Path, threads: int) -> list[str]:
    narrow = gguf_of(model, GGMLQuantizationType.F16)  # its reader takes no float32
    return _program("openvino", "openvino", str(narrow), str(threads))


def _onnxruntime(model: Path, threads: int) -> list[str]:
    return _program("onnxruntime", "onnxruntime", str(onnx_of(model)), str(threads))


def _llamacpp(matrices: GGMLQuantizationType, model: Path, threads: int) -> list[str]:
    bench = ENVIRONMENTS["llama.cpp"].program("llama-batched-bench")
    # Repacked for AMX, 8 bits end in an illegal instruction where a hypervisor shows AMX and does not allow it.
    options = ["--no-repack"] if matrices is GGMLQuantizationType.Q8_0 else []
    return _program("llama.cpp", "llamacpp", str(bench), str(gguf_of(model, matrices)), str(threads), *options)


def _vllm(model: Path, threads: int) -> list[str]:
    variables = vllm_variables(sorted(os.sched_getaffinity(0))[:threads])
    program = _program("vllm", "vllm", str(model), str(most_tokens(model)))
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *program]


def _program(environment: str, module: str, *arguments: str) -> list[str]:
    return [str(ENVIRONMENTS[environment].program("python")), "-m", f"scripts.rivalry.engines.{module}", *arguments]


ENGINES: dict[str, Callable[[Path, int], list[str]]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "llama.cpp": partial(_llamacpp, GGMLQuantizationType.F32),
    "llama.cpp-q8_0": partial(_llamacpp, GGMLQuantizationType.Q8_0),
    "vllm": _vllm,
}
"""By name: (model directory, threads) -> the program's command. The model is converted first, once."""
