"""The bytes of a worker's KV pool, in anonymous shared memory that other processes of the same user can map.

A memfd, not a file in /dev/shm: it has no name, so nothing is left behind however a worker dies, and it isn't bound by
the size of /dev/shm (64 MiB in many containers). A reader opens it through /proc/<pid>/fd/<fd>. Its pages outlive the
owner while a reader has them mapped, so reading never crashes; whether they are still *meant* is told by epoch,
generations and digests, which the reader checks.

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

from python_backends.core.errors import ConfigError
from python_backends.core.types import Epoch

_MAGIC = b"BATONKV1"
_HEADER = struct.Struct("<8sQQQ")
_PAGE = mmap.PAGESIZE


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class PoolMemory:
    """The owner's side: create, write, and bump generations before a block is written anew."""

    def __init__(self, num_blocks: int, block_bytes: int, epoch: Epoch) -> None:
        """Raises ConfigError when the machine has not enough memory."""
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.epoch = epoch
        start = _PAGE + _round_up(num_blocks * 8)
        size = start + num_blocks * block_bytes
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC)
        try:
            # Allocating now touches every page: later writes run at memory speed, and a lack of memory shows at load.
            os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"the KV pool of {size >> 20} MiB does not fit in memory ({error.strerror}); lower engine.kv_pool_mib"
            ) from error
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, epoch, num_blocks, block_bytes)
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, num_blocks, _PAGE)
        self.blocks: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes, start).reshape(
            num_blocks, block_bytes
        )
        self.locator = f"{os.getpid()}/{self._fd}"

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last array that views it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PoolView:
    """A reader's side: the pool of another process (or of this one), mapped read-only."""

    def __init__(self, locator: str) -> None:
        """Raises OSError when the owner is gone, ValueError when the memory is not a Baton pool."""
        pid, _, fd = locator.partition("/")
        if not (pid.isdecimal() and fd.isdecimal()):
            raise ValueError(f"{locator!r} is not a pool locator")
        descriptor = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        if len(self._map) < _PAGE:
            raise ValueError("the memory behind the locator is not a Baton KV pool")
        magic, epoch, num_blocks, block_bytes = _HEADER.unpack_from(self._map)
        start = _PAGE + _round_up(num_blocks * 8)
        if magic != _MAGIC or len(self._map) != start + num_blocks * block_bytes:
            raise ValueError("the memory behind the locator is not a Baton KV pool")
        self.epoch = Epoch(epoch)
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, num_blocks, _PAGE)
        self.blocks: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes, start).reshape(
            num_blocks, block_bytes
        )
