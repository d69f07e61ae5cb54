"""Belief about which worker has which KV blocks, fed by the workers' events.

The index may be wrong - an event may be on its way - and that is never unsafe: whoever is believed to have a block looks
into its own cache before using it. A gap in a worker's sequence numbers empties its part and asks for a resync.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from python_backends.core.messages import BlockEvents
from python_backends.core.types import BlockHash, WorkerId


class PrefixIndex:
    def __init__(self) -> None:
        self._holders: dict[bytes, set[WorkerId]] = defaultdict(set)
        self._blocks: dict[WorkerId, set[bytes]] = defaultdict(set)
        self._sequence: dict[WorkerId, tuple[int, int]] = {}  # epoch, last sequence number seen

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """Leading blocks that each worker is believed to hold; workers that hold none are left out. Read-only."""
        matched: dict[WorkerId, int] = {}
        still: set[WorkerId] | None = None
        for count, block in enumerate(hashes, start=1):
            holders = self._holders.get(block, set())
            still = set(holders) if still is None else still & holders
            if not still:
                break
            matched.update(dict.fromkeys(still, count))
        return matched

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
        for block in events.removed:
            self._drop(worker, block)
        for block in events.stored:
            self._holders[block].add(worker)
            self._blocks[worker].add(block)
        return True

    def is_behind(self, worker: WorkerId, epoch: int, sequence: int) -> bool:
        """Whether a worker that says to have sent `sequence` events was not fully heard."""
        heard_epoch, heard = self._sequence.get(worker, (epoch, 0))
        return heard_epoch != epoch or heard < sequence

    def forget(self, worker: WorkerId) -> None:
        for block in list(self._blocks.pop(worker, ())):
            self._discard_holder(worker, block)
        self._sequence.pop(worker, None)

    def __len__(self) -> int:
        return len(self._holders)

    def _drop(self, worker: WorkerId, block: bytes) -> None:
        self._blocks[worker].discard(block)
        self._discard_holder(worker, block)

    def _discard_holder(self, worker: WorkerId, block: bytes) -> None:
        holders = self._holders.get(block)
        if holders is not None:
            holders.discard(worker)
            if not holders:
                del self._holders[block]
