"""What a machine can serve, from its measured limits: an order of magnitude, before anything is installed or loaded.

Two bounds (the roofline model, Williams et al. 2009): a decode step reads every weight once, so tokens per second of one
stream are at most bandwidth / weight bytes; a prompt token costs 2 operations per weight, so prefill is at most
rate / (2 x parameters). Attention and the KV cache come on top. Engines reach a part of either bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.doctor_checks import GIB, memory_needed

_REACHED = 0.7  # of a bound, by a good engine
_STREAMS, _CONTEXT = 8, 2048  # whose KV has to fit
_PROMPT = 2000  # tokens of the prompt whose first token is waited for
_SMOOTH_TOKENS_S = 10.0  # faster than people read
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    parameters: float
    kv_elements: int  # per token: 2 x layers x kv_heads x head_dim


MODELS = (
    Model("SmolLM2-135M", 135e6, 2 * 30 * 3 * 64),
    Model("SmolLM2-360M", 362e6, 2 * 32 * 5 * 64),
    Model("Llama-3.2-1B", 1.24e9, 2 * 16 * 8 * 64),
    Model("Llama-3.2-3B", 3.21e9, 2 * 28 * 8 * 128),
    Model("Llama-3.1-8B", 8.03e9, 2 * 32 * 8 * 128),
    Model("Qwen3-32B", 32.8e9, 2 * 64 * 8 * 128),
    Model("Llama-3.1-70B", 70.6e9, 2 * 80 * 8 * 128),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured. Bandwidth of reads, bytes/s; matrix products, operations/s; with one thread and with all."""

    cores: int
    bandwidth_one: float
    bandwidth_all: float
    matrix_one: float
    matrix_all: float
    memory_bytes: int  # that may be used
    element_bytes: int = 4  # of weights and KV


@dataclass(frozen=True, slots=True)
class Fit:
    """One model on the machine. Rates are what a good engine reaches; `verdict`: well, slowly, or why not."""

    model: str
    needed_bytes: int
    decode_tokens_s: float
    prefill_tokens_s: float
    ttft_s: float  # of a prompt of _PROMPT tokens
    verdict: str


def fits(limits: Limits, models: Sequence[Model] = MODELS) -> list[Fit]:
    return [_fit(model, limits) for model in models]


def _fit(model: Model, limits: Limits) -> Fit:
    weights = int(model.parameters * limits.element_bytes)
    pool = model.kv_elements * limits.element_bytes * _STREAMS * _CONTEXT
    needed = memory_needed(weights, [pool, pool])
    decode = _REACHED * limits.bandwidth_all / weights
    prefill = _REACHED * limits.matrix_all / (2 * model.parameters)
    ttft = _PROMPT / prefill
    verdict = "slowly"
    if decode >= _SMOOTH_TOKENS_S:
        verdict = "well" if ttft <= _PATIENCE_S else "short prompts well"
    if needed > limits.memory_bytes:
        verdict = "not: too large"
    return Fit(model.name, needed, decode, prefill, ttft, verdict)


@dataclass(frozen=True, slots=True)
class Split:
    """Threads of each worker. Without prefill threads: one aggregated worker."""

    prefill: int
    decode: int
    text: str


def split_cores(limits: Limits) -> Split:
    """How to divide the cores: decode needs no more threads than read memory at its full rate, prefill takes the rest."""
    if limits.cores < 2:
        return Split(0, 1, "one core: one aggregated worker; two phases would only take turns on it")
    saturating = math.ceil(limits.bandwidth_all / limits.bandwidth_one - 0.25)  # a rest of less than a quarter is noise
    decode = min(max(1, saturating), limits.cores // 2)
    prefill = limits.cores - decode
    speed = f"{limits.bandwidth_all / GIB:.0f} GiB/s"
    reads = f"enough for the memory's {speed}"
    if decode < saturating:
        reads = f"which reads about {limits.bandwidth_one * decode / GIB:.0f} of the memory's {speed}"
    return Split(
        prefill, decode, f"one prefill worker with {_threads(prefill)}, one decode worker with {_threads(decode)}, {reads}"
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
