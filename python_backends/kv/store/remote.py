"""The remote store: full KV blocks in Redis, for all workers of all hosts that run the same model.

One value per block (value.py), under a key that holds fingerprint and block hash, hence the tenant's salt. Several servers
share the blocks by consistent hashing (ring.py), or are one Redis Cluster. A server that is down, slow, full, flushed or
wrong costs hits: each read has a deadline, a failing server is left alone for a while, and every block is checked.

Values of several blocks were measured and are not worth it: from 256 KiB, which blocks of real models exceed, the rate
does not grow any more.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice

import numpy as np
import numpy.typing as npt

from python_backends.core.config import RemoteStoreConfig
from python_backends.core.layout import KVLayout
from python_backends.core.types import BlockHash, StoreCounts
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer
from python_backends.kv.store.redis_servers import find_servers
from python_backends.kv.store.redis_wire import FAILURES, Argument, RedisServer, ReplyError, Wire
from python_backends.kv.store.value import (
    PREFIX_BYTES,
    DamagedValue,
    ForeignValue,
    ValueHeader,
    decode_header,
    encode_header,
    header_length,
)
from python_backends.kv.transfer.base import block_digest

log = logging.getLogger(__name__)

_WINDOW_BYTES = 8 << 20  # asked of the servers ahead of what is being read; they hold so much in their output buffers
_WRITE_S = 2.0  # for one window
_ASK_MOST = 512  # keys in one go when only their presence is asked
_KNOWN_MOST = 200_000  # blocks of which this worker remembers that they are there
_USED_FRESH_S = 1.0  # how long a server's word on its memory is believed, ...
_NEAR = 0.9  # ... below so much of the budget

Block = npt.NDArray[np.uint8]
_Command = Callable[[bytes], list[Argument]]  # key -> command


class RemoteStore:
    """Implements StoreTier."""

    def __init__(self, config: RemoteStoreConfig, layout: KVLayout, fingerprint: str) -> None:
        """Connects in the background. Raises ConfigError for a wrong URL, or a file that can't be read."""
        self.name = "remote"
        self._ttl_s = config.ttl_s
        self._budget = config.budget_mib << 20
        self._layout = layout
        self._fingerprint = fingerprint
        self._servers = find_servers(config)
        self._window = max(1, _WINDOW_BYTES // layout.block_bytes)
        self._known: OrderedDict[BlockHash, float] = OrderedDict()  # -> monotonic s when seen there; oldest use first
        self._known_lock = threading.Lock()
        self._staging: Block = np.empty((0, layout.block_bytes), np.uint8)
        self._writing = threading.Lock()  # of the staging
        self._read = self._missed = self._written = self._corrupt = self._dropped = 0
        self._greeting = threading.Thread(target=self._greet, name="remote-store", daemon=True)
        self._greeting.start()

    # --- StoreTier ----------------------------------------------------------------------------------------------------

    def count(self, hashes: Sequence[BlockHash], deadline: float) -> int:
        """See StoreTier."""
        found = 0
        for start in range(0, len(hashes), _ASK_MOST):
            some = hashes[start : start + _ASK_MOST]
            there = self._exist(some, deadline)
            leading = next((i for i, hash_ in enumerate(some) if hash_ not in there), len(some))
            found += leading
            if leading < len(some):
                break
        return found

    def read(self, hashes: Sequence[BlockHash], into: Block, blocks: Sequence[int], deadline: float) -> int:
        """See StoreTier."""
        with _Reading(self._servers.owner, self._key, deadline) as reading:
            done = self._read_windows(reading, hashes, into, blocks)
        self._read += done
        self._missed += done < len(hashes)
        self._know(hashes[:done])
        self._forget(hashes[done:])
        if reading.damaged:
            self._discard(reading.damaged)
        return done

    def write(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        """See StoreTier."""
        unknown = self._unknown([offer.hash for offer in offers])
        wanted = [offer for offer in offers if offer.hash in unknown]
        with self._writing:
            if not len(self._staging):
                self._staging = np.empty((self._window, self._layout.block_bytes), np.uint8)
            for start in range(0, len(wanted), self._window):
                self._write_window(wanted[start : start + self._window], memory)

    def put(self, hashes: Sequence[BlockHash], data: Sequence[Block], digests: Sequence[bytes]) -> None:
        """See StoreTier."""
        deadline = time.monotonic() + _WRITE_S
        there = self._exist(hashes, deadline)
        values = dict(zip(hashes, zip(data, digests, strict=True), strict=True))
        self._store({hash_: value for hash_, value in values.items() if hash_ not in there}, deadline)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """See StoreTier. Renews the time to live of what was not heard of for an eighth of it."""
        due = time.monotonic() - self._ttl_s / 8
        with self._known_lock:
            old = [hash_ for hash_ in hashes if self._known.get(hash_, -math.inf) < due]
        ttl = str(self._ttl_s).encode()
        self._know(self._each(old, lambda key: [b"EXPIRE", key, ttl], time.monotonic() + _WRITE_S))

    def counts(self) -> StoreCounts:
        servers = self._servers.known()
        return StoreCounts(
            read=self._read,
            missed=self._missed,
            written=self._written,
            corrupt=self._corrupt,
            dropped=self._dropped,
            used_bytes=sum(server.used_bytes for server in servers),
            budget_bytes=len(servers) * self._budget,
            up=all(server.up for server in servers),
        )

    def close(self) -> None:
        self._greeting.join(_WRITE_S)  # a connection that is closed under it breaks in odd ways
        for server in self._servers.known():
            server.close()

    def _greet(self) -> None:
        """Connect, so that the first request doesn't wait for it; a server that is not there is told of at the start."""
        self._each([BlockHash(bytes([i]) * 16) for i in range(256)], lambda key: [b"EXISTS", key], time.monotonic() + _WRITE_S)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _key(self, hash_: BlockHash) -> bytes:
        return f"baton:kv:{self._fingerprint}:{hash_.hex()}".encode()

    def _read_windows(self, reading: _Reading, hashes: Sequence[BlockHash], into: Block, blocks: Sequence[int]) -> int:
        """The next window is asked for before one is read, so that neither servers nor network wait for us."""
        size = self._window
        reading.ask(hashes[:size])
        for start in range(0, len(hashes), size):
            reading.ask(hashes[start + size : start + 2 * size])
            for position in range(start, min(start + size, len(hashes))):
                if not self._receive(reading, hashes[position], into[blocks[position]]):
                    return position
        return len(hashes)

    def _receive(self, reading: _Reading, hash_: BlockHash, into: Block) -> bool:
        """Read the next value of the block's server into a block of the pool. False: it is not there, or no good."""
        wire = reading.wire_for(hash_)
        if wire is None:
            return False
        try:
            length = wire.bulk_length()
            if length is None:
                return False
            digest = self._read_header(wire, length, hash_)
            wire.read_into(into.data)
            wire.end_bulk()
            if block_digest(into) != digest:
                raise DamagedValue("its digest is another")
        except ReplyError as error:
            self._servers.misled(error)
            return False
        except ForeignValue:
            wire.give_up()
            return False
        except DamagedValue as error:
            log.warning("a block in the remote store is damaged and will be computed again: %s", error)
            wire.give_up()
            self._corrupt += 1
            reading.damaged.append(hash_)
            return False
        except FAILURES:
            return False
        return True

    def _read_header(self, wire: Wire, length: int, hash_: BlockHash) -> bytes:
        """The digest of the block that follows. Raises ForeignValue or DamagedValue when none follows that is wanted."""
        if length < PREFIX_BYTES:
            raise DamagedValue(f"it has {length} bytes")
        prefix = bytearray(PREFIX_BYTES)
        wire.read_into(memoryview(prefix))
        size = header_length(bytes(prefix))
        if PREFIX_BYTES + size + self._layout.block_bytes != length:
            raise DamagedValue(f"it has {length} bytes")
        body = bytearray(size)
        wire.read_into(memoryview(body))
        header = decode_header(bytes(body))
        if (header.fingerprint, header.layout, header.hash) != (self._fingerprint, self._layout, hash_):
            raise DamagedValue("it is another block")
        return header.digest

    def _exist(self, hashes: Sequence[BlockHash], deadline: float) -> set[BlockHash]:
        there = self._each(hashes, lambda key: [b"EXISTS", key], deadline)
        self._know(there)
        return set(there)

    def _discard(self, hashes: Sequence[BlockHash]) -> None:
        """Take damaged values away, so that good ones can be written."""
        self._each(hashes, lambda key: [b"UNLINK", key], time.monotonic() + _WRITE_S)

    def _each(self, hashes: Sequence[BlockHash], command: _Command, deadline: float) -> list[BlockHash]:
        """Ask every hash's server. Returns the hashes for which the answer was 1."""
        positive: list[BlockHash] = []
        for server, some in self._shared(hashes).items():
            with suppress(*FAILURES), server.conversation(deadline) as wire:
                wire.send([command(self._key(hash_)) for hash_ in some])
                for hash_ in some:
                    try:
                        answer = wire.reply()
                    except ReplyError as error:
                        self._servers.misled(error)
                    else:
                        if answer == 1:
                            positive.append(hash_)
        return positive

    def _shared(self, hashes: Iterable[BlockHash]) -> dict[RedisServer, list[BlockHash]]:
        """The hashes by server; those whose server is down are left out."""
        shared: dict[RedisServer, list[BlockHash]] = {}
        for hash_ in hashes:
            server = self._servers.owner(hash_, self._key(hash_))
            if server is not None:
                shared.setdefault(server, []).append(hash_)
        return shared

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write_window(self, offers: Sequence[Offer], memory: PoolMemory) -> None:
        deadline = time.monotonic() + _WRITE_S
        there = self._exist([offer.hash for offer in offers], deadline)
        values: dict[BlockHash, tuple[Block, bytes]] = {}
        absent = [offer for offer in offers if offer.hash not in there]
        for room, offer in zip(self._staging, absent, strict=False):
            room[:] = memory.blocks[offer.block]
            if memory.generations[offer.block] == offer.generation:  # still the block that was offered
                values[offer.hash] = (room, offer.digest or block_digest(room))
        self._dropped += len(absent) - len(values)
        self._store(values, deadline)

    def _store(self, values: Mapping[BlockHash, tuple[Block, bytes]], deadline: float) -> None:
        """Write values that are not there yet."""
        written = 0
        for server, hashes in self._shared(values).items():
            if server.takes_writes:
                with suppress(*FAILURES), server.conversation(deadline) as wire:
                    if self._make_room(server, wire, len(hashes) * self._layout.block_bytes):
                        written += self._set(server, wire, {hash_: values[hash_] for hash_ in hashes})
        self._written += written
        self._dropped += len(values) - written

    def _set(self, server: RedisServer, wire: Wire, values: Mapping[BlockHash, tuple[Block, bytes]]) -> int:
        """Returns how many the server has taken."""
        ttl = str(self._ttl_s).encode()
        for hash_, (data, digest) in values.items():
            header = encode_header(ValueHeader(self._fingerprint, self._layout, hash_, digest))
            wire.send([[b"SET", self._key(hash_), (header, data.data), b"EX", ttl]])
        taken = []
        for hash_ in values:
            try:
                wire.reply()
            except ReplyError as error:
                server.refused_write(error)
                self._servers.misled(error)
            else:
                taken.append(hash_)
        server.used_bytes += len(taken) * self._layout.block_bytes
        self._know(taken)
        return len(taken)

    def _make_room(self, server: RedisServer, wire: Wire, num_bytes: int) -> bool:
        """Keep the server within the budget: what this worker used least recently gives way to new blocks."""
        if not self._budget:
            return True
        try:
            near = server.used_bytes + num_bytes > self._budget * _NEAR
            if near or time.monotonic() - server.said_at > _USED_FRESH_S:
                wire.send([[b"INFO", b"memory"]])
                server.used_bytes = _used_memory(wire.reply())
                server.said_at = time.monotonic()
            excess = server.used_bytes + num_bytes - self._budget
            if excess <= 0:
                return True
            oldest = self._take_oldest(server, -(-excess // self._layout.block_bytes))
            wire.send([[b"UNLINK", self._key(hash_)] for hash_ in oldest])
            freed = sum(wire.reply() == 1 for _ in oldest) * self._layout.block_bytes
        except ReplyError as error:
            server.refused_write(error)
            return False
        server.used_bytes -= freed
        return freed >= excess

    # --- what is known to be there ------------------------------------------------------------------------------------

    def _know(self, hashes: Sequence[BlockHash]) -> None:
        now = time.monotonic()
        with self._known_lock:
            for hash_ in reversed(hashes):  # the deepest of a prefix is the first to go
                self._known[hash_] = now
                self._known.move_to_end(hash_)
            while len(self._known) > _KNOWN_MOST:
                self._known.popitem(last=False)

    def _forget(self, hashes: Sequence[BlockHash]) -> None:
        with self._known_lock:
            for hash_ in hashes:
                self._known.pop(hash_, None)

    def _unknown(self, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        due = time.monotonic() - self._ttl_s / 2
        with self._known_lock:
            return {hash_ for hash_ in hashes if self._known.get(hash_, -math.inf) < due}

    def _take_oldest(self, server: RedisServer, count: int) -> list[BlockHash]:
        """Known blocks of this server, the least recently used first; they are known no more."""
        with self._known_lock:
            owned = (hash_ for hash_ in self._known if self._servers.owner(hash_, self._key(hash_)) is server)
            oldest = list(islice(owned, count))
            for hash_ in oldest:
                del self._known[hash_]
        return oldest


class _Reading:
    """Conversations with several servers at once, opened as blocks are asked for; a context manager."""

    def __init__(
        self, owner: Callable[[BlockHash, bytes], RedisServer | None], key: Callable[[BlockHash], bytes], deadline: float
    ) -> None:
        self._owner = owner
        self._key = key
        self._deadline = deadline
        self._stack = ExitStack()
        self._wires: dict[RedisServer, Wire | None] = {}  # None: it failed
        self._server_of: dict[BlockHash, RedisServer] = {}
        self.damaged: list[BlockHash] = []

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        for wire in self._wires.values():
            if wire is not None:
                with suppress(*FAILURES):
                    wire.skip_nils()  # of the blocks behind the first that was not there
        self._stack.close()

    def ask(self, hashes: Sequence[BlockHash]) -> None:
        shared: dict[RedisServer, list[BlockHash]] = {}
        for hash_ in hashes:
            server = self._owner(hash_, self._key(hash_))
            if server is not None:
                self._server_of[hash_] = server
                shared.setdefault(server, []).append(hash_)
        for server, some in shared.items():
            wire = self._open(server)
            if wire is not None:
                with suppress(*FAILURES):
                    wire.send([[b"GET", self._key(hash_)] for hash_ in some])

    def wire_for(self, hash_: BlockHash) -> Wire | None:
        """Where the block's value comes next; None when its server is of no use."""
        server = self._server_of.get(hash_)
        wire = self._wires.get(server) if server is not None else None
        return wire if wire is not None and wire.failure is None else None

    def _open(self, server: RedisServer) -> Wire | None:
        if server not in self._wires:
            self._wires[server] = None
            with suppress(*FAILURES):
                self._wires[server] = self._stack.enter_context(server.conversation(self._deadline))
        wire = self._wires[server]
        return wire if wire is not None and wire.failure is None else None


def _used_memory(info: int | bytes | None) -> int:
    """From the reply to INFO memory."""
    text = info.decode(errors="replace") if isinstance(info, bytes) else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields.get("used_memory", 0))
