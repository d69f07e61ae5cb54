"""How much of a prompt is computed beside running streams: as much as keeps the time between their tokens.

A chunk of a prompt makes everybody in the step wait. Where a time between tokens is aimed at, a step with streams takes
as many prompt tokens as fit into that time, by what steps like it have taken, instead of a fixed number: more where
streams are few and short, fewer where they are many (Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference
with Sarathi-Serve", OSDI 2024, choose a fixed number for a target by profiling beforehand).
"""

from __future__ import annotations

from collections.abc import Iterable

from python_backends.core.messages import StepSample
from python_backends.core.step_model import StepModel, tokens_within


class StepLimit:
    """Belongs to the engine's thread. step_ms: what steps with streams are kept to."""

    def __init__(self, step_ms: float, step_tokens: int, calibration: Iterable[StepSample]) -> None:
        self._step_ms = step_ms
        self._step_tokens = step_tokens
        self._model = StepModel(calibration)

    def prompt_tokens(self, streams: int, context: int, depth: int) -> int:
        """Beside so many streams of `context` tokens together, of a prompt of which `depth` tokens are computed."""
        most = max(self._step_tokens - streams, 1)
        return tokens_within(self._model, self._step_ms, streams, context, depth, most)

    def learn(self, step: StepSample) -> None:
        """A step has been computed, with streams or without."""
        self._model.learn(step)
