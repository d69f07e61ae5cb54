"""Blocks whose bytes follow from their hash, in pools to read from and write to: for tests of stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from python_backends.core.types import BlockHash, Epoch
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer
from python_backends.kv.transfer.base import block_digest

BLOCK_BYTES = 4096


def hashes(count: int, seed: int = 0) -> list[BlockHash]:
    """Names of blocks; no two seeds share one."""
    return [BlockHash(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=16).digest()) for i in range(count)]


def content(hash_: bytes, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(int.from_bytes(hash_, "big")).integers(0, 256, block_bytes, np.uint8)


class Pool:
    """A worker's pool: `offer` writes blocks into it one after the other, round and round."""

    def __init__(self, num_blocks: int = 256, block_bytes: int = BLOCK_BYTES) -> None:
        self.memory = PoolMemory(num_blocks, block_bytes, Epoch(1))
        self._next = 0

    def offer(self, names: Sequence[BlockHash], *, digests: bool = True) -> list[Offer]:
        offers = []
        for name in names:
            block = self._next % self.memory.num_blocks
            self._next += 1
            self.memory.generations[block] += np.uint64(1)
            self.memory.blocks[block] = content(name, self.memory.block_bytes)
            digest = block_digest(self.memory.blocks[block]) if digests else None
            offers.append(Offer(name, block, int(self.memory.generations[block]), digest))
        return offers

    def holds(self, names: Sequence[BlockHash], blocks: Sequence[int]) -> bool:
        """Whether the blocks hold what the names say."""
        return all(
            np.array_equal(self.memory.blocks[block], content(name, self.memory.block_bytes))
            for name, block in zip(names, blocks, strict=True)
        )

    def close(self) -> None:
        self.memory.close()
