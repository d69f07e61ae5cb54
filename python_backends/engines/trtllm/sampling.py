"""Our sampling parameters as TensorRT-LLM's. What it can't do is refused by name; nothing is dropped in silence.

A client's `stop` strings are the router's business: it sees all text, and the engine makes none (detokenize=False).

What holds: greedy decoding is exact up to the arithmetic of batches. A seed is passed on; releases before per-request
seeds (TensorRT-LLM PR 17172) draw from one generator per process, so there it doesn't reproduce. Random draws are
counted per engine, not by position: a request that goes on elsewhere draws other tokens than it would have here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from python_backends.core.errors import InvalidRequest
from python_backends.core.types import SamplingParams
from python_backends.engines.trtllm.library import Library

_PASSED_ON = frozenset(  # any other field, also one that is new in SamplingParams, is refused when it is set
    {
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
    }
)

_AS_CLIENTS_SAY = {"grammar": "grammar (response_format, tools, guided_decoding_guide)"}


def check_sampling(sampling: SamplingParams, eos_token_ids: Collection[int], library: Library) -> None:
    """Raises InvalidRequest that names what TensorRT-LLM can't do."""
    for field in msgspec.structs.fields(sampling):
        if field.name not in _PASSED_ON and getattr(sampling, field.name) != _default(field):
            name = _AS_CLIENTS_SAY.get(field.name, field.name)
            raise InvalidRequest(f"{name} is not supported by engine trtllm; leave it out")
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if getattr(sampling, name) != neutral and not library.applies_penalties:
            raise InvalidRequest(f"{name} has no effect in TensorRT-LLM {library.version}, so it is refused; leave it out")
    others = set(sampling.stop_token_ids) - set(eos_token_ids)
    if sampling.min_tokens and others:
        raise InvalidRequest(
            f"stop_token_ids {sorted(others)} with min_tokens: TensorRT-LLM holds back the model's end token only; "
            "give one of the two"
        )


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def sampling_arguments(
    sampling: SamplingParams, eos_token_ids: Collection[int], num_done: int, max_new: int, perf_metrics: bool
) -> dict[str, Any]:
    """Arguments of a new `tensorrt_llm.SamplingParams`: the LLM changes the object it is given, so none is used twice.

    num_done: output tokens that the request had before, which count towards min_tokens. max_new: tokens to produce.
    """
    min_left = max(0, sampling.min_tokens - num_done)
    arguments: dict[str, Any] = {
        "max_tokens": max_new,
        "n": 1,
        "detokenize": False,
        "exclude_input_from_output": True,
        "ignore_eos": sampling.ignore_eos,
        "return_perf_metrics": perf_metrics,
    }
    if sampling.temperature == 0:
        arguments["top_k"] = 1
    else:
        # top_p is always given: without top_k and top_p some releases take a request for greedy, whatever its temperature.
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        if sampling.top_k:
            arguments["top_k"] = sampling.top_k
    if min_left:
        arguments["min_tokens"] = min_left
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops |= set(eos_token_ids)  # TensorRT-LLM knows one end token, models may have several
    if stops and not min_left:
        arguments["stop_token_ids"] = sorted(stops)
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if getattr(sampling, name) != neutral:
            arguments[name] = getattr(sampling, name)
    if sampling.logprobs is not None:
        arguments["logprobs"] = max(1, sampling.logprobs)  # 0 means none in releases up to 1.2
    return arguments
