"""Transport `inline`: the bytes travel inside the ticket. For tests and tiny prompts: a ticket then is as big as its KV.

What a ticket carries is a copy, so neither reuse of the blocks nor the source's death can make it stale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from python_backends.core.handoff import KVHandoff
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Published, check_time, failed


class InlineTransport(CheckedTransport):
    def __init__(self) -> None:
        self.name = "inline"

        self._published: dict[str, bytes] = {}

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """Copy the blocks, in this order, one after the other."""
        self._published[lease_id] = self._published.get(lease_id, b"") + memory.blocks[list(blocks)].tobytes()
        return Published(opaque=self._published[lease_id])

    def release(self, lease_id: str) -> None:
        """See KVTransport.release."""
        self._published.pop(lease_id, None)

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
    ) -> None:
        """See CheckedTransport.copy."""
        if len(handoff.opaque) != len(handoff.blocks) * into.block_bytes:
            raise failed(f"the ticket carries {len(handoff.opaque)} bytes for {len(handoff.blocks)} blocks")
        carried = np.frombuffer(handoff.opaque, np.uint8).reshape(len(handoff.blocks), into.block_bytes)
        for position, block in zip(wanted, blocks, strict=True):
            check_time(deadline)
            into.blocks[block] = carried[position]

    def close(self) -> None:
        """Nothing is held."""
