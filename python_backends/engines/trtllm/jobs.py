"""A job is what a router asked of this engine; a leg is one request to TensorRT-LLM that serves it.

A job usually has one leg: context for prefill, generation for decode with a ticket, plain for decode without. When a
handoff fails the job goes on with a plain leg, and the old leg, which nobody may cancel while KV is in transit, stays
behind without a job until TensorRT-LLM is done with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from python_backends.core.handoff import KVHandoff
from python_backends.core.types import GenerateRequest, RequestId


class Kind(str, Enum):
    CONTEXT = "context_only"
    GENERATION = "generation_only"
    PLAIN = "context_and_generation"


@dataclass(slots=True, eq=False)
class Job:
    request: GenerateRequest
    prefill_only: bool
    arrival: int  # order of arrival in this engine
    arrived: float  # monotonic, s
    max_new: int  # tokens it may still produce
    handoff: KVHandoff | None = None  # a good ticket
    params: Any = None  # its DisaggregatedParams
    lease_id: str | None = None  # of the ticket, good or bad
    was_handed: bool = False  # it came with a ticket: what is computed here is a recompute
    verdict: str = "none"  # KVReport.digest
    leg: Leg | None = None
    reused_tokens: int = 0
    received_tokens: int = 0
    transfer_ms: float = 0.0
    compute_ms: float = 0.0

    token_ids: list[int] = field(init=False)  # all that came with the request

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_ids, *self.request.output_ids]

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first: priority, then arrival."""
        return (self.request.priority, self.arrival)


@dataclass(slots=True, eq=False)
class Leg:
    kind: Kind
    job: Job | None  # None: nobody waits for it any more
    streaming: bool
    num_blocks: int  # of TensorRT-LLM's pool, at most
    began: float  # monotonic, s
    result: Any = None  # tensorrt_llm's GenerationResult
    task: asyncio.Task[None] | None = None
    heard: bool = False  # it has had a first output: no KV of it is in transit
    aborted: bool = False
    num_skipped: int = 0  # leading output tokens that the client has already: the context's token
    num_sent: int = 0  # output tokens told, the skipped ones not counted

    @property
    def in_transit(self) -> bool:
        """KV may be on its way into its blocks: an abort now would lose them for ever."""
        return self.kind is Kind.GENERATION and not self.heard
