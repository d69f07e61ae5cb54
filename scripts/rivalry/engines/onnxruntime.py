"""ONNX Runtime GenAI, asked by scripts/rivalry/engines/calls.py. Usage: DIRECTORY (as its model builder wrote it) THREADS"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnxruntime_genai

from scripts.rivalry.engines.calls import answer_calls, private_stdout


class OnnxRuntime:
    """Implements calls.Engine."""

    def __init__(self, model: str, threads: int) -> None:
        config = onnxruntime_genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        length = len(prompts[0]) + steps + 2
        parameters.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        began = time.perf_counter()
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        times = [time.perf_counter()]
        for _ in range(steps):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times[0] - began, [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    _answers = private_stdout()
    answer_calls(OnnxRuntime(sys.argv[1], int(sys.argv[2])), _answers)
