"""Workers that die, stop or come too late: no request fails while another worker can serve it, and the text is the same.

Workers run in processes of their own; SIGKILL and SIGSTOP are real.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import Unavailable
from python_backends.core.messages import Work
from python_backends.core.types import Role, SamplingParams, WorkerId
from router.lifecycle import State
from router.seams import Destination
from tests.flow.house import TIMEOUT_S, Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference

SAMPLING = SamplingParams(seed=11, max_tokens=60)
ROUTER = RouterConfig(mode="always-remote", worker_wait_s=5)
SLOW_PREFILL: dict[str, Any] = {"engine": fake_engine(prefill_us_per_token=1000)}
SLOW_STEPS: dict[str, Any] = {"engine": fake_engine(step_us=5000)}
HANGING: dict[str, Any] = {"faults": {"hang": 1.0}, "transfer_timeout_s": 0.6}


def _two_of_each(**settings: Any) -> FlowHouse:
    return FlowHouse(deployment(2, 2, router=ROUTER, **settings), processes=True)


def _prompt(index: int) -> list[int]:
    return prompt(300 + index, index)


def _begin_some(house: FlowHouse, state: State, count: int = 6) -> list[Answer]:
    """Requests that are in `state` now, or have passed it."""
    answers = [house.begin(_prompt(i), SAMPLING) for i in range(count)]
    assert eventually(lambda: any(answer.state is state for answer in answers), 5)
    return answers


def _place(answer: Answer, role: Role) -> str:
    """The worker a request was sent to."""
    assert answer.run is not None
    leg = answer.run._prefill_leg if role is Role.PREFILL else answer.run._decode_leg
    assert leg is not None
    return leg[0]


def _assert_all_whole(house: FlowHouse, answers: list[Answer]) -> None:
    for i, answer in enumerate(answers):
        answer.wait()
        assert answer.error is None, repr(answer.error)
        assert answer.ids == reference(_prompt(i), SAMPLING)
        assert answer.text == "".join(f"<{token}>" for token in answer.ids)
        assert answer.late == 0
    house.assert_nothing_held()


@pytest.mark.parametrize(
    ("state", "role", "settings"),
    [
        (State.PREFILLING, Role.PREFILL, SLOW_PREFILL),
        (State.HANDING_OFF, Role.PREFILL, HANGING),
        (State.HANDING_OFF, Role.DECODE, HANGING),
        (State.DECODING, Role.DECODE, SLOW_STEPS),
        (State.DECODING, Role.PREFILL, SLOW_STEPS),
    ],
    ids=lambda value: value.value if isinstance(value, State | Role) else "",
)
def test_killed(state: State, role: Role, settings: dict[str, Any]) -> None:
    with _two_of_each(**settings) as house:
        answers = _begin_some(house, state)
        victim = _place(next(answer for answer in answers if answer.state is state), role)
        house.kill(victim)
        assert eventually(lambda: not house.is_up(victim), within=1.0)
        _assert_all_whole(house, answers)
        if role is Role.DECODE or state is State.PREFILLING:
            assert house.counts.retries > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_decode_worker_is_gone_before_its_turn(number: int) -> None:
    """It is lost while the prompt is still being computed elsewhere."""
    config = deployment(1, 2, router=ROUTER, silent_s=0.3, engine=fake_engine(prefill_us_per_token=3000))
    with FlowHouse(config, processes=True) as house:
        answer = house.begin(_prompt(0), SAMPLING)
        assert eventually(lambda: answer.state is State.PREFILLING, 5)
        victim = next(view.id for view in house.service.house.fleet if view.role is Role.DECODE and view.requests)
        house.signal(victim, number)
        assert eventually(lambda: not house.is_up(victim), within=1.5)
        assert answer.state is State.PREFILLING
        _assert_all_whole(house, [answer])


def test_killed_and_nobody_else_is_one_clear_error() -> None:
    router = RouterConfig(mode="always-remote", worker_wait_s=0.5)
    with FlowHouse(deployment(router=router, **SLOW_STEPS), processes=True) as house:
        answers = _begin_some(house, State.DECODING, count=3)
        began = time.monotonic()
        house.kill("decode_0")
        for i, answer in enumerate(answers):
            answer.wait()
            assert time.monotonic() - began < 2
            assert isinstance(answer.error, Unavailable)
            assert answer.ids == reference(_prompt(i), SAMPLING)[: len(answer.ids)]
            assert answer.late == 0
        house.assert_nothing_held()


@pytest.mark.parametrize("victim", ["prefill_0", "decode_0"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_only_worker_is_restarted_and_goes_on(victim: str, number: int) -> None:
    settings = SLOW_PREFILL if victim == "prefill_0" else SLOW_STEPS
    router = RouterConfig(mode="always-remote", worker_wait_s=10)
    config = deployment(router=router, silent_s=0.5, **settings)
    with FlowHouse(config, processes=True, restart=True) as house:
        before = house.epoch(victim)
        answers = _begin_some(house, State.PREFILLING if victim == "prefill_0" else State.DECODING, count=3)
        house.signal(victim, number)
        _assert_all_whole(house, answers)
        assert eventually(lambda: house.is_up(victim, other_than=before), TIMEOUT_S)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_stopped_and_continued(role: Role) -> None:
    """It is taken out when silent; what it says when it wakes up counts for nothing, and it serves again."""
    state, settings = (State.PREFILLING, SLOW_PREFILL) if role is Role.PREFILL else (State.DECODING, SLOW_STEPS)
    with _two_of_each(silent_s=0.3, **settings) as house:
        answers = _begin_some(house, state)
        victim = _place(next(answer for answer in answers if answer.state is state), role)
        house.signal(victim, signal.SIGSTOP)
        assert eventually(lambda: not house.is_up(victim), within=1.0)
        for answer in answers:
            answer.wait()
        house.signal(victim, signal.SIGCONT)
        assert eventually(lambda: house.is_up(victim), 5)
        _assert_all_whole(house, answers)
        assert house.ask(_prompt(0), SAMPLING).ids == answers[0].ids


def test_one_after_the_other_under_load() -> None:
    """Each worker is killed once while requests keep coming; all are restarted and no request fails."""
    router = RouterConfig(mode="adaptive", worker_wait_s=10)
    config = deployment(2, 2, router=router, engine=fake_engine(prefill_us_per_token=50, step_us=1000))
    with FlowHouse(config, processes=True, restart=True) as house:
        answers: list[Answer] = []
        for victim in ("decode_0", "prefill_1", "decode_1", "prefill_0"):
            answers += [house.begin(_prompt(len(answers) + i), SAMPLING) for i in range(6)]
            time.sleep(0.05)
            house.kill(victim)
            assert eventually(lambda: not house.is_up(victim), within=1.0)  # noqa: B023
            answers += [house.begin(_prompt(len(answers) + i), SAMPLING) for i in range(6)]
            assert eventually(lambda: house.is_up(victim), TIMEOUT_S)  # noqa: B023
        _assert_all_whole(house, answers)


@pytest.fixture
def in_process() -> Iterator[FlowHouse]:
    with FlowHouse(deployment(router=RouterConfig(mode="always-remote", worker_wait_s=5)), workers_up=False) as house:
        yield house


def test_a_worker_that_speaks_before_its_model_is_loaded(in_process: FlowHouse) -> None:
    """Its first heartbeat is out, calls to it still fail for a moment: no reason to fail requests."""
    house = in_process
    submit = house._submit
    loaded = time.monotonic() + TIMEOUT_S

    def not_yet(worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        if time.monotonic() > loaded:
            submit(worker, work, failed)
        else:
            failed("the model is not ready")

    house.service._submit = not_yet
    answers = [house.begin(_prompt(i), SAMPLING) for i in range(3)]
    house.start("prefill_0", "decode_0")
    loaded = time.monotonic() + 0.25
    _assert_all_whole(house, answers)


def test_late_words_of_a_dead_worker_do_not_bring_it_back(in_process: FlowHouse) -> None:
    house = in_process
    house.start("prefill_0", "decode_0")
    view = house.service.house.fleet.get(WorkerId("decode_0"))
    assert view is not None
    last = view.heartbeat

    def die_and_speak() -> None:
        service = house.service
        service._supervisor._died(last.worker, last.epoch)
        service._channel._hear(service._channel._workers[last.worker], last)

    house.on_loop(die_and_speak)
    assert not house.is_up("decode_0")
    house.workers.pop("decode_0").close()
    house.start("decode_0")
    house.on_loop(lambda: house.service._channel._hear(house.service._channel._workers[last.worker], last))
    assert house.epoch("decode_0") != last.epoch
    assert house.ask(_prompt(0), SAMPLING).ids == reference(_prompt(0), SAMPLING)
