"""Workers whose address is none of the deployment's any more, although they live, and then is again: names are changed so."""

from __future__ import annotations

import pytest

from python_backends.core.types import Role, SamplingParams
from router.lifecycle import State
from router.types import Wish
from tests.flow.house import FlowHouse, deployment, eventually, fake_engine, prompt, reference

SAMPLING = SamplingParams(seed=4, max_tokens=200)


@pytest.mark.parametrize("state", [State.PREFILLING, State.DECODING])
def test_removed_under_a_request_and_taken_in_again(state: State) -> None:
    """The request goes on elsewhere, nobody remembers the worker, and later it serves as before."""
    slow = fake_engine(prefill_us_per_token=1000) if state is State.PREFILLING else fake_engine(step_us=3000)
    with FlowHouse(deployment(2, 2, engine=slow, lease_s=1.0)) as house:
        everybody = [house.address(name) for name in house.workers]
        answer = house.begin(prompt(60, 1), SAMPLING)
        assert eventually(lambda: answer.state is state, 5)
        role = Role.PREFILL if state is State.PREFILLING else Role.DECODE
        (victim,) = [view.id for view in house.service.house.fleet if view.role is role and view.requests]
        others = [address for address in everybody if address != house.address(victim)]
        house.on_loop(lambda: house.service._channel.connect(others))
        assert house.service.house.fleet.get(victim) is None
        assert answer.wait(20).ids == reference(prompt(60, 1), SAMPLING)
        rivals = [house.address(view.id) for view in house.service.house.fleet if view.role is role]
        house.on_loop(lambda: house.service._channel.connect([address for address in everybody if address not in rivals]))
        assert eventually(lambda: house.is_up(victim), 5)
        answers = [house.begin(prompt(60, number), SAMPLING, Wish.REMOTE) for number in range(2, 6)]
        assert [answer.wait(20).ids for answer in answers] == [reference(prompt(60, i), SAMPLING) for i in range(2, 6)]
        assert all(victim in (answer.proof.prefill_worker, answer.proof.decode_worker) for answer in answers)
        house.assert_nothing_held(within=2.5)
