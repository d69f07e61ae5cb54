"""A transport that breaks a given share of transfers, for failure tests. It damages between the copy and the check.

drop      fails at once                       delay     waits up to 0.2 s first
hang      waits for the deadline              corrupt   flips one bit of one arrived block
truncate  leaves the second half of the last block as it was before
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from python_backends.core.handoff import KVHandoff
from python_backends.core.types import Role
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Fetched, Published, check_time, failed

Fault = Literal["delay", "drop", "corrupt", "truncate", "hang"]
_MAX_DELAY_S = 0.2


class FaultyTransport(CheckedTransport):
    """Bears the wrapped transport's name: tickets don't show that a reader has faults."""

    def __init__(self, inner: CheckedTransport, shares: Mapping[Fault, float], seed: int = 0) -> None:
        """`shares`: fault -> share of transfers, together at most 1. The same seed draws the same sequence of faults."""
        self.name = inner.name
        self.on_device = inner.on_device
        self._inner = inner
        self._shares = dict(shares)
        self._random = random.Random(seed)
        self._lock = threading.Lock()  # of the generator: fetches run concurrently
        self._closed = threading.Event()

    def attach(self, memory: PoolMemory, role: Role) -> None:
        self._inner.attach(memory, role)

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        return self._inner.publish(memory, blocks, lease_id)

    def digests(self, memory: PoolMemory, blocks: Sequence[int]) -> list[bytes]:
        return self._inner.digests(memory, blocks)

    def release(self, lease_id: str) -> None:
        self._inner.release(lease_id)

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
    ) -> Fetched | None:
        """See CheckedTransport.copy, with at most one fault. Nothing has arrived before the damage is done.

        And nothing is rounded on the way: what the source seals is checked before the damage.
        """
        fault, amount = self._draw()
        if fault == "drop":
            raise failed("dropped on purpose")
        if fault == "hang":
            self._wait(deadline - time.monotonic(), deadline)
        if fault == "delay":
            self._wait(amount * _MAX_DELAY_S, deadline)
        before = self._bytes_of(into, blocks[-1]).copy() if fault == "truncate" and blocks else None
        how = self._inner.copy(handoff, wanted, into, blocks, deadline, _unheard, exact=True)
        if before is not None:
            self._bytes_of(into, blocks[-1])[len(before) // 2 :] = before[len(before) // 2 :]
            self._put_back(into, blocks[-1])
        if fault == "corrupt" and blocks:
            index, bit = divmod(int(amount * len(blocks) * into.block_bytes * 8), into.block_bytes * 8)
            self._bytes_of(into, blocks[index])[bit // 8] ^= 1 << bit % 8
            self._put_back(into, blocks[index])
        return how

    def close(self) -> None:
        self._closed.set()
        self._inner.close()

    def _bytes_of(self, into: PoolMemory, block: int) -> npt.NDArray[np.uint8]:
        if self.on_device and into.device is not None:
            into.device.to_host([block])
        data: npt.NDArray[np.uint8] = into.blocks[block]
        return data

    def _put_back(self, into: PoolMemory, block: int) -> None:
        if self.on_device and into.device is not None:
            into.device.to_device([block])

    def _draw(self) -> tuple[Fault | None, float]:
        """(the fault of this transfer, a number in [0, 1) that says how long or where)."""
        with self._lock:
            lot, amount = self._random.random(), self._random.random()
        for fault, share in self._shares.items():
            if lot < share:
                return fault, amount
            lot -= share
        return None, amount

    def _wait(self, seconds: float, deadline: float) -> None:
        """Raises HandoffRefused when the deadline comes first, or the transport is closed."""
        if self._closed.wait(min(seconds, deadline - time.monotonic())):
            raise failed("the transport was closed")
        check_time(deadline)


def _unheard(indices: Sequence[int], *, rounded: bool = False) -> None:
    """Everything is digested at the end."""
