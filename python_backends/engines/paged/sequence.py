"""One request inside the paged engine: its tokens, its blocks, and how far its KV has come.

    token_ids   [ prompt ............ | output of earlier attempts | output of this one ]
                 0        num_computed  ^ first uncomputed position
    blocks      cover at least `num_computed` positions; the first `num_published` of them are findable by hash

Whoever advances `num_computed` (a step, a verified transfer, a prefix hit) has put the KV of those positions in `blocks`.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from python_backends.core.block_hash import block_hash, block_hashes
from python_backends.core.handoff import KVHandoff
from python_backends.core.types import BlockHash, FinishReason, GenerateRequest, PrefixReport, RequestId
from python_backends.engines.paged.guide import Guide
from python_backends.engines.paged.speculation import Drafts
from python_backends.kv.transfer.base import Fetched


@dataclass(slots=True, eq=False)
class Sequence:
    request: GenerateRequest
    prefill_only: bool  # ends with the first token and a published ticket
    arrival: int  # order of arrival in this engine
    block_size: int
    root: BlockHash
    handoff: KVHandoff | None = None  # a verified ticket, of a handoff or a loan, whose KV is yet to be fetched
    lease_id: str | None = None  # of that ticket; reported in KVReady
    follows: bool = False  # only fetched, into the prefix cache, and never computed
    was_handed: bool = False  # a ticket came with the request, good or bad: what is computed here is a recompute
    refusal: str = "none"  # KVReport.digest
    seeks_store: bool = False  # there are stores that may have what is not cached here
    prefetching: bool = False  # its blocks are on their way from a farther store to a nearer one, or were
    guide: Guide | None = None

    token_ids: list[int] = field(init=False)
    num_given: int = field(init=False)  # tokens that came with the request
    hashes: list[BlockHash] = field(init=False)  # of the full blocks of token_ids
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    transfer: Future[None] | None = None  # that fetches the handed KV
    private: bool = False  # there is rounded KV in its blocks, hence in all that it computes: nobody else may find it
    doomed: bool = False  # aborted while a transfer writes into its blocks: freed when the transfer ends

    drafts: Drafts = field(default_factory=Drafts)

    queued_s: float = 0.0  # until the engine's thread took the request in
    fetched_at: float = 0.0  # monotonic, s: its handed KV was here, good or bad
    started: float = 0.0  # monotonic, s: first step
    compute_ms: float = 0.0  # from then to the first token sampled here
    reused_tokens: int = 0
    received_tokens: int = 0
    received_bytes: int = 0
    transfer_ms: float = 0.0
    fetched: Fetched = field(default_factory=lambda: Fetched(""))
    prefix: PrefixReport = field(default_factory=PrefixReport)
    forwarded_tokens: int = 0  # given tokens that went through the model here, the last one not counted

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_ids, *self.request.output_ids]
        self.num_given = len(self.token_ids)
        self.hashes = block_hashes(self.token_ids, self.block_size, self.root)

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first: priority, then arrival."""
        return (self.request.priority, self.arrival)

    def reusable_hashes(self) -> list[BlockHash]:
        """Full blocks that a prefix hit may cover: never the last token, whose logits are wanted."""
        return self.hashes[: (len(self.token_ids) - 1) // self.block_size]

    @property
    def may_be_stored(self) -> bool:
        """Whether full blocks are missing that the stores may have."""
        return self.seeks_store and not self.private and self.num_published < len(self.reusable_hashes())

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has brought KV here for it yet; not so after a preemption, whose reuse is not to be reported."""
        return not (self.received_tokens or self.forwarded_tokens or self.prefix.tokens)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.guide is not None:
            self.guide.take(token_id)
        if len(self.token_ids) % self.block_size == 0:
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(block_hash(parent, self.token_ids[-self.block_size :]))

    def finish_reason(self, eos_token_ids: tuple[int, ...], max_context: int) -> FinishReason | None:
        """Of the token appended last."""
        sampling = self.request.sampling
        last = self.token_ids[-1]
        if self.num_output > sampling.min_tokens and (
            last in sampling.stop_token_ids or (last in eos_token_ids and not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        if self.num_output >= sampling.max_tokens or len(self.token_ids) >= max_context:
            return FinishReason.LENGTH
        return None

    def restart(self) -> None:
        """Forget all computed KV after its blocks were taken away (preemption)."""
        self.blocks = []
        self.num_computed = 0
        self.num_published = 0
        self.private = False
