"""How KV moves between pools: the contract of a transport, and the one check that all transports share.

Copying and believing are two steps. A transport's `copy` brings bytes into the destination and says whether the source
still meant them; `fetch` digests what actually arrived, in place. So no transport, however broken, can hand over KV that
differs from what was published.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.types import Role
from python_backends.kv.memory import PoolMemory


class Published(msgspec.Struct, frozen=True):
    """What a transport puts into the ticket so that its other end finds the bytes."""

    locator: str = ""
    opaque: bytes = b""


class Fetched(msgspec.Struct, frozen=True):
    """How a handoff was fetched."""

    transport: str  # the one that moved the bytes
    why: str = ""  # it was taken, where there was a choice
    codec: str = "raw"  # raw | lossless | float16 | int8: how the bytes travelled
    wire_bytes: int = 0  # that travelled
    rounded: str = ""  # the dtype that numbers were rounded to on the way; empty: they are what was published, bit for bit


_CHECKED_AT_ONCE = 16  # blocks digested between two looks at the clock


class Arrived(Protocol):
    """Told by `copy` of indices into `wanted` whose bytes are complete: they are digested at once, while the processor has
    them in its cache. Whatever was not told is digested at the end.
    """

    def __call__(self, indices: Sequence[int], *, rounded: bool = False) -> None:
        """`rounded`: they are not what was published but what the source has made of it for the way, with a seal of its own
        (codec.py) that `copy` has checked.
        """


class KVTransport(Protocol):
    """Moves blocks from a source's pool into this worker's pool. `name` is what the ticket calls it.

    on_device: between the memories of GPUs. Then what pool memories hold does not matter, neither before nor after.
    """

    name: str
    on_device: bool

    def attach(self, memory: PoolMemory, role: Role) -> None:
        """This worker's pool and what the worker does with it; once, before anything else, so that the first handoff does
        not wait for what can be made ready now. Raises ConfigError.
        """

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """Make the blocks fetchable by whoever has the ticket. The caller holds them until the lease ends.

        May be called again for the same lease, with further blocks: so finished chunks can be published before the rest
        is computed. What the last call returns is good for all of them.
        """

    def release(self, lease_id: str) -> None:
        """The lease has ended: nothing of it is handed out any more. A copy on its way may get other bytes from now on."""

    def digests(self, memory: PoolMemory, blocks: Sequence[int]) -> list[bytes]:
        """What the ticket says of these blocks of this worker's pool, so that the other end knows them again."""

    def fetch(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        *,
        exact: bool = True,
    ) -> Fetched:
        """Copy the handoff's blocks at the positions `wanted` into `into.blocks[blocks[i]]`, verified.

        Not `exact`: numbers may be rounded on the way, as far as `transfer.rounding` of both ends allows; Fetched.rounded
        tells. `deadline` is in time.monotonic() seconds; returns or raises by then (and 50 ms). May be called from several
        threads. When it has returned, nobody writes into `into` any more; after an error the destination blocks hold
        anything. Raises HandoffRefused: STALE_EPOCH (the source has restarted or reused a block), EXPIRED (its lease
        has ended), DIGEST_MISMATCH, TRANSFER_FAILED or TRANSFER_TIMEOUT.
        """

    def close(self) -> None:
        """Give up mappings and connections, and wake who waits. Idempotent."""


class CheckedTransport(ABC):
    """A KVTransport whose `fetch` is its own `copy` and the shared digest check."""

    name: str
    on_device = False

    def attach(self, memory: PoolMemory, role: Role) -> None:
        """See KVTransport.attach."""
        return

    def digests(self, memory: PoolMemory, blocks: Sequence[int]) -> list[bytes]:
        """See KVTransport.digests."""
        return [block_digest(memory.blocks[block]) for block in blocks]

    @abstractmethod
    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published: ...

    @abstractmethod
    def release(self, lease_id: str) -> None: ...

    @abstractmethod
    def copy(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        arrived: Arrived,
        *,
        exact: bool,
    ) -> Fetched | None:
        """Copy as `fetch` does, and check that the source still meant the bytes *after* they were copied.

        Returns how, if that is not just by this transport and as the bytes are.
        """

    @abstractmethod
    def close(self) -> None: ...

    def fetch(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        *,
        exact: bool = True,
    ) -> Fetched:
        """See KVTransport.fetch."""
        if handoff.transport != self.name:
            raise failed(f"the ticket is for transport {handoff.transport!r}, this worker has {self.name!r}")
        if handoff.layout.block_bytes != into.block_bytes:
            raise failed(f"blocks of {handoff.layout.block_bytes} bytes do not fit a pool of {into.block_bytes}")
        check = _DigestCheck(handoff, wanted, blocks, lambda some: self.digests(into, some), exact=exact)
        how = self.copy(handoff, wanted, into, blocks, deadline, check.arrived, exact=exact)
        check.finish(deadline)
        return how or Fetched(self.name, wire_bytes=len(wanted) * into.block_bytes)


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


class _DigestCheck:
    """The digests of one fetch. A mismatch is reported at the end: that the source has reused the block says more."""

    def __init__(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        blocks: Sequence[int],
        digests: Callable[[Sequence[int]], list[bytes]],
        *,
        exact: bool,
    ) -> None:
        """`digests` of blocks as they arrived. exact: what is said to be rounded must be what was published, too."""
        self._exact = exact
        self._handoff = handoff
        self._wanted = wanted
        self._blocks = blocks
        self._digests = digests
        self._unchecked = set(range(len(wanted)))
        self._damaged: list[int] = []  # positions in the handoff

    def arrived(self, indices: Sequence[int], *, rounded: bool = False) -> None:
        """See Arrived. May be called from several threads, for different indices."""
        compared = [] if rounded and not self._exact else indices
        digests = self._digests([self._blocks[index] for index in compared])
        for index, digest in zip(compared, digests, strict=True):
            if digest != self._handoff.digests[self._wanted[index]]:
                self._damaged.append(self._wanted[index])
        self._unchecked.difference_update(indices)

    def finish(self, deadline: float) -> None:
        left = sorted(self._unchecked)
        for start in range(0, len(left), _CHECKED_AT_ONCE):
            check_time(deadline)
            self.arrived(left[start : start + _CHECKED_AT_ONCE])
        if self._damaged:
            detail = f"block {self._damaged[0]} of {self._handoff.source} arrived damaged"
            raise HandoffRefused(RefusalReason.DIGEST_MISMATCH, detail)
