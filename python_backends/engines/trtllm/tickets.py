"""Tickets of this engine and the DisaggregatedParams in them: made on the prefill side, read with suspicion on the decode
side."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from python_backends.core.block_hash import block_hashes, chain_root, content_hash
from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import ENGINE_TRANSPORT, TICKET_VERSION, KVHandoff, seal, unseal
from python_backends.core.types import BlockHash, Epoch, WorkerId
from python_backends.engines.trtllm.jobs import Job, Kind
from python_backends.engines.trtllm.loaded import Loaded
from python_backends.engines.trtllm.opaque import pack, unpack
from python_backends.engines.trtllm.request_ids import RequestIds


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who makes tickets. `backend`, the transceiver's, is the ticket's locator and must be the same on both sides."""

    worker: WorkerId
    number: int  # of the worker: another one for each of a server, and likely for those of others
    epoch: Epoch
    key: bytes
    backend: str
    good_for_s: float


class Tickets:
    def __init__(self, issuer: Issuer, loaded: Loaded) -> None:
        self._issuer = issuer
        self._info = loaded.info
        self._library = loaded.library
        self._fields = loaded.library.params_fields
        self._ids = RequestIds(issuer.number, issuer.epoch)
        self._used: OrderedDict[str, float] = OrderedDict()  # lease id -> when its ticket expires anyway

    @property
    def backend(self) -> str:
        return self._issuer.backend

    @property
    def carry_logprobs(self) -> bool:
        """Up to 1.2 the first token's log-probability has no field, and the generation half of such a request fails."""
        return "first_gen_log_probs" in self._fields

    def context_params(self) -> Any:
        """For one context request. A new id each time: one asked for twice can leave generation waiting for ever."""
        own = {"disagg_request_id": self._ids.new()} if "disagg_request_id" in self._fields else {}
        return self._library.disaggregated_params(request_type=Kind.CONTEXT.value, **own)

    def make(self, job: Job, params: Any | None) -> tuple[bytes, str]:
        """(ticket, lease id) for the KV of all of the job's tokens; without `params` it says that there is no KV to move.

        Raises TypeError when the release's DisaggregatedParams holds something that can't travel.
        """
        lease_id = secrets.token_hex(8)
        handoff = KVHandoff(
            version=TICKET_VERSION,
            transport=ENGINE_TRANSPORT,
            source=self._issuer.worker,
            epoch=self._issuer.epoch,
            lease_id=lease_id,
            expires_at=time.time() + self._issuer.good_for_s,
            layout=self._info.layout,
            fingerprint=self._info.fingerprint,
            num_tokens=len(job.token_ids),
            blocks=[],
            generations=[],
            digests=[],
            locator=self.backend,
            opaque=pack(params) if params is not None else b"",
            content=self._content(job.token_ids, job.request.salt),
        )
        return seal(handoff, self._issuer.key), lease_id

    def read(self, job: Job, ticket: bytes) -> None:
        """Set the job's handoff and params. Raises HandoffRefused; the job knows the lease then, if the ticket tells it."""
        handoff = unseal(ticket, self._issuer.key, time.time())
        job.lease_id = handoff.lease_id
        if (handoff.fingerprint, handoff.layout) != (self._info.fingerprint, self._info.layout):
            raise HandoffRefused(RefusalReason.FOREIGN_FINGERPRINT, "KV of another model, layout or version")
        if handoff.transport != ENGINE_TRANSPORT or handoff.locator != self.backend:
            theirs = f"{handoff.transport} {handoff.locator}"
            raise HandoffRefused(RefusalReason.TRANSFER_FAILED, f"its KV moves by {theirs}, this worker's by {self.backend}")
        self._check_unused(handoff)
        given = job.token_ids[: handoff.num_tokens]
        whole = handoff.num_tokens == len(job.token_ids) - 1
        if not whole or self._content(given, job.request.salt) != handoff.content:
            raise HandoffRefused(RefusalReason.FOREIGN_CONTENT, "KV of other tokens")
        if not handoff.opaque:
            raise HandoffRefused(RefusalReason.UNSUPPORTED, "log-probabilities can't be handed over in this release")
        params = unpack(handoff.opaque, self._library.disaggregated_params, self._library.logprob)
        if list(params.first_gen_tokens) != job.token_ids[-1:]:
            raise HandoffRefused(RefusalReason.FOREIGN_CONTENT, "KV that led to another first token")
        if job.request.sampling.logprobs is not None and not getattr(params, "first_gen_log_probs", None):
            raise HandoffRefused(RefusalReason.UNSUPPORTED, "the first token's log-probability is missing")
        self._used[handoff.lease_id] = handoff.expires_at
        job.handoff, job.params = handoff, params

    def _check_unused(self, handoff: KVHandoff) -> None:
        now = time.time()
        while self._used and next(iter(self._used.values())) < now:
            self._used.popitem(last=False)
        if handoff.lease_id in self._used:
            raise HandoffRefused(RefusalReason.REPLAYED, "this ticket was used before")

    def _content(self, token_ids: list[int], salt: str) -> BlockHash:
        size, root = self._info.layout.block_size, chain_root(self._info.fingerprint, salt)
        return content_hash(token_ids, block_hashes(token_ids, size, root), size, root)
