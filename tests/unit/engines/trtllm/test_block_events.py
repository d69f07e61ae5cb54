from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.engines.base import CacheChange
from python_backends.engines.trtllm.block_events import BlockEvents

SIZE = 4
ROOT = partial(chain_root, "f" * 32)


def ours(tokens: Sequence[int], salt: str = "") -> list[bytes]:
    return list(block_hashes(tokens, SIZE, ROOT(salt)))


class Teller:
    """Tells events with consecutive ids. TensorRT-LLM's hash of a block is any number that the test gives."""

    def __init__(self) -> None:
        self.events = BlockEvents(SIZE, ROOT)
        self.next_id = 0
        self.told: set[bytes] = set()

    def tell(self, data: dict[str, Any], **fields: Any) -> None:
        self.events.take({"event_id": self.next_id, "data": data, **fields})
        self.next_id += 1

    def stored(self, parent: int | None, blocks: dict[int, Sequence[int]], extra_id: int = 0, **fields: Any) -> None:
        entries = [
            {
                "type": "stored_block",
                "block_hash": hash_,
                "cache_level": 0,
                "priority": 35,
                "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": extra_id} for t in tokens],
            }
            for hash_, tokens in blocks.items()
        ]
        self.tell({"type": "stored", "parent_hash": parent, "blocks": entries}, **fields)

    def removed(self, *hashes: int, **fields: Any) -> None:
        self.tell({"type": "removed", "block_hashes": list(hashes)}, **fields)

    @property
    def known(self) -> set[bytes]:
        """What a router knows by now."""
        change = self.events.take_change()
        if change is not None:
            self.told = (set() if change.reset else self.told) - set(change.removed) | set(change.stored)
        return self.told


@pytest.fixture
def teller() -> Teller:
    teller = Teller()
    teller.events.expect([1, 2, 3, 4, 5, 6, 7, 8, 9], "")
    return teller


def test_a_chain_is_told_under_our_hashes(teller: Teller) -> None:
    teller.stored(None, {2**63 + 5: [1, 2, 3, 4], 77: [5, 6, 7, 8]})
    assert teller.known == set(ours([1, 2, 3, 4, 5, 6, 7, 8]))
    teller.stored(77, {78: [9, 10, 11, 12]})
    assert teller.known == set(ours(range(1, 13)))


def test_nothing_new_is_no_change(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    assert teller.events.take_change() == CacheChange(stored=ours([1, 2, 3, 4]), removed=[])
    assert teller.events.take_change() is None


def test_stored_and_removed_in_between_is_no_change(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.removed(1)
    assert teller.events.take_change() is None


def test_removed_blocks_are_told_and_unknown_ones_ignored(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4], 2: [5, 6, 7, 8]})
    assert len(teller.known) == 2
    teller.removed(2, 999)
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_only_full_blocks_count_and_their_removal_is_ignored(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4], 2: [5, 6]})
    assert teller.known == set(ours([1, 2, 3, 4]))
    teller.removed(2)
    teller.stored(2, {3: [7, 8, 9, 10]})
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_a_block_moved_between_gpu_and_host_is_still_there(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.tell({"type": "updated", "block_hash": 1, "cache_level": {"type": "event_diff", "old_value": 0, "new_value": 1}})
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_a_block_on_two_ranks_is_there_until_both_are_gone(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.events.take({**_stored_on(1), "event_id": 0})
    assert len(teller.known) == 1
    teller.removed(1)
    assert len(teller.known) == 1
    teller.events.take({"event_id": 1, "attention_dp_rank": 1, "data": {"type": "removed", "block_hashes": [1]}})
    assert teller.known == set()


def _stored_on(rank: int) -> dict[str, Any]:
    block = {"block_hash": 1, "tokens": [{"token_id": t} for t in (1, 2, 3, 4)]}
    return {"attention_dp_rank": rank, "data": {"type": "stored", "parent_hash": None, "blocks": [block]}}


def test_stored_twice_counts_once(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.removed(1)
    assert teller.known == set()


def test_of_several_windows_only_the_largest_counts(teller: Teller) -> None:
    for window in (1024, 4096):
        teller.tell({"type": "created", "num_blocks_per_cache_level": [8, 0]}, window_size=window)
    teller.stored(None, {1: [1, 2, 3, 4]}, window_size=1024)
    assert teller.known == set()
    teller.stored(None, {1: [1, 2, 3, 4]}, window_size=4096)
    teller.removed(1, window_size=1024)
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_multimodal_blocks_are_not_told(teller: Teller) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]}, extra_id=9)
    assert teller.known == set()


# --- salts -------------------------------------------------------------------------------------------------------------


def test_the_salt_is_that_of_the_requests(teller: Teller) -> None:
    teller.events.expect([20, 21, 22, 23, 24], "tenant")
    teller.stored(None, {1: [20, 21, 22, 23], 2: [24, 25, 26, 27]})
    assert teller.known == set(ours(range(20, 28), "tenant"))


def test_a_first_block_of_two_tenants_is_told_for_neither(teller: Teller) -> None:
    teller.events.expect([1, 2, 3, 4, 99], "tenant")
    teller.stored(None, {1: [1, 2, 3, 4], 2: [5, 6, 7, 8]})
    teller.stored(2, {3: [9, 10, 11, 12]})
    assert teller.known == set()


def test_asking_again_under_the_same_salt_is_not_ambiguous(teller: Teller) -> None:
    teller.events.expect([1, 2, 3, 4, 99], "")
    teller.stored(None, {1: [1, 2, 3, 4]})
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_blocks_that_nobody_asked_for_are_not_told(teller: Teller) -> None:
    """The engine's own start-up request, for example."""
    teller.stored(None, {1: [40, 41, 42, 43]})
    assert teller.known == set()


# --- losses ------------------------------------------------------------------------------------------------------------


def _with_a_gap(teller: Teller) -> None:
    """Two blocks are told, then an event is lost."""
    teller.stored(None, {1: [1, 2, 3, 4], 2: [5, 6, 7, 8]})
    assert len(teller.known) == 2
    teller.next_id += 1
    teller.removed(999)


def test_after_a_gap_nothing_is_told_of_what_was_known(teller: Teller) -> None:
    _with_a_gap(teller)
    assert teller.events.take_change() == CacheChange(stored=[], removed=[], reset=True)
    assert teller.events.gaps == 1
    teller.stored(None, {3: [1, 2, 3, 4]})
    assert teller.events.everything() == CacheChange(stored=ours([1, 2, 3, 4]), removed=[], reset=True)


def test_what_a_request_finds_after_a_gap_is_told_again(teller: Teller) -> None:
    """TensorRT-LLM stores it no second time: else a system prompt would be unknown from the first gap on."""
    _with_a_gap(teller)
    teller.events.found([1, 2, 3, 4], "")
    assert teller.known == set(ours([1, 2, 3, 4]))
    teller.events.found([1, 2, 3, 4, 5, 6, 7, 8], "")
    teller.stored(2, {3: [9, 10, 11, 12]})
    assert teller.known == set(ours(range(1, 13)))
    teller.removed(2, 3)
    assert teller.known == set(ours([1, 2, 3, 4]))


def test_what_is_removed_after_a_gap_is_not_found(teller: Teller) -> None:
    _with_a_gap(teller)
    teller.removed(1, 2)
    teller.events.found([1, 2, 3, 4, 5, 6, 7, 8], "")
    assert teller.known == set()


def test_what_another_tenant_finds_is_not_told(teller: Teller) -> None:
    _with_a_gap(teller)
    teller.events.found([1, 2, 3, 4], "tenant")
    assert teller.known == set()


def test_a_block_behind_which_another_is_stored_is_there(teller: Teller) -> None:
    _with_a_gap(teller)
    teller.stored(2, {3: [9, 10, 11, 12]})
    assert teller.known == set(ours(range(1, 13))[1:])


def test_two_gaps_are_no_worse_than_one(teller: Teller) -> None:
    _with_a_gap(teller)
    teller.next_id += 1
    teller.removed(999)
    teller.events.found([1, 2, 3, 4, 5, 6, 7, 8], "")
    assert teller.known == set(ours([1, 2, 3, 4, 5, 6, 7, 8]))


def test_the_first_event_heard_may_have_any_id(teller: Teller) -> None:
    teller.next_id = 1000
    teller.stored(None, {1: [1, 2, 3, 4]})
    assert len(teller.known) == 1
    assert teller.events.gaps == 0


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event_id": 0},
        {"event_id": 0, "data": {"type": "invented"}},
        {"event_id": 0, "data": {"type": "stored", "blocks": [{"block_hash": "x"}]}},
        {"event_id": "0", "data": {"type": "removed", "block_hashes": [1]}},
    ],
)
def test_what_is_not_understood_counts_as_lost(teller: Teller, event: dict[str, Any]) -> None:
    teller.stored(None, {1: [1, 2, 3, 4]})
    teller.events.take(event)
    assert teller.events.gaps == 1
    assert teller.known == set()


def test_a_random_walk_agrees_with_a_plain_model() -> None:
    """Chains grow and leaves are removed; what is told always equals what is there."""
    rng = random.Random(7)
    teller = Teller()
    chains: dict[int, list[int]] = {}  # TensorRT-LLM's hash -> all tokens up to the block's end
    for step in range(2000):
        leaves = [h for h, t in chains.items() if not any(o != h and c[: len(t)] == t for o, c in chains.items())]
        if leaves and rng.random() < 0.4:
            gone = rng.choice(leaves)
            del chains[gone]
            teller.removed(gone)
        else:
            parent = rng.choice(list(chains)) if chains and rng.random() < 0.7 else None
            before = chains[parent] if parent is not None else []
            block = [rng.randrange(3) for _ in range(SIZE)]
            if before + block in chains.values():
                continue
            teller.events.expect((before + block)[:SIZE], "")
            chains[step] = before + block
            teller.stored(parent, {step: block})
        if rng.random() < 0.3:
            assert teller.known == {ours(tokens)[-1] for tokens in chains.values()}
