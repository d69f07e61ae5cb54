from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from python_backends.core.types import FinishReason, TokenLogprob
from python_backends.engines.trtllm import answers


def output(**fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "token_ids": [],
        "finish_reason": None,
        "stop_reason": None,
        "logprobs": [],
        "request_perf_metrics": None,
    }
    return SimpleNamespace(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("token_ids", "stop_reason", "eos", "expected"),
    [
        ([5, 6], 9, (2,), [5, 6, 9]),  # a stop token id, taken off
        ([5, 6], 9, (), [5, 6, 9]),
        ([], 9, (2,), [9]),
        ([5, 2], None, (2,), [5, 2]),  # the end token, left in place
        ([5, 3], None, (2, 3), [5, 3]),
        ([5, 6], None, (2,), [5, 6, 2]),  # the end token, not told
        ([5, 6], None, (), [5, 6]),  # no end token is known: then it is the last one
        ([5, 6], "a stop string", (2,), [5, 6, 2]),
    ],
)
def test_a_stop_ends_with_the_token_that_stopped(
    token_ids: list[int], stop_reason: Any, eos: tuple[int, ...], expected: list[int]
) -> None:
    said = output(token_ids=token_ids, stop_reason=stop_reason)
    assert answers.tokens(said, FinishReason.STOP, eos) == expected
    assert answers.tokens(said, FinishReason.LENGTH, eos) == token_ids
    assert answers.tokens(said, None, eos) == token_ids


def test_finish_reasons() -> None:
    assert answers.finish_reason(output(finish_reason="stop")) is FinishReason.STOP
    assert answers.finish_reason(output(finish_reason="length")) is FinishReason.LENGTH
    with pytest.raises(ValueError, match="bored"):
        answers.finish_reason(output(finish_reason="bored"))


@pytest.mark.parametrize(("blocks", "expected"), [(0, 0), (2, 32), (5, 74), (None, 0)])
def test_reused_tokens_never_count_the_last_one(blocks: int | None, expected: int) -> None:
    metrics = SimpleNamespace(kv_cache_metrics=SimpleNamespace(num_reused_blocks=blocks))
    assert answers.reused_tokens(output(request_perf_metrics=metrics), 75, 16) == expected


def test_no_metrics_is_no_reuse() -> None:
    assert answers.reused_tokens(output(), 75, 16) == 0
    assert answers.reused_tokens(output(request_perf_metrics=SimpleNamespace(kv_cache_metrics=None)), 75, 16) == 0


def test_logprobs_are_of_the_new_tokens_best_first() -> None:
    entries = [{1: SimpleNamespace(logprob=-1.0)}, {7: SimpleNamespace(logprob=-3.0), 8: SimpleNamespace(logprob=-0.1)}]
    said = output(token_ids=[1, 7], logprobs=entries)
    assert answers.logprobs(said, 1, [7], 2) == [TokenLogprob(7, -3.0, [(8, -0.1), (7, -3.0)])]
    assert answers.logprobs(said, 1, [7], 0) == [TokenLogprob(7, -3.0, [])]
    assert answers.logprobs(said, 1, [7], None) is None
    assert answers.logprobs(said, 1, [7, 2], 0) == [TokenLogprob(7, -3.0, [])], "a stop token that was put back has none"


def test_a_missing_logprob_is_not_invented() -> None:
    with pytest.raises(ValueError, match="sampled token 7"):
        answers.logprobs(output(logprobs=[{8: SimpleNamespace(logprob=-0.1)}]), 0, [7], 1)
