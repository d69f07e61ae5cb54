from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.core.types import BlockHash, RequestId
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.lease import GRACE_S, LeaseTable

ONE, TWO = RequestId("one"), RequestId("two")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8, np.zeros(8, np.uint64))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(pool: BlockPool, clock: Clock) -> LeaseTable:
    return LeaseTable(pool, clock)


def test_lease_owns_its_blocks_until_released(pool: BlockPool, leases: LeaseTable) -> None:
    lease_id = leases.grant(ONE, pool.allocate(3), 10.0)
    assert re.fullmatch("[0-9a-f]{16}", lease_id)
    assert (leases.active, pool.held_blocks) == (1, 3)
    assert leases.release(lease_id)
    assert (leases.active, pool.held_blocks) == (0, 0)


def test_releasing_twice_or_the_unknown_is_a_no_op(pool: BlockPool, leases: LeaseTable) -> None:
    blocks = pool.allocate(1)
    pool.retain(blocks)  # somebody else's reference must survive
    lease_id = leases.grant(ONE, blocks, 10.0)
    assert [leases.release(lease_id), leases.release(lease_id), leases.release("?")] == [True, False, False]
    assert pool.held_blocks == 1


def test_later_changes_of_the_callers_list_do_not_matter(pool: BlockPool, leases: LeaseTable) -> None:
    blocks = pool.allocate(2)
    lease_id = leases.grant(ONE, blocks, 10.0)
    blocks.clear()
    leases.release(lease_id)
    assert pool.held_blocks == 0


def test_request_gives_back_all_its_leases_and_no_others(pool: BlockPool, leases: LeaseTable) -> None:
    for request_id in (ONE, ONE, TWO):
        leases.grant(request_id, pool.allocate(1), 10.0)
    assert leases.release_request(ONE)
    assert (leases.active, pool.held_blocks) == (1, 1)
    assert not leases.release_request(ONE)
    assert not leases.release_request(RequestId("unknown"))


def test_lease_lives_for_its_time_and_the_grace(pool: BlockPool, leases: LeaseTable, clock: Clock) -> None:
    lease_id = leases.grant(ONE, pool.allocate(1), 10.0)
    end = clock.now + 10.0 + GRACE_S
    assert leases.next_expiry() == end
    assert leases.expire(end - 0.001) == []
    assert pool.held_blocks == 1
    assert leases.expire(end) == [lease_id]
    assert pool.held_blocks == 0
    assert not leases.release(lease_id)
    assert leases.next_expiry() is None


def test_grace_keeps_the_promise_about_orphans() -> None:
    assert 0 < GRACE_S < 1


def test_leases_end_in_order_of_expiry(pool: BlockPool, leases: LeaseTable, clock: Clock) -> None:
    late, early, released = (leases.grant(ONE, pool.allocate(1), ttl) for ttl in (3.0, 1.0, 0.5))
    leases.release(released)
    assert leases.next_expiry() == clock.now + 1.0 + GRACE_S
    assert leases.expire(clock.now + 100) == [early, late]


def test_close_ends_everything_and_may_be_repeated(pool: BlockPool, leases: LeaseTable) -> None:
    leases.grant(ONE, pool.allocate(1), 10.0)
    leases.grant(TWO, pool.allocate(2), 10.0)
    leases.close()
    leases.close()
    assert (leases.active, pool.held_blocks, leases.next_expiry()) == (0, 0, None)


class LeaseMachine(RuleBasedStateMachine):
    """Grants and every way to end a lease, interleaved: each block's references are given back exactly once."""

    NUM_BLOCKS = 8

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pool = BlockPool(self.NUM_BLOCKS, np.zeros(self.NUM_BLOCKS, np.uint64))
        self.leases = LeaseTable(self.pool, self.clock)
        self.open: dict[str, tuple[RequestId, list[int], float]] = {}
        self.ended: list[str] = []

    def end(self, lease_ids: list[str]) -> None:
        for lease_id in lease_ids:
            del self.open[lease_id]
            self.ended.append(lease_id)

    @rule(request=st.sampled_from([ONE, TWO]), count=st.integers(0, 3), ttl_s=st.integers(1, 4), publish=st.booleans())
    def grant(self, request: RequestId, count: int, ttl_s: int, publish: bool) -> None:
        if not self.pool.can_allocate(count):
            return
        blocks = self.pool.allocate(count)
        for block in blocks if publish else []:
            self.pool.publish(block, BlockHash(len(self.ended).to_bytes(8, "big") + block.to_bytes(8, "big")))
        lease_id = self.leases.grant(request, blocks, ttl_s)
        assert lease_id not in self.open
        self.open[lease_id] = request, blocks, self.clock.now + ttl_s + GRACE_S

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def grant_shared(self, data: st.DataObject) -> None:
        """Another request reuses a prefix: the blocks have two owners."""
        request, blocks, _ = self.open[data.draw(st.sampled_from(list(self.open)))]
        self.pool.retain(blocks)
        lease_id = self.leases.grant(request, blocks, 1)
        self.open[lease_id] = request, blocks, self.clock.now + 1 + GRACE_S

    @precondition(lambda self: self.open or self.ended)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(list(self.open) + self.ended))
        is_open = lease_id in self.open
        assert self.leases.release(lease_id) == is_open
        self.end([lease_id] if is_open else [])

    @rule(request=st.sampled_from([ONE, TWO]))
    def release_request(self, request: RequestId) -> None:
        theirs = [lease_id for lease_id, (owner, _, _) in self.open.items() if owner == request]
        assert self.leases.release_request(request) == bool(theirs)
        self.end(theirs)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        due = [lease_id for lease_id, (_, _, end) in self.open.items() if end <= self.clock.now]
        assert sorted(self.leases.expire(self.clock.now)) == sorted(due)
        self.end(due)

    @rule()
    def close(self) -> None:
        self.leases.close()
        self.end(list(self.open))

    @invariant()
    def blocks_are_held_by_open_leases_only(self) -> None:
        self.pool.check()
        assert self.leases.active == len(self.open)
        assert self.pool.held_blocks == len({block for _, blocks, _ in self.open.values() for block in blocks})
        assert self.leases.next_expiry() == min((end for _, _, end in self.open.values()), default=None)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True)
