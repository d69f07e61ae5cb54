"""Several tiers behind one front: who is asked, when it pays, and that nobody waits for a slow one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from python_backends.core.types import BlockHash, StoreCounts
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer
from python_backends.kv.store.node import NodeStore
from python_backends.kv.store.pace import Pace
from python_backends.kv.store.stores import Stores
from tests.kv.blocks import BLOCK_BYTES, Pool, content, hashes

BLOCK_SIZE = 16


class DictTier:
    """A tier that keeps blocks in a dictionary, and can be slow."""

    def __init__(self, name: str, delay_s: float = 0.0) -> None:
        self.name = name
        self.delay_s = delay_s
        self.blocks: dict[BlockHash, bytes] = {}
        self.reads: list[int] = []  # how many blocks were asked for each time
        self.touched: list[BlockHash] = []
        self.closed = False
        self.gate = threading.Event()  # writes wait for it
        self.gate.set()

    def count(self, hashes: Sequence[BlockHash], deadline: float) -> int:
        return next((i for i, name in enumerate(hashes) if name not in self.blocks), len(hashes))

    def read(self, hashes: Sequence[BlockHash], into: npt.NDArray[np.uint8], blocks: Sequence[int], deadline: float) -> int:
        self.reads.append(len(hashes))
        time.sleep(self.delay_s)
        count = self.count(hashes, deadline)
        for name, block in zip(hashes[:count], blocks, strict=False):
            into[block] = np.frombuffer(self.blocks[name], np.uint8)
        return count

    def write(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        assert self.gate.wait(10)
        for offer in offers:
            data = memory.blocks[offer.block].tobytes()
            if memory.generations[offer.block] == offer.generation:
                self.blocks[offer.hash] = data

    def put(self, hashes: Sequence[BlockHash], data: Sequence[npt.NDArray[np.uint8]], digests: Sequence[bytes]) -> None:
        self.blocks.update((name, block.tobytes()) for name, block in zip(hashes, data, strict=True))

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        self.touched += hashes

    def counts(self) -> StoreCounts:
        return StoreCounts(written=len(self.blocks))

    def close(self) -> None:
        self.closed = True

    def fill(self, names: Sequence[BlockHash]) -> None:
        self.blocks.update((name, content(name).tobytes()) for name in names)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(256)
    yield pool
    pool.close()


@pytest.fixture
def compute() -> Pace:
    """Of the worker's prefill."""
    return Pace()


@pytest.fixture
def make(pool: Pool, compute: Pace) -> Iterator[Callable[..., Stores]]:
    made: list[Stores] = []

    def make_stores(*tiers: Any, queue_blocks: int = 1000) -> Stores:
        made.append(Stores(tiers, pool.memory, BLOCK_SIZE, queue_blocks, compute))
        return made[-1]

    yield make_stores
    for stores in made:
        stores.close()
        stores.close()


Make = Callable[..., Stores]


def load(stores: Stores, pool: Pool, names: Sequence[BlockHash]) -> dict[str, int]:
    """Blocks by tier, each checked."""
    targets = list(range(100, 100 + len(names)))
    loaded = stores.load(names, targets, time.monotonic() + 5)
    assert pool.holds(names[: loaded.blocks], targets[: loaded.blocks])
    assert sum(loaded.of_tier.values()) == loaded.blocks
    return {name: count for name, count in loaded.of_tier.items() if count}


def eventually(condition: Callable[[], object], within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_fastest_tier_is_asked_first_and_the_next_goes_on(make: Make, pool: Pool) -> None:
    near, far, names = DictTier("near"), DictTier("far"), hashes(20)
    near.fill(names[:8])
    far.fill(names)
    assert load(make(near, far), pool, names) == {"near": 8, "far": 12}
    assert (near.reads, far.reads) == ([20], [12])


def test_gaps_are_closed_from_whoever_has_them(make: Make, pool: Pool) -> None:
    near, far, names = DictTier("near"), DictTier("far"), hashes(20)
    near.fill([*names[:5], *names[10:15]])
    far.fill([*names[5:10], *names[15:18]])
    assert load(make(near, far), pool, names) == {"near": 10, "far": 8}
    assert make(near, far).locate(names, time.monotonic() + 1) == 18


def test_nothing_anywhere_asks_each_once(make: Make, pool: Pool) -> None:
    near, far = DictTier("near"), DictTier("far")
    assert load(make(near, far), pool, hashes(20)) == {}
    assert (near.reads, far.reads) == ([20], [20])


def test_reading_stops_where_computing_is_faster(make: Make, pool: Pool, compute: Pace) -> None:
    slow, names = DictTier("slow", delay_s=0.05), hashes(4)
    slow.fill(names)
    stores = make(slow)
    assert load(stores, pool, names) == {"slow": 4}, "what is not known yet is tried"
    compute.measure(10_000, 0.1)  # 64 tokens in 0.64 ms
    assert load(stores, pool, names) == {}
    assert stores.locate(names, time.monotonic() + 1) == 0
    assert slow.reads == [4]
    for _ in range(30):
        compute.measure(64, 1.0)
    assert load(stores, pool, names) == {"slow": 4}


def test_a_slow_tier_is_tried_again_later(make: Make, pool: Pool, compute: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, names = DictTier("slow", delay_s=0.05), hashes(4)
    slow.fill(names)
    stores = make(slow)
    compute.measure(10_000, 0.1)
    load(stores, pool, names)
    assert load(stores, pool, names) == {}
    monkeypatch.setattr("python_backends.kv.store.pace._FORGOTTEN_S", 0.0)
    assert load(stores, pool, names) == {"slow": 4}


def test_what_was_read_is_touched_where_it_was_read(make: Make, pool: Pool) -> None:
    near, far, names = DictTier("near"), DictTier("far"), hashes(6)
    near.fill(names[:2])
    far.fill(names)
    load(make(near, far), pool, names)
    assert eventually(lambda: (near.touched, far.touched) == (names[:2], names[2:]))


def test_prefetch_brings_blocks_nearer(make: Make, pool: Pool, tmp_path: Path) -> None:
    near, far, names = NodeStore(1 << 20, BLOCK_BYTES, b"k" * 32, tmp_path), DictTier("far"), hashes(50)
    far.fill(names)
    stores = make(near, far)
    stores.prefetch(names, time.monotonic() + 5)
    far.blocks.clear()
    assert load(stores, pool, names) == {"node": 50}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_every_tier_is_filled(make: Make, pool: Pool) -> None:
    near, far, names = DictTier("near"), DictTier("far"), hashes(150)
    make(near, far).offer(pool.offer(names))
    assert eventually(lambda: len(near.blocks) == len(far.blocks) == 150)
    assert near.blocks == far.blocks == {name: content(name).tobytes() for name in names}


def test_a_slow_tier_delays_neither_the_caller_nor_the_others(make: Make, pool: Pool) -> None:
    stuck, quick = DictTier("stuck"), DictTier("quick")
    stuck.gate.clear()
    stores = make(stuck, quick)
    began = time.monotonic()
    for seed in range(3):
        stores.offer(pool.offer(hashes(60, seed)))
    assert time.monotonic() - began < 0.5
    assert eventually(lambda: len(quick.blocks) == 180)
    assert not stuck.blocks
    stuck.gate.set()
    assert eventually(lambda: len(stuck.blocks) == 180)


def test_the_queue_is_bounded_and_drops_the_oldest(make: Make, pool: Pool) -> None:
    tier = DictTier("tier")
    tier.gate.clear()
    stores = make(tier, queue_blocks=10)
    stores.offer(pool.offer(hashes(1, 9)))  # this one holds the writer up
    time.sleep(0.1)
    stores.offer(pool.offer(hashes(200)))
    tier.gate.set()
    assert eventually(lambda: len(tier.blocks) == 11)
    assert set(hashes(200)[190:]) < set(tier.blocks)


def test_closing_writes_what_waits_and_closes_the_tiers(pool: Pool) -> None:
    tier = DictTier("tier")
    stores = Stores([tier], pool.memory, BLOCK_SIZE, 1000, Pace())
    stores.offer(pool.offer(hashes(200)))
    stores.close()
    assert len(tier.blocks) == 200
    assert tier.closed


def test_closing_does_not_wait_long_for_a_tier_that_hangs(pool: Pool) -> None:
    tier = DictTier("tier")
    tier.gate.clear()
    stores = Stores([tier], pool.memory, BLOCK_SIZE, 1000, Pace())
    stores.offer(pool.offer(hashes(200)))
    began = time.monotonic()
    stores.close()
    assert time.monotonic() - began < 4
    tier.gate.set()


class TierWithABug(DictTier):
    """Its first write fails in a way that nobody foresaw."""

    def write(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        self.touched += [offer.hash for offer in offers]
        if self.touched == [offer.hash for offer in offers]:
            raise ZeroDivisionError
        super().write(offers, memory)


def test_a_tier_with_a_bug_loses_one_batch_and_not_the_rest(make: Make, pool: Pool) -> None:
    tier, names = TierWithABug("near"), hashes(10)
    stores = make(tier)
    stores.offer(pool.offer(names[:5]))
    assert eventually(lambda: tier.touched)
    stores.offer(pool.offer(names[5:]))
    assert eventually(lambda: set(tier.blocks) >= set(names[5:]))
