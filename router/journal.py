"""What became of the last requests, and what those in flight are doing: read by the page, by scripts/trace and by tracing.

A bounded ring in the router's memory. Nothing of a prompt or an answer is kept but numbers, and a digest that tells which
prompts begin alike.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import msgspec
import xxhash

from python_backends.core.types import RequestId
from router.lifecycle import State
from router.trace_context import TraceContext, continue_trace
from router.types import ClientRequest, FrontEndTimes, Outcome, Proof, RouteDecision

_PREFIX_TOKENS = 32  # prompts that begin with the same ones are of one family
_SHORTEST_BEGINNING = 8  # of an id that is looked for, in characters
_KEPT_TROUBLES = 8  # failed attempts that are told in words

LATEST, SLOWEST = "latest", "slowest"
"""What may be looked for besides an id."""


class Trouble(msgspec.Struct, frozen=True):
    """An attempt that failed. ms: after the arrival."""

    ms: float
    why: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times are milliseconds after `arrival_ns`, 0 where it did not come so far."""

    id: RequestId
    client_id: str  # the client's own word: x-request-id, or the id of Triton's request
    answer_id: str  # of the OpenAI API's answer: chatcmpl-...
    trace: TraceContext
    front_end: FrontEndTimes | None  # None: it did not come through one
    state: State
    outcome: Outcome | None  # None: in flight
    error: str
    arrival_ns: int  # wall clock, at the router
    prompt_tokens: int
    output_tokens: int  # with those of an earlier life of the router
    resumed_tokens: int  # which an earlier life of the router has produced
    prefix: str  # digest of the prompt's first tokens and its tenant
    route: str  # empty: not decided
    why: str
    prefill_worker: str
    decode_worker: str
    attempts: int
    troubles: list[Trouble]
    ttft_ms: float
    second_token_ms: float
    longest_gap_ms: float  # between two chunks of tokens
    age_ms: float  # to now, or to its end
    proof: Proof | None = None  # of a request that ended well

    @property
    def itl_ms(self) -> float:
        """Mean time between two tokens; 0 with fewer than two."""
        produced = self.output_tokens - self.resumed_tokens
        return (self.age_ms - self.ttft_ms) / (produced - 1) if produced > 1 and self.ttft_ms else 0.0


class Entry:
    """One request as it goes; what happens to it is told as it happens. Belongs to the event loop."""

    def __init__(
        self, request_id: RequestId, request: ClientRequest, arrival: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """arrival: on the clock of `now`, s."""
        self.id = request_id
        self.state = State.QUEUED
        self._request = request
        self._trace = request.trace or continue_trace(None)
        self._now = now
        self._arrival = arrival
        self._arrival_ns = time.time_ns() - int((now() - arrival) * 1e9)
        self._prompt_tokens = 0
        self._output_tokens = len(request.output_ids)
        self._prefix = ""
        self._decision: RouteDecision | None = None
        self._attempts = 0
        self._troubles: list[Trouble] = []
        self._first_token = 0.0
        self._second_token = 0.0
        self._last_token = 0.0
        self._longest_gap = 0.0

    @property
    def trace_id(self) -> str:
        return self._trace.trace_id

    def tokenized(self, token_ids: Sequence[int]) -> None:
        self._prompt_tokens = len(token_ids)
        first = array("q", token_ids[:_PREFIX_TOKENS]).tobytes()
        self._prefix = str(xxhash.xxh3_64_hexdigest(first + self._request.salt.encode(errors="surrogatepass")))

    def routed(self, decision: RouteDecision) -> None:
        self._decision = decision
        self._attempts += 1

    def failed_attempt(self, why: str) -> None:
        if len(self._troubles) < _KEPT_TROUBLES:
            self._troubles.append(Trouble((self._now() - self._arrival) * 1e3, why))

    def tokens(self, count: int) -> float:
        """So many new tokens. Returns the seconds since those before, 0 for the first."""
        now = self._now()
        gap = now - self._last_token if self._last_token else 0.0
        self._longest_gap = max(self._longest_gap, gap)
        self._last_token = now
        if not self._first_token:
            self._first_token = now
        if not self._second_token and (gap or count > 1):
            self._second_token = now
        self._output_tokens += count
        return gap

    def record(self, outcome: Outcome | None = None, error: str = "", proof: Proof | None = None) -> Record:
        """How it stands now. An outcome says that this is its end."""
        request, decision = self._request, self._decision
        return Record(
            id=self.id,
            client_id=request.client_id,
            answer_id=request.answer_id,
            trace=self._trace,
            front_end=request.front_end,
            state=self.state,
            outcome=outcome,
            error=error,
            arrival_ns=self._arrival_ns,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            resumed_tokens=len(request.output_ids),
            prefix=self._prefix,
            route=decision.way.value if decision else "",
            why=decision.why if decision else "",
            prefill_worker=(decision.prefill or decision.decode) if decision else "",
            decode_worker=decision.decode if decision else "",
            attempts=self._attempts,
            troubles=list(self._troubles),
            ttft_ms=proof.ttft_ms if proof else self._since(self._first_token),
            second_token_ms=self._since(self._second_token),
            longest_gap_ms=self._longest_gap * 1e3,
            age_ms=proof.e2e_ms if proof else self._since(self._now()),
            proof=proof,
        )

    def _since(self, instant: float) -> float:
        """Milliseconds from the arrival; 0 if it has not been."""
        return (instant - self._arrival) * 1e3 if instant else 0.0


class Journal:
    """Belongs to the event loop. `listeners` hear of every request that ends, there; they must not block."""

    def __init__(self, size: int = 2000) -> None:
        self.listeners: list[Callable[[Record], None]] = []
        self.sequence = 0  # requests that have ended
        self._ended: deque[Record] = deque(maxlen=size)
        self._live: dict[RequestId, Entry] = {}

    def begin(self, entry: Entry) -> None:
        self._live[entry.id] = entry

    def end(self, entry: Entry, outcome: Outcome, error: str = "", proof: Proof | None = None) -> Record:
        """Returns what will be kept for a while."""
        self._live.pop(entry.id, None)
        record = entry.record(outcome, error, proof)
        self._ended.append(record)
        self.sequence += 1
        for listener in self.listeners:
            listener(record)
        return record

    def live(self, limit: int) -> list[Record]:
        """Requests in flight, oldest first."""
        return [entry.record() for entry in islice(self._live.values(), limit)]

    def after(self, sequence: int, limit: int) -> list[Record]:
        """The first `limit` kept records later than `sequence`; the oldest ones kept when that is long ago."""
        first = max(sequence, self.first)
        return list(islice(self._ended, first - self.first, first - self.first + limit))

    @property
    def first(self) -> int:
        """`sequence` before the oldest record that is kept."""
        return self.sequence - len(self._ended)

    def find(self, what: str) -> list[Record]:
        """Requests by any id of theirs, or by the beginning of one; `latest`, `slowest` to their end."""
        if what == LATEST:
            return [self._ended[-1]] if self._ended else []
        if what == SLOWEST:
            return [max(self._ended, key=lambda record: record.age_ms)] if self._ended else []
        records = [*self._ended, *(entry.record() for entry in self._live.values())]
        exact = [record for record in records if what in _ids(record)]
        if exact or len(what) < _SHORTEST_BEGINNING:
            return exact
        return [record for record in records if any(id.startswith(what) for id in _ids(record))]


def _ids(record: Record) -> tuple[str, ...]:
    return (record.id, record.client_id, record.answer_id, record.trace.trace_id)
