"""What routers and workers say to each other: work by a short signed Triton call, everything else on the channel.

Outputs and control are msgspec tagged unions, so a message of an unknown type is refused when decoded.
"""

from __future__ import annotations

import msgspec

from python_backends.core.errors import TritonCode
from python_backends.core.layout import KVLayout
from python_backends.core.types import (
    Epoch,
    FinishReason,
    GenerateRequest,
    KVReport,
    LeaseEnd,
    PrefixReport,
    RequestId,
    Role,
    StoreCounts,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
)

# --- router -> worker, in the `work` tensor of a non-decoupled call, sealed as an order (core/orders.py) ---------------


class PrefillWork(msgspec.Struct, frozen=True, tag=True):
    """Compute the prompt, sample the first token, publish the KV under a lease.

    `loan`: a ticket for KV of the first blocks, which another worker lends (Lent).
    """

    request: GenerateRequest
    loan: bytes | None = None


class DecodeWork(msgspec.Struct, frozen=True, tag=True):
    """Continue to the end. With a ticket the KV is fetched; without one the worker prefills by itself."""

    request: GenerateRequest
    ticket: bytes | None = None


class FollowWork(msgspec.Struct, frozen=True, tag=True):
    """Fetch the KV of the request's first blocks, which a prefill worker lends while it computes the rest, and cache it.

    The handoff has less to move then. The answer is Followed. The request is never computed; its prompt has one token
    more than the loan covers.
    """

    request: GenerateRequest
    loan: bytes


Work = PrefillWork | DecodeWork | FollowWork


# --- worker -> router, on the channel ---------------------------------------------------------------------------------


class PrefillDone(msgspec.Struct, frozen=True, tag=True):
    """The first token, and the ticket for the KV (None when the first token already finished the request)."""

    request_id: RequestId
    token_id: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    ticket: bytes | None
    lease_id: str | None
    reused_tokens: int  # prefix hit on the prefill worker
    computed_tokens: int
    compute_ms: float  # from the first chunk's start to the published ticket
    prefix: PrefixReport = PrefixReport()


class KVReady(msgspec.Struct, frozen=True, tag=True):
    """A worker has the KV it was handed or lent, or has given up on it. `lease_id` can be released now."""

    request_id: RequestId
    lease_id: str | None
    report: KVReport


class TokenChunk(msgspec.Struct, frozen=True, tag=True):
    """Tokens produced now. The last chunk of a request carries finish_reason and the final KVReport."""

    request_id: RequestId
    token_ids: list[int]
    start: int  # position of the first of them in the whole output: what is lost on the way, or comes twice, is noticed
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    report: KVReport | None = None


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    request_id: RequestId
    code: TritonCode
    message: str
    retryable: bool


class Located(msgspec.Struct, frozen=True, tag=True):
    """The answer to Locate: so many leading blocks are in the stores, and come faster than they are computed."""

    request_id: RequestId
    blocks: int


class Lent(msgspec.Struct, frozen=True, tag=True):
    """The answer to Lend: a ticket for so many leading tokens, under a lease. Without a ticket nothing is cached any more."""

    request_id: RequestId
    tokens: int
    ticket: bytes | None = None
    lease_id: str | None = None


class Followed(msgspec.Struct, frozen=True, tag=True):
    """The answer to FollowWork: so many tokens were fetched and are cached. The loan can be released."""

    request_id: RequestId
    tokens: int = 0  # 0: there was no room, or the loan was of no use
    bytes: int = 0
    wire_bytes: int = 0  # that travelled for them
    ms: float = 0.0


Output = PrefillDone | KVReady | TokenChunk | RequestFailed | Located | Lent | Followed


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step computed and how long it took: the router's cost model learns from these."""

    prefill_tokens: int  # prompt tokens computed
    prefill_context: float  # sum over the prompts' chunks of tokens x mean number of tokens each one attends to
    decode_streams: int  # sequences that got one more token
    decode_context: int  # sum of their lengths, tokens
    ms: float  # from the end of the step before, if the engine was busy, to the end of this one
    decode_tokens: int = 0  # that the streams got; 0: one each


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All outputs of one engine step, for all streams of this router, and the steps since the last message."""

    worker: WorkerId
    epoch: Epoch
    outputs: list[Output]
    steps: list[StepSample] = []


class BlockEvents(msgspec.Struct, frozen=True, tag=True):
    """Changes of a worker's prefix cache. `sequence` counts by one; a gap means: ask for a resync.

    With `reset` the list `stored` is the whole cache and everything known before is void.
    """

    worker: WorkerId
    epoch: Epoch
    sequence: int
    stored: list[bytes]
    removed: list[bytes]
    reset: bool = False


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    worker: WorkerId
    model: str  # its Triton model
    server: str  # HOST:PORT of its Triton's gRPC; empty: the router's own server
    role: Role
    epoch: Epoch
    pid: int
    host: str  # core.host.host_id: where `pid` means something
    load: WorkerLoad
    layout: KVLayout
    fingerprint: str
    max_context: int  # tokens, prompt and output; bounded by model and pool
    step_tokens: int  # computed in one step, at most: the chunk of a long prompt
    max_batch: int  # requests in one step
    events_sequence: int  # of the last BlockEvents sent
    calibration: list[StepSample] = []  # steps timed when the model was loaded
    stores: dict[str, StoreCounts] = {}  # by the tier's name; empty: this worker has no stores
    lends: bool = False  # whether it lends and borrows cached blocks
    follows: bool = False  # whether it knows FollowWork
    node_place: str = ""  # where users of the node store meet (core/shared_memory.py); empty: it uses none
    warm_up: bool = False  # its first handoff with each other worker is slow: make one before clients do
    draining: bool = False  # it takes no new work
    family: str = ""  # equal in workers whose layouts differ and whose KV is converted; empty: it is not
    cores: str = ""  # equal in workers of a host that lend each other cores: all are slower while several compute


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The worker ends because it was told to: unloaded, or the server stops. It is not to be restarted."""

    worker: WorkerId
    epoch: Epoch


FromWorker = Outputs | BlockEvents | Heartbeat | Leaving

# --- router -> worker, on the channel ---------------------------------------------------------------------------------


class RouterHeartbeat(msgspec.Struct, frozen=True, tag=True):
    """Said first on every connection, then again and again."""

    router: str  # another one in every life of a router; its request ids begin with it
    pid: int
    host: str  # core.host.host_id
    place: str  # what only one living router can have: one with the same place has replaced this one
    uses: bool = True  # whether it gives this worker work: False where that fails its canaries
    promised: int = 0  # requests that it will hand over to this worker, and that are computed elsewhere now


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[RequestId]


class ReleaseLease(msgspec.Struct, frozen=True, tag=True):
    """Nobody needs these leases any more."""

    lease_ids: list[str]
    end: LeaseEnd = LeaseEnd.UNWANTED


class Resync(msgspec.Struct, frozen=True, tag=True):
    """Send all block hashes again."""


class Locate(msgspec.Struct, frozen=True, tag=True):
    """Say (Located) how many leading blocks of these the stores have. Answered at once, or not at all."""

    request_id: RequestId
    hashes: list[bytes]


class Lend(msgspec.Struct, frozen=True, tag=True):
    """Publish what is cached of these leading blocks for another worker, and say so (Lent)."""

    request_id: RequestId
    hashes: list[bytes]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Tell routers to send nothing new; after `grace_s` hand back what is not finished."""

    grace_s: float


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Take work again."""


class Look(msgspec.Struct, frozen=True, tag=True):
    """Say how you are (Condition). Asked by those of the worker's own server that watch over it or drain it."""


ToWorker = RouterHeartbeat | Abort | ReleaseLease | Resync | Locate | Lend | Drain | Resume | Look

# --- worker -> whoever has asked it to Look ---------------------------------------------------------------------------


class Condition(msgspec.Struct, frozen=True, tag=True):
    """How a worker is. Said at once, also while its engine is stuck."""

    epoch: Epoch
    pid: int
    draining: bool
    idle: bool  # it has no request and is promised none, and holds nothing that others may still fetch
    used: bool  # some router gives it work, or there is no router
    standing_s: int  # as in WorkerLoad
    fault: str  # as in WorkerLoad


from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
condition_decoder = msgspec.msgpack.Decoder(Condition)
encode = msgspec.msgpack.Encoder().encode
