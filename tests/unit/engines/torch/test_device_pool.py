"""Digests of blocks on a device: any damage shows, and equal blocks have equal ones wherever they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from python_backends.core.layout import KVLayout
from python_backends.core.types import Epoch
from python_backends.engines.torch.device_pool import DevicePool, digest_factors
from python_backends.kv.memory import PoolMemory
from tests.engines.host_device import HostDevice

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float16")
WORDS = LAYOUT.block_bytes // 8


@pytest.fixture
def pool() -> Iterator[DevicePool]:
    memory = PoolMemory(8, LAYOUT.block_bytes, Epoch(1))
    memory.blocks[:] = np.random.default_rng(1).integers(0, 256, memory.blocks.shape, np.uint8)
    pool = DevicePool(memory, LAYOUT, HostDevice())
    pool.to_device(range(8))
    yield pool
    memory.close()


def words(pool: DevicePool, block: int) -> torch.Tensor:
    return pool.tensor[block].view(-1).view(torch.int64)


def test_digests_are_of_bytes_and_not_of_places(pool: DevicePool) -> None:
    pool.tensor[5] = pool.tensor[2]
    digests = pool.digests([2, 5, 3])
    assert [len(digest) for digest in digests] == [16, 16, 16]
    assert digests[0] == digests[1] != digests[2]
    assert pool.digests([]) == []


def test_every_flipped_bit_shows(pool: DevicePool) -> None:
    (before,) = pool.digests([2])
    for bit in range(64):
        words(pool, 2)[bit % WORDS] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        assert pool.digests([2]) != [before], bit
        words(pool, 2)[bit % WORDS] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63))
    assert pool.digests([2]) == [before]


def test_damage_to_the_same_bit_of_several_words_shows(pool: DevicePool) -> None:
    """Sums of odd multiples alone would miss two highest bits."""
    (before,) = pool.digests([2])
    for bit in (0, 31, 32, 62, 63):
        flip = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        for first in range(WORDS - 1):
            words(pool, 2)[[first, first + 1]] ^= flip
            assert pool.digests([2]) != [before], (bit, first)
            words(pool, 2)[[first, first + 1]] ^= flip


def test_exchanged_words_and_missing_ends_show(pool: DevicePool) -> None:
    (before,) = pool.digests([2])
    block = words(pool, 2)
    kept = block.clone()
    block[[3, 9]] = block[[9, 3]]
    assert pool.digests([2]) != [before]
    block[:] = kept
    block[WORDS // 2 :] = words(pool, 3)[WORDS // 2 :]
    assert pool.digests([2]) != [before]


def test_factors_are_the_same_for_ever() -> None:
    """Workers of different releases exchange blocks."""
    factors = digest_factors(3)
    assert factors.shape == (2, 3)
    assert (factors & 1).all()
    assert factors[0, 0] == np.int64(np.uint64(0xE220A8397B1DCDAF | 1).astype(np.int64))
