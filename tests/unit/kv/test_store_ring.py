from __future__ import annotations

from collections import Counter

import pytest

from python_backends.kv.store.ring import Ring
from tests.kv.blocks import hashes

BLOCKS = hashes(20_000)


@pytest.mark.parametrize("servers", [1, 2, 4, 8, 16])
def test_shares_are_about_even(servers: int) -> None:
    ring = Ring([f"redis-{i}:6379" for i in range(servers)])
    shares = Counter(ring.owner(block) for block in BLOCKS)
    assert len(shares) == servers
    assert all(0.75 < count * servers / len(BLOCKS) < 1.25 for count in shares.values())


@pytest.mark.parametrize("servers", [1, 2, 4, 8, 15])
def test_adding_one_moves_its_share_and_nothing_else(servers: int) -> None:
    names = [f"redis-{i}:6379" for i in range(servers + 1)]
    before, after = Ring(names[:-1]), Ring(names)
    moved = [block for block in BLOCKS if before.owner(block) != after.owner(block)]
    assert all(after.owner(block) == names[-1] for block in moved)
    assert 0.75 < len(moved) * (servers + 1) / len(BLOCKS) < 1.25


def test_the_order_of_the_list_does_not_matter() -> None:
    names = [f"redis-{i}:6379" for i in range(5)]
    one, two = Ring(names), Ring(names[::-1])
    assert all(one.owner(block) == two.owner(block) for block in BLOCKS[:1000])
