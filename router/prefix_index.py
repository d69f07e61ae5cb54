"""Belief about which worker has which KV blocks, fed by the workers' events.

The index may be wrong - an event may be on its way - and that is never unsafe: whoever is believed to have a block looks
into its own cache before using it. A gap in a worker's sequence numbers empties its part and asks for a resync.

The holders of a block are one integer with a bit per worker. Who has a block is taken to have those before it, too: caches
give up the end of a prompt before its beginning. So a few blocks of a prompt tell of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from heapq import heappop, heappush

from python_backends.core.messages import BlockEvents
from python_backends.core.types import BlockHash, WorkerId


class Match:
    """Leading prompt tokens that workers are believed to have; a snapshot."""

    def __init__(self, levels: Sequence[tuple[int, int]], bits: dict[WorkerId, int], names: Sequence[WorkerId]) -> None:
        """levels: (tokens, holders of just so many) with the most tokens first."""
        self._levels = levels
        self._bits = bits
        self._names = names

    def get(self, worker: WorkerId) -> int:
        bit = self._bits.get(worker)
        if bit is not None:
            for tokens, holders in self._levels:
                if holders >> bit & 1:
                    return tokens
        return 0

    def deepest(self, among: int, count: int) -> list[WorkerId]:
        """Up to `count` of the workers `among` (PrefixIndex.members) that have most, best first."""
        found: list[WorkerId] = []
        for _, holders in self._levels:
            left = holders & among
            while left:
                if len(found) == count:
                    return found
                lowest = left & -left
                found.append(self._names[lowest.bit_length() - 1])
                left ^= lowest
        return found


class PrefixIndex:
    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        # Used as sets. The garbage collector walks through sets, but not through dicts of bytes to nothing.
        self._blocks: dict[WorkerId, dict[bytes, None]] = defaultdict(dict)
        self._sequence: dict[WorkerId, tuple[int, int]] = {}  # epoch, last sequence number seen
        self._bits: dict[WorkerId, int] = {}
        self._names: list[WorkerId] = []
        self._free_bits: list[int] = []  # heap

    def members(self, workers: Collection[WorkerId]) -> int:
        """These workers as `Match.deepest` takes them."""
        return sum(1 << self._bit(worker) for worker in workers)

    def match(self, prompts: Sequence[tuple[int, Sequence[BlockHash]]]) -> Match:
        """How much of a prompt each worker is believed to hold. Read-only.

        prompts: the prompt once per model in the fleet, as (tokens of a block, hashes of its full blocks).
        """
        levels = [level for size, hashes in prompts for level in self._levels(hashes, size)]
        if len(prompts) > 1:
            levels.sort(reverse=True)
        return Match(levels, self._bits, self._names)

    def _levels(self, hashes: Sequence[BlockHash], size: int) -> list[tuple[int, int]]:
        """Bisects for the depths where the holders get fewer: a few lookups, however long the prompt is."""
        get = self._holders.get
        first = get(hashes[0], 0) if hashes else 0
        levels: list[tuple[int, int]] = []
        parts = [(0, first, len(hashes), 0)] if first else []  # from a block with its holders to a later one with fewer
        while parts:
            low, more, high, fewer = parts.pop()
            if high == low + 1:
                levels.append((high * size, more ^ fewer))
                continue
            middle = (low + high) // 2
            between = more & get(hashes[middle], 0)
            fewer &= between
            if between != more:
                parts.append((low, more, middle, between))
            if between != fewer:
                parts.append((middle, between, high, fewer))  # looked at next: the deepest come first
        return levels

    def apply(self, events: BlockEvents) -> bool:
        """Take in events. Returns False when some were missed: the worker must be asked for a resync."""
        worker = events.worker
        known = self._sequence.get(worker)
        if events.reset:
            self.forget(worker)
        elif known != (events.epoch, events.sequence - 1):
            self.forget(worker)
            return False
        self._sequence[worker] = (events.epoch, events.sequence)
        bit = 1 << self._bit(worker)
        blocks, holders = self._blocks[worker], self._holders
        for block in events.removed:
            self._drop(blocks, block, bit)
        for block in events.stored:
            holders[block] = holders.get(block, 0) | bit
            blocks[block] = None
        return True

    def is_behind(self, worker: WorkerId, epoch: int, sequence: int) -> bool:
        """Whether a worker that says to have sent `sequence` events was not fully heard."""
        heard_epoch, heard = self._sequence.get(worker, (epoch, 0))
        return heard_epoch != epoch or heard < sequence

    def forget(self, worker: WorkerId) -> None:
        blocks = self._blocks.pop(worker, {})
        bit = 1 << self._bit(worker)
        for block in list(blocks):
            self._drop(blocks, block, bit)
        self._sequence.pop(worker, None)

    def leave(self, worker: WorkerId) -> None:
        """It has left the deployment for good. Its bit is the next new worker's, or every block would need one per pod there
        ever was; whoever keeps what `members` said asks again when a worker comes.
        """
        self.forget(worker)
        bit = self._bits.pop(worker, None)
        if bit is not None:
            heappush(self._free_bits, bit)

    def __len__(self) -> int:
        return len(self._holders)

    def _drop(self, blocks: dict[bytes, None], block: bytes, bit: int) -> None:
        if block not in blocks:
            return
        del blocks[block]
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _bit(self, worker: WorkerId) -> int:
        """A worker keeps its bit until it leaves."""
        bit = self._bits.get(worker)
        if bit is not None:
            return bit
        if self._free_bits:
            bit = heappop(self._free_bits)
            self._names[bit] = worker
        else:
            bit = len(self._names)
            self._names.append(worker)
        self._bits[worker] = bit
        return bit
