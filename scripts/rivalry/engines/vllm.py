"""vLLM without its server, asked by scripts/rivalry/engines/calls.py. Usage: MODEL LONGEST (tokens of a sequence, at most)"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise

from vllm import LLM, SamplingParams

from scripts.rivalry.engines.calls import answer_calls, private_stdout

_CHUNK = 2048  # half of the tokens that a step of it takes by default


class Vllm:
    """Implements calls.Engine. float32, as the others have it, and its own chunk size; prompts seen before are computed."""

    def __init__(self, model: str, longest: int) -> None:
        self._engine = LLM(model, dtype="float32", max_model_len=longest, enable_prefix_caching=False).llm_engine
        self._calls = 0

    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        self._calls += 1
        # The first of several prompts go on while the last are still computed.
        ahead = sum(map(len, prompts)) // _CHUNK + 1 if len(prompts) > 1 else 0
        asked = SamplingParams(temperature=0.0, max_tokens=1 + steps + ahead, ignore_eos=True, detokenize=False)
        waiting = {f"{self._calls}.{number}" for number in range(len(prompts))}
        began = time.perf_counter()
        for name, prompt in zip(sorted(waiting), prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, asked)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        times = [time.perf_counter()]
        for _ in range(steps):
            self._engine.step()
            times.append(time.perf_counter())
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return times[0] - began, [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    _answers = private_stdout()
    answer_calls(Vllm(sys.argv[1], int(sys.argv[2])), _answers)
