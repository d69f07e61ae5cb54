"""A client that goes away, in every state: compute stops and everything is free within a second, on all sides."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import Cancelled
from python_backends.core.types import SamplingParams
from router.lifecycle import State
from router.types import Outcome, Wish
from tests.flow.house import Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference

ENDLESS = SamplingParams(temperature=0, max_tokens=4000)
REMOTE = RouterConfig(mode="always-remote", worker_wait_s=5)
LOCAL = RouterConfig(mode="always-local", worker_wait_s=5)
AGGREGATED = RouterConfig(mode="always-aggregated", worker_wait_s=5)
SLOW_PREFILL = fake_engine(prefill_us_per_token=2000)
SLOW_STEPS = fake_engine(step_us=2000)

CASES: dict[str, tuple[State, dict[str, Any]]] = {
    "prefilling": (State.PREFILLING, {"router": REMOTE, "engine": SLOW_PREFILL}),
    "handing off, transfer hangs": (State.HANDING_OFF, {"router": REMOTE, "faults": {"hang": 1.0}, "transfer_timeout_s": 0.5}),
    "decoding": (State.DECODING, {"router": REMOTE, "engine": SLOW_STEPS}),
    "prefilling locally": (State.DECODING, {"router": LOCAL, "engine": SLOW_PREFILL}),
    "decoding locally": (State.DECODING, {"router": LOCAL, "engine": SLOW_STEPS}),
    "aggregated": (State.DECODING, {"router": AGGREGATED, "engine": SLOW_STEPS, "aggregated": 1, "prefill": 0, "decode": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_in_every_state(case: str) -> None:
    state, settings = CASES[case]
    with FlowHouse(deployment(**settings)) as house:
        answers = [house.begin(prompt(400, i), ENDLESS) for i in range(2)]
        assert eventually(lambda: all(answer.state is state for answer in answers), 5)
        _cancel_and_check(house, answers)


def test_while_no_worker_is_up() -> None:
    with FlowHouse(workers_up=False) as house:
        answers = [house.begin(prompt(40, i)) for i in range(3)]
        assert eventually(lambda: all(answer.state is State.QUEUED for answer in answers))
        _cancel_and_check(house, answers)


def test_before_it_has_begun() -> None:
    """The loop is busy: request and cancellation reach it in the same turn."""
    with FlowHouse() as house:
        busy, go = threading.Event(), threading.Event()
        house.service._loop.call_soon_threadsafe(busy.set)
        house.service._loop.call_soon_threadsafe(go.wait, 5)
        assert busy.wait(5)
        answer = house.begin(prompt(40))
        house.cancel(answer)
        go.set()
        _check([answer.wait(2)], house)


def test_in_the_turn_in_which_a_worker_comes_up() -> None:
    with FlowHouse(workers_up=False) as house:
        answer = house.begin(prompt(40), ENDLESS)
        assert eventually(lambda: answer.state is State.QUEUED and house.service.house.admission.queued_tokens)
        run = answer.run
        assert run is not None

        def come_up_and_cancel() -> None:
            loop = house.service._loop
            house.service.house.fleet._wake()
            loop.call_soon(house.service._interrupt, run, Cancelled("gone"))

        house.on_loop(come_up_and_cancel)
        _check([answer.wait(1)], house)


def test_twice_and_after_the_end() -> None:
    with FlowHouse() as house:
        answer = house.begin(prompt(40), ENDLESS)
        assert answer.first.wait(5)
        for _ in range(3):
            house.cancel(answer)
        _check([answer.wait(1)], house)
        house.cancel(answer)
        whole = house.ask(prompt(40))
        house.cancel(whole)
        assert house.ask(prompt(40)).ids == whole.ids
        assert whole.late == answer.late == 0


def test_at_random_moments_under_load() -> None:
    """Every second request is cancelled somewhere on its way; the others are whole."""
    sampling = SamplingParams(seed=1, max_tokens=20)
    lot = random.Random(5)
    config = deployment(
        2, 2, 1, engine=fake_engine(prefill_us_per_token=20, step_us=300), faults={"delay": 0.3, "corrupt": 0.2}
    )
    with FlowHouse(config) as house:
        answers = []
        for i in range(100):
            wish = lot.choice([Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED])
            answers.append(house.begin(prompt(20 + i, i % 30), sampling, wish))
            if i % 2:
                timer = threading.Timer(lot.random() * 0.1, house.cancel, [answers[-1]])
                timer.start()
            if i % 10 == 9:
                answers[i - 9].wait()
        for i, answer in enumerate(answers):
            expected = reference(prompt(20 + i, i % 30), sampling)
            answer.wait()
            assert answer.late == 0
            if answer.error is None:
                assert answer.ids == expected
            else:
                assert i % 2
                assert isinstance(answer.error, Cancelled)
                assert answer.ids == expected[: len(answer.ids)]
        house.assert_nothing_held()


def _cancel_and_check(house: FlowHouse, answers: list[Answer]) -> None:
    for answer in answers:
        house.cancel(answer)
    _check([answer.wait(1) for answer in answers], house)


def _check(answers: list[Answer], house: FlowHouse) -> None:
    house.assert_nothing_held(within=1.0)
    for answer in answers:
        assert isinstance(answer.error, Cancelled)
        assert answer.state is State.CANCELLED
        assert answer.late == 0
    assert house.counts.outcomes.count(Outcome.CANCELLED) == len(answers)
