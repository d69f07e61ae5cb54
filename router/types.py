"""The router's own values: what a client asked for, where it goes, what is sent back, and the proof."""

from __future__ import annotations

from enum import Enum

import msgspec

from python_backends.core.errors import InvalidRequest
from python_backends.core.types import FinishReason, SamplingParams, TokenLogprob, WorkerId
from router.trace_context import TraceContext

MAX_NAME_CHARS = 1_000
"""Of a salt, and of a client's name for its request."""
MAX_INPUT_IDS = 1_000_000


class Way(str, Enum):
    """How a request is served."""

    REMOTE = "remote"  # a prefill worker computes the prompt and hands the KV to a decode worker
    LOCAL = "local"  # the decode worker computes the uncached rest of the prompt itself
    CACHED = "cached"  # the decode worker has every full block, or finds it in a store; it computes only what none covers
    AGGREGATED = "aggregated"  # an aggregated worker does both


class Wish(str, Enum):
    """What client or deployment ask of the route."""

    AUTO = "auto"  # whatever is predicted to be best
    REMOTE = "remote"
    LOCAL = "local"
    AGGREGATED = "aggregated"


class Slo(msgspec.Struct, frozen=True):
    """What the route has to keep, in ms; 0 is no target."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0  # of this stream, and of those that it joins


class FrontEndTimes(msgspec.Struct, frozen=True):
    """What a front end did before it asked the router."""

    received_ns: int  # wall clock, when the request's head was there
    tokenize_ms: float


class ClientRequest(msgspec.Struct, frozen=True):
    """A client's request, validated field by field. Exactly one of text, messages, input_ids is given."""

    sampling: SamplingParams
    text: str | None = None
    messages: list[dict[str, object]] | None = None
    input_ids: list[int] | None = None
    wish: Wish | None = None  # None: the deployment's mode
    salt: str = ""
    priority: int = 0  # lower is served first
    slo_ttft_ms: float | None = None  # None: the deployment's
    slo_itl_ms: float | None = None
    timeout_s: float | None = None  # None: router.default_deadline_s
    client_id: str = ""  # the client's own name for it; only kept in the journal
    answer_id: str = ""  # likewise, of the answer
    trace: TraceContext | None = None  # None: a new one begins
    front_end: FrontEndTimes | None = None
    output_ids: list[int] = []  # the answer's first tokens, which the client has had from a router that died since

    def check_sizes(self) -> None:
        """Raises InvalidRequest where a field is larger than anybody needs: each of them is kept or hashed."""
        for field, text in (("cache_salt", self.salt), ("the request's id", self.client_id)):
            if len(text) > MAX_NAME_CHARS:
                raise InvalidRequest(f"{field} has {len(text)} characters; at most {MAX_NAME_CHARS} are accepted")
        for field, ids in (("input_ids", self.input_ids or ()), ("output_ids", self.output_ids)):
            if len(ids) > MAX_INPUT_IDS:
                raise InvalidRequest(f"{field} has {len(ids)} tokens; at most {MAX_INPUT_IDS} are accepted")


class RouteDecision(msgspec.Struct, frozen=True):
    way: Way
    prefill: WorkerId | None  # only for REMOTE
    decode: WorkerId  # or the aggregated worker
    prefill_tokens: int  # uncached tokens that whoever prefills is expected to compute
    why: str
    ttft_ms: float = 0.0  # predicted, from now to the first token
    itl_ms: float = 0.0  # predicted, between two tokens of this stream
    lender: WorkerId | None = None  # has more of the prompt cached than `prefill`, and lends it


class Sending(str, Enum):
    """What is worth a response of its own, besides the end."""

    WHOLE = "whole"  # nothing
    TEXT = "text"  # text
    TOKENS = "tokens"  # tokens, whose text may still be to come


class Piece(msgspec.Struct, frozen=True):
    """What one response carries."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    cumulative_logprob: float
    num_input_tokens: int
    finish_reason: FinishReason | None = None
    proof: Proof | None = None  # with finish_reason


class Proof(msgspec.Struct, frozen=True):
    """What really happened to one request. Tokens are of the prompt; times are milliseconds.

    queue_ms + prefill_ms == ttft_ms: the first token leaves before decode begins. handoff_ms and first_decode_ms follow
    it, up to the second token; they are 0 where there was no handoff or no second token.
    """

    route: str
    why: str
    prefill_worker: str
    decode_worker: str
    attempts: int
    kv_tokens_reused: int  # prefix hit on the decode worker
    kv_tokens_received: int  # moved and verified
    kv_tokens_recomputed: int  # handed over, yet computed again
    kv_tokens_computed: int  # computed on the decode worker by plan (local, aggregated)
    kv_tokens_node: int  # taken from the node store by the decode worker, verified
    kv_tokens_remote: int  # from the remote store
    prefill_tokens_reused: int  # prefix hit on the prefill worker
    prefill_tokens_node: int
    prefill_tokens_remote: int
    prefill_tokens_peer: int  # lent by another worker
    prefill_tokens_computed: int
    kv_bytes: int
    transfer_ms: float
    transport: str
    transport_why: str  # why it was taken, with transfer.transport: auto
    store_bytes: int  # taken from stores by both workers
    store_ms: float  # spent on looking there and taking
    digest: str  # verified | unchecked (moved by the engine itself) | none (nothing moved) | why it was refused
    ttft_ms: float
    queue_ms: float
    prefill_ms: float
    handoff_ms: float
    first_decode_ms: float
    e2e_ms: float
    arrival_ns: int  # wall clock
    itl_ms: float = 0.0  # mean time between two tokens
    predicted_ttft_ms: float = 0.0  # when the route was chosen
    predicted_itl_ms: float = 0.0
    kv_codec: str = (
        ""  # raw | lossless | float16 | int8: how kv_bytes travelled; empty: nothing did, or the engine doesn't tell
    )
    kv_wire_bytes: int = 0  # that travelled for them
    kv_tokens_ahead: int = 0  # of those received: moved while the prefill worker was still computing others
    kv_rounded: str = ""  # the dtype that received KV was rounded to (transfer.rounding); empty: it arrived bit for bit
    request_id: str = ""  # the router's; scripts/trace finds the request by it ...
    trace_id: str = ""  # ... and by this one


class Outcome(str, Enum):
    OK = "ok"
    FAILED = "failed"
    REFUSED = "refused"  # by admission or for bad input
    CANCELLED = "cancelled"
