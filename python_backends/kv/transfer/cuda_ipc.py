"""Transport `cuda_ipc`: one copy from the source worker's GPU memory to this worker's, on the same or another GPU of a host.

KV never touches the host. The source's blocks are opened once in its life, by the handle that its tickets carry; epoch and
generations are in shared memory as with `shm`. Digests are made on the GPUs, at both ends, in the same way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from python_backends.core.errors import ConfigError
from python_backends.core.handoff import KVHandoff
from python_backends.core.types import Epoch, Role
from python_backends.kv.device import BlockDigest, DeviceBlocks, OpenBlocks
from python_backends.kv.memory import PoolMemory, PoolView
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Fetched, Published, check_time, failed
from python_backends.kv.transfer.shm import check_fresh, claimed, open_view

_MOST_SOURCES = 16  # kept open
_PIECE_BYTES = 256 << 20  # copied between two looks at the clock: a few ms even where GPUs are joined by PCIe


@dataclass(slots=True)
class _Source:
    """Another worker's pool: what it says of it, and its blocks; None: they are this worker's own."""

    view: PoolView
    blocks: OpenBlocks | None
    users: int = 0


class CudaIpcTransport(CheckedTransport):
    on_device = True

    def __init__(self) -> None:
        self.name = "cuda_ipc"
        self._lock = threading.Lock()  # of the sources; not held while copying
        self._sources: OrderedDict[tuple[str, Epoch], _Source] = OrderedDict()  # least recently used first

    def attach(self, memory: PoolMemory, role: Role) -> None:
        """See KVTransport.attach."""
        try:
            _device(memory).share()
        except OSError as error:
            raise ConfigError(f"transfer.transport: cuda_ipc: this GPU's memory can't be shared: {error}; use shm") from error

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """The blocks are readable where they are."""
        return Published(locator=memory.locator, opaque=_device(memory).share())

    def release(self, lease_id: str) -> None:
        """A reader sees by the generations when blocks are written anew."""

    def digests(self, memory: PoolMemory, blocks: Sequence[int]) -> list[BlockDigest]:
        """See KVTransport.digests."""
        return _device(memory).digests(blocks)

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
    ) -> Fetched:
        """See CheckedTransport.copy."""
        check_time(deadline)
        if into.device is None:  # a landing zone of KV to be converted
            raise failed("cuda_ipc converts no layouts; give both workers the same, or transfer.transport: tcp")
        device = _device(into)
        most = max(1, _PIECE_BYTES // into.block_bytes)
        with self._using(handoff, device) as source:
            places = claimed(handoff, wanted, source.view)
            for start in range(0, len(wanted), most):
                check_time(deadline)
                device.fetch(source.blocks, places[start : start + most], blocks[start : start + most])
            check_fresh(handoff, wanted, source.view)
        return Fetched(self.name, why="GPUs of one host", wire_bytes=len(wanted) * into.block_bytes)

    def close(self) -> None:
        with self._lock:
            for source in self._sources.values():
                _close(source)
            self._sources.clear()

    @contextmanager
    def _using(self, handoff: KVHandoff, device: DeviceBlocks) -> Iterator[_Source]:
        with self._lock:
            source = self._open(handoff, device)
            source.users += 1
        try:
            yield source
        finally:
            with self._lock:
                source.users -= 1

    def _open(self, handoff: KVHandoff, device: DeviceBlocks) -> _Source:
        self._drop_abandoned()
        key = (handoff.locator, handoff.epoch)
        source = self._sources.get(key)
        if source is None:
            view = open_view(handoff)
            try:
                source = _Source(view, None if handoff.opaque == device.share() else device.open(handoff.opaque))
            except OSError as error:
                raise failed(f"the GPU memory of {handoff.source} can't be opened: {error}") from error
            self._sources[key] = source
        self._sources.move_to_end(key)
        return source

    def _drop_abandoned(self) -> None:
        """Those of dead owners, and the oldest beyond as many as are kept: an open memory is kept from being freed."""
        surplus = len(self._sources) - _MOST_SOURCES
        for index, (key, source) in enumerate(list(self._sources.items())):
            if source.users == 0 and (index <= surplus or not source.view.owned):
                _close(self._sources.pop(key))


def _close(source: _Source) -> None:
    if source.blocks is not None:
        with suppress(OSError):  # nothing can be done about it
            source.blocks.close()


def _device(memory: PoolMemory) -> DeviceBlocks:
    """Raises ConfigError."""
    if memory.device is None:
        raise ConfigError("transfer.transport: cuda_ipc needs workers on GPUs (workers[].device: cuda); use auto")
    return memory.device
