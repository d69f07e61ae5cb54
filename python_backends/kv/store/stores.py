"""All store tiers of one worker, the fastest first: write-behind into them, and reading from them when that pays.

The engine's thread only puts things into queues here. Each tier has a thread that writes: it copies a block from the pool
some time after it was offered, and the block's generation tells whether it was still the same. So no block is held for
the stores, a slow tier delays nobody, and what comes too late is simply not stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from python_backends.core.types import BlockHash, StoreCounts
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer, StoreTier
from python_backends.kv.store.node import NodeStore
from python_backends.kv.store.pace import Pace
from python_backends.kv.transfer.base import block_digest

log = logging.getLogger(__name__)

_BATCH = 64  # blocks handed to a tier at once
_PREFETCH_BYTES = 16 << 20  # read at once
_FLUSH_S = 1.0  # given to what waits to be written when the worker ends in order


@dataclass(slots=True)
class Loaded:
    """What one `load` has brought."""

    blocks: int = 0
    of_tier: dict[str, int] = field(default_factory=dict)  # blocks by the tier's name
    seconds: float = 0.0


class Stores:
    def __init__(
        self, tiers: Sequence[StoreTier], memory: PoolMemory, block_size: int, queue_blocks: int, compute: Pace
    ) -> None:
        """`memory` is the worker's pool, its blocks hold `block_size` tokens; `compute` is its pace in prompt tokens.

        The tiers are closed with the stores.
        """
        self._tiers = list(tiers)
        self._memory = memory
        self._block_size = block_size
        self._writers = {tier.name: _Writer(tier, memory, queue_blocks) for tier in self._tiers}
        self._paces = {tier.name: Pace() for tier in self._tiers}
        self._compute = compute

    @property
    def node_place(self) -> str:
        """Where users of the node store meet; empty without one."""
        return next((str(tier.place) for tier in self._tiers if isinstance(tier, NodeStore)), "")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tier.name for tier in self._tiers)

    # --- on the engine's thread; nothing here waits ---

    def offer(self, offers: Sequence[Offer]) -> None:
        """These blocks are full and findable: store them, as far as there is time."""
        for writer in self._writers.values():
            writer.offer(offers)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """These were found in the pool itself."""
        for writer in self._writers.values():
            writer.touch(hashes)

    @property
    def can_prefetch(self) -> bool:
        """Whether there is a tier to bring blocks from and a nearer one to bring them to."""
        return len(self._tiers) > 1

    # --- on reading threads ---

    def load(self, hashes: Sequence[BlockHash], blocks: Sequence[int], deadline: float) -> Loaded:
        """Bring the leading blocks of `hashes` into the pool's `blocks`, verified, as far as it beats computing them.

        `deadline` is in time.monotonic() seconds. When it has returned, nobody writes into the pool any more.
        """
        loaded = Loaded()
        began = time.monotonic()
        lacking = dict.fromkeys(self.names, -1)  # tier -> the position it was last asked for in vain
        while loaded.blocks < len(hashes):
            tier = next((t for t in self._tiers if lacking[t.name] < loaded.blocks), None)
            if tier is None:
                break
            at = loaded.blocks
            lacking[tier.name] = at
            if self._pays(tier, len(hashes) - at):
                count = self._read(tier, hashes[at:], blocks[at:], deadline)
                loaded.blocks += count
                loaded.of_tier[tier.name] = loaded.of_tier.get(tier.name, 0) + count
                lacking[tier.name] = loaded.blocks
        loaded.seconds = time.monotonic() - began
        return loaded

    def locate(self, hashes: Sequence[BlockHash], deadline: float) -> int:
        """How many leading blocks the tiers have between them, and could bring faster than they are computed."""
        found = 0
        for _ in range(len(self._tiers)):
            for tier in self._tiers:
                if found < len(hashes) and self._pays(tier, len(hashes) - found):
                    found += tier.count(hashes[found:], deadline)
        return found

    def prefetch(self, hashes: Sequence[BlockHash], deadline: float) -> None:
        """Bring blocks nearer that will be wanted soon: from the slower tiers into the fastest."""
        nearest, *farther = self._tiers
        done = nearest.count(hashes, deadline)
        step = max(1, _PREFETCH_BYTES // self._memory.block_bytes)
        room = np.empty((step, self._memory.block_bytes), np.uint8)
        while done < len(hashes) and time.monotonic() < deadline:
            some = hashes[done : done + step]
            count = max((tier.read(some, room, range(step), deadline) for tier in farther), default=0)
            if count == 0:
                return
            nearest.put(some[:count], list(room[:count]), [block_digest(block) for block in room[:count]])
            done += count

    def counts(self) -> dict[str, StoreCounts]:
        return {tier.name: _with_dropped(tier.counts(), self._writers[tier.name].dropped) for tier in self._tiers}

    def close(self) -> None:
        """Write what waits, for a second at most, then close the tiers. Idempotent."""
        deadline = time.monotonic() + _FLUSH_S
        for writer in self._writers.values():
            writer.close(deadline)
        for tier in self._tiers:
            tier.close()

    def _read(self, tier: StoreTier, hashes: Sequence[BlockHash], blocks: Sequence[int], deadline: float) -> int:
        began = time.monotonic()
        count = tier.read(hashes, self._memory.blocks, blocks, deadline)
        self._paces[tier.name].measure(count * self._memory.block_bytes, time.monotonic() - began)
        if count:
            self._writers[tier.name].touch(hashes[:count])
        return count

    def _pays(self, tier: StoreTier, blocks: int) -> bool:
        """Whether fetching beats computing."""
        return self._paces[tier.name].beats(blocks * self._memory.block_bytes, self._compute, blocks * self._block_size)


def _with_dropped(counts: StoreCounts, dropped: int) -> StoreCounts:
    return msgspec.structs.replace(counts, dropped=counts.dropped + dropped)


class _Writer:
    """The bounded queue in front of one tier, and the thread behind it."""

    def __init__(self, tier: StoreTier, memory: PoolMemory, queue_blocks: int) -> None:
        self._tier = tier
        self._memory = memory
        self._most = queue_blocks
        self._news = threading.Condition()
        self._offers: OrderedDict[BlockHash, Offer] = OrderedDict()
        self._touched: OrderedDict[BlockHash, None] = OrderedDict()
        self._ends_at: float | None = None  # monotonic, s; set by close
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"store-{tier.name}", daemon=True)
        self._thread.start()

    def offer(self, offers: Sequence[Offer]) -> None:
        with self._news:
            for offer in offers:
                self._offers[offer.hash] = offer
            while len(self._offers) > self._most:
                self._offers.popitem(last=False)  # the oldest is the likeliest to be reused before its turn
                self.dropped += 1
            self._news.notify()

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        with self._news:
            self._touched.update(dict.fromkeys(hashes))
            while len(self._touched) > self._most:
                self._touched.popitem(last=False)
            self._news.notify()

    def close(self, deadline: float) -> None:
        with self._news:
            self._ends_at = deadline
            self._news.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()) + 1.0)

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._offers and not self._touched and self._ends_at is None:
                    self._news.wait()
                offers = [self._offers.popitem(last=False)[1] for _ in range(min(_BATCH, len(self._offers)))]
                touched, self._touched = list(self._touched), OrderedDict()
                over = self._ends_at is not None and (not offers or time.monotonic() > self._ends_at)
            if over:
                return
            try:
                if touched:
                    self._tier.touch(touched)
                if offers:
                    self._tier.write(offers, self._memory)
            except Exception:  # a tier with a bug costs these blocks, not all that follow
                log.exception("writing to the %s store failed", self._tier.name)
