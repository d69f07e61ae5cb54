"""The handoff ticket: a signed, versioned, self-describing claim on KV that a prefill worker holds under a lease.

The ticket is msgpack followed by HMAC-SHA256 over all of it, with the deployment's key. Never pickle. It says where the
bytes are, never carries them (except `inline`), and nothing in it is believed before the signature is checked.

An engine with a pool and a transfer of its own (TensorRT-LLM) lists no blocks: what its other end needs is in `opaque`,
which nobody else reads, and the transport is called ENGINE_TRANSPORT.
"""

from __future__ import annotations

import msgspec

from python_backends.core.errors import UNREADABLE, HandoffRefused, RefusalReason
from python_backends.core.layout import KVLayout
from python_backends.core.signing import Domain, sign, verify
from python_backends.core.types import Epoch, WorkerId

TICKET_VERSION = 1
ENGINE_TRANSPORT = "engine"
"""`KVHandoff.transport` of KV that the engines move between themselves."""


class KVHandoff(msgspec.Struct, frozen=True):
    """One claim. Blocks are in prompt order and cover `num_tokens`; the last one may be partly filled.

    With ENGINE_TRANSPORT the lists of blocks, generations and digests are empty.
    """

    version: int
    transport: str  # registry name in kv/transfer, or ENGINE_TRANSPORT
    source: WorkerId
    epoch: Epoch
    lease_id: str
    expires_at: float  # wall clock, s; after it the blocks may be reused
    layout: KVLayout
    fingerprint: str
    num_tokens: int  # tokens whose KV is handed over
    blocks: list[int]  # block numbers in the source's pool
    generations: list[int]  # per block: the pool's generation when published; another one later means reused
    digests: list[bytes]  # per block: 16 bytes, as the transport digests it
    locator: str = ""  # transport's own address of the pool
    opaque: bytes = b""  # transport or engine private
    content: bytes = b""  # core.block_hash.content_hash of the tokens: a ticket can't be used for another prompt


def seal(handoff: KVHandoff, key: bytes) -> bytes:
    """Encode and sign."""
    return sign(Domain.HANDOFF, msgspec.msgpack.encode(handoff), key)


def unseal(ticket: bytes, key: bytes, now: float) -> KVHandoff:
    """Verify and decode. Raises HandoffRefused for a bad signature, a foreign version, nonsense or a passed expiry."""
    body = verify(Domain.HANDOFF, ticket, key)
    if body is None:
        raise HandoffRefused(RefusalReason.BAD_SIGNATURE, "the ticket was not signed with this deployment's key")
    try:
        handoff = _decoder.decode(body)
    except UNREADABLE as error:
        raise HandoffRefused(RefusalReason.MALFORMED, str(error)) from error
    if handoff.version != TICKET_VERSION:
        raise HandoffRefused(RefusalReason.MALFORMED, f"ticket version {handoff.version}, this worker reads {TICKET_VERSION}")
    if handoff.layout.block_size < 1:
        raise HandoffRefused(RefusalReason.MALFORMED, "a block holds no tokens")
    num_blocks = handoff.layout.blocks_for(handoff.num_tokens) if handoff.transport != ENGINE_TRANSPORT else 0
    if not num_blocks == len(handoff.blocks) == len(handoff.generations) == len(handoff.digests):
        raise HandoffRefused(RefusalReason.MALFORMED, "block, generation and digest lists do not cover the tokens")
    if handoff.num_tokens < 1:
        raise HandoffRefused(RefusalReason.MALFORMED, "it covers no tokens")
    if now >= handoff.expires_at:
        raise HandoffRefused(RefusalReason.EXPIRED, f"the lease ended {now - handoff.expires_at:.2f} s ago")
    return handoff


_decoder = msgspec.msgpack.Decoder(KVHandoff)
