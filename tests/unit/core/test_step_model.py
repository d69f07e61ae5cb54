"""The model of step times: against made-up engines whose law is known, and against recorded runs of real ones.

recorded/*.json: steps of the PyTorch engine with a random Llama of 6 layers and hidden size 256, one thread of a busy
machine. mixed: a worker that prefills and decodes; prefill: one that only prefills.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.messages import StepSample
from python_backends.core.step_model import TERMS, StepModel, longest_step_ms, tokens_within

LAW = (8.0, 0.03, 2e-6, 0.05, 6e-5)  # about a GPU's
CALIBRATION = [(64, 2048, 0, 0), (0, 0, 1, 64), (0, 0, 8, 512), (256, 32_768, 0, 0), (0, 0, 8, 4096), (256, 294_912, 0, 0)]


class Recording(msgspec.Struct):
    calibration: list[StepSample]
    steps: list[StepSample]


def recording(name: str) -> Recording:
    return msgspec.json.decode((Path(__file__).parent / "recorded" / f"{name}.json").read_bytes(), type=Recording)


def ms(law: Sequence[float], prefill: float, pairs: float, streams: float, context: float) -> float:
    return sum(c * x for c, x in zip(law, (1, prefill, pairs, streams, context), strict=True))


def steps(count: int, law: Sequence[float] = LAW, noise: float = 0.0, seed: int = 0, prompts: bool = True) -> list[StepSample]:
    random = Random(seed)
    made = []
    for _ in range(count):
        prefill = random.choice([0, 0, 100, 2048]) if prompts else 0
        streams = random.randrange(0 if prefill else 1, 60)
        shape = (prefill, prefill * random.uniform(50, 8000), streams, streams * random.randrange(100, 4000))
        made.append(StepSample(*shape, ms(law, *shape) * random.lognormvariate(0, noise)))
    return made


def errors(model: StepModel, samples: Sequence[StepSample]) -> list[float]:
    """Relative errors of predictions, each made before its step is learned."""
    found = []
    for sample in samples:
        shape = (sample.prefill_tokens, sample.prefill_context, sample.decode_streams, sample.decode_context)
        found.append(model.step_ms(*shape) / sample.ms - 1)
        model.learn(sample)
    return found


def test_the_law_of_an_engine_is_found() -> None:
    model = StepModel()
    found = errors(model, steps(300))
    assert max(map(abs, found[100:])) < 0.1
    assert statistics.median(map(abs, found[100:])) < 0.01
    assert model.error < 0.02
    assert model.coefficients == pytest.approx(LAW, rel=0.15, abs=1e-6)


def test_noise_is_averaged() -> None:
    model = StepModel()
    errors(model, steps(600, noise=0.2))
    assert model.step_ms(2048, 2048 * 1000, 10, 10_000) == pytest.approx(ms(LAW, 2048, 2048 * 1000, 10, 10_000), rel=0.1)
    assert 0.1 < model.error < 0.25


def test_calibration_is_where_predictions_start() -> None:
    model = StepModel([StepSample(*shape, ms(LAW, *shape)) for shape in CALIBRATION])
    assert model.step_ms(2048, 2048 * 1000, 10, 10_000) == pytest.approx(ms(LAW, 2048, 2048 * 1000, 10, 10_000), rel=0.1)
    assert model.step_ms(0, 0, 30, 30_000) == pytest.approx(ms(LAW, 0, 0, 30, 30_000), rel=0.1)


def test_a_worker_that_has_become_slower_is_followed_soon() -> None:
    model = StepModel()
    errors(model, steps(300))
    slower = tuple(3 * coefficient for coefficient in LAW)
    found = errors(model, steps(200, slower, seed=1))
    assert abs(found[0]) > 0.5
    assert statistics.median(map(abs, found[100:])) < 0.15


def test_what_only_calibration_has_seen_follows_the_drift_of_the_rest() -> None:
    """A decode worker that never prefills finds its steps twice as long as calibration said: so will prefill be."""
    model = StepModel([StepSample(*shape, ms(LAW, *shape)) for shape in CALIBRATION])
    slower = tuple(2 * coefficient for coefficient in LAW)
    errors(model, steps(400, slower, prompts=False))
    assert model.step_ms(1000, 0, 0, 0) == pytest.approx(ms(slower, 1000, 0, 0, 0), rel=0.3)


def test_a_calibration_while_the_machine_was_busy_is_corrected_by_a_few_canaries() -> None:
    """Also for what canaries do not show. They are prompts of half a block."""
    model = StepModel([StepSample(*shape, 3 * ms(LAW, *shape)) for shape in CALIBRATION])
    for _ in range(8):
        model.learn(StepSample(8, 32, 0, 0, ms(LAW, 8, 32, 0, 0)))
    for shape in ((0, 0, 1, 300), (0, 0, 16, 8000), (1000, 5e5, 0, 0)):
        assert model.step_ms(*shape) == pytest.approx(ms(LAW, *shape), rel=0.3)


def test_hours_of_decoding_do_not_wipe_out_what_a_prompt_costs() -> None:
    model = StepModel()
    errors(model, steps(200))
    errors(model, steps(3000, prompts=False, seed=2))
    assert model.step_ms(2048, 2048 * 1000, 10, 10_000) == pytest.approx(ms(LAW, 2048, 2048 * 1000, 10, 10_000), rel=0.1)


def test_a_size_that_is_slower_than_the_line_is_known_as_such() -> None:
    """Products of some shapes have slow kernels."""
    model = StepModel()
    random = Random(0)
    for _ in range(500):
        streams = random.choice([1, 5, 20])
        slow = 3.0 if streams == 5 else 1.0
        model.learn(StepSample(0, 0, streams, 0, slow * ms(LAW, 0, 0, streams, 0)))
    assert model.step_ms(0, 0, 5, 0) == pytest.approx(3 * ms(LAW, 0, 0, 5, 0), rel=0.1)
    assert model.step_ms(0, 0, 20, 0) == pytest.approx(ms(LAW, 0, 0, 20, 0), rel=0.1)


def test_one_step_in_which_the_machine_slept_changes_little() -> None:
    model = StepModel()
    errors(model, steps(200))
    before = model.step_ms(0, 0, 10, 10_000)
    model.learn(StepSample(0, 0, 10, 10_000, 60_000.0))
    for sample in steps(20, seed=3):
        model.learn(sample)
    assert model.step_ms(0, 0, 10, 10_000) == pytest.approx(before, rel=0.25)


def test_empty_and_impossible_samples_are_ignored() -> None:
    model = StepModel()
    before = list(model.coefficients)
    model.learn(StepSample(0, 0, 0, 0, 5.0))
    model.learn(StepSample(5, 10, 0, 0, 0.0))
    assert (model.samples, model.coefficients) == (0, before)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300), st.floats(0.01, 1e4)), max_size=150))
def test_costs_are_never_negative_whatever_is_told(samples: list[tuple[int, int, float]]) -> None:
    model = StepModel()
    for tokens, streams, time in samples:
        model.learn(StepSample(tokens, tokens * 100.0, streams, streams * 500, time))
    assert all(coefficient >= 0 for coefficient in model.coefficients)
    assert model.step_ms(100, 1e4, 10, 1e4) >= 0


@pytest.mark.parametrize(("name", "median", "tail"), [("mixed", 0.2, 0.6), ("prefill", 0.15, 0.5)])
def test_recorded_runs_are_predicted(name: str, median: float, tail: float) -> None:
    run = recording(name)
    model = StepModel(run.calibration)
    found = [abs(error) for error in errors(model, run.steps)]
    assert statistics.median(found[:32]) < 0.2  # from calibration alone
    assert statistics.median(found[32:]) < median
    assert statistics.quantiles(found[32:], n=10)[-1] < tail
    predicted = sum(
        (1 + error) * step.ms for error, step in zip(errors(StepModel(run.calibration), run.steps), run.steps, strict=True)
    )
    assert predicted == pytest.approx(sum(step.ms for step in run.steps), rel=0.08)


def test_a_model_that_predicts_nothing_at_all_still_learns() -> None:
    model = StepModel([StepSample(64, 2048.0, 0, 0, ms=1.0)])
    for _ in range(40):
        model.learn(StepSample(64, 2048.0, 0, 0, ms=1.0))
    model.coefficients = [0.0] * len(TERMS)
    for _ in range(40):
        model.learn(StepSample(64, 2048.0, 0, 0, ms=8.0))
    assert model.step_ms(64, 2048.0, 0, 0) > 0


# --- as many prompt tokens as a step has time for ----------------------------------------------------------------------


def test_a_step_takes_as_many_prompt_tokens_as_fit() -> None:
    model = StepModel()
    model.coefficients = [10.0, 0.5, 0.0, 1.0, 0.0]
    assert tokens_within(model, 100.0, 20, 0, 0, 256) == 140  # 10 + 20 of the streams, and 70 ms of the prompt
    assert tokens_within(model, 500.0, 20, 0, 0, 256) == 256
    assert tokens_within(model, 10.0, 20, 0, 0, 256) == 16, "a sixteenth, or the prompt would never be done"
    assert tokens_within(model, 10.0, 20, 0, 0, 3) == 1


@given(st.floats(0, 500), st.integers(1, 200), st.integers(0, 9000), st.integers(1, 4096), st.floats(0, 1e-3))
def test_what_is_allowed_keeps_the_time_unless_it_is_the_least(
    ms_: float, streams: int, depth: int, most: int, pair: float
) -> None:
    model = StepModel()
    model.coefficients = [8.0, 0.03, pair, 0.05, 6e-5]
    tokens = tokens_within(model, ms_, streams, streams * 500, depth, most)
    assert max(most // 16, 1) <= tokens <= most
    if tokens > max(most // 16, 1):
        assert model.step_ms(tokens, tokens * (depth + tokens / 2), streams, streams * 500) <= ms_


def test_depth_costs_tokens() -> None:
    model = StepModel()
    model.coefficients = [8.0, 0.1, 1e-4, 0.1, 0.0]
    assert tokens_within(model, 60.0, 8, 0, 4000, 256) < tokens_within(model, 60.0, 8, 0, 0, 256) == 256


def test_steps_end_before_the_next_token_is_due() -> None:
    assert 0.0 == longest_step_ms(0.0) < longest_step_ms(100.0) < 100.0
