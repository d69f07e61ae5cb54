"""The node store: shared by processes, gone with the last of them, and never a wrong byte, whoever dies or stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.shared_memory import NODE_MEMORY, hold
from python_backends.core.types import BlockHash
from python_backends.kv.store.node import NodeStore
from tests.kv.blocks import BLOCK_BYTES, Pool, content, hashes

KEY = b"k" * 32
SLOTS = 128
BUDGET = SLOTS * BLOCK_BYTES

Join = Callable[..., NodeStore]


def soon() -> float:
    return time.monotonic() + 5


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Makes members of one store (unless told otherwise)."""
    members: list[NodeStore] = []

    def join_store(budget: int = BUDGET, key: bytes = KEY) -> NodeStore:
        members.append(NodeStore(budget, BLOCK_BYTES, key, tmp_path))
        return members[-1]

    yield join_store
    for member in members:
        member.close()
        member.close()
    assert not list(tmp_path.iterdir()), "the last member did not clear away"


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(1024)
    yield pool
    pool.close()


def put(store: NodeStore, pool: Pool, names: Sequence[BlockHash]) -> None:
    for start in range(0, len(names), 64):
        store.write(pool.offer(names[start : start + 64]), pool.memory)


def read_all(store: NodeStore, pool: Pool, names: Sequence[BlockHash]) -> int:
    """How many leading blocks come, each checked."""
    targets = list(range(pool.memory.num_blocks - len(names), pool.memory.num_blocks))
    count = store.read(names, pool.memory.blocks, targets, soon())
    assert pool.holds(names[:count], targets[:count])
    return count


def there(store: NodeStore, names: Sequence[BlockHash]) -> list[bool]:
    return [store.count([name], soon()) == 1 for name in names]


# --- what is stored is found ------------------------------------------------------------------------------------------


def test_another_member_reads_what_one_has_written(join: Join, pool: Pool) -> None:
    writer, reader, names = join(), join(), hashes(100)
    put(writer, pool, names)
    assert reader.count(names, soon()) == 100
    assert read_all(reader, pool, names) == 100
    assert reader.counts().read == writer.counts().written == 100


@pytest.mark.parametrize("known", [True, False])
def test_digests_are_made_where_they_are_not_known(join: Join, pool: Pool, known: bool) -> None:
    store, names = join(), hashes(5)
    store.write(pool.offer(names, digests=known), pool.memory)
    assert read_all(store, pool, names) == 5


def test_only_the_leading_blocks_count(join: Join, pool: Pool) -> None:
    store, names = join(), hashes(10)
    put(store, pool, names[:4] + names[5:])
    assert store.count(names, soon()) == read_all(store, pool, names) == 4
    assert store.count([], soon()) == store.read([], pool.memory.blocks, [], soon()) == 0
    assert store.count(names[4:], soon()) == 0


def test_a_passed_deadline_reads_nothing(join: Join, pool: Pool) -> None:
    store, names = join(), hashes(3)
    put(store, pool, names)
    assert store.read(names, pool.memory.blocks, [0, 1, 2], time.monotonic() - 1) == 0


def test_what_is_there_is_not_written_again(join: Join, pool: Pool) -> None:
    one, two, names = join(), join(), hashes(20)
    put(one, pool, names)
    put(two, pool, [*names, *names])
    assert (one.counts().written, two.counts().written) == (20, 0)
    assert two.counts().used_bytes == 20 * BLOCK_BYTES


def test_a_block_reused_before_it_was_copied_is_not_stored(join: Join, pool: Pool) -> None:
    store, names = join(), hashes(3)
    offers = pool.offer(names)
    pool.memory.generations[offers[1].block] += np.uint64(1)
    pool.memory.blocks[offers[1].block] = 0
    store.write(offers, pool.memory)
    assert there(store, names) == [True, False, True]
    put(store, pool, names)
    assert read_all(store, pool, names) == 3


def test_blocks_of_another_tier_are_taken(join: Join, pool: Pool) -> None:
    store, names = join(), hashes(70)
    offers = pool.offer(names)
    store.put(names, [content(name) for name in names], [offer.digest or b"" for offer in offers])
    assert read_all(store, pool, names) == 70


def test_deployments_and_sizes_are_apart(join: Join, pool: Pool) -> None:
    names = hashes(3)
    put(join(), pool, names)
    assert there(join(key=b"x" * 32), names) == [False] * 3
    assert there(join(budget=2 * BUDGET), names) == [False] * 3


def test_a_budget_of_less_than_two_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.node_mib"):
        NodeStore(BLOCK_BYTES, BLOCK_BYTES, KEY, tmp_path)


def test_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lower store\.node_mib"):
        NodeStore(1 << 50, 1 << 40, KEY, tmp_path)


# --- what goes first --------------------------------------------------------------------------------------------------


def test_the_least_recently_stored_goes_first(join: Join, pool: Pool) -> None:
    store = join()
    old, new = hashes(SLOTS, 1), hashes(SLOTS // 2, 2)
    put(store, pool, old)
    put(store, pool, new)
    assert all(there(store, new))
    assert sum(there(store, old)) == SLOTS // 2


def test_a_prefix_loses_its_end_first(join: Join, pool: Pool) -> None:
    store, prefix = join(), hashes(64, 1)
    store.write(pool.offer(prefix), pool.memory)
    put(store, pool, hashes(SLOTS - 64 + 16, 2))
    assert store.count(prefix, soon()) == sum(there(store, prefix)) == 48


@pytest.mark.parametrize("use", ["read", "touch"])
def test_a_scan_does_not_evict_what_is_used(join: Join, pool: Pool, use: str) -> None:
    store, hot = join(), hashes(SLOTS // 2, 1)
    put(store, pool, hot)
    if use == "read":
        assert read_all(store, pool, hot) == len(hot)
    else:
        store.touch([*hashes(5, 9), *hot])
    put(store, pool, hashes(SLOTS * 3, 2))
    assert read_all(store, pool, hot) == len(hot)
    put(store, pool, hashes(SLOTS * 3, 3))
    assert read_all(store, pool, hot) == len(hot)


def test_what_was_used_long_ago_does_not_stay_for_ever(join: Join, pool: Pool) -> None:
    store, once_hot = join(), hashes(SLOTS // 2, 1)
    put(store, pool, once_hot)
    assert read_all(store, pool, once_hot) == len(once_hot)
    put(store, pool, hashes(SLOTS * 6, 2))
    assert not any(there(store, once_hot))


def test_new_favourites_push_out_old_ones(join: Join, pool: Pool) -> None:
    store = join()
    for generation in range(10):
        names = hashes(16, generation)
        put(store, pool, names)
        assert read_all(store, pool, names) == len(names)
    assert not any(there(store, hashes(16, 0)))
    assert all(there(store, names))


def test_the_store_is_as_large_as_its_budget(join: Join, pool: Pool) -> None:
    store = join()
    for seed in range(5):
        put(store, pool, hashes(SLOTS, seed))
    everything = [name for seed in range(5) for name in hashes(SLOTS, seed)]
    assert SLOTS * 0.95 <= sum(there(store, everything)) <= SLOTS
    assert store.counts().used_bytes == store.counts().budget_bytes == BUDGET


# --- members that come, go and die ------------------------------------------------------------------------------------

MEMBER = """
import sys, time
from pathlib import Path
from tests.kv.test_node_store import BUDGET, KEY, BLOCK_BYTES, NodeStore, Pool, hashes, put
store = NodeStore(BUDGET, BLOCK_BYTES, KEY, Path(sys.argv[1]))
pool = Pool()
exec(sys.argv[2])
print("done", flush=True)
sys.stdin.read()
"""


class Member:
    """Another process that is a member of the store, and has done what `code` says."""

    def __init__(self, base: Path, code: str = "", *, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(base), code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if wait:
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == "done\n"

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        self.process.communicate(timeout=20)


def test_survives_the_writer_and_ends_with_the_last_member(join: Join, pool: Pool, tmp_path: Path) -> None:
    reader, names = join(), hashes(50)
    member = Member(tmp_path, "put(store, pool, hashes(50))")
    member.end()
    late = join()
    for store in (reader, late):
        assert read_all(store, pool, names) == 50
    for store in (reader, late):
        store.close()
    assert read_all(join(), pool, names) == 0


def test_whoever_holds_it_bridges_the_time_without_a_worker(join: Join, pool: Pool, tmp_path: Path) -> None:
    member = Member(tmp_path, "put(store, pool, hashes(50))")
    (place,) = tmp_path.iterdir()
    holder = hold(place, NODE_MEMORY)
    assert holder is not None
    member.end()
    store = join()
    assert read_all(store, pool, hashes(50)) == 50
    holder.close()
    store.close()
    assert not place.exists()
    assert hold(place, NODE_MEMORY) is None


def test_nothing_is_left_when_everybody_is_killed(pool: Pool, tmp_path: Path) -> None:
    members = [Member(tmp_path, "put(store, pool, hashes(50))") for _ in range(3)]
    for member in members:
        assert "/dev/shm" not in Path(f"/proc/{member.process.pid}/maps").read_text()
        member.end()
    (place,) = tmp_path.iterdir()
    assert hold(place, NODE_MEMORY) is None, "the memory is still there"
    store = NodeStore(2 * BUDGET, BLOCK_BYTES, KEY, tmp_path)  # any later store clears away what lies about
    assert list(tmp_path.iterdir()) == [store.place]
    store.close()


def test_entries_that_lead_to_something_else_are_passed_over(join: Join, pool: Pool, tmp_path: Path) -> None:
    first = join()
    reader, writer = os.pipe()
    other = os.memfd_create(NODE_MEMORY, os.MFD_CLOEXEC)
    for name in (f"{os.getpid()}.{reader}", f"{os.getpid()}.{other}", "999999999.3", "0.0", "x", f"{os.getpid()}.2.3"):
        (first.place / name).symlink_to("/nowhere")
    put(first, pool, hashes(3))
    assert read_all(join(), pool, hashes(3)) == 3
    for descriptor in (reader, writer, other):
        os.close(descriptor)


# --- nobody waits, and nobody reads what was not written ----------------------------------------------------------------


def test_a_member_killed_with_the_lock_gives_it_back(join: Join, pool: Pool, tmp_path: Path) -> None:
    store = join()
    member = Member(tmp_path, "turn = store._turn(); assert turn.__enter__()")
    began = time.monotonic()
    put(store, pool, hashes(3))
    assert time.monotonic() - began < 1
    assert store.counts().dropped == 3
    member.end()
    put(store, pool, hashes(3))
    assert read_all(store, pool, hashes(3)) == 3


def test_readers_need_no_lock(join: Join, pool: Pool, tmp_path: Path) -> None:
    store = join()
    put(store, pool, hashes(3))
    member = Member(tmp_path, "turn = store._turn(); assert turn.__enter__()")
    member.process.send_signal(signal.SIGSTOP)
    assert read_all(store, pool, hashes(3)) == 3
    member.end()


HALF_WRITTEN = """
from tests.kv.blocks import content
import numpy as np
from python_backends.kv.store.node import _keys_of
with store._turn() as mine:
    claimed = store._claim(_keys_of(hashes(4)))
for position, slot, _ in claimed[:2]:
    store._blocks[slot] = content(hashes(4)[position])
"""


def test_a_half_written_block_is_not_there_until_another_writes_it(
    join: Join, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = join(), hashes(4)
    member = Member(tmp_path, HALF_WRITTEN)
    assert there(store, names) == [False] * 4
    member.end()
    put(store, pool, names)
    assert there(store, names) == [False] * 4, "it could still be in the writing"
    monkeypatch.setattr("python_backends.kv.store.node._ABANDONED_S", 0.0)
    put(store, pool, names)
    assert read_all(store, pool, names) == 4


LATE_WRITER = (
    HALF_WRITTEN
    + """
print("done", flush=True)
sys.stdin.readline()
for position, slot, _ in claimed:
    store._blocks[slot] = 0xAA
with store._turn() as mine:
    store._finish(claimed, [b"d" * 16] * 4, np.ones(4, bool))
print(store.counts().written, store.counts().dropped, flush=True)
"""
)


def test_a_writer_that_wakes_up_late_does_no_harm(
    join: Join, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = join(), hashes(4)
    member = Member(tmp_path, LATE_WRITER)
    monkeypatch.setattr("python_backends.kv.store.node._ABANDONED_S", 0.0)
    put(store, pool, names)
    assert read_all(store, pool, names) == 4
    assert member.process.stdin is not None
    assert member.process.stdout is not None
    print(file=member.process.stdin, flush=True)
    assert member.process.stdout.readline() == "0 4\n"
    assert read_all(store, pool, names) == 0
    assert store.counts().corrupt == 1
    member.end()


def test_a_flipped_bit_is_found_and_the_block_forgotten(join: Join, pool: Pool) -> None:
    store, names = join(), hashes(5)
    put(store, pool, names)
    store._blocks[2, 17] ^= 4
    assert read_all(store, pool, names) == 2
    assert there(store, names) == [True, True, False, True, True]
    assert store.counts().corrupt == 1
    put(store, pool, names)
    assert read_all(store, pool, names) == 5


@pytest.mark.parametrize("seed", range(20))
def test_garbage_in_the_tables_costs_hits_only(join: Join, pool: Pool, seed: int) -> None:
    store, names = join(), hashes(SLOTS)
    put(store, pool, names)
    rng = np.random.default_rng(seed)
    arrays = (store._generations, store._stamps, store._keys, store._digests, store._proven, store._table)
    array = arrays[seed % len(arrays)]
    flat = array.reshape(-1).view(np.uint8)
    places = rng.integers(0, len(flat), 200)
    flat[places] = rng.integers(0, 256, 200)
    for _ in range(3):
        for name in names:
            read_all(store, pool, [name])
        put(store, pool, hashes(SLOTS, int(rng.integers(1, 1000))))
    assert sum(there(store, names)) < SLOTS


STRESS = """
import random
rng = random.Random(int(sys.argv[3]))
end = time.monotonic() + 4
names = hashes(600)
wrong = good = 0
while time.monotonic() < end:
    start, count = rng.randrange(560), rng.randrange(1, 40)
    some = names[start : start + count]
    if rng.random() < 0.5:
        store.write(pool.offer(some), pool.memory)
    else:
        targets = rng.sample(range(pool.memory.num_blocks), count)
        got = store.read(some, pool.memory.blocks, targets, time.monotonic() + 5)
        good += got
        wrong += not pool.holds(some[:got], targets[:got])
print(wrong, good, store.counts().corrupt, flush=True)
"""


def test_processes_that_write_read_evict_and_die_never_read_a_wrong_byte(
    join: Join, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 blocks through 128 slots by five processes; one is stopped now and then, two are killed."""
    keeper = join()
    code = MEMBER.replace('print("done", flush=True)', "")
    members = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), STRESS, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(5)
    ]
    time.sleep(1.5)
    for _ in range(20):
        members[0].send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        members[0].send_signal(signal.SIGCONT)
        time.sleep(0.02)
    for member in members[3:]:
        member.kill()
        member.communicate(timeout=20)
    results = []
    for member in members[:3]:
        assert member.stdout is not None
        results.append([int(number) for number in member.stdout.readline().split()])
        member.communicate(timeout=20)
    assert [wrong for wrong, _, _ in results] == [0, 0, 0]
    assert all(good > 100 for _, good, _ in results)
    monkeypatch.setattr("python_backends.kv.store.node._ABANDONED_S", 0.0)
    put(keeper, pool, hashes(20, 7))
    assert read_all(keeper, pool, hashes(20, 7)) == 20
