from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lifecycle import ENDED_BY_ITSELF, HOLDS, TRANSITIONS, Event, Held, IllegalEvent, Lifecycle, State

FINAL = {State.DONE, State.FAILED, State.CANCELLED}
PAIRS = [(state, event) for state in State for event in Event]


def in_state(state: State) -> Lifecycle:
    life = Lifecycle()
    life.state = state
    return life


def test_a_request_begins_queued_with_only_its_place() -> None:
    life = Lifecycle()
    assert (life.state, life.live, life.holds) == (State.QUEUED, True, frozenset({Held.ADMISSION}))


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_pair_follows_the_table(state: State, event: Event) -> None:
    life = in_state(state)
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(IllegalEvent, match=f"{event.value} in state {state.value}"):
            life.on(event)
        assert life.state is state
        return
    given_back = life.on(event)
    assert life.state is after
    ended = ENDED_BY_ITSELF.get((state, event), frozenset())
    # What was held is either still held, ended by itself, or to be given back; never two of these.
    assert HOLDS[state] == (HOLDS[state] & HOLDS[after]) | ended | given_back
    assert not given_back & (HOLDS[after] | ended)
    assert ended <= HOLDS[state]


@pytest.mark.parametrize("state", State)
def test_final_states_hold_nothing_and_stay(state: State) -> None:
    life = in_state(state)
    assert life.live is (state not in FINAL)
    assert (state in FINAL) == (not life.holds)
    leads_on = any(before is state for before, _ in TRANSITIONS)
    assert leads_on is (state not in FINAL)


@pytest.mark.parametrize("event", [Event.CANCEL, Event.FAIL])
@pytest.mark.parametrize("state", [state for state in State if state not in FINAL])
def test_cancel_and_fail_end_every_live_state_with_all_given_back(state: State, event: Event) -> None:
    life = in_state(state)
    held = life.holds
    assert life.on(event) == held
    assert not life.live


@pytest.mark.parametrize("state", [State.ROUTED, State.PREFILLING, State.HANDING_OFF, State.DECODING])
def test_a_lost_worker_leads_back_to_the_queue_with_only_the_place(state: State) -> None:
    life = in_state(state)
    assert life.on(Event.WORKER_LOST) == HOLDS[state] - {Held.ADMISSION}
    assert life.state is State.QUEUED


def test_all_states_can_be_reached_and_left_for_an_end() -> None:
    reached = {State.QUEUED}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_what_ends_by_itself_belongs_to_a_transition() -> None:
    assert set(ENDED_BY_ITSELF) <= set(TRANSITIONS)


@given(st.lists(st.sampled_from(Event), max_size=60), st.sampled_from([Event.CANCEL, Event.FAIL]))
def test_random_walks_end_with_nothing_held(events: list[Event], end: Event) -> None:
    """The caller's books: taken on entering a state, given back when told, or ended by itself - each exactly once."""
    life = Lifecycle()
    taken: Counter[Held] = Counter(life.holds)
    ended: Counter[Held] = Counter()
    for event in [*events, end]:
        before, held = life.state, life.holds
        try:
            given_back = life.on(event)
        except IllegalEvent:
            assert (life.state, life.holds) == (before, held)
            continue
        ended.update(given_back)
        ended.update(ENDED_BY_ITSELF.get((before, event), frozenset()))
        taken.update(life.holds - held)
        assert all(taken[resource] - ended[resource] == (resource in life.holds) for resource in Held)
    assert not life.live
    assert taken == ended
