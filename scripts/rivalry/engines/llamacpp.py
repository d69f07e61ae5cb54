"""llama.cpp, asked by scripts/rivalry/engines/calls.py. Usage: llama-batched-bench MODEL.gguf THREADS [OPTION...]

Each call is a run of llama.cpp's own benchmark, which loads the model and warms up, and computes prompts of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from scripts.rivalry.engines.calls import answer_calls, private_stdout

_BATCH = 2048  # tokens of a prompt computed at once, its default


class LlamaCpp:
    """Implements calls.Engine. KV in float32, as the others have it; each sequence has its own."""

    def __init__(self, program: str, model: str, threads: int, options: Sequence[str]) -> None:
        self._command = [program, "-m", model, "-t", str(threads), "-tb", str(threads), "-b", str(_BATCH), "-ub", "512"]
        self._command += ["-ctk", "f32", "-ctv", "f32", "--output-format", "jsonl", *options]

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        length, count = len(prompts[0]), len(prompts)
        sizes = ["-npp", str(length), "-ntg", str(max(1, steps)), "-npl", str(count), "-c", str((length + steps + 1) * count)]
        done = subprocess.run([*self._command, *sizes], stdout=subprocess.PIPE, text=True, check=True)
        (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        return found["t_pp"], [found["t_tg"] / max(1, steps)] * steps  # it tells the sum of its steps only


if __name__ == "__main__":
    _answers = private_stdout()
    answer_calls(LlamaCpp(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]), _answers)
