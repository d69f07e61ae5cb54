"""A request's life as a table: which state follows which event, and what each state holds.

All transitions live here. A retry is a row, not an `except` in the middle. Whatever a state holds and its successor does
not is given back by the caller of `on` - except what ended by itself with the event, which is told apart here too.

    QUEUED -> ROUTED -> PREFILLING -> HANDING_OFF -> DECODING -> DONE          FAILED, CANCELLED from every live state
       ^         |          |             |             |
       |         +----------|-------------|--> (local, cached, aggregated: straight to DECODING)
       +-- WORKER_LOST -----+-------------+-------------+
"""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    QUEUED = "queued"
    ROUTED = "routed"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(str, Enum):
    ROUTE = "route"
    PREFILL = "prefill"  # work submitted to a prefill worker
    HAND_OFF = "hand_off"  # the first token is out, decode work is submitted with the ticket
    DECODE = "decode"  # work submitted to a decode worker without a ticket
    KV_READY = "kv_ready"  # the decode worker needs the lease no more
    TOKENS = "tokens"
    FINISH = "finish"  # the worker says that this was the last token
    STOP = "stop"  # the router ends it: a stop string
    WORKER_LOST = "worker_lost"
    FAIL = "fail"
    CANCEL = "cancel"


class Held(str, Enum):
    """What a request may hold, and what giving it back means."""

    ADMISSION = "admission"  # a place in the house
    CHARGE = "charge"  # counted as load of its decode worker
    PREFILL = "prefill"  # a request at a prefill worker, or its published KV: abort it there
    LOAN = "loan"  # blocks that another worker lends to the prefill worker: release their lease
    LEASE = "lease"  # published KV at a prefill worker: release it
    DECODE = "decode"  # a request at a decode worker: abort it there


HOLDS: dict[State, frozenset[Held]] = {
    State.QUEUED: frozenset({Held.ADMISSION}),
    State.ROUTED: frozenset({Held.ADMISSION, Held.CHARGE, Held.LOAN}),
    State.PREFILLING: frozenset({Held.ADMISSION, Held.CHARGE, Held.LOAN, Held.PREFILL}),
    State.HANDING_OFF: frozenset({Held.ADMISSION, Held.CHARGE, Held.LEASE, Held.DECODE}),
    State.DECODING: frozenset({Held.ADMISSION, Held.CHARGE, Held.DECODE}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

LIVE = (State.QUEUED, State.ROUTED, State.PREFILLING, State.HANDING_OFF, State.DECODING)
"""States of a request that has not ended."""
_WITH_WORKER = (State.ROUTED, State.PREFILLING, State.HANDING_OFF, State.DECODING)

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.ROUTE): State.ROUTED,
    (State.ROUTED, Event.PREFILL): State.PREFILLING,
    (State.ROUTED, Event.DECODE): State.DECODING,
    (State.PREFILLING, Event.HAND_OFF): State.HANDING_OFF,
    (State.PREFILLING, Event.FINISH): State.DONE,  # the first token was the last: decode is never asked
    (State.PREFILLING, Event.STOP): State.DONE,
    (State.HANDING_OFF, Event.KV_READY): State.DECODING,
    (State.DECODING, Event.TOKENS): State.DECODING,
    (State.DECODING, Event.FINISH): State.DONE,
    (State.DECODING, Event.STOP): State.DONE,
    **{(state, Event.WORKER_LOST): State.QUEUED for state in _WITH_WORKER},
    **{(state, Event.FAIL): State.FAILED for state in LIVE},
    **{(state, Event.CANCEL): State.CANCELLED for state in LIVE},
}

ENDED_BY_ITSELF: dict[tuple[State, Event], frozenset[Held]] = {
    (State.PREFILLING, Event.HAND_OFF): frozenset({Held.PREFILL}),  # became the lease
    (State.PREFILLING, Event.FINISH): frozenset({Held.PREFILL}),
    (State.DECODING, Event.FINISH): frozenset({Held.DECODE}),
}


class IllegalEvent(RuntimeError):
    """A bug in the caller. The lifecycle is unchanged."""


class Lifecycle:
    """One request's state. `on` moves it and returns what the caller must give back now."""

    def __init__(self) -> None:
        self.state = State.QUEUED

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def holds(self) -> frozenset[Held]:
        return HOLDS[self.state]

    def on(self, event: Event) -> frozenset[Held]:
        """Raises IllegalEvent, and changes nothing, for a pair that is not in the table."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise IllegalEvent(f"{event.value} in state {self.state.value}")
        ended = ENDED_BY_ITSELF.get((self.state, event), frozenset())
        to_give_back = HOLDS[self.state] - HOLDS[after] - ended
        self.state = after
        return to_give_back
