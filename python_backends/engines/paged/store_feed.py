"""Which blocks of a worker's pool go to the stores, and when.

`publish`: each full block, as soon as it is findable. `evict`: blocks that are next to be evicted, as long as fewer than an
eighth of the pool is either free or stored, so that evicting does not have to wait for a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from python_backends.core.types import BlockHash
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer
from python_backends.kv.store.stores import Stores

_RESERVE = 8  # evict: one in so many blocks is to be free or stored
_MOST_AT_ONCE = 64


class StoreFeed:
    """Belongs to the engine's thread."""

    def __init__(
        self,
        stores: Stores,
        pool: BlockPool,
        memory: PoolMemory,
        export: Callable[[Sequence[int]], None],
        digest_of: Callable[[int], bytes | None],
        *,
        early: bool,
    ) -> None:
        """`export` makes the pool memory hold the blocks' KV. digest_of: xxh3_128 of a block where it is known.

        `early`: store at publishing, else near eviction.
        """
        self._stores = stores
        self._pool = pool
        self._memory = memory
        self._export = export
        self._digest_of = digest_of
        self._early = early
        self._offered: set[BlockHash] = set()  # near eviction

    def changed(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
        """After each step: these hashes became findable in the pool, or are no more."""
        if self._early:
            found = [(hash_, self._pool.find(hash_)) for hash_ in stored]
            self._offer([(hash_, block) for hash_, block in found if block is not None])
        else:
            self._offered.difference_update(removed)
            self._offer_oldest()

    def reused(self, hashes: Sequence[BlockHash]) -> None:
        """A prefix hit in the pool: the stores should know that these blocks are worth keeping."""
        if hashes:
            self._stores.touch(hashes)

    def _offer_oldest(self) -> None:
        wanted = self._pool.total_blocks // _RESERVE - self._pool.free_blocks
        if wanted > 0:
            oldest = [pair for pair in self._pool.next_evicted(wanted) if pair[0] not in self._offered][:_MOST_AT_ONCE]
            self._offered.update(hash_ for hash_, _ in oldest)
            self._offer(oldest)

    def _offer(self, blocks: Sequence[tuple[BlockHash, int]]) -> None:
        if blocks:
            self._export([block for _, block in blocks])
            generations = self._memory.generations
            self._stores.offer(
                [Offer(hash_, block, int(generations[block]), self._digest_of(block)) for hash_, block in blocks]
            )
