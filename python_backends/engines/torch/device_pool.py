"""The KV pool in a device's memory, and how its blocks get out of it and into it: to the host, to other processes' pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.torch.device import Device
from python_backends.kv.device import BlockDigest, OpenBlocks
from python_backends.kv.memory import PoolMemory

_PIECE_BYTES = 32 << 20  # digested at once, which takes about twice as much in between
_HIGH = 32  # bits of a word that are folded onto the lower ones
_LOW_MASK = (1 << _HIGH) - 1


class DevicePool:
    """Implements kv.device.DeviceBlocks. One more block than the pool memory has: nobody's, for rows that pad a step."""

    def __init__(self, memory: PoolMemory, layout: KVLayout, device: Device) -> None:
        dtype: torch.dtype = getattr(torch, layout.dtype)
        shape = (memory.num_blocks, *layout.block_shape)
        self.tensor = device.zeros((memory.num_blocks + 1, *layout.block_shape), dtype)
        self._bytes = self.tensor.view(len(self.tensor), -1).view(torch.uint8)  # [blocks + 1, block_bytes]
        self._host = torch.from_numpy(memory.blocks).view(dtype).view(shape)
        self._device = device
        factors = torch.from_numpy(digest_factors(memory.block_bytes // 8)).to(device.torch_device)
        self._factors = factors[:, None]  # [2, 1, words]
        self._shared = b""

    def to_host(self, blocks: Sequence[int]) -> None:
        """See DeviceBlocks.to_host."""
        if blocks:
            self._host[list(blocks)] = self.tensor[list(blocks)].cpu()

    def to_device(self, blocks: Sequence[int]) -> None:
        """See DeviceBlocks.to_device."""
        if blocks:
            self.tensor[list(blocks)] = self._host[list(blocks)].to(self.tensor.device)

    def share(self) -> bytes:
        """See DeviceBlocks.share."""
        self._shared = self._shared or self._device.share(self._bytes)
        return self._shared

    def open(self, shared: bytes) -> OpenBlocks:
        """See DeviceBlocks.open."""
        return _OpenBlocks(self._device, self._device.open(shared), self._bytes.shape[1])

    def fetch(self, source: OpenBlocks | None, blocks: Sequence[int], into: Sequence[int]) -> None:
        """See DeviceBlocks.fetch. Each stretch of neighbours is one copy by the device, no kernel and nothing in between."""
        origin = source.rows if isinstance(source, _OpenBlocks) else self._bytes
        with self._device.copying():
            for first, target, count in _stretches(blocks, into):
                self._bytes[target : target + count].copy_(origin[first : first + count], non_blocking=True)

    def digests(self, blocks: Sequence[int]) -> list[BlockDigest]:
        """See DeviceBlocks.digests. Two sums modulo 2^64 of the block's words, each times a number of its place.

        Before, a word's high half is folded onto its low half: else damage to the highest bits alone could cancel out.
        Finds damage, not malice.
        """
        most = max(1, _PIECE_BYTES // self._bytes.shape[1])
        parts: list[npt.NDArray[np.int64]] = []
        with self._device.copying():
            for start in range(0, len(blocks), most):
                words = self._bytes[list(blocks[start : start + most])].view(torch.int64)
                words ^= (words >> _HIGH) & _LOW_MASK
                parts.append((words * self._factors).sum(dim=2).T.cpu().numpy())
        return [row.tobytes() for part in parts for row in part]


class _OpenBlocks:
    """Implements kv.device.OpenBlocks. rows: uint8 [blocks, block_bytes]."""

    def __init__(self, device: Device, memory: torch.Tensor, block_bytes: int) -> None:
        self._device = device
        self._memory = memory
        self.rows = memory.view(-1, block_bytes)

    def close(self) -> None:
        self._device.close(self._memory)


def digest_factors(words: int) -> npt.NDArray[np.int64]:
    """Odd numbers, int64 [2, words], the same everywhere: splitmix64 of 1, 2, 3 ... (Steele and others, OOPSLA 2014)."""
    state = np.arange(1, 2 * words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state | np.uint64(1)).view(np.int64).reshape(2, words)


def _stretches(blocks: Sequence[int], into: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first block, first target, count) of what is consecutive on both sides."""
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1 or into[i] != into[i - 1] + 1:
            yield blocks[start], into[start], i - start
            start = i
