"""TensorRT-LLM's events of its prefix cache, told in our block hashes.

Its own hashes mean nothing outside. The events carry token ids, so blocks are hashed again here, chain by chain, from
the fingerprint and the tenant's salt. The salt is not in the events (up to 1.2 nobody can tell salted blocks apart):

- A chain's salt is found by its first block: the requests this worker was given tell under which salts it was asked for.
- One salt only: the chain is told under that salt's hashes. None or several (tenants that share a first block, such as a
  system prompt): it is not told at all. The router then routes these prompts by load; nothing is ever told under
  another tenant's hashes.

Only full blocks count. With several attention windows only the largest one's blocks do. A gap in event ids means that
events were lost, removals perhaps: nothing is told any more of what was known. TensorRT-LLM never stores again what it has,
so such a block is told again when a request has found it in the cache, or when another block is stored behind it.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from python_backends.core.block_hash import block_hash, block_hashes
from python_backends.core.types import BlockHash
from python_backends.engines.base import CacheChange

log = logging.getLogger(__name__)

_REMEMBERED_CHAINS = 50_000
_REMEMBERED_DOUBTS = 200_000
_NO_SALT = BlockHash(bytes(16))  # parent of a first block where only its tokens matter


class _Token(msgspec.Struct):
    token_id: int
    token_extra_id: int = 0


class _Block(msgspec.Struct):
    block_hash: int
    tokens: list[_Token]


class _Created(msgspec.Struct, tag_field="type", tag="created"):
    pass


class _Stored(msgspec.Struct, tag_field="type", tag="stored"):
    blocks: list[_Block]
    parent_hash: int | None = None


class _Removed(msgspec.Struct, tag_field="type", tag="removed"):
    block_hashes: list[int]


class _Updated(msgspec.Struct, tag_field="type", tag="updated"):
    """Moved between GPU and host: a hit all the same."""


class _Event(msgspec.Struct):
    event_id: int
    data: _Created | _Stored | _Removed | _Updated
    window_size: int | None = None
    attention_dp_rank: int | None = None


class BlockEvents:
    """Belongs to the engine's loop."""

    def __init__(self, block_size: int, root_of: Callable[[str], BlockHash]) -> None:
        """`root_of`: salt -> parent of a chain's first block."""
        self._block_size = block_size
        self._root_of = root_of
        self._salts: OrderedDict[BlockHash, str | None] = OrderedDict()  # first block, by tokens alone -> the one salt
        self._ours: dict[tuple[int, int], BlockHash] = {}  # (rank, TensorRT-LLM's hash) -> ours
        self._holders: Counter[BlockHash] = Counter()  # how many of TensorRT-LLM's blocks are this one of ours
        self._doubted: dict[tuple[int, int], BlockHash] = {}  # like _ours, of before events were lost
        self._doubted_as: dict[BlockHash, list[tuple[int, int]]] = {}  # the other way round; some are gone from _doubted
        self._last_id: dict[int, int] = {}  # rank -> event id
        self._window = 0
        self._changes: dict[BlockHash, bool] = {}  # since take_change: True stored, False removed
        self._reset = False
        self.heard = False  # any event at all
        self.gaps = 0

    def expect(self, token_ids: Sequence[int], salt: str) -> None:
        """A request with these tokens is being computed here: its blocks will be told of."""
        if len(token_ids) < self._block_size:
            return
        first = block_hash(_NO_SALT, token_ids[: self._block_size])
        self._salts[first] = salt if self._salts.get(first, salt) == salt else None  # None: several
        self._salts.move_to_end(first)
        if len(self._salts) > _REMEMBERED_CHAINS:
            self._salts.popitem(last=False)

    def found(self, token_ids: Sequence[int], salt: str) -> None:
        """A request has found the KV of these leading tokens in the cache: doubts about it are over."""
        if self._doubted:
            for hash_ in block_hashes(token_ids, self._block_size, self._root_of(salt)):
                for key in self._doubted_as.pop(hash_, []):
                    self._trust(key)

    def take(self, raw: dict[str, Any]) -> None:
        """One event as get_kv_cache_events_async gives it. What it doesn't understand counts as lost."""
        self.heard = True
        try:
            event = msgspec.convert(raw, _Event)
        except msgspec.ValidationError as error:
            log.warning("a KV cache event is not understood (%s); forgetting what was told", error)
            self._forget()
            return
        rank = event.attention_dp_rank or 0
        last = self._last_id.get(rank)
        self._last_id[rank] = event.event_id
        if last is not None and event.event_id != last + 1:
            log.warning("KV cache events %d to %d are lost; forgetting what was told", last + 1, event.event_id - 1)
            self._forget()
        if isinstance(event.data, _Created):
            self._window = max(self._window, event.window_size or 0)
        if event.window_size is not None and event.window_size < self._window:
            return
        if isinstance(event.data, _Stored):
            self._store(rank, event.data)
        elif isinstance(event.data, _Removed):
            for hash_ in event.data.block_hashes:
                self._remove(rank, hash_)

    def take_change(self) -> CacheChange | None:
        """What is new since the last call."""
        if self._reset:
            return self.everything()
        changes, self._changes = self._changes, {}
        if not changes:
            return None
        return CacheChange(
            stored=[hash_ for hash_, stored in changes.items() if stored],
            removed=[hash_ for hash_, stored in changes.items() if not stored],
        )

    def everything(self) -> CacheChange:
        """All that is known, to replace all that was told."""
        self._reset = False
        self._changes = {}
        return CacheChange(stored=list(self._holders), removed=[], reset=True)

    def _store(self, rank: int, stored: _Stored) -> None:
        parent = self._parent(rank, stored)
        if parent is None:
            return
        for block in stored.blocks:
            partial = len(block.tokens) != self._block_size
            if partial or any(token.token_extra_id for token in block.tokens):
                return  # neither it nor what follows can be asked for by token ids
            parent = block_hash(parent, [token.token_id for token in block.tokens])
            self._remove(rank, block.block_hash)
            self._add((rank, block.block_hash), parent)

    def _parent(self, rank: int, stored: _Stored) -> BlockHash | None:
        if stored.parent_hash is not None:
            self._trust((rank, stored.parent_hash))
            return self._ours.get((rank, stored.parent_hash))
        tokens = [token.token_id for token in stored.blocks[0].tokens] if stored.blocks else []
        salt = self._salts.get(block_hash(_NO_SALT, tokens))
        return self._root_of(salt) if salt is not None else None

    def _add(self, key: tuple[int, int], ours: BlockHash) -> None:
        self._ours[key] = ours
        self._holders[ours] += 1
        if self._holders[ours] == 1:
            self._note(ours, stored=True)

    def _trust(self, key: tuple[int, int]) -> None:
        ours = self._doubted.pop(key, None)
        if ours is not None:
            self._add(key, ours)

    def _remove(self, rank: int, hash_: int) -> None:
        self._doubted.pop((rank, hash_), None)
        ours = self._ours.pop((rank, hash_), None)
        if ours is None:
            return
        self._holders[ours] -= 1
        if not self._holders[ours]:
            del self._holders[ours]
            self._note(ours, stored=False)

    def _note(self, hash_: BlockHash, *, stored: bool) -> None:
        if self._changes.pop(hash_, stored) == stored:
            self._changes[hash_] = stored

    def _forget(self) -> None:
        self.gaps += 1
        doubted = [*self._doubted.items(), *self._ours.items()][-_REMEMBERED_DOUBTS:]
        self._doubted, self._doubted_as = dict(doubted), {}
        for key, ours in doubted:
            self._doubted_as.setdefault(ours, []).append(key)
        self._ours.clear()
        self._holders.clear()
        self._changes = {}
        self._reset = True
