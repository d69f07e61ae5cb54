"""The compiled sampler draws what the plain one draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from python_backends.core.errors import EngineFailure
from python_backends.engines.torch import sampler as plain_module
from python_backends.engines.torch.kernels.sampler import CompiledSampler
from python_backends.engines.torch.sampler import Sampler
from tests.unit.engines.torch.test_sampler import make_draw, make_logits

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "in order": {"temperature": 1.0},
    "in order, hot, min_p": {"temperature": 3.0, "min_p": 0.01},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_p of nearly all": {"temperature": 1.5, "top_p": 0.9999},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_k beyond the leaders": {"temperature": 1.0, "top_k": 2000},
    "top_k of a cold row": {"temperature": 0.05, "top_k": 300, "top_p": 0.999},
    "all": {"temperature": 1.2, "top_k": 500, "top_p": 0.8, "min_p": 0.001},
    "edited": {"temperature": 0.8, "top_p": 0.9, "logit_bias": {3: 5.0}, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("vocab_size", [7, 16, 333, 5000])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_equals_the_plain_sampler(sampling: dict[str, Any], vocab_size: int, spread: float) -> None:
    logits = make_logits(64, vocab_size, spread=spread)
    draws = [make_draw(seed=seed, prompt=[1, 2, 3], output=[5] * (seed % 3), **sampling) for seed in range(64)]
    plain, compiled = (kind(vocab_size).sample(logits, draws) for kind in (Sampler, CompiledSampler))
    assert [token.token_id for token in compiled] == [token.token_id for token in plain]


def test_many_equal_logits() -> None:
    logits = make_logits(32, 3000).round().clamp(-1, 1)
    samplings: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 20}, {"temperature": 1.0})
    for sampling in samplings:
        draws = [make_draw(seed=seed, **{"temperature": 0.9, **sampling}) for seed in range(32)]
        plain, compiled = (kind(3000).sample(logits, draws) for kind in (Sampler, CompiledSampler))
        assert [token.token_id for token in compiled] == [token.token_id for token in plain]


def test_a_usual_distribution_sorts_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sort(_scores: torch.Tensor) -> None:
        raise AssertionError("a whole row was sorted")

    monkeypatch.setattr(plain_module, "_ranking", no_sort)
    samplings: tuple[dict[str, Any], ...] = ({"top_p": 0.9}, {"top_k": 50}, {"top_k": 1000, "top_p": 0.95})
    for sampling in samplings:
        draws = [make_draw(seed=seed, temperature=0.7, **sampling) for seed in range(16)]
        CompiledSampler(20_000).sample(make_logits(16, 20_000, spread=3.0), draws)


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = make_logits(20, 1234)
    draws = [make_draw(seed=i, temperature=0.5 + 0.1 * i, top_p=0.5 + 0.02 * i) for i in range(20)]
    together = [token.token_id for token in CompiledSampler(1234).sample(logits, draws)]
    for i in range(20):
        assert CompiledSampler(1234).sample(logits[i : i + 1], draws[i : i + 1])[0].token_id == together[i]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 17, 332])
def test_a_row_without_a_distribution_is_named(sampling: dict[str, Any], value: float, column: int) -> None:
    logits = make_logits(3, 333)
    logits[1, column] = value
    with pytest.raises(EngineFailure, match="row 1"):
        CompiledSampler(333).sample(logits, [make_draw(**sampling) for _ in range(3)])


def test_banned_and_masked_tokens_are_never_drawn() -> None:
    logits = make_logits(1, 64)
    logits[0, 32:] = -math.inf
    samplings: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 0.99})
    for sampling in samplings:
        for seed in range(60):
            draw = make_draw(seed=seed, banned=list(range(0, 32, 2)), **sampling)
            token = CompiledSampler(64).sample(logits, [draw])[0].token_id
            assert token < 32
            assert token % 2 == 1
