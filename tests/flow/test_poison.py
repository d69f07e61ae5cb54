"""A request that kills whoever computes it: it is failed after a few workers, and the others' requests are served.

The test plays its part: it kills the worker that holds the request, each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import EngineFailure
from python_backends.core.types import SamplingParams
from router.lifecycle import State
from tests.flow.house import Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference

SAMPLING = SamplingParams(seed=5, max_tokens=60)
DEADLY = prompt(120, 999)


@contextmanager
def _killing(house: FlowHouse, answer: Answer, state: State) -> Iterator[list[str]]:
    """Kill whoever has the request in this state, until it has ended."""
    killed: list[str] = []

    def play() -> None:
        seen: set[str] = set()
        run = answer.run
        assert run is not None
        while not answer.ended.is_set():
            leg = run._prefill_leg if state is State.PREFILLING else run._decode_leg
            if run.state is state and leg is not None and leg[1] not in seen:
                seen.add(leg[1])
                killed.append(leg[0])
                house.kill(leg[0])
            time.sleep(0.001)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield killed
    finally:
        answer.ended.wait(30)
        thread.join(5)


@pytest.mark.parametrize("state", [State.PREFILLING, State.DECODING])
def test_it_does_not_walk_through_the_fleet(state: State) -> None:
    router = RouterConfig(mode="always-remote", worker_wait_s=15)
    engine = fake_engine(prefill_us_per_token=500, step_us=4000)
    with FlowHouse(deployment(3, 3, router=router, engine=engine), processes=True, restart=True) as house:
        deadly = house.begin(DEADLY, SAMPLING)
        with _killing(house, deadly, state) as killed:
            others = [house.begin(prompt(100, i), SAMPLING) for i in range(6)]
            deadly.wait(30)
        assert isinstance(deadly.error, EngineFailure)
        assert "3 workers died in a row" in str(deadly.error)
        assert len(killed) == 3
        for i, other in enumerate(others):
            assert other.wait(30).error is None, repr(other.error)
            assert other.ids == reference(prompt(100, i), SAMPLING)
        again = house.ask(DEADLY, SAMPLING)  # as clients do
        assert isinstance(again.error, EngineFailure)
        assert len(killed) == 3
        assert eventually(lambda: all(house.is_up(worker.name) for worker in house.config.workers), 15)
        assert house.ask(prompt(50, 50), SAMPLING).ids == reference(prompt(50, 50), SAMPLING)
        house.assert_nothing_held()


def test_a_long_answer_may_outlive_any_number_of_workers() -> None:
    """What it has produced in between shows that it kills nobody."""
    router = RouterConfig(mode="always-remote", worker_wait_s=15)
    sampling = SamplingParams(seed=6, max_tokens=160)
    with FlowHouse(deployment(1, 2, router=router, engine=fake_engine(step_us=10_000)), processes=True, restart=True) as house:
        answer = house.begin(prompt(40, 1), sampling)
        for _ in range(5):
            before = len(answer.ids)
            assert eventually(lambda: len(answer.ids) >= before + 20, 15)  # noqa: B023
            assert answer.run is not None
            assert answer.run._decode_leg is not None
            house.kill(answer.run._decode_leg[0])
        assert answer.wait(30).ids == reference(prompt(40, 1), sampling)
        assert answer.proof.attempts == 6
