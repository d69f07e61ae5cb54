"""The documented fields; any other keyword is a TypeError, as in the real dataclass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    max_tokens: int = 32
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    n: int = 1
    detokenize: bool = True
    exclude_input_from_output: bool = True
    return_perf_metrics: bool = False

    @property
    def greedy(self) -> bool:
        """A temperature alone does not make a request sample: early releases look at top_k and top_p only."""
        return (self.top_k is None or self.top_k == 1) and (self.top_p is None or self.top_p == 0.0)
