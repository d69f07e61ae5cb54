"""What TensorRT-LLM's answers mean in our terms. Pure functions over its CompletionOutput, whose tokens are cumulative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from python_backends.core.types import FinishReason, TokenLogprob

GIVEN_UP = ("cancelled", "timeout")
"""Finish reasons of requests that TensorRT-LLM ended by itself."""


def finish_reason(output: Any) -> FinishReason:
    """Of a finished output. Raises ValueError for one that is not known."""
    if output.finish_reason == "stop":
        return FinishReason.STOP
    if output.finish_reason == "length":
        return FinishReason.LENGTH
    raise ValueError(f"finish reason {output.finish_reason!r}")


def tokens(output: Any, finish: FinishReason | None, eos_token_ids: Sequence[int]) -> list[int]:
    """All output tokens; with STOP the last one is the token that stopped, as our contract has it.

    TensorRT-LLM takes a stop token id off the tokens and names it in stop_reason; an end token it leaves in place, or
    doesn't tell at all.
    """
    token_ids = list(output.token_ids)
    if finish is FinishReason.STOP:
        if isinstance(output.stop_reason, int):
            token_ids.append(output.stop_reason)
        elif eos_token_ids and (not token_ids or token_ids[-1] not in eos_token_ids):
            token_ids.append(eos_token_ids[0])
    return token_ids


def reused_tokens(output: Any, num_tokens: int, block_size: int) -> int:
    """Prefix hit of a prompt of `num_tokens`; 0 when TensorRT-LLM doesn't say. The last token is always computed."""
    metrics = getattr(output.request_perf_metrics, "kv_cache_metrics", None)
    blocks = getattr(metrics, "num_reused_blocks", None) or 0
    return min(num_tokens - 1, int(blocks) * block_size)


def logprobs(output: Any, start: int, token_ids: Sequence[int], wanted: int | None) -> list[TokenLogprob] | None:
    """Of the output tokens from position `start` on; None when none are wanted. A stop token put back may have none.

    Raises ValueError when a sampled token is not among those that TensorRT-LLM tells.
    """
    if wanted is None:
        return None
    found = []
    for token_id, top in zip(token_ids, (output.logprobs or [])[start:], strict=False):
        if token_id not in top:
            raise ValueError(f"TensorRT-LLM tells no log-probability of the sampled token {token_id}")
        best = sorted(((int(token), float(entry.logprob)) for token, entry in top.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(token_id, float(top[token_id].logprob), best[:wanted]))
    return found
