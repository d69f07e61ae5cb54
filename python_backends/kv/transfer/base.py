"""How KV moves between pools: the contract of a transport, and the one check that all transports share.

Copying and believing are two steps. A transport's `copy` brings bytes into the destination and says whether the source
still meant them; `fetch` then digests what actually arrived, in place. So no transport, however broken, can hand over
KV that differs from what was published.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.kv.memory import PoolMemory


class Published(msgspec.Struct, frozen=True):
    """What a transport puts into the ticket so that its other end finds the bytes."""

    locator: str = ""
    opaque: bytes = b""


class KVTransport(Protocol):
    """Moves blocks from a source's pool into this worker's pool. `name` is what the ticket calls it."""

    name: str

    def publish(self, memory: PoolMemory, blocks: Sequence[int]) -> Published:
        """Make the blocks fetchable by whoever has the ticket. The caller holds them (a lease) until then."""

    def fetch(
        self, handoff: KVHandoff, wanted: Sequence[int], into: PoolMemory, blocks: Sequence[int], deadline: float
    ) -> None:
        """Copy the handoff's blocks at the positions `wanted` into `into.blocks[blocks[i]]`, verified.

        `deadline` is in time.monotonic() seconds; returns or raises by then (and 50 ms). May be called from several
        threads. When it has returned, nobody writes into `into` any more; after an error the destination blocks hold
        anything. Raises HandoffRefused: STALE_EPOCH (the source has restarted or reused a block), DIGEST_MISMATCH,
        TRANSFER_FAILED or TRANSFER_TIMEOUT.
        """

    def close(self) -> None:
        """Give up mappings and connections, and wake who waits. Idempotent."""


class CheckedTransport(ABC):
    """A KVTransport whose `fetch` is its own `copy`, then the shared digest check."""

    name: str

    @abstractmethod
    def publish(self, memory: PoolMemory, blocks: Sequence[int]) -> Published: ...

    @abstractmethod
    def copy(self, handoff: KVHandoff, wanted: Sequence[int], into: PoolMemory, blocks: Sequence[int], deadline: float) -> None:
        """Copy as `fetch` does, and check that the source still meant the bytes *after* they were copied."""

    @abstractmethod
    def close(self) -> None: ...

    def fetch(
        self, handoff: KVHandoff, wanted: Sequence[int], into: PoolMemory, blocks: Sequence[int], deadline: float
    ) -> None:
        """See KVTransport.fetch."""
        if handoff.transport != self.name:
            raise failed(f"the ticket is for transport {handoff.transport!r}, this worker has {self.name!r}")
        if handoff.layout.block_bytes != into.block_bytes:
            raise failed(f"blocks of {handoff.layout.block_bytes} bytes do not fit a pool of {into.block_bytes}")
        self.copy(handoff, wanted, into, blocks, deadline)
        _check_digests(handoff, wanted, into, blocks, deadline)


def block_digest(block: npt.NDArray[np.uint8]) -> bytes:
    """xxh3_128 (16 bytes) of a block's contiguous bytes. Finds damage, not malice: the ticket's signature does that."""
    return xxhash.xxh3_128_digest(block.data)


def check_time(deadline: float) -> None:
    """Raises HandoffRefused when the deadline (time.monotonic()) has passed. Call it before each piece of work."""
    if time.monotonic() >= deadline:
        raise HandoffRefused(RefusalReason.TRANSFER_TIMEOUT, "the transfer did not end in transfer.timeout_s")


def failed(detail: str) -> HandoffRefused:
    """The error of a transfer that can't be done."""
    return HandoffRefused(RefusalReason.TRANSFER_FAILED, detail)


def _check_digests(handoff: KVHandoff, wanted: Sequence[int], into: PoolMemory, blocks: Sequence[int], deadline: float) -> None:
    for position, block in zip(wanted, blocks, strict=True):
        check_time(deadline)
        if block_digest(into.blocks[block]) != handoff.digests[position]:
            raise HandoffRefused(RefusalReason.DIGEST_MISMATCH, f"block {position} of {handoff.source} arrived damaged")
