from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.errors import QueueFull
from router.admission import Admission, Place


def test_places_are_counted_and_refused_beyond_the_limit() -> None:
    admission = Admission(max_requests=2, max_queued_tokens=100)
    first = admission.enter()
    admission.enter()
    with pytest.raises(QueueFull, match=r"router\.max_requests"):
        admission.enter()
    assert admission.requests == 2
    first.leave()
    admission.enter()


def test_waiting_tokens_are_bounded_but_one_prompt_may_always_wait() -> None:
    admission = Admission(max_requests=9, max_queued_tokens=100)
    long = admission.enter()
    long.queue(1000)
    short = admission.enter()
    with pytest.raises(QueueFull, match=r"router\.max_queued_tokens"):
        short.queue(1)
    assert admission.queued_tokens == 1000
    short.leave()
    long.first_token()
    assert admission.queued_tokens == 0
    admission.enter().queue(60)
    admission.enter().queue(40)
    with pytest.raises(QueueFull):
        admission.enter().queue(1)


def test_giving_back_twice_counts_once() -> None:
    admission = Admission(max_requests=9, max_queued_tokens=100)
    other = admission.enter()
    other.queue(5)
    place = admission.enter()
    place.queue(7)
    for _ in range(2):
        place.first_token()
        place.leave()
    assert (admission.requests, admission.queued_tokens) == (1, 5)


@given(st.lists(st.tuples(st.sampled_from(["enter", "queue", "first", "leave"]), st.integers(0, 7), st.integers(1, 60))))
def test_the_counts_never_drift(steps: list[tuple[str, int, int]]) -> None:
    admission = Admission(max_requests=4, max_queued_tokens=100)
    places: list[tuple[Place, set[str]]] = []
    for step, which, tokens in steps:
        if step == "enter":
            if admission.requests < 4:
                places.append((admission.enter(), set()))
            continue
        if not places:
            continue
        place, done = places[which % len(places)]
        if step == "queue" and not done:
            try:
                place.queue(tokens)
            except QueueFull:
                place.leave()
                done.add("leave")
            done.add("queue")
        elif step == "first":
            place.first_token()
        elif step == "leave":
            place.leave()
            done.update(("queue", "leave"))
        assert admission.requests == sum("leave" not in done for _, done in places)
        assert admission.queued_tokens >= 0
    for place, _ in places:
        place.leave()
    assert (admission.requests, admission.queued_tokens) == (0, 0)
