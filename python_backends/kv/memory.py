"""The bytes of a worker's KV pool, in anonymous shared memory that other processes of the same user can map.

Its pages outlive the owner while a reader has them mapped, and it is sealed against shrinking, so reading never crashes
(core/shared_memory.py); whether the bytes are still *meant* is told by epoch, generations and digests, which the reader
checks.

    offset 0      header: magic, epoch, num_blocks, block_bytes      (one page)
    page 1 ..     generation of each block, uint64
    then          blocks, each block_bytes, in KVLayout.block_shape
"""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np
import numpy.typing as npt

from python_backends.core.shared_memory import create_memory, open_memory
from python_backends.core.types import Epoch
from python_backends.kv.device import DeviceBlocks

_MAGIC = b"BATONKV1"
_HEADER = struct.Struct("<8sQQQ")
_EPOCH = struct.Struct("<Q")
_EPOCH_OFFSET = len(_MAGIC)
_NO_EPOCH = Epoch(2**64 - 1)  # of a closed pool
_NAME = "baton-kv"
_PAGE = mmap.PAGESIZE


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class PoolMemory:
    """The owner's side: create, write, and bump generations before a block is written anew.

    `blocks`: uint8 [num_blocks, block_bytes]; `generations`: uint64 [num_blocks]; both are views of the shared memory,
    zero at first. `locator` is what a PoolView opens. `device`: where the blocks really are, if that is a GPU's memory.
    """

    def __init__(self, num_blocks: int, block_bytes: int, epoch: Epoch) -> None:
        """Raises ConfigError when the machine has not enough memory."""
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.epoch = epoch
        size = _blocks_offset(num_blocks) + num_blocks * block_bytes
        self._fd, self._map = create_memory(_NAME, size, "the KV pool", "engine.kv_pool_mib")
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, epoch, num_blocks, block_bytes)
        self.generations, self.blocks = _arrays(self._map, num_blocks, block_bytes)
        self.locator = f"{os.getpid()}/{self._fd}"
        self.device: DeviceBlocks | None = None

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    @property
    def fd(self) -> int:
        """Of the memory; -1 when it is closed."""
        return self._fd

    def offset_of(self, block: int) -> int:
        """Where a block's bytes begin in the memory."""
        return _blocks_offset(self.num_blocks) + block * self.block_bytes

    def close(self) -> None:
        """Void the epoch for readers and give up the descriptor; the mapping goes with the last array that views it.

        Idempotent.
        """
        if self._fd >= 0:
            _EPOCH.pack_into(self._map, _EPOCH_OFFSET, _NO_EPOCH)
            os.close(self._fd)
            self._fd = -1


class PoolView:
    """A reader's side: the pool of another process (or of this one), mapped read-only. Shapes as in PoolMemory."""

    def __init__(self, locator: str) -> None:
        """Raises OSError when the owner is gone, ValueError when the memory is not a Baton pool."""
        pid, _, fd = locator.partition("/")
        if not (pid.isdecimal() and fd.isdecimal()):
            raise ValueError(f"{locator!r} is not a pool locator")
        self._path = f"/proc/{pid}/fd/{fd}"
        try:
            descriptor = open_memory(self._path, _NAME, os.O_RDONLY)
        except ValueError as error:
            raise ValueError(f"{locator!r} is not a Baton KV pool") from error
        try:
            self._identity = _identity(os.fstat(descriptor))
            self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self.num_blocks, self.block_bytes = _shape(self._map)
        self.generations, self.blocks = _arrays(self._map, self.num_blocks, self.block_bytes)

    @property
    def epoch(self) -> Epoch:
        """The owner's epoch as the memory says it now; it changes when the owner closes the pool."""
        return Epoch(_EPOCH.unpack_from(self._map, _EPOCH_OFFSET)[0])

    @property
    def owned(self) -> bool:
        """Whether the owner still lives and still has this very memory under its locator. One system call."""
        try:
            return _identity(os.stat(self._path)) == self._identity
        except OSError:
            return False


def _blocks_offset(num_blocks: int) -> int:
    return _PAGE + _round_up(num_blocks * 8)


def _arrays(memory: mmap.mmap, num_blocks: int, block_bytes: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """(generations [num_blocks], blocks [num_blocks, block_bytes]) as views that keep the mapping alive."""
    generations = np.frombuffer(memory, np.uint64, num_blocks, _PAGE)
    blocks = np.frombuffer(memory, np.uint8, num_blocks * block_bytes, _blocks_offset(num_blocks))
    return generations, blocks.reshape(num_blocks, block_bytes)


def _shape(memory: mmap.mmap) -> tuple[int, int]:
    """(num_blocks, block_bytes) from the header. Raises ValueError when header and size don't fit."""
    if len(memory) >= _PAGE:
        magic, _, num_blocks, block_bytes = _HEADER.unpack_from(memory)
        if magic == _MAGIC and len(memory) == _blocks_offset(num_blocks) + num_blocks * block_bytes:
            return num_blocks, block_bytes
    raise ValueError("the memory behind the locator is not a Baton KV pool")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
