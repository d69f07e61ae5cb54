"""The bytes of a worker's KV pool, in anonymous shared memory that other processes of the same user can map.

A memfd, not a file in /dev/shm: it has no name, so nothing is left behind however a worker dies, and it isn't bound by
the size of /dev/shm (64 MiB in many containers). A reader opens it through /proc/<pid>/fd/<fd>. Its pages outlive the
owner while a reader has them mapped, and it is sealed against shrinking (memfd_create(2)), so reading never crashes;
whether the bytes are still *meant* is told by epoch, generations and digests, which the reader checks.

    offset 0      header: magic, epoch, num_blocks, block_bytes      (one page)
    page 1 ..     generation of each block, uint64
    then          blocks, each block_bytes, in KVLayout.block_shape
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from python_backends.core.errors import ConfigError
from python_backends.core.types import Epoch

_MAGIC = b"BATONKV1"
_HEADER = struct.Struct("<8sQQQ")
_EPOCH = struct.Struct("<Q")
_EPOCH_OFFSET = len(_MAGIC)
_NO_EPOCH = Epoch(2**64 - 1)  # of a closed pool
_NAME = "baton-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PAGE = mmap.PAGESIZE
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class PoolMemory:
    """The owner's side: create, write, and bump generations before a block is written anew.

    `blocks`: uint8 [num_blocks, block_bytes]; `generations`: uint64 [num_blocks]; both are views of the shared memory,
    zero at first. `locator` is what a PoolView opens.
    """

    def __init__(self, num_blocks: int, block_bytes: int, epoch: Epoch) -> None:
        """Raises ConfigError when the machine has not enough memory."""
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.epoch = epoch
        size = _blocks_offset(num_blocks) + num_blocks * block_bytes
        available = _available_bytes()
        if size > available:  # the kernel would find out by killing processes
            raise _too_large(size, f"{available >> 20} MiB available")
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Allocating now touches every page: later writes run at memory speed, and a lack of memory shows at load.
            os.posix_fallocate(self._fd, 0, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            raise _too_large(size, str(error.strerror)) from error
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, epoch, num_blocks, block_bytes)
        self.generations, self.blocks = _arrays(self._map, num_blocks, block_bytes)
        self.locator = f"{os.getpid()}/{self._fd}"

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
        # By its name first: opening whatever else has this number (a pipe, a device) could block or have effects.
        if os.readlink(self._path) != f"/memfd:{_NAME} (deleted)":
            raise ValueError(f"{locator!r} is not a Baton KV pool")
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._identity = _identity(os.fstat(descriptor))
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != _SEALS:
                raise ValueError(f"{locator!r} is not a sealed Baton KV pool")
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


def _too_large(size: int, why: str) -> ConfigError:
    return ConfigError(f"the KV pool of {size >> 20} MiB does not fit in memory ({why}); lower engine.kv_pool_mib")


def _available_bytes() -> int:
    """What can be allocated without swapping (MemAvailable of proc(5)), within the container's limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limits = [path.read_text().strip() for path in _CGROUP_LIMITS if path.exists()]
    return min([available, *(int(limit) for limit in limits if limit.isdecimal())])  # "max": no limit


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
