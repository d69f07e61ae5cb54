"""From limits to what can be served."""

from __future__ import annotations

import pytest

from scripts.doctor_checks import GIB
from scripts.doctor_sizing import MODELS, Limits, Model, fits, split_cores

SMALL = Limits(2, 13 * GIB, 23 * GIB, 70e9, 133e9, 20 * GIB)
LARGE = Limits(64, 15 * GIB, 240 * GIB, 70e9, 3.5e12, 400 * GIB)


def test_rates_are_the_part_of_the_roofline_that_engines_reach() -> None:
    (fit,) = fits(SMALL, [Model("A", 100e6, 2 * 12 * 4 * 64)])
    assert fit.decode_tokens_s == pytest.approx(0.7 * 23 * GIB / 400e6, rel=1e-3)
    assert fit.prefill_tokens_s == pytest.approx(0.7 * 133e9 / 200e6, rel=1e-3)
    assert fit.ttft_s == pytest.approx(2000 / fit.prefill_tokens_s)
    assert fit.verdict == "well"


def test_larger_models_fit_larger_machines() -> None:
    small, large = ({fit.model: fit for fit in fits(limits)} for limits in (SMALL, LARGE))
    assert small["SmolLM2-135M"].verdict == "short prompts well"
    assert small["Llama-3.1-8B"].verdict == "not: too large"
    assert large["Llama-3.2-1B"].verdict == "well"
    assert large["Llama-3.1-8B"].verdict == "slowly"
    needed = [fit.needed_bytes for fit in fits(LARGE)]
    assert needed == sorted(needed)
    assert [fit.model for fit in fits(SMALL)] == [model.name for model in MODELS]


def test_half_precision_halves_weights_and_cache() -> None:
    gpu = Limits(8, 3e12, 3e12, 600e12, 600e12, 80 * GIB, element_bytes=2)
    found = {fit.model: fit for fit in fits(gpu)}
    assert found["Llama-3.1-8B"].verdict == "well"
    assert found["Llama-3.1-8B"].needed_bytes < 25 * GIB
    assert found["Llama-3.1-70B"].verdict == "not: too large"


def test_decode_gets_the_threads_that_read_memory_at_its_full_rate() -> None:
    assert (split_cores(LARGE).prefill, split_cores(LARGE).decode) == (48, 16)
    assert "48 threads" in split_cores(LARGE).text
    assert "enough for the memory's 240 GiB/s" in split_cores(LARGE).text


def test_but_never_more_than_half() -> None:
    split = split_cores(SMALL)
    assert (split.prefill, split.decode) == (1, 1)
    assert "reads about 13 of the memory's 23 GiB/s" in split.text


def test_one_core_is_no_place_for_two_phases() -> None:
    split = split_cores(Limits(1, 10 * GIB, 10 * GIB, 50e9, 50e9, 8 * GIB))
    assert split.prefill == 0
    assert "one aggregated worker" in split.text
