"""The KV cache: paged blocks, a reuse tree, and the events that tell about it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Emit = Callable[[dict[str, Any]], None]


class KvPool:
    """A block is free, used (referenced), cached (in the tree, evictable) or leaked. Its KV: tokens and positions."""

    def __init__(self, num_blocks: int, tokens_per_block: int, reuse: bool, emit: Emit) -> None:
        self.size = tokens_per_block
        self.total = num_blocks
        self.kv = np.zeros((num_blocks, 2, tokens_per_block), np.uint32)
        self.leaked = 0
        self._reuse = reuse
        self._emit = emit
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references: dict[int, int] = {}
        self._block_of: dict[int, int] = {}  # tree: hash -> block
        self._hash_of: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # evictable, least recently used first
        emit({"type": "created", "num_blocks_per_cache_level": [num_blocks, 0]})

    @property
    def used(self) -> int:
        return len(self._references) + self.leaked

    @property
    def cached(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.size)

    def can_take(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= len(self._free) + len(self._cached)

    def take(self, tokens: Sequence[int], num_tokens: int, salt: str | None, match: bool) -> tuple[list[int], int]:
        """Blocks for `num_tokens`, and how many leading ones were found in the tree (never the last token's)."""
        hashes = self._hashes(tokens[: (len(tokens) - 1) // self.size * self.size], salt) if match and self._reuse else []
        blocks: list[int] = []
        for hash_ in hashes:
            if hash_ not in self._block_of:
                break
            blocks.append(self._block_of[hash_])
        for block in blocks:
            self._refer(block)
        reused = len(blocks)
        while len(blocks) < self.blocks_for(num_tokens):
            block = self._free.pop() if self._free else self._evict()
            self._refer(block)
            blocks.append(block)
        return blocks, reused

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def leak(self, blocks: Sequence[int]) -> None:
        """Nobody owns them any more, and nobody gets them back."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                self.leaked += 1

    def store(self, tokens: Sequence[int], blocks: Sequence[int], salt: str | None) -> None:
        """Make full blocks findable."""
        if not self._reuse:
            return
        stored: list[dict[str, Any]] = []
        first_parent: int | None = None
        parent: int | None = None
        for index, hash_ in enumerate(self._hashes(tokens[: len(tokens) // self.size * self.size], salt)):
            if hash_ not in self._block_of and blocks[index] not in self._hash_of:
                self._block_of[hash_] = blocks[index]
                self._hash_of[blocks[index]] = hash_
                if not stored:
                    first_parent = parent
                stored.append(_stored_block(hash_, tokens[index * self.size : (index + 1) * self.size]))
            parent = hash_
        if stored:
            self._emit({"type": "stored", "parent_hash": first_parent, "blocks": stored})

    def tell_partial(self, tokens: Sequence[int], salt: str | None) -> None:
        """The last block, not full, is stored, too; here it goes at once, since nothing but full blocks is matched."""
        start = len(tokens) // self.size * self.size
        if not self._reuse or start == len(tokens):
            return
        *parents, hash_ = self._hashes(tokens, salt)
        parent = parents[-1] if parents else None
        self._emit({"type": "stored", "parent_hash": parent, "blocks": [_stored_block(hash_, tokens[start:])]})
        self._emit({"type": "removed", "block_hashes": [hash_]})

    def update(self) -> None:
        """A block moves to the host's memory and back: it is no less there."""
        for hash_ in list(self._block_of)[:1]:
            level = {"type": "event_diff", "old_value": 0, "new_value": 1}
            self._emit({"type": "updated", "block_hash": hash_, "cache_level": level})

    def write(self, blocks: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        positions = np.arange(start, start + len(tokens))
        table = np.asarray(blocks)[positions // self.size]
        self.kv[table, 0, positions % self.size] = np.asarray(tokens, np.uint32)
        self.kv[table, 1, positions % self.size] = positions

    def read(self, blocks: Sequence[int], num_tokens: int) -> npt.NDArray[np.uint32]:
        """uint32 [2, num_tokens]: tokens and positions as they stand in the cache."""
        seen = self.kv[np.asarray(blocks[: self.blocks_for(num_tokens)])].transpose(1, 0, 2).reshape(2, -1)
        return np.ascontiguousarray(seen[:, :num_tokens])

    def _hashes(self, tokens: Sequence[int], salt: str | None) -> list[int]:
        hashes: list[int] = []
        parent = salt or ""
        for start in range(0, len(tokens), self.size):
            text = f"{parent}/{list(tokens[start : start + self.size])}"
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))
            parent = str(hashes[-1])
        return hashes

    def _refer(self, block: int) -> None:
        self._cached.pop(block, None)
        self._references[block] = self._references.get(block, 0) + 1

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        hash_ = self._hash_of.pop(block)
        del self._block_of[hash_]
        self._emit({"type": "removed", "block_hashes": [hash_]})
        return block


def _stored_block(hash_: int, tokens: Sequence[int]) -> dict[str, Any]:
    return {
        "type": "stored_block",
        "block_hash": hash_,
        "cache_level": 0,
        "priority": 35,
        "tokens": [{"type": "unique_token", "token_id": int(token), "token_extra_id": 0} for token in tokens],
    }
