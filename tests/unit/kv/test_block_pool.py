from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.core.types import BlockHash
from python_backends.kv.block_pool import BlockPool, PoolExhausted, PoolMisuse


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def make_pool(num_blocks: int = 4) -> BlockPool:
    return BlockPool(num_blocks, np.zeros(num_blocks, np.uint64))


def cached(pool: BlockPool, *numbers: int) -> list[int]:
    """A released prompt of full blocks with these hashes."""
    blocks = pool.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        pool.publish(block, name(number))
    pool.release(blocks)
    return blocks


def places(pool: BlockPool) -> tuple[int, int, int]:
    return pool.free_blocks, pool.cached_blocks, pool.held_blocks


def test_new_pool_is_free() -> None:
    pool = make_pool(4)
    assert places(pool) == (4, 0, 0)
    assert pool.total_blocks == 4
    assert pool.hashes() == []
    pool.check()


def test_allocation_is_all_or_nothing() -> None:
    pool = make_pool(4)
    cached(pool, 1)
    held = pool.allocate(2)
    assert not pool.can_allocate(3)
    with pytest.raises(PoolExhausted, match="3 blocks wanted, 1 free and 1 cached"):
        pool.allocate(3)
    assert places(pool) == (1, 1, 2)
    assert pool.match([name(1)]) == 1
    pool.release(held)
    assert len(set(pool.allocate(4))) == 4


def test_block_without_hash_is_free_at_once() -> None:
    pool = make_pool(2)
    pool.release(pool.allocate(2))
    assert places(pool) == (2, 0, 0)


def test_block_with_hash_stays_findable_until_evicted() -> None:
    pool = make_pool(2)
    blocks = cached(pool, 1, 2)
    assert places(pool) == (0, 2, 0)
    assert pool.reuse([name(1), name(2)]) == blocks
    assert places(pool) == (0, 0, 2)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match([name(1)]) == 0


def test_last_reference_decides() -> None:
    pool = make_pool(2)
    blocks = pool.allocate(1)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.held_blocks == 1
    pool.release(blocks)
    assert pool.held_blocks == 0


def test_held_blocks_are_shared_by_their_hash() -> None:
    pool = make_pool(2)
    [block] = pool.allocate(1)
    pool.publish(block, name(1))
    assert pool.reuse([name(1)]) == [block]
    pool.release([block])
    assert places(pool) == (1, 0, 1)


def test_match_counts_leading_hashes_only() -> None:
    pool = make_pool(4)
    cached(pool, 1, 2, 3)
    assert pool.match([]) == 0
    assert pool.match([name(1), name(2), name(3), name(4)]) == 3
    assert pool.match([name(1), name(9), name(3)]) == 1
    assert pool.match([name(9), name(1)]) == 0


def test_eviction_takes_the_least_recently_used_prompt_and_its_deepest_block_first() -> None:
    pool = make_pool(4)
    cached(pool, 1, 2)
    cached(pool, 3, 4)
    pool.release(pool.reuse([name(1), name(2)]))
    order: list[BlockHash] = []
    for _ in range(4):
        before = set(pool.hashes())
        pool.allocate(1)
        order += before - set(pool.hashes())
    assert order == [name(4), name(3), name(2), name(1)]


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = make_pool(4)
    cached(pool, 1, 2)
    pool.allocate(2)
    assert pool.match([name(1), name(2)]) == 2


def test_generation_grows_only_when_a_block_is_given_out_anew() -> None:
    generations = np.zeros(1, np.uint64)
    pool = BlockPool(1, generations)
    seen = [int(generations[0])]
    cached(pool, 1)
    seen.append(int(generations[0]))
    pool.release(pool.reuse([name(1)]))
    seen.append(int(generations[0]))
    pool.allocate(1)
    seen.append(int(generations[0]))
    assert seen == [0, 1, 1, 2]


def test_second_block_of_a_hash_stays_private() -> None:
    pool = make_pool(2)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    assert pool.reuse([name(1)]) == [first]
    pool.release([second])
    assert pool.free_blocks == 1
    pool.check()


def test_publishing_twice_is_once() -> None:
    pool = make_pool(1)
    [block] = pool.allocate(1)
    pool.publish(block, name(1))
    pool.publish(block, name(1))
    assert pool.take_changes() == ([name(1)], [])


def test_forgotten_hash_is_not_found_and_its_block_returns() -> None:
    pool = make_pool(2)
    held, released = pool.allocate(2)
    pool.publish(held, name(1))
    pool.publish(released, name(2))
    pool.release([released])
    pool.forget([name(1), name(2), name(3)])
    assert pool.hashes() == []
    assert places(pool) == (1, 0, 1)
    pool.release([held])
    assert places(pool) == (2, 0, 0)
    pool.check()


def test_changes_are_told_once_and_cancel_out() -> None:
    pool = make_pool(2)
    cached(pool, 1, 2)
    assert pool.take_changes() == ([name(1), name(2)], [])
    assert pool.take_changes() == ([], [])
    blocks = pool.allocate(1)  # evicts 2
    pool.publish(blocks[0], name(3))
    assert pool.take_changes() == ([name(3)], [name(2)])
    pool.forget([name(3)])
    pool.publish(blocks[0], name(3))
    pool.forget([name(1)])
    assert pool.take_changes() == ([], [name(1)])
    pool.publish(pool.allocate(1)[0], name(4))
    pool.forget([name(4)])
    assert pool.take_changes() == ([], [])


def test_digest_lives_as_long_as_the_hash() -> None:
    pool = make_pool(1)
    [block] = pool.allocate(1)
    pool.set_digest(block, b"early")  # not full yet: it may still be written
    assert pool.digest_of(block) is None
    pool.publish(block, name(1))
    pool.set_digest(block, b"digest")
    pool.release([block])
    assert pool.digest_of(block) == b"digest"
    pool.allocate(1)
    assert pool.digest_of(block) is None


def test_misuse_raises_and_changes_nothing() -> None:
    pool = make_pool(3)
    held, shared = pool.allocate(2)
    pool.retain([shared])
    pool.publish(held, name(1))
    [released] = cached(pool, 2)
    before = places(pool), set(pool.hashes())
    for misuse in (
        lambda: pool.release([released]),
        lambda: pool.release([held, released]),
        lambda: pool.release([shared, shared, shared]),
        lambda: pool.release([99]),
        lambda: pool.retain([held, released]),
        lambda: pool.publish(released, name(3)),
        lambda: pool.publish(held, name(3)),
        lambda: pool.reuse([name(1), name(9)]),
    ):
        with pytest.raises(PoolMisuse):
            misuse()
        assert (places(pool), set(pool.hashes())) == before
        pool.check()
    pool.release([held])
    pool.release([shared, shared])


class PoolMachine(RuleBasedStateMachine):
    """The pool against a naive model: a list of references per owner, and hashes in order of last use."""

    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.generations = np.zeros(self.NUM_BLOCKS, np.uint64)
        self.pool = BlockPool(self.NUM_BLOCKS, self.generations)
        self.owners: list[list[int]] = []
        self.hash_of: dict[int, BlockHash] = {}
        self.unused: OrderedDict[int, None] = OrderedDict()  # cached, least recently used first
        self.lives: Counter[int] = Counter()
        self.told: set[BlockHash] = set()

    def held(self) -> set[int]:
        return {block for owner in self.owners for block in owner}

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = self.NUM_BLOCKS - len(self.held()) - len(self.unused)
        assert self.pool.can_allocate(count) == (count <= free + len(self.unused))
        if count > free + len(self.unused):
            with pytest.raises(PoolExhausted):
                self.pool.allocate(count)
            return
        evicted = list(self.unused)[: max(0, count - free)]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert self.held().isdisjoint(blocks)
        assert set(evicted) == set(self.unused) & set(blocks)
        for block in evicted:
            del self.unused[block], self.hash_of[block]
        self.lives.update(blocks)
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(blocks)
        for block in reversed(blocks):
            if block in self.hash_of and block not in self.held():
                self.unused[block] = None

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = self.owners[data.draw(st.integers(0, len(self.owners) - 1))]
        self.pool.retain(blocks)
        self.owners.append(list(blocks))

    @precondition(lambda self: self.held() - self.hash_of.keys())
    @rule(data=st.data(), number=st.integers(0, 7))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.held() - self.hash_of.keys())))
        self.pool.publish(block, name(number))
        if name(number) not in self.hash_of.values():
            self.hash_of[block] = name(number)
            self.pool.set_digest(block, bytes([block, self.lives[block]]))

    @rule(numbers=st.lists(st.integers(0, 7), unique=True, max_size=4))
    def reuse(self, numbers: list[int]) -> None:
        hashes = [name(number) for number in numbers]
        block_of = {hash_: block for block, hash_ in self.hash_of.items()}
        missing = [i for i, hash_ in enumerate(hashes) if hash_ not in block_of]
        matched = missing[0] if missing else len(hashes)
        assert self.pool.match(hashes) == matched
        blocks = self.pool.reuse(hashes[:matched])
        assert blocks == [block_of[hash_] for hash_ in hashes[:matched]]
        for block in blocks:
            self.unused.pop(block, None)
        self.owners.append(blocks)

    @rule(numbers=st.lists(st.integers(0, 7), max_size=2))
    def forget(self, numbers: list[int]) -> None:
        hashes = {name(number) for number in numbers}
        self.pool.forget([name(number) for number in numbers])
        for block in [block for block, hash_ in self.hash_of.items() if hash_ in hashes]:
            del self.hash_of[block]
            self.unused.pop(block, None)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def release_what_nobody_holds(self, block: int) -> None:
        if block not in self.held():
            with pytest.raises(PoolMisuse):
                self.pool.release([block])

    @rule()
    def take_changes(self) -> None:
        stored, removed = self.pool.take_changes()
        assert self.told.isdisjoint(stored)
        assert self.told.issuperset(removed)
        self.told = (self.told | set(stored)) - set(removed)
        assert self.told == set(self.hash_of.values())

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        held = len(self.held())
        assert places(self.pool) == (self.NUM_BLOCKS - held - len(self.unused), len(self.unused), held)
        assert set(self.pool.hashes()) == set(self.hash_of.values())
        for block in range(self.NUM_BLOCKS):
            digest = bytes([block, self.lives[block]]) if block in self.hash_of else None
            assert self.pool.digest_of(block) == digest
            assert self.generations[block] == self.lives[block]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
