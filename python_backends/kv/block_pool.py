"""Blocks of one worker's KV pool: who may write them, who reads them, and which prefixes can be found again.

A block is in exactly one of three places, and every method is a move between them:

    free --allocate--> held --release--> cached (it has a hash: findable, evictable) or free (it has none)
    cached --reuse--> held        cached --allocate (evict)--> held        cached --forget--> free

A held block may have a hash, too: then it is findable while requests or leases still use it. One thread owns the pool;
there are no locks. Bytes are not touched here: kv/memory.py has them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from python_backends.core.types import BlockHash


class PoolExhausted(Exception):
    """Free and evictable blocks together are too few. Nothing was allocated; try again after a release."""


class PoolMisuse(AssertionError):
    """The caller broke the rules of references: a bug in this program, never a request's fault. Nothing was changed."""


class BlockPool:
    """References, hashes and the eviction order of `num_blocks` blocks, numbered from 0."""

    def __init__(self, num_blocks: int, generations: npt.NDArray[np.uint64]) -> None:
        """`generations`, uint64 [num_blocks], is the pool memory's: a block's number grows each time it is given out
        to be written anew, so that a reader who copied an older life of the block notices.
        """
        self._generations = generations
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references: dict[int, int] = {}  # held blocks, count >= 1
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._changes: dict[BlockHash, bool] = {}  # since take_changes: True stored, False removed
        self.total_blocks = num_blocks

    # --- what is where ---

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def held_blocks(self) -> int:
        return len(self._references)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed now. Reuse what is to be reused first: it is evictable until then."""
        return count <= len(self._free) + len(self._cached)

    # --- references ---

    def allocate(self, count: int) -> list[int]:
        """Blocks to be written anew, one reference each; evicts cached ones as needed.

        Raises PoolExhausted: all or nothing.
        """
        if not self.can_allocate(count):
            raise PoolExhausted(f"{count} blocks wanted, {self.free_blocks} free and {self.cached_blocks} cached")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._generations[block] += np.uint64(1)
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference on each. Raises PoolMisuse when a block isn't held."""
        self._require_references(blocks, "retained")
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each, `blocks` in prompt order. Raises PoolMisuse for a reference that isn't there.

        At zero a findable block is cached as most recently used - the deepest of a prompt before its parents, since a
        block is worthless without them - and any other block is free.
        """
        self._require_references(blocks, "released")
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    # --- the prefix cache ---

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes are findable here."""
        for count, hash_ in enumerate(hashes):
            if hash_ not in self._block_of:
                return count
        return len(hashes)

    def find(self, hash: BlockHash) -> int | None:
        """The block that is found by this hash."""
        return self._block_of.get(hash)

    def next_evicted(self, count: int) -> list[tuple[BlockHash, int]]:
        """Hash and block of the cached blocks that would be evicted first, in that order."""
        return [(self._hash_of[block], block) for block in islice(self._cached, count)]

    def reuse(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of these hashes, with one more reference each. Raises PoolMisuse unless all are findable."""
        if self.match(hashes) < len(hashes):
            raise PoolMisuse("a hash to be reused is not cached; call match first")
        blocks = [self._block_of[hash_] for hash_ in hashes]
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1
        return blocks

    def publish(self, block: int, hash: BlockHash) -> None:
        """Make a held, full block findable. If another block already is found by this hash, this one stays private.

        Raises PoolMisuse when the block isn't held or has another hash.
        """
        self._require_references([block], "published")
        if self._hash_of.get(block, hash) != hash:
            raise PoolMisuse(f"block {block} already has another hash")
        if hash not in self._block_of:
            self._hash_of[block] = hash
            self._block_of[hash] = block
            self._note(hash, stored=True)

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """Let nobody find these any more, for instance because their KV is corrupt. Unknown hashes are ignored."""
        for hash_ in hashes:
            block = self._block_of.get(hash_)
            if block is None:
                continue
            self._unpublish(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def hashes(self) -> list[BlockHash]:
        """All findable hashes."""
        return list(self._block_of)

    def take_changes(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """(stored, removed) since the last call; what was undone in between is in neither."""
        changes, self._changes = self._changes, {}
        return [h for h, stored in changes.items() if stored], [h for h, stored in changes.items() if not stored]

    # --- digests of findable blocks, so that a hot prefix is digested once and not once per handoff ---

    def digest_of(self, block: int) -> bytes | None:
        """The digest that `set_digest` gave for the block's present content."""
        return self._digest_of.get(block)

    def set_digest(self, block: int, digest: bytes) -> None:
        """Keep the digest as long as the block is findable. Ignored for a block that isn't: it may still be written."""
        if block in self._hash_of:
            self._digest_of[block] = digest

    def check(self) -> None:
        """Assert every invariant. O(blocks), for tests."""
        places = [*self._free, *self._cached, *self._references]
        assert sorted(places) == list(range(self.total_blocks)), "a block is nowhere or in two places"
        assert all(count >= 1 for count in self._references.values()), "a held block has no reference"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hashes and blocks are not each other's inverse"
        assert len(self._hash_of) == len(self._block_of), "two blocks are found by one hash"
        assert self._cached.keys() <= self._hash_of.keys(), "a cached block can't be found"
        assert self._hash_of.keys().isdisjoint(self._free), "a free block can be found"
        assert self._digest_of.keys() <= self._hash_of.keys(), "a digest outlived its block"

    # --- steps of the moves above ---

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unpublish(block)
        return block

    def _unpublish(self, block: int) -> None:
        hash_ = self._hash_of.pop(block)
        del self._block_of[hash_]
        self._digest_of.pop(block, None)
        self._note(hash_, stored=False)

    def _note(self, hash_: BlockHash, *, stored: bool) -> None:
        if self._changes.pop(hash_, stored) == stored:
            self._changes[hash_] = stored

    def _require_references(self, blocks: Sequence[int], action: str) -> None:
        for block, wanted in Counter(blocks).items():
            if self._references.get(block, 0) < wanted:
                raise PoolMisuse(f"block {block} is {action} {wanted}x with {self._references.get(block, 0)} references")
