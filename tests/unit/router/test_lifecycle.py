"""The table, walked pair by pair and at random."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lifecycle import ENDED_BY_ITSELF, HOLDS, TRANSITIONS, Event, Held, IllegalEvent, Lifecycle, State

FINAL = {State.DONE, State.FAILED, State.CANCELLED}


def _in(state: State) -> Lifecycle:
    life = Lifecycle()
    life.state = state
    return life


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair(state: State, event: Event) -> None:
    life = _in(state)
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(IllegalEvent):
            life.on(event)
        assert life.state is state
    else:
        given_back = life.on(event)
        assert life.state is after
        assert given_back == HOLDS[state] - HOLDS[after] - ENDED_BY_ITSELF.get((state, event), frozenset())


@pytest.mark.parametrize("state", sorted(set(State) - FINAL))
def test_every_live_state_can_fail_and_be_cancelled(state: State) -> None:
    assert _in(state).on(Event.FAIL) == HOLDS[state]
    assert _in(state).on(Event.CANCEL) == HOLDS[state]


@pytest.mark.parametrize("state", sorted(FINAL))
def test_final_states_hold_nothing_and_end(state: State) -> None:
    assert HOLDS[state] == frozenset()
    assert not any(before is state for before, _ in TRANSITIONS)


@given(st.lists(st.sampled_from(list(Event)), max_size=60))
def test_a_random_walk_gives_everything_back_exactly_once(events: list[Event]) -> None:
    life = Lifecycle()
    held = set(life.holds)
    for event in [*events, Event.FAIL]:
        state = life.state
        try:
            given_back = life.on(event)
        except IllegalEvent:
            continue
        ended = ENDED_BY_ITSELF.get((state, event), frozenset())
        assert given_back | ended <= held, "given back, but not held"
        held = held - given_back - ended | life.holds
        assert held == life.holds
    assert held == set()


def test_a_lease_is_released_when_the_kv_has_arrived() -> None:
    assert _in(State.HANDING_OFF).on(Event.KV_READY) == {Held.LEASE}
