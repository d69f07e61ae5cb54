"""What prompts of several steps and transfers cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from python_backends.core.step_model import StepModel
from router.cost_model import LinkModel, prefill_ms

# --- prompts of several steps ------------------------------------------------------------------------------------------


def model_of(law: Sequence[float]) -> StepModel:
    model = StepModel()
    model.coefficients = list(law)
    return model


def test_a_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    model = model_of((10.0, 0.1, 0.0, 0.0, 0.0))
    assert prefill_ms(model, 100, 100, 0) == pytest.approx(20)
    assert prefill_ms(model, 100, 101, 0) == pytest.approx(20 + 10.1)
    assert prefill_ms(model, 100, 250, 0) == pytest.approx(3 * 10 + 25)


def test_what_is_ahead_and_beside_takes_its_time() -> None:
    model = model_of((10.0, 0.1, 0.0, 0.0, 0.0))
    alone = prefill_ms(model, 100, 50, 0)
    assert prefill_ms(model, 100, 50, 0, ahead=100) == pytest.approx(alone + 20 + 10)  # a step, and half of one under way
    assert prefill_ms(model, 100, 50, 0, beside=1000) == pytest.approx(alone + 5 + 10)


def test_streams_take_part_of_every_chunk_and_a_step_is_under_way() -> None:
    model = model_of((10.0, 0.1, 0.0, 0.5, 0.0))
    assert prefill_ms(model, 100, 80, 0, streams=20) == pytest.approx((10 + 8 + 10) + (10 + 10) / 2)
    assert prefill_ms(model, 100, 81, 0, streams=20) == pytest.approx((28 + 10 + 0.1 + 10) + 10)


def test_context_costs() -> None:
    model = model_of((0.0, 0.0, 1e-3, 0.0, 0.0))
    assert prefill_ms(model, 1000, 100, 0) == pytest.approx(1e-3 * 100 * 50)
    assert prefill_ms(model, 1000, 100, 900) == pytest.approx(1e-3 * 100 * 950)
    assert prefill_ms(model, 10, 100, 900) == pytest.approx(1e-3 * 100 * 950)


# --- links -------------------------------------------------------------------------------------------------------------


def test_the_rate_of_a_link_is_learned() -> None:
    link = LinkModel()
    for size in (1_000_000, 5_000_000, 20_000_000) * 30:
        link.learn(size, transfer_ms=size / 1e5, total_ms=size / 1e5 + 3)
    assert link.bytes_per_ms == pytest.approx(1e5, rel=0.02)
    assert link.transfer_ms(10_000_000) == pytest.approx(103, rel=0.03)


def test_transfers_of_nothing_teach_only_the_overhead() -> None:
    link = LinkModel()
    rate = link.bytes_per_ms
    for _ in range(60):
        link.learn(0, transfer_ms=0.0, total_ms=9.0)
    assert link.bytes_per_ms == rate
    assert link.transfer_ms(0) == pytest.approx(9, rel=0.02)
