"""A GPU's memory that another process opens, played by the shared memory of a pool: what CUDA IPC allows, and no more.

A handle is opened once in a process, and not in the one that made it; what was closed is not read. Each PlayedDevice plays
a process of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from python_backends.kv.device import OpenBlocks
from python_backends.kv.memory import PoolMemory, PoolView
from python_backends.kv.transfer.base import block_digest


class _Shared(msgspec.Struct):
    process: str
    locator: str


class _Open:
    def __init__(self, owner: PlayedDevice, key: tuple[str, str]) -> None:
        self.view: PoolView | None = PoolView(key[1])
        self._owner = owner
        self._key = key

    def close(self) -> None:
        assert self.view is not None, "closed twice"
        self._owner.opened.remove(self._key)
        self.view = None


class PlayedDevice:
    """Implements DeviceBlocks; the pool memory itself is what the device has. opened: what is open here now."""

    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory
        self._process = secrets.token_hex(8)
        self.opened: set[tuple[str, str]] = set()

    def share(self) -> bytes:
        return msgspec.msgpack.encode(_Shared(self._process, self._memory.locator))

    def open(self, shared: bytes) -> OpenBlocks:
        try:
            told = msgspec.msgpack.decode(shared, type=_Shared)
        except msgspec.MsgspecError as error:
            raise OSError("invalid argument") from error
        key = told.process, told.locator
        if told.process == self._process or key in self.opened:
            raise OSError("invalid device context")
        opened = _Open(self, key)
        self.opened.add(key)
        return opened

    def fetch(self, source: OpenBlocks | None, blocks: Sequence[int], into: Sequence[int]) -> None:
        origin = self._memory.blocks
        if source is not None:
            assert isinstance(source, _Open)
            assert source.view is not None, "it was closed"
            origin = source.view.blocks
        self._memory.blocks[list(into)] = origin[list(blocks)]

    def digests(self, blocks: Sequence[int]) -> list[bytes]:
        return [block_digest(self._memory.blocks[block]) for block in blocks]

    def to_host(self, blocks: Sequence[int]) -> None:
        """It is the same memory."""

    def to_device(self, blocks: Sequence[int]) -> None:
        """It is the same memory."""
