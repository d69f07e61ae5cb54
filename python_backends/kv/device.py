"""KV blocks in the memory of a GPU, as transports see them. engines/torch has them; nothing here knows torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BlockDigest = bytes


class OpenBlocks(Protocol):
    """Another process's blocks, readable here until closed."""

    def close(self) -> None: ...


class DeviceBlocks(Protocol):
    """One worker's blocks, numbered as in its PoolMemory, whose bytes on the host only mirror what was copied there."""

    def share(self) -> bytes:
        """What `open` takes in another process of this host. Always the same bytes. Raises OSError where it can't be."""

    def open(self, shared: bytes) -> OpenBlocks:
        """Blocks of another process; once for each, since CUDA opens a memory once in a process. Raises OSError."""

    def fetch(self, source: OpenBlocks | None, blocks: Sequence[int], into: Sequence[int]) -> None:
        """Copy blocks of `source` (None: these ones) to others of these. They are there when this returns.

        May be called from several threads, and beside steps, for blocks that no step uses.
        """

    def digests(self, blocks: Sequence[int]) -> list[BlockDigest]:
        """16 bytes for each block, of the bytes as they are on the device: equal blocks have equal ones everywhere."""

    def to_host(self, blocks: Sequence[int]) -> None:
        """Make the pool memory hold these blocks' bytes."""

    def to_device(self, blocks: Sequence[int]) -> None:
        """Take these blocks' bytes from the pool memory."""
