"""Records for tests: requests whose times are given, not waited for."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from python_backends.core.types import RequestId, SamplingParams, WorkerId
from router.journal import Entry, Journal, Record
from router.lifecycle import State
from router.trace_context import TraceContext
from router.types import ClientRequest, FrontEndTimes, Outcome, Proof, RouteDecision, Way

REMOTE = RouteDecision(Way.REMOTE, WorkerId("prefill"), WorkerId("decode"), 100, "it is long")
LOCAL = RouteDecision(Way.LOCAL, None, WorkerId("decode"), 10, "it is short")
PROOF = Proof(
    route="remote",
    why="it is long",
    prefill_worker="prefill",
    decode_worker="decode",
    attempts=1,
    kv_tokens_reused=16,
    kv_tokens_received=84,
    kv_tokens_recomputed=0,
    kv_tokens_computed=0,
    kv_tokens_node=0,
    kv_tokens_remote=0,
    prefill_tokens_reused=32,
    prefill_tokens_node=0,
    prefill_tokens_remote=0,
    prefill_tokens_peer=0,
    prefill_tokens_computed=68,
    kv_bytes=1 << 20,
    transfer_ms=2.0,
    transport="shm",
    transport_why="same host",
    store_bytes=0,
    store_ms=0.0,
    digest="verified",
    ttft_ms=20.0,
    queue_ms=5.0,
    prefill_ms=15.0,
    handoff_ms=4.0,
    first_decode_ms=6.0,
    e2e_ms=100.0,
    arrival_ns=0,
    kv_codec="lossless",
    kv_wire_bytes=900_000,
)


@dataclass
class Clock:
    """Monotonic seconds that pass when told to."""

    now: float = 100.0

    def after_ms(self, ms: float) -> None:
        self.now += ms / 1e3

    def __call__(self) -> float:
        return self.now


def request(**fields: object) -> ClientRequest:
    given: dict[str, object] = {"sampling": SamplingParams(), "input_ids": [1, 2, 3], **fields}
    return ClientRequest(**given)  # type: ignore[arg-type]


def entry(name: str, clock: Clock | None = None, **fields: object) -> Entry:
    clock = clock or Clock()
    return Entry(RequestId(name), request(**fields), clock.now, clock)


def remote_record(name: str = "r.1", *, front_end: bool = True, sampled: bool | None = None) -> Record:
    """A request that took 20 ms to its first token, 30 to its second, 100 in all; 3 in the front end before that."""
    clock = Clock()
    made = entry(name, clock, client_id="mine", trace=TraceContext("a" * 32, "b" * 16, "c" * 16, sampled))
    made.tokenized(list(range(101)))
    made.routed(REMOTE)
    clock.after_ms(20)
    made.tokens(1)
    clock.after_ms(10)
    made.tokens(1)
    clock.after_ms(70)
    made.tokens(8)
    made.state = State.DONE
    record = Journal().end(made, Outcome.OK, proof=PROOF)
    if front_end:
        times = FrontEndTimes(record.arrival_ns - 3_000_000, tokenize_ms=1.0)
        record = msgspec.structs.replace(record, front_end=times)
    return record
