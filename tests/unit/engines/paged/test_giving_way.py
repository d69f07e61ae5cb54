"""Streams that are faster than the target let workers with prompts have the cores between their steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from python_backends.core.config import Deployment, EngineConfig, FakeConfig, RouterConfig, SloConfig, WorkerConfig
from python_backends.core.messages import Output, TokenChunk
from python_backends.core.types import Epoch, GenerateRequest, RequestId, Role, SamplingParams
from python_backends.engines.fake import FakeRunner
from python_backends.engines.paged.engine import PagedEngine

TARGET_MS = 250.0
DECODE = WorkerConfig(Role.DECODE, "decode", engine="fake")
DEPLOYMENT = Deployment(
    workers=(WorkerConfig(Role.PREFILL, "prefill", engine="fake"), DECODE),
    engine=EngineConfig(kv_pool_mib=8, fake=FakeConfig(step_us=200)),
    router=RouterConfig(slo=SloConfig(itl_ms=TARGET_MS)),
)


class SharingRunner(FakeRunner):
    """Shares its cores with another worker."""

    wanted = False
    rests = 0

    def are_cores_wanted(self) -> bool:
        return self.wanted

    def rest(self) -> None:
        self.rests += 1


class Served:
    """An engine, and when each token came."""

    def __init__(self) -> None:
        self.runner = SharingRunner(DEPLOYMENT)
        self.engine = PagedEngine(DEPLOYMENT, DECODE, self.runner, Epoch(1), b"k" * 32)
        self.tokens: dict[RequestId, list[float]] = {}
        self._more = threading.Condition()
        self.engine.start(lambda outputs, change: self._hear(outputs))

    def ask(self, name: str, max_tokens: int) -> RequestId:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
        self.engine.decode(GenerateRequest(RequestId(name), [5, 6, 7], sampling, time.monotonic() + 60), None)
        return RequestId(name)

    def wait(self, request: RequestId, count: int) -> list[float]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.tokens.get(request, [])) >= count, 30)
            return self.tokens[request]

    def _hear(self, outputs: Sequence[Output]) -> None:
        with self._more:
            for output in outputs:
                if isinstance(output, TokenChunk):
                    self.tokens.setdefault(output.request_id, []).append(time.monotonic())
            self._more.notify_all()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.engine.close()


def test_they_are_slowed_down_to_less_than_the_target_while_cores_are_wanted(served: Served) -> None:
    served.runner.wanted = True
    times = served.wait(served.ask("a", 6), 6)
    gaps = sorted(later - earlier for earlier, later in pairwise(times[1:]))  # before, there was the prompt's step
    assert gaps[0] > 0.3 * TARGET_MS / 1e3
    assert gaps[len(gaps) // 2] < TARGET_MS / 1e3
    assert served.runner.rests >= 4


def test_nobody_is_given_way_to_who_does_not_want_it(served: Served) -> None:
    served.wait(served.ask("a", 1), 1)
    rests = served.runner.rests
    served.wait(served.ask("b", 50), 50)
    assert served.runner.rests <= rests + 2


def test_who_comes_meanwhile_does_not_wait(served: Served) -> None:
    served.runner.wanted = True
    stream = served.ask("a", 40)
    waits = []
    for number in range(5):
        served.wait(stream, 2 * number + 2)
        asked = time.monotonic()
        waits.append(served.wait(served.ask(f"b{number}", 1), 1)[0] - asked)
    assert sorted(waits)[2] < 0.3 * TARGET_MS / 1e3
