"""Running streams wait a moment for who joins them, so that KV that comes just after a step has begun does not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
import pytest

from python_backends.core.config import Deployment, EngineConfig, FakeConfig, RouterConfig, SloConfig, WorkerConfig
from python_backends.core.messages import Output, PrefillDone, TokenChunk
from python_backends.core.step_model import longest_step_ms
from python_backends.core.types import Epoch, GenerateRequest, RequestId, Role, SamplingParams
from python_backends.engines.fake import FakeRunner
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.paged.runner import Sampled, Slice

Said = TypeVar("Said", PrefillDone, TokenChunk)

KEY = b"k" * 32
PROMPT = list(range(400, 500))
STEP_S = 0.25
PREFILL, DECODE = (WorkerConfig(role, role.value, engine="fake") for role in (Role.PREFILL, Role.DECODE))
DEPLOYMENT = Deployment(workers=(PREFILL, DECODE), engine=EngineConfig(kv_pool_mib=8, fake=FakeConfig(step_us=200)))


class SlowRunner(FakeRunner):
    """Tells how many sequences each step has, and calls somebody in the middle of one."""

    def __init__(self) -> None:
        super().__init__(DEPLOYMENT)
        self.sizes: list[int] = []
        self.meanwhile: Callable[[], None] | None = None

    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        self.sizes.append(len(batch))
        if self.meanwhile is not None and len(self.sizes) == 4:
            self.meanwhile()
        time.sleep(STEP_S)
        return super().step(batch)


class Heard:
    """What an engine has said."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._more = threading.Condition()

    def hear(self, outputs: Sequence[Output], _change: object) -> None:
        with self._more:
            self.outputs += outputs
            self._more.notify_all()

    def wait(self, kind: type[Said], name: str) -> Said:
        def found() -> Said | None:
            return next((each for each in self.outputs if isinstance(each, kind) and each.request_id == name), None)

        with self._more:
            assert self._more.wait_for(lambda: found() is not None, 30)
        said = found()
        assert said is not None
        return said


@pytest.fixture
def handed() -> Iterator[PrefillDone]:
    """A prompt's first token and the ticket for its KV."""
    heard, engine = Heard(), PagedEngine(DEPLOYMENT, PREFILL, FakeRunner(DEPLOYMENT), Epoch(1), KEY)
    engine.start(heard.hear)
    engine.prefill(_request("joins", PROMPT))
    yield heard.wait(PrefillDone, "joins")
    engine.close()


def _request(name: str, prompt: list[int], outputs: Sequence[int] = (), max_tokens: int = 20) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
    return GenerateRequest(RequestId(name), prompt, sampling, time.monotonic() + 60, output_ids=list(outputs))


def _joined(handed: PrefillDone, deployment: Deployment) -> tuple[PagedEngine, SlowRunner]:
    """One stream ran, the other was handed over when a step had just begun, and has its first token here. Closed."""
    runner, heard = SlowRunner(), Heard()
    engine = PagedEngine(deployment, DECODE, runner, Epoch(2), KEY)
    engine.start(heard.hear)
    runner.sizes.clear()  # of the calibration
    runner.meanwhile = lambda: engine.decode(_request("joins", PROMPT, [handed.token_id]), handed.ticket)
    engine.decode(_request("runs", [5, 6, 7]), None)
    heard.wait(TokenChunk, "joins")
    engine.close()
    return engine, runner


def test_who_is_handed_over_during_a_step_is_in_the_next_one(handed: PrefillDone) -> None:
    _, runner = _joined(handed, DEPLOYMENT)
    assert runner.sizes[:5] == [1, 1, 1, 1, 2]


def test_a_prompt_waits_for_a_stream_that_is_handed_over(handed: PrefillDone) -> None:
    """It would have three more steps to make."""
    deployment = msgspec.structs.replace(DEPLOYMENT, engine=msgspec.structs.replace(DEPLOYMENT.engine, step_tokens=64))
    runner, heard = SlowRunner(), Heard()
    engine = PagedEngine(deployment, DECODE, runner, Epoch(2), KEY)
    engine.start(heard.hear)
    runner.sizes.clear()  # of the calibration
    runner.meanwhile = lambda: engine.decode(_request("joins", PROMPT, [handed.token_id]), handed.ticket)
    engine.decode(_request("long", list(range(64 * 7))), None)
    heard.wait(TokenChunk, "joins")
    engine.close()
    assert runner.sizes[:5] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(("target_s", "is_late"), [(1.6 * STEP_S, True), (4 * STEP_S, False)])
def test_steps_within_the_target_are_too_long_for_who_waits_for_two(
    handed: PrefillDone, target_s: float, is_late: bool
) -> None:
    slo = SloConfig(itl_ms=target_s * 1e3)
    engine, _ = _joined(handed, msgspec.structs.replace(DEPLOYMENT, router=RouterConfig(slo=slo)))
    assert (engine.load().step_ms < longest_step_ms(slo.itl_ms)) is is_late
