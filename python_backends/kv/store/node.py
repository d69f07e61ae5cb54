"""The node store: full KV blocks in shared memory of the host, for all workers of a deployment on it.

The memory belongs to nobody and everybody (core/shared_memory.py): it outlives each worker's restart, and the kernel frees
it with its last user, however that one dies. No process serves it; each reads and writes by itself:

    header        magic, identity, sizes, how many blocks were ever written
    per slot      generation (even: stable, odd: being written), key (the block's hash), digest, last use, proven
    table         hash -> slot, open addressing within a window; only a hint, since the slot's own key decides
    slots         the bytes of one block each

Writers take slots under a lock that the kernel gives back when its holder dies (flock), copy without it, and finish under
it. Readers take no lock: a slot counts when its generation is even and the same before and after the copy, and when the
digest of what was copied is the one written with it. A writer that dies or stops half-way leaves an odd generation, which
others take over after a while; should it wake up and write then, the digest tells.

Eviction is segmented LRU: a block is on probation until it is used again. The proven ones, at most 4/5 of the slots, are
not touched while there is another on probation, so a one-off scan of long prompts evicts only the likes of itself. One
that nobody used while four times the store's size was written has to prove itself again.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from python_backends.core.block_hash import HASH_BYTES
from python_backends.core.errors import ConfigError
from python_backends.core.paths import run_base
from python_backends.core.shared_memory import NODE_MEMORY, create_memory, join, sweep
from python_backends.core.signing import Domain, mac
from python_backends.core.types import BlockHash, StoreCounts
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer
from python_backends.kv.transfer.base import block_digest

log = logging.getLogger(__name__)

_MAGIC = b"BATONND1"
_HEADER = struct.Struct("<8s16sQQ")  # magic, identity, number of slots, bytes of a slot
_CLAIMED_OFFSET = 64
_PAGE = mmap.PAGESIZE
_WINDOW = 8  # places of the table where a hash may be
_SPARSENESS = 4  # places of the table per slot: a full window is then next to impossible
_LOCK_PATIENCE_S = 0.05  # a holder needs microseconds; one that was stopped must not stop the others
_ABANDONED_S = 10.0  # after so long an unfinished write is taken over
_PROVEN_SHARE = 0.8
_PROVEN_FOR = 4  # times the number of slots: blocks written since the last use, after which a proof is out of date
_MOST_VICTIMS = 256  # ranked at once
_BATCH = 64  # blocks written per turn of the lock
_PIECE_BYTES = 4 << 20  # read between two looks at the clock; its digest is made while it is in the processor's cache

Array = npt.NDArray[np.uint64]


class NodeStore:
    """Implements StoreTier."""

    def __init__(self, budget_bytes: int, block_bytes: int, key: bytes, base: Path | None = None) -> None:
        """Join the store of this deployment (its key) on this host, or make it.

        `base`: where the meeting place is; run_base() if None. Raises ConfigError when the memory can't be had.
        """
        self.name = "node"
        self._num_slots = budget_bytes // block_bytes
        if self._num_slots < 2:
            raise ConfigError(f"store.node_mib: {budget_bytes >> 20} MiB holds no 2 blocks of {block_bytes} bytes; give more")
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._victims: deque[tuple[int, int, int]] = deque()  # slot, its generation and stamp when ranked
        self._read = self._missed = self._written = self._corrupt = self._dropped = 0
        sizes = struct.pack("<QQ", self._num_slots, block_bytes)
        self._header = _HEADER.pack(_MAGIC, mac(Domain.NODE_STORE, sizes, key)[:16], self._num_slots, block_bytes)
        base = base or run_base()
        for place in base.glob("node-*"):
            sweep(place, NODE_MEMORY)
        self.place = base / f"node-{self._header[8:16].hex()}"
        self._memory: mmap.mmap | None = None
        self._membership = join(self.place, NODE_MEMORY, self._create, self._is_it)
        self._map(self._memory or mmap.mmap(self._membership.fd, 0))

    # --- StoreTier ----------------------------------------------------------------------------------------------------

    def count(self, hashes: Sequence[BlockHash], deadline: float) -> int:
        """See StoreTier. Takes microseconds."""
        if not hashes:
            return 0
        slots = self._find(_keys_of(hashes))
        return _leading((slots >= 0) & (self._generations[slots] & 1 == 0))

    def read(self, hashes: Sequence[BlockHash], into: npt.NDArray[np.uint8], blocks: Sequence[int], deadline: float) -> int:
        """See StoreTier. numpy gives up the GIL while it copies."""
        if not hashes:
            return 0
        keys = _keys_of(hashes)
        slots = self._find(keys)
        count = _leading(slots >= 0)
        step = max(1, _PIECE_BYTES // self._block_bytes)
        done = 0
        while done < count and time.monotonic() < deadline:
            piece = slice(done, min(done + step, count))
            taken = self._read_piece(keys[piece], slots[piece], into, blocks[piece])
            done += taken
            if taken < piece.stop - piece.start:
                break
        self._use(slots[:done])
        self._read += done
        self._missed += done < len(hashes)
        return done

    def write(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        """See StoreTier."""
        for start in range(0, len(offers), _BATCH):
            batch = offers[start : start + _BATCH]
            blocks = [offer.block for offer in batch]
            generations = np.array([offer.generation for offer in batch], np.uint64)
            self._write(
                [offer.hash for offer in batch],
                [memory.blocks[block] for block in blocks],
                [offer.digest for offer in batch],
                lambda blocks=blocks, generations=generations: memory.generations[blocks] == generations,  # type: ignore[misc]
            )

    def put(self, hashes: Sequence[BlockHash], data: Sequence[npt.NDArray[np.uint8]], digests: Sequence[bytes]) -> None:
        """See StoreTier."""
        for start in range(0, len(hashes), _BATCH):
            batch = slice(start, start + _BATCH)
            intact = np.ones(len(hashes[batch]), np.bool_)
            self._write(hashes[batch], data[batch], digests[batch], lambda intact=intact: intact)  # type: ignore[misc]

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """See StoreTier."""
        if hashes:
            slots = self._find(_keys_of(hashes))
            self._use(slots[slots >= 0])

    def counts(self) -> StoreCounts:
        return StoreCounts(
            read=self._read,
            missed=self._missed,
            written=self._written,
            corrupt=self._corrupt,
            dropped=self._dropped,
            used_bytes=min(int(self._claimed[0]), self._num_slots) * self._block_bytes,
            budget_bytes=self._num_slots * self._block_bytes,
        )

    def close(self) -> None:
        self._membership.close()

    # --- the memory ---------------------------------------------------------------------------------------------------

    def _create(self) -> int:
        size = self._offsets()[-1] + self._num_slots * self._block_bytes
        fd, self._memory = create_memory(NODE_MEMORY, size, "the node store", "store.node_mib")
        self._memory[: len(self._header)] = self._header
        return fd

    def _is_it(self, fd: int) -> bool:
        return os.pread(fd, len(self._header), 0) == self._header

    def _table_size(self) -> int:
        return 1 << (self._num_slots * _SPARSENESS - 1).bit_length()

    def _offsets(self) -> list[int]:
        """Where generations, stamps, uses, claims, keys, digests, proofs, table and slots begin."""
        n = self._num_slots
        offsets = [_PAGE]
        for size in (8 * n, 8 * n, 8 * n, 8 * n, HASH_BYTES * n, 16 * n, n, 4 * (self._table_size() + _WINDOW)):
            offsets.append(-(-(offsets[-1] + size) // _PAGE) * _PAGE)
        return offsets

    def _map(self, memory: mmap.mmap) -> None:
        """Arrays that view the shared memory, and keep it mapped."""
        n = self._num_slots
        generations, stamps, uses, claims, keys, digests, proven, table, slots = self._offsets()
        self._claimed = np.frombuffer(memory, np.uint64, 1, _CLAIMED_OFFSET)  # slots ever claimed, the first n of them new
        self._generations = np.frombuffer(memory, np.uint64, n, generations)
        self._stamps = np.frombuffer(memory, np.uint64, n, stamps)  # monotonic ns of the last use
        self._uses = np.frombuffer(memory, np.uint64, n, uses)  # what `_claimed` was then
        self._claims = np.frombuffer(memory, np.float64, n, claims)  # monotonic s when the last write began
        self._keys = np.frombuffer(memory, np.uint64, n * 2, keys).reshape(n, 2)
        self._digests = np.frombuffer(memory, np.uint64, n * 2, digests).reshape(n, 2)
        self._proven = np.frombuffer(memory, np.uint8, n, proven)
        self._table = np.frombuffer(memory, np.int32, self._table_size() + _WINDOW, table)  # slot + 1; 0 is empty
        self._blocks = np.frombuffer(memory, np.uint8, n * self._block_bytes, slots).reshape(n, self._block_bytes)
        self._mask = np.uint64(self._table_size() - 1)

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether this thread alone may take slots now. False when another one, perhaps stopped, doesn't let go."""
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        if not self._lock.acquire(timeout=_LOCK_PATIENCE_S):
            yield False
            return
        try:
            if not self._flock(deadline):
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(self._membership.fd, fcntl.LOCK_UN)
        finally:
            self._lock.release()

    def _flock(self, deadline: float) -> bool:
        while True:
            try:
                fcntl.flock(self._membership.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.0002)
            else:
                return True

    # --- finding ------------------------------------------------------------------------------------------------------

    def _find(self, keys: Array) -> npt.NDArray[np.intp]:
        """Slots of the keys, uint64 [n, 2]; -1 where there is none. Being written counts as there."""
        homes = (keys[:, 0] & self._mask).astype(np.intp)
        entries = self._table[homes[:, None] + np.arange(_WINDOW)]
        slots = np.clip(entries, 1, self._num_slots).astype(np.intp) - 1
        same = (entries > 0) & (self._keys[slots] == keys[:, None, :]).all(axis=2)
        first = same.argmax(axis=1)
        rows = np.arange(len(keys))
        return np.where(same[rows, first], slots[rows, first], -1)

    def _enter(self, slot: int, key: int) -> None:
        """Make the slot findable by its key. In a full window another block becomes unfindable and will be evicted."""
        home = key & int(self._mask)
        window = self._table[home : home + _WINDOW]
        for step, entry in enumerate(window.tolist()):
            if entry == 0 or not self._belongs(entry - 1, home + step):
                window[step] = slot + 1
                return
        window[slot % _WINDOW] = slot + 1

    def _belongs(self, slot: int, place: int) -> bool:
        """Whether the slot's present key may be looked for at this place of the table."""
        return 0 <= slot < self._num_slots and 0 <= place - (int(self._keys[slot, 0]) & int(self._mask)) < _WINDOW

    def _use(self, slots: npt.NDArray[np.intp]) -> None:
        """Most recently used, the deepest of a prefix a little less than its parents, and proven."""
        now = time.monotonic_ns()
        self._stamps[slots] = now - np.arange(len(slots)).astype(np.uint64)
        self._uses[slots] = self._claimed[0]
        self._proven[slots] = 1

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_piece(self, keys: Array, slots: npt.NDArray[np.intp], into: npt.NDArray[np.uint8], blocks: Sequence[int]) -> int:
        """Copy and verify; returns how many leading blocks are good."""
        before = self._generations[slots]
        digests = self._digests[slots]
        good = (before & 1 == 0) & (self._keys[slots] == keys).all(axis=1)
        count = _leading(good)
        for slot, block in zip(slots[:count].tolist(), blocks, strict=False):
            into[block] = self._blocks[slot]
        count = _leading(good & (self._generations[slots] == before))  # what is overwritten meanwhile is another's
        for position in range(count):
            if block_digest(into[blocks[position]]) != digests[position].tobytes():
                self._discard(int(slots[position]), int(before[position]))
                return position
        return count

    def _discard(self, slot: int, generation: int) -> None:
        """Let nobody find a damaged block again."""
        self._corrupt += 1
        log.warning("a block of the node store is damaged; it will be computed again")
        with self._turn() as mine:
            if mine and self._generations[slot] == generation:
                self._empty(np.array([slot]))
                self._generations[slot] += np.uint64(2)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write(
        self,
        hashes: Sequence[BlockHash],
        data: Sequence[npt.NDArray[np.uint8]],
        digests: Sequence[bytes | None],
        intact: Callable[[], npt.NDArray[np.bool_]],
    ) -> None:
        """Store what is absent. `intact` tells, after the copy, which of `data` are still what `hashes` say."""
        keys = _keys_of(hashes)
        if self._claimed[0] + len(hashes) > self._num_slots and len(self._victims) < len(hashes):
            self._rank_victims()
        with self._turn() as mine:
            claimed = self._claim(keys) if mine else []
            absent = len(claimed) if mine else len(hashes)
        self._dropped += absent - len(claimed)
        if not claimed:
            return
        for position, slot, _ in claimed:
            self._blocks[slot] = data[position]
        good = intact()
        sums = [digests[position] or block_digest(self._blocks[slot]) for position, slot, _ in claimed]
        with self._turn() as mine:
            if mine:
                self._finish(claimed, sums, good)
            else:  # the slots stay unfinished, and are taken over by whoever needs them
                self._dropped += len(claimed)

    def _claim(self, keys: Array) -> list[tuple[int, int, int]]:
        """(position in keys, slot, its odd generation) for what is not here yet, as far as there are slots."""
        now = time.monotonic()
        there = self._find(keys)
        claimed = []
        for position, found in enumerate(there.tolist()):
            slot = self._take_slot() if found < 0 else self._take_over(found, now)
            if slot is None:
                continue
            generation = int(self._generations[slot])
            generation += 1 if generation % 2 == 0 else 2
            self._generations[slot] = generation
            self._keys[slot] = keys[position]
            self._claims[slot] = now
            self._proven[slot] = 0
            self._enter(slot, int(keys[position, 0]))
            claimed.append((position, slot, generation))
        return claimed

    def _take_slot(self) -> int | None:
        """A slot that was never filled, else the next victim that was not used since it was ranked."""
        claimed = int(self._claimed[0])
        if claimed < self._num_slots:
            self._claimed[0] = claimed + 1
            return claimed
        while self._victims:
            slot, generation, stamp = self._victims.popleft()
            if self._generations[slot] == generation and self._stamps[slot] == stamp:
                self._claimed[0] = claimed + 1
                return slot
        return None

    def _take_over(self, slot: int, now: float) -> int | None:
        """The slot of a key that is here already, if whoever writes it has given up."""
        return slot if self._generations[slot] % 2 == 1 and now - self._claims[slot] > _ABANDONED_S else None

    def _finish(self, claimed: Sequence[tuple[int, int, int]], digests: Sequence[bytes], good: npt.NDArray[np.bool_]) -> None:
        """`digests` are of the claimed, `good` of all that were to be written."""
        now = time.monotonic_ns()
        for (position, slot, generation), digest in zip(claimed, digests, strict=True):
            if self._generations[slot] != generation:
                self._dropped += 1
                continue  # taken over by another
            if good[position]:
                self._digests[slot] = np.frombuffer(digest, np.uint64)
                self._stamps[slot] = now - position
                self._written += 1
            else:
                self._empty(np.array([slot]))
                self._dropped += 1
            self._generations[slot] = generation + 1

    def _empty(self, slots: npt.NDArray[np.intp]) -> None:
        self._keys[slots] = 0
        self._stamps[slots] = 0  # the first to be evicted
        self._proven[slots] = 0

    def _rank_victims(self) -> None:
        """Look for the next slots to be reused, without the lock: whoever is used meanwhile is left out when taken."""
        stable = self._generations & np.uint64(1) == 0
        abandoned = ~stable & (time.monotonic() - self._claims > _ABANDONED_S)
        current = self._claimed[0] - self._uses < np.uint64(_PROVEN_FOR * self._num_slots)
        proven = stable & (self._proven == 1) & current
        surplus = int(np.count_nonzero(proven)) - int(_PROVEN_SHARE * self._num_slots)
        if surplus > 0:
            demoted = self._oldest(np.flatnonzero(proven), surplus)
            self._proven[demoted] = 0
            proven[demoted] = False
        candidates = np.flatnonzero((stable & ~proven) | abandoned)
        most = min(_MOST_VICTIMS, max(_BATCH, self._num_slots // 16))
        ranked = self._oldest(candidates if len(candidates) else np.flatnonzero(stable), most)
        self._victims = deque(
            zip(ranked.tolist(), self._generations[ranked].tolist(), self._stamps[ranked].tolist(), strict=True)
        )

    def _oldest(self, slots: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
        """The `count` least recently used of the slots, the oldest first."""
        stamps = self._stamps[slots]
        if count < len(slots):
            some = np.argpartition(stamps, count)[:count]
            slots, stamps = slots[some], stamps[some]
        return slots[np.argsort(stamps)]


def _keys_of(hashes: Sequence[BlockHash]) -> Array:
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), 2)


def _leading(good: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(good) if good.all() else int(good.argmin())
