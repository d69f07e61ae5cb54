from __future__ import annotations

import gc
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.messages import BlockEvents
from python_backends.core.types import BlockHash, Epoch, WorkerId
from router.prefix_index import PrefixIndex

A, B = WorkerId("a"), WorkerId("b")


def test_the_garbage_collector_does_not_walk_through_it() -> None:
    index, count = PrefixIndex(), 5000
    hashes = [number.to_bytes(16, "big") for number in range(count)]
    index.apply(BlockEvents(A, Epoch(1), 0, hashes, [], reset=True))
    assert len(index) == count
    known = {id(hashes)}
    # By their exact type: isinstance asks what is walked for its class, and torch's deprecated names warn when asked.
    walked = [each for each in gc.get_objects() if type(each) in (dict, set, list) and len(each) >= count]
    assert not [each for each in walked if id(each) not in known and hashes[0] in each]


def blocks(names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def matched(index: PrefixIndex, names: str, size: int = 1) -> dict[WorkerId, int]:
    """Tokens that each of the two workers has."""
    match = index.match([(size, blocks(names))])
    return {worker: tokens for worker in (A, B) if (tokens := match.get(worker))}


def events(
    worker: WorkerId, sequence: int, stored: str = "", removed: str = "", *, epoch: int = 1, reset: bool = False
) -> BlockEvents:
    return BlockEvents(worker, Epoch(epoch), sequence, list(blocks(stored)), list(blocks(removed)), reset)


def started(*workers: WorkerId, stored: str = "") -> PrefixIndex:
    index = PrefixIndex()
    for worker in workers:
        assert index.apply(events(worker, 1, stored, reset=True))
    return index


def test_leading_blocks_are_matched_per_worker() -> None:
    index = started(A, B)
    index.apply(events(A, 2, "xyz"))
    index.apply(events(B, 2, "x"))
    assert matched(index, "xyzw") == {A: 3, B: 1}
    assert matched(index, "yz") == {A: 2}
    assert matched(index, "wx") == {}
    assert matched(index, "") == {}
    assert len(index) == 3


def test_the_deepest_come_first_among_those_that_are_asked_for() -> None:
    index = started(A, B, stored="x")
    index.apply(events(B, 2, "y"))
    match = index.match([(16, blocks("xyz"))])
    assert (match.get(A), match.get(B), match.get(WorkerId("c"))) == (16, 32, 0)
    everybody = index.members([A, B, WorkerId("c")])
    assert match.deepest(everybody, 5) == [B, A]
    assert match.deepest(everybody, 1) == [B]
    assert match.deepest(index.members([A]), 5) == [A]
    assert index.match([(16, blocks("q"))]).deepest(everybody, 5) == []


def test_models_with_other_hashes_are_matched_with_theirs() -> None:
    index = started(A, stored="xy")
    index.apply(events(B, 1, "u", reset=True))
    match = index.match([(16, blocks("xyz")), (64, blocks("uv"))])
    assert (match.get(A), match.get(B)) == (32, 64)
    assert match.deepest(index.members([A, B]), 2) == [B, A]


def test_a_match_is_a_snapshot() -> None:
    index = started(A, stored="x")
    match = index.match([(16, blocks("x"))])
    index.forget(A)
    index.apply(events(B, 1, "x", reset=True))
    assert (match.get(A), match.get(B)) == (16, 0)


def test_asking_changes_nothing() -> None:
    index = started(A, stored="x")
    for _ in range(3):
        assert matched(index, "xq") == {A: 1}
    assert len(index) == 1


def test_removed_blocks_match_no_more() -> None:
    index = started(A, B, stored="xy")
    assert index.apply(events(A, 2, removed="x"))
    assert matched(index, "xy") == {B: 2}
    assert index.apply(events(A, 3, removed="q"))  # never heard of: no harm


def test_a_block_removed_and_stored_in_one_message_is_there() -> None:
    index = started(A, stored="x")
    index.apply(events(A, 2, stored="x", removed="x"))
    assert matched(index, "x") == {A: 1}


def test_a_gap_empties_the_worker_until_its_reset() -> None:
    index = started(A, B, stored="x")
    assert not index.apply(events(A, 3, "y"))
    assert matched(index, "xy") == {B: 1}
    assert not index.apply(events(A, 4, "z"))
    assert index.apply(events(A, 5, "yz", reset=True))
    assert matched(index, "yz") == {A: 2}
    assert index.apply(events(A, 6, "x"))
    assert matched(index, "xyz") == {A: 3, B: 1}


def test_a_repeated_message_counts_as_a_gap() -> None:
    index = started(A, stored="x")
    assert not index.apply(events(A, 1, "y"))
    assert matched(index, "x") == {}


def test_the_first_message_of_a_worker_must_be_a_reset() -> None:
    assert not PrefixIndex().apply(events(A, 1, "x"))


def test_another_life_of_the_worker_starts_empty() -> None:
    index = started(A, stored="x")
    assert not index.apply(events(A, 2, "y", epoch=2))
    assert matched(index, "x") == {}
    assert index.apply(events(A, 1, "z", epoch=2, reset=True))
    assert matched(index, "z") == {A: 1}


def test_who_has_left_makes_room_for_who_comes() -> None:
    """Pods have other names in their next life: after a thousand of them a block's holders still fit into a machine word."""
    index = started(A, B, stored="x")
    for number in range(1000):
        pod = WorkerId(f"pod-{number}")
        index.apply(events(pod, 1, "xy", reset=True))
        match = index.match([(1, blocks("xy"))])
        assert match.deepest(index.members([A, B, pod]), 1) == [pod]
        index.leave(pod)
        assert index.match([(1, blocks("xy"))]).get(pod) == 0
    assert index.members([WorkerId("the next")]) == 0b100
    assert matched(index, "xy") == {A: 1, B: 1}


def test_forgetting_leaves_nothing() -> None:
    index = started(A, B, stored="xy")
    index.forget(A)
    assert matched(index, "xy") == {B: 2}
    index.forget(B)
    index.forget(B)
    assert len(index) == 0


def test_a_worker_is_behind_when_it_sent_more_than_was_heard() -> None:
    index = started(A)
    assert not index.is_behind(A, 1, 1)
    assert index.is_behind(A, 1, 2)
    assert index.is_behind(A, 2, 1)
    assert not index.is_behind(B, 1, 0)
    assert index.is_behind(B, 1, 1)


def test_a_heartbeat_older_than_the_events_is_no_reason_to_ask_again() -> None:
    index = started(A)
    index.apply(events(A, 2, "x"))
    assert not index.is_behind(A, 1, 1)


_ALPHABET = "uvwxyz"
_message = st.tuples(
    st.sampled_from([A, B]),
    st.text(_ALPHABET, max_size=4),
    st.text(_ALPHABET, max_size=3),
    st.sampled_from(["event", "event", "event", "lost", "reset", "reborn", "forget"]),
)


@given(st.lists(_message, max_size=40), st.text(_ALPHABET, max_size=6))
def test_like_a_plain_dictionary(messages: Sequence[tuple[WorkerId, str, str, str]], asked: str) -> None:
    index = PrefixIndex()
    believed: dict[WorkerId, set[str] | None] = {A: None, B: None}  # None: out of step until a reset
    sequence = {A: 0, B: 0}
    epoch = {A: 1, B: 1}
    for worker, stored, removed, kind in messages:
        known = believed[worker]
        if kind == "forget":
            index.forget(worker)
            believed[worker] = None
            continue
        if kind == "reborn":
            epoch[worker] += 1
            sequence[worker] = 0
            believed[worker] = known = None
        sequence[worker] += 2 if kind == "lost" else 1
        reset = kind in ("reset", "reborn")
        in_step = index.apply(events(worker, sequence[worker], stored, removed, epoch=epoch[worker], reset=reset))
        assert in_step is (reset or (known is not None and kind != "lost"))
        if not in_step:
            believed[worker] = None
        else:
            believed[worker] = (set() if reset or known is None else known) - set(removed) | set(stored)
        assert index.is_behind(worker, epoch[worker], sequence[worker]) is not in_step
    expected = {}
    for worker, names in believed.items():
        count = next((i for i, name in enumerate(asked) if name not in (names or ())), len(asked))
        if count:
            expected[worker] = count
    found = matched(index, asked)
    assert found.keys() == expected.keys()
    for worker, count in expected.items():
        held = believed[worker] or set()
        is_closed = not any(name in held for name in asked[count:])
        assert found[worker] == count if is_closed else found[worker] >= count
    assert len(index) == len(set().union(*(names or () for names in believed.values())))


@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(1, 70))
def test_depths_are_found_in_long_prompts_with_few_lookups(depths: Sequence[int], length: int) -> None:
    chain = [BlockHash(bytes([i]) * 16) for i in range(70)]
    workers = [WorkerId(f"w{number}") for number in range(len(depths))]
    index = PrefixIndex()
    for worker, depth in zip(workers, depths, strict=True):
        index.apply(BlockEvents(worker, Epoch(1), 1, list(chain[:depth]), [], reset=True))
    match = index.match([(16, chain[:length])])
    assert [match.get(worker) for worker in workers] == [16 * min(depth, length) for depth in depths]
    deepest = match.deepest(index.members(workers), 9)
    assert [match.get(worker) for worker in deepest] == sorted((16 * min(d, length) for d in depths if d), reverse=True)
