"""Which tickets a worker takes. Everything about one is checked here that needs no bytes of its KV.

A ticket is good once, for the tokens that it was made for, and with KV of the same model, version and layout; that of a
handoff also where its layout can be converted into the worker's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from python_backends.core.block_hash import block_hashes, chain_root, content_hash
from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff, unseal
from python_backends.core.layout import KVLayout
from python_backends.core.types import WorkerId
from python_backends.engines.paged.sequence import Sequence


class TicketDesk:
    """Belongs to the engine's thread."""

    def __init__(
        self, worker: WorkerId, key: bytes, layout: KVLayout, rounding: str, fingerprint_of: Callable[[KVLayout], str]
    ) -> None:
        """worker: who takes them, into KV of `layout`. fingerprint_of: ModelRunner's. rounding: transfer.rounding."""
        self._worker = worker
        self._key = key
        self._layout = layout
        self._rounding = rounding
        self._fingerprint_of = fingerprint_of
        self._used: OrderedDict[str, float] = OrderedDict()  # lease id -> when its ticket expires anyway

    def take_handoff(self, sequence: Sequence, ticket: bytes) -> None:
        """For all but the last token that came with the request. Sets `lease_id` as soon as it is known, and `handoff`.

        Raises HandoffRefused.
        """
        handoff = unseal(ticket, self._key, time.time())
        sequence.lease_id = handoff.lease_id
        self._check_origin(handoff, convert=True)
        if handoff.num_tokens != sequence.num_given - 1 or handoff.content != self._content(sequence, handoff):
            raise HandoffRefused(RefusalReason.FOREIGN_CONTENT, "KV of other tokens")
        self._take(sequence, handoff)

    def take_loan(self, sequence: Sequence, ticket: bytes) -> None:
        """For the sequence's first full blocks, otherwise likewise."""
        loan = unseal(ticket, self._key, time.time())
        sequence.lease_id = loan.lease_id
        self._check_origin(loan, convert=False)
        blocks, rest = divmod(loan.num_tokens, sequence.block_size)
        if rest or not 0 < blocks <= len(sequence.reusable_hashes()) or loan.content != sequence.hashes[blocks - 1]:
            raise HandoffRefused(RefusalReason.FOREIGN_CONTENT, "KV of other tokens")
        self._take(sequence, loan)

    def forget_expired(self, now: float) -> None:
        """now: wall clock, s. Tickets that have expired are refused for that."""
        while self._used and next(iter(self._used.values())) < now:
            self._used.popitem(last=False)

    def _take(self, sequence: Sequence, handoff: KVHandoff) -> None:
        self._used[handoff.lease_id] = handoff.expires_at
        sequence.handoff = handoff

    def _check_origin(self, handoff: KVHandoff, *, convert: bool) -> None:
        """`convert`: KV of another layout is good, too, where it can be converted."""
        theirs, ours = handoff.layout, self._layout
        differ = theirs.obstacle(ours, self._rounding) if convert else theirs.differences(ours)
        if differ or handoff.fingerprint != self._fingerprint_of(theirs):
            what = f"its KV and that of {self._worker} differ in {differ}" if differ else "KV of another model or version"
            detail = f"{handoff.source}: {what}; set model.* and engine.block_size alike on both sides"
            raise HandoffRefused(RefusalReason.FOREIGN_FINGERPRINT, detail)
        if handoff.lease_id in self._used:
            raise HandoffRefused(RefusalReason.REPLAYED, "this ticket was used before")

    def _content(self, sequence: Sequence, handoff: KVHandoff) -> bytes:
        """What the ticket of these tokens says."""
        covered = handoff.num_tokens
        tokens, size, root = sequence.token_ids[:covered], handoff.layout.block_size, sequence.root
        hashes = sequence.hashes[: covered // size]
        if handoff.layout != self._layout:  # its hashes are of its own fingerprint and block size
            root = chain_root(handoff.fingerprint, sequence.request.salt)
            hashes = block_hashes(tokens, size, root)
        return content_hash(tokens, hashes, size, root)
