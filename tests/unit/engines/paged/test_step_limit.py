"""What steps beside streams are kept to: a share of the target that depends on how far off the predictions are."""

from __future__ import annotations

import pytest

from python_backends.core.messages import StepSample
from python_backends.engines.paged.step_limit import StepLimit

TARGET = 100.0


def _law(tokens: int, pairs: float, streams: int, context: int) -> float:
    return 10 + 0.5 * tokens + 0.0001 * pairs + 1.0 * streams + 0.001 * context


def _sample(tokens: int, depth: int, streams: int, context: int, slowness: float = 1.0) -> StepSample:
    shape = tokens, tokens * (depth + tokens / 2), streams, context
    return StepSample(*shape, slowness * _law(*shape))


@pytest.fixture
def limit() -> StepLimit:
    shapes = [(64, 0, 0, 0), (256, 0, 0, 0), (256, 1024, 0, 0), (0, 0, 1, 64), (0, 0, 8, 512), (0, 0, 8, 4096)]
    return StepLimit(TARGET, 256, [_sample(*shape) for shape in shapes])


def _run(limit: StepLimit, steps: int, every: int) -> list[float]:
    """Milliseconds of steps that are as long as is allowed; one in `every` takes twice as long."""
    taken = []
    for number in range(steps):
        tokens = limit.prompt_tokens(8, 800, 500)
        step = _sample(tokens, 500, 8, 800, slowness=2.0 if number % every == 0 else 1.0)
        limit.learn(step)
        taken.append(step.ms)
    return taken


def test_steps_fill_the_target_where_they_take_what_is_predicted(limit: StepLimit) -> None:
    began = limit.step_ms
    taken = _run(limit, 600, every=10_000)
    assert began < limit.step_ms <= TARGET
    assert max(taken[-100:]) <= TARGET


def test_a_busy_machine_makes_them_shorter(limit: StepLimit) -> None:
    began = limit.step_ms
    taken = _run(limit, 600, every=5)
    assert limit.step_ms < began
    late = sum(ms > TARGET for ms in taken[-300:])
    assert late <= 0.1 * 300, "twice as long is in time then"


def test_short_steps_and_those_of_prompts_alone_teach_nothing(limit: StepLimit) -> None:
    began = limit.step_ms
    for _ in range(100):
        limit.learn(_sample(4, 0, 8, 800))
        limit.learn(_sample(0, 0, 8, 800))
        limit.learn(_sample(200, 0, 0, 0, slowness=3))
    assert limit.step_ms == began


def test_many_streams_alone_teach_as_well(limit: StepLimit) -> None:
    began = limit.step_ms
    limit.learn(_sample(0, 0, 60, 6000))
    raised = limit.step_ms
    assert began < raised
    limit.learn(_sample(0, 0, 60, 6000, slowness=2.0))
    assert limit.step_ms < began


def test_the_deeper_the_prompt_the_fewer_of_its_tokens(limit: StepLimit) -> None:
    assert limit.prompt_tokens(8, 800, 4000) < limit.prompt_tokens(8, 800, 0) < 256


def test_guesses_get_what_prompts_leave(limit: StepLimit) -> None:
    alone = limit.draft_tokens(8, 800, 0)
    assert 8 < alone <= 256
    assert limit.draft_tokens(8, 800, 20) == alone - 20
    assert limit.draft_tokens(8, 800, 256) == 0
    assert limit.draft_tokens(100, 10_000, 0) == 0, "the streams alone take longer than the target"


def test_steps_are_learned_with_their_guesses(limit: StepLimit) -> None:
    """A step with guesses takes longer, and streams must not be taken to be slow for it."""
    before = limit.draft_tokens(8, 800, 0)
    for _ in range(200):
        ms = _law(32, 32 * 100, 8, 800)
        limit.learn(StepSample(0, 0, 8, 800, ms, 40), drafts=32)
    assert abs(limit.draft_tokens(8, 800, 0) - before) <= 0.2 * before


def test_streams_that_are_faster_than_the_target_have_time_to_spare(limit: StepLimit) -> None:
    spare = limit.spare_ms(8, 800)
    step_ms = _law(0, 0, 8, 800)
    assert spare + step_ms == pytest.approx(limit.step_ms, rel=0.05)
    assert limit.step_ms < TARGET
    assert limit.spare_ms(60, 30_000) < 0, "their steps alone take longer"


def test_who_joins_late_makes_steps_shorter(limit: StepLimit) -> None:
    """A step of three quarters of the target is in time for those it was begun with, not for who waited for its turn."""
    began = limit.step_ms
    for _ in range(100):
        limit.learn(_sample(0, 0, 60, 6000), joined_ms=[110.0, 80.0, 120.0])
    lowered = limit.step_ms
    assert lowered < 0.9 * began
    for _ in range(100):
        tokens = limit.prompt_tokens(8, 800, 500)
        limit.learn(_sample(tokens, 500, 8, 800), joined_ms=[80.0])
    assert lowered < limit.step_ms, "steps as long as they may be, and nobody is late"


def test_who_joins_a_short_step_that_nobody_else_is_in_teaches_nothing(limit: StepLimit) -> None:
    """No stream's step was waited for."""
    began = limit.step_ms
    for _ in range(50):
        limit.learn(_sample(0, 0, 1, 100), joined_ms=[500.0])
    assert limit.step_ms == began
