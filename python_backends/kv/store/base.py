"""The contract of a store tier: a place outside the engines that remembers full blocks by their hash.

A tier may forget anything at any time, and be slow, full, broken or gone: its methods never raise for that. Whoever reads
gets blocks that are verified, or fewer of them. So a store can cost hits, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from python_backends.core.types import BlockHash, StoreCounts
from python_backends.kv.memory import PoolMemory


@dataclass(frozen=True, slots=True)
class Offer:
    """A full block of a worker's pool as it is offered to the tiers. Nobody holds the block for them: its generation,
    looked at after the bytes were copied, says whether they were still those of `hash`.
    """

    hash: BlockHash
    block: int
    generation: int
    digest: bytes | None  # xxh3_128 of its bytes, where it is known already


class StoreTier(Protocol):
    """All methods but `close` may be called from several threads. `name` is what the proof calls the tier.

    Deadlines are in time.monotonic() seconds; a method returns by then (and 50 ms) with what it has.
    """

    name: str

    def count(self, hashes: Sequence[BlockHash], deadline: float) -> int:
        """How many leading hashes seem to be here now."""

    def read(self, hashes: Sequence[BlockHash], into: npt.NDArray[np.uint8], blocks: Sequence[int], deadline: float) -> int:
        """Copy leading blocks into `into[blocks[i]]`, uint8 [any, block_bytes], and verify them; returns how many.

        When it has returned, nobody writes into `into` any more; destinations behind the returned count hold anything.
        """

    def write(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        """Store what is not here yet. `memory` is the pool that the offers are from."""

    def put(self, hashes: Sequence[BlockHash], data: Sequence[npt.NDArray[np.uint8]], digests: Sequence[bytes]) -> None:
        """Store blocks that another tier had; each of `data` is one block's bytes, which don't change."""

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """These were used, even though not read from here: keep them longer."""

    def counts(self) -> StoreCounts: ...

    def close(self) -> None:
        """Give up memory and connections. Idempotent."""
