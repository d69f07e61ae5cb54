"""OpenVINO GenAI, asked by scripts/rivalry/engines/calls.py. Usage: MODEL.gguf THREADS"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai

from scripts.rivalry.engines.calls import answer_calls, private_stdout

_MICROSECONDS = 1e-6
_UNLIMITED = 1 << 31


class OpenVino:
    """Implements calls.Engine. float32 throughout: by itself it would keep KV in 8 bits."""

    def __init__(self, model: str, threads: int) -> None:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        scheduler = openvino_genai.SchedulerConfig()  # as the pipeline's own, except that prompts seen before are computed
        scheduler.max_num_batched_tokens = _UNLIMITED
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **settings)

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig(max_new_tokens=steps + 1, ignore_eos=True, do_sample=False)
        metrics = self._pipeline.generate(inputs, config).perf_metrics.raw_metrics
        durations = [float(value) * _MICROSECONDS for value in metrics.token_infer_durations]
        return durations[0], durations[1:]


if __name__ == "__main__":
    _answers = private_stdout()
    answer_calls(OpenVino(sys.argv[1], int(sys.argv[2])), _answers)
