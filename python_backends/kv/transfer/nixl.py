"""Transport `nixl`: NVIDIA's NIXL moves the bytes over whatever fabric two hosts have (RDMA, NVLink, shared memory, TCP).

The source pushes (WRITE), since over TCP a pull is several times slower. What to push where is asked for over the same
authenticated connections as in transport `tcp`, by the signed ticket; NIXL's own serialised descriptors, which are pickle,
are never taken from anybody, and its listener stays off. NIXL has no time-outs and does not know stale memory; both are
ours.

A push that was given up may still arrive, whenever the other end wakes up. So nobody pushes into the pool: the reader has a
landing zone, from which each piece is copied to its blocks while the next one is on its way. After a failure the zone is
never used again: its agent is destroyed, and its addresses stay reserved for ever, so that what comes late hits nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import mmap
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from python_backends.core.errors import ConfigError, RefusalReason
from python_backends.core.handoff import KVHandoff, seal
from python_backends.core.types import Role
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Published, check_time, failed
from python_backends.kv.transfer.server import PushLost, TransferServer
from python_backends.kv.transfer.session import Claim, Landing, Push, Session, SessionError, Status, TlsContexts
from python_backends.kv.transfer.tcp import Sessions, refusal

log = logging.getLogger(__name__)

_ZONE_BYTES = 64 << 20
_ZONE_SLOTS = 4096  # at most; each costs a descriptor at the source
_PIECE_BYTES = 4 << 20  # pushed at once; then copied and digested while it is in the processor's cache
_POLL_BYTES = 512 << 10  # copied between two looks at what arrives
_MOST_ZONES = 4  # one for each size of blocks that is handed over here
_MOST_READERS = 256  # that a source keeps connections to
_AHEAD = 3  # pieces asked for before the first has arrived
_SETTINGS = {  # of NIXL and of UCX, its transport layer; whoever sets them in the environment knows better
    "NIXL_LOG_LEVEL": "ERROR",  # it would report every agent on standard output
    "UCX_HANDLE_ERRORS": "none",  # no signal handlers in somebody else's process
    "UCX_TCP_SNDBUF": "4m",  # loopback at 256 KiB: 1.0 GiB/s without the next three, 3.1 with them
    "UCX_TCP_RCVBUF": "4m",
    "UCX_TCP_MAX_POLL": "64",
}
_NO_RDMA = {"UCX_MODULES": "^ib"}  # libibverbs without a device makes processes crash when they exit
_RDMA_DEVICES = Path("/sys/class/infiniband")

Block = npt.NDArray[np.uint8]
_environment_lock = threading.Lock()
_abandoned: list[mmap.mmap] = []  # zones of failed pushes: mapped until the process ends, without pages


def rdma_devices() -> list[str]:
    """Names of this host's RDMA network devices."""
    return sorted(path.name for path in _RDMA_DEVICES.iterdir()) if _RDMA_DEVICES.is_dir() else []


def is_installed() -> bool:
    return importlib.util.find_spec("nixl") is not None


class NixlTransport(CheckedTransport):
    def __init__(
        self, server: TransferServer, key: bytes, tls: TlsContexts | None, settings: Mapping[str, str] | None = None
    ) -> None:
        """`server`: of this worker; it is closed with the transport. `settings`: of UCX, on top of the environment.

        Raises ConfigError when NIXL isn't there.
        """
        self.name = "nixl"
        if not is_installed():
            raise ConfigError(
                "transfer.transport: nixl is not installed here; run pip install --no-deps -r requirements-nixl.txt, or use tcp"
            )
        self._server = server
        self._key = key
        self._sessions = Sessions(key, tls)
        self._settings = {**_SETTINGS, **({} if rdma_devices() else _NO_RDMA)}
        self._settings = {name: os.environ.get(name, value) for name, value in self._settings.items()} | dict(settings or {})
        self._source = _Source(self._settings)
        server.pusher = self._source
        self._zones: OrderedDict[int, _Zone] = OrderedDict()  # by their blocks' bytes; oldest use first
        self._lock = threading.Lock()  # of the zones' choice

    def attach(self, memory: PoolMemory, role: Role) -> None:
        """See KVTransport.attach. Agents take a tenth of a second to make, and RDMA pins what is registered."""
        if role is Role.PREFILL:
            self._source.register(memory)
        elif role is Role.DECODE:
            self._zones[memory.block_bytes] = _Zone(memory.block_bytes, self._settings)

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """See KVTransport.publish."""
        self._source.register(memory)
        self._server.publish(memory, blocks, lease_id)
        return Published(locator=self._server.address)

    def release(self, lease_id: str) -> None:
        """See KVTransport.release."""
        self._server.release(lease_id)

    def copy(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        arrived: Arrived,
        *,
        exact: bool,
    ) -> None:
        """See CheckedTransport.copy."""
        check_time(deadline)
        if not wanted:
            return
        zone = self._enter_zone(into.block_bytes)
        arriving = _Arriving(zone, wanted, into, blocks, arrived)
        session: Session | None = None
        try:
            session = self._sessions.take(handoff.locator, deadline)
            session.send_message(Claim(seal(handoff, self._key)), deadline)
            session.send_message(zone.landing, deadline)
            arriving.receive(session, deadline)
        except (OSError, SessionError, ValueError) as error:
            check_time(deadline)
            raise failed(f"{handoff.source} at {handoff.locator}: {error or type(error).__name__}") from error
        finally:
            if session is not None:
                self._sessions.give_back(handoff.locator, session, usable=arriving.settled)
            self._leave_zone(zone, clean=arriving.settled)

    def close(self) -> None:
        self._sessions.close()
        self._server.close()
        with self._lock:
            zones, self._zones = self._zones, OrderedDict()
        for zone in zones.values():
            zone.retire()
        self._source.close()

    def _enter_zone(self, block_bytes: int) -> _Zone:
        """KV that is converted comes in the source's blocks, which have another size."""
        with self._lock:
            zone = self._zones.get(block_bytes)
            if zone is None:
                zone = self._zones[block_bytes] = _Zone(block_bytes, self._settings)
                if len(self._zones) > _MOST_ZONES:
                    _, oldest = self._zones.popitem(last=False)
                    if oldest.users == 0:
                        oldest.retire()
            self._zones.move_to_end(block_bytes)
            zone.users += 1
            return zone

    def _leave_zone(self, zone: _Zone, *, clean: bool) -> None:
        """Not `clean`: something may still be on its way into it."""
        size = zone.blocks.shape[1]
        with self._lock:
            if not clean:
                zone.tainted = True
                if self._zones.get(size) is zone:
                    del self._zones[size]
            zone.users -= 1
            over = zone.users == 0 and self._zones.get(size) is not zone
        if over:
            zone.retire()


class _Agent:
    """NIXL's agent, one call at a time. Raises whatever NIXL raises; its errors have no common base of their own."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.name = secrets.token_hex(8)  # never used twice: an agent that returns under its old name is refused
        self._lock = threading.Lock()
        with _environment(settings):
            api = import_module("nixl._api")
            if "NIXL_LOG_LEVEL" not in os.environ or os.environ["NIXL_LOG_LEVEL"] == "ERROR":
                logging.getLogger("nixl").setLevel(logging.ERROR)  # whoever has imported it before us
            config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent: Any = api.nixl_agent(self.name, config)

    def __enter__(self) -> Any:
        self._lock.acquire()
        return self._agent

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def destroy(self) -> None:
        """End its connections; nothing comes in or goes out through it any more."""
        with self._lock:
            self._agent = None


class _Zone:
    """Memory of the reader that sources write to, in slots of one block."""

    def __init__(self, block_bytes: int, settings: Mapping[str, str]) -> None:
        slots = max(_AHEAD + 1, min(_ZONE_SLOTS, _ZONE_BYTES // block_bytes))
        self._memory = mmap.mmap(-1, slots * block_bytes)
        self.blocks: Block = np.frombuffer(self._memory, np.uint8).reshape(slots, block_bytes)
        self.blocks[:] = 0  # every page is there
        self.agent = _Agent(settings)
        address = self.blocks.ctypes.data
        with self.agent as agent:
            agent.register_memory([(address, self.blocks.nbytes, 0, "")], "DRAM")
            metadata: bytes = agent.get_agent_metadata()
        self.landing = Landing(self.agent.name, metadata, address, slots)
        self.users = 0
        self.tainted = False
        self._free = list(range(slots))
        self._freed = threading.Condition()

    def take(self, count: int, deadline: float) -> list[int]:
        """Slots of one's own. Raises HandoffRefused when there are none in time."""
        with self._freed:
            if not self._freed.wait_for(lambda: len(self._free) >= count, max(0.0, deadline - time.monotonic())):
                check_time(deadline)
            return self._pop(count)

    def try_take(self, count: int) -> list[int]:
        """Slots of one's own, or an empty list when there are too few."""
        with self._freed:
            if len(self._free) < count:
                return []
            return self._pop(count)

    def _pop(self, count: int) -> list[int]:
        """Those used last: the processor still has them in its cache."""
        slots = self._free[-count:]
        del self._free[-count:]
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        with self._freed:
            self._free += slots
            self._freed.notify_all()

    def poll(self) -> None:
        """Give NIXL the processor to take in what comes."""
        with self.agent as agent:
            if agent is not None:  # the transport is being closed, and the connection says so
                agent.get_new_notifs()

    def retire(self) -> None:
        """Called by its last user. Whatever still comes writes into pages that nobody looks at."""
        self.agent.destroy()
        if self.tainted:
            self._memory.madvise(mmap.MADV_DONTNEED)
            _abandoned.append(self._memory)


class _Arriving:
    """One fetch: pieces that were asked for, in order, each with its slots."""

    def __init__(self, zone: _Zone, wanted: Sequence[int], into: PoolMemory, blocks: Sequence[int], arrived: Arrived) -> None:
        self._zone = zone
        self._wanted = wanted
        self._into = into
        self._blocks = blocks
        self._arrived = arrived
        size = max(1, min(_PIECE_BYTES // into.block_bytes, len(zone.blocks) // (_AHEAD + 1)))
        self._to_ask = deque(range(start, min(start + size, len(wanted))) for start in range(0, len(wanted), size))
        self._asked: deque[tuple[range, list[int]]] = deque()

    @property
    def settled(self) -> bool:
        """Whether everything asked for was answered, so that nothing is on its way."""
        return not self._asked

    def receive(self, session: Session, deadline: float) -> None:
        """Raises HandoffRefused, OSError or SessionError."""
        while self._to_ask or self._asked:
            self._ask(session, deadline)
            status = self._await_status(session, deadline)
            if status.reason:
                self._settle(session, status, deadline)
                raise refusal(status)
            piece, slots = self._asked.popleft()
            copied = 0
            for index, slot in zip(piece, slots, strict=True):
                self._into.blocks[self._blocks[index]] = self._zone.blocks[slot]
                copied += self._into.block_bytes
                if copied >= _POLL_BYTES:  # the next pieces are arriving
                    copied = 0
                    self._zone.poll()
            self._zone.give_back(slots)
            self._arrived(piece)

    def _ask(self, session: Session, deadline: float) -> None:
        while self._to_ask and len(self._asked) < _AHEAD:
            piece = self._to_ask[0]
            slots = self._zone.try_take(len(piece)) if self._asked else self._zone.take(len(piece), deadline)
            if not slots:
                return
            self._to_ask.popleft()
            self._asked.append((piece, slots))
            session.send_message(Push([self._wanted[index] for index in piece], slots), deadline)

    def _settle(self, session: Session, status: Status, deadline: float) -> None:
        """After a refusal: hear the answers that are still owed, so that nothing more can come."""
        while not status.late:
            self._zone.give_back(self._asked.popleft()[1])
            if not self._asked:
                return
            status = self._await_status(session, deadline)

    def _await_status(self, session: Session, deadline: float) -> Status:
        """The source's answer; meanwhile what comes is taken in."""
        while not session.has_news:
            check_time(deadline)
            self._zone.poll()
            time.sleep(0)  # lets the engine's thread have the GIL
        status = session.receive_message(deadline)
        if not isinstance(status, Status):
            raise SessionError("it answers with something else")
        return status


class _Source:
    """The pushing end. Implements server.Pusher."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._settings = settings
        self._agent: _Agent | None = None
        self._memory: PoolMemory | None = None
        self._local: Any = None  # NIXL's prepared descriptors of all blocks of the pool
        self._remote: OrderedDict[str, Any] = OrderedDict()  # agent -> the same of its landing; oldest use first
        self._lock = threading.Lock()

    def register(self, memory: PoolMemory) -> None:
        """The pool that will be pushed from; once."""
        with self._lock:
            if self._memory is memory:
                return
            self._memory = memory
            self._agent = self._agent or _Agent(self._settings)
            address = memory.blocks.ctypes.data
            with self._agent as agent:
                agent.register_memory([(address, memory.blocks.nbytes, 0, "")], "DRAM")
                rows = _rows(address, memory.num_blocks, memory.block_bytes)
                self._local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, "DRAM")

    def begin(
        self, memory: PoolMemory, blocks: Sequence[int], landing: Landing, slots: Sequence[int], deadline: float
    ) -> _Pushing:
        """See Pusher.begin."""
        if len(slots) != len(blocks) or not all(0 <= slot < landing.slots for slot in slots):
            raise failed("the landing has no such slots")
        owner = self._require_agent(memory)
        remote = self._prepare(owner, memory, landing)
        indices = np.array(blocks, np.int32), np.array(slots, np.int32)
        try:
            with owner as agent:
                handle = agent.make_prepped_xfer("WRITE", self._local, indices[0], remote, indices[1])
                state = agent.transfer(handle)
        except Exception as error:  # NIXL's errors have no common base
            self.forget(owner, landing.agent)
            raise _lost(error) from error
        return _Pushing(self, owner, handle, state, landing.agent, deadline)

    def close(self) -> None:
        with self._lock:
            self._local = None
            self._remote.clear()
            if self._agent is not None:
                self._agent.destroy()
                self._agent = None
            self._memory = None

    def _require_agent(self, memory: PoolMemory) -> _Agent:
        with self._lock:
            if self._agent is None or memory is not self._memory:
                raise failed("the pool has been closed")
            return self._agent

    def _prepare(self, owner: _Agent, memory: PoolMemory, landing: Landing) -> Any:
        """NIXL's handle of the reader's slots, made of numbers from the authenticated connection, once per reader."""
        with self._lock, owner as agent:
            if landing.agent not in self._remote:
                try:
                    self._remote[landing.agent] = self._introduce(agent, landing, memory.block_bytes)
                except Exception as error:  # NIXL's errors have no common base
                    raise failed(f"NIXL does not take the landing: {error or type(error).__name__}") from error
                if len(self._remote) > _MOST_READERS:
                    oldest, _ = self._remote.popitem(last=False)
                    with suppress(Exception):
                        agent.remove_remote_agent(oldest)
            self._remote.move_to_end(landing.agent)
            return self._remote[landing.agent]

    def _introduce(self, agent: Any, landing: Landing, block_bytes: int) -> Any:
        name = agent.add_remote_agent(landing.metadata)
        name = name.decode() if isinstance(name, bytes) else name
        if name != landing.agent:
            agent.remove_remote_agent(name)
            raise ValueError("its name is another")
        return agent.prep_xfer_dlist(name, _rows(landing.address, landing.slots, block_bytes), "DRAM")

    def forget(self, owner: _Agent, name: str) -> None:
        """The reader has failed; should it live, its next request introduces it again."""
        with self._lock, owner as agent:
            self._remote.pop(name, None)
            with suppress(Exception):
                agent.remove_remote_agent(name)


class _Pushing:
    """Implements server.Pushing."""

    def __init__(self, source: _Source, owner: _Agent, handle: Any, state: str, reader: str, deadline: float) -> None:
        """`state`: NIXL's, after posting the transfer `handle` to the agent `reader`."""
        self._source = source
        self._owner = owner
        self._handle = handle
        self._state = state
        self._reader = reader
        self._deadline = deadline

    def has_ended(self) -> bool:
        """See Pushing.has_ended."""
        try:
            if self._state == "PROC":
                with self._owner as agent:
                    self._state = agent.check_xfer_state(self._handle)
        except Exception as error:  # NIXL's errors have no common base
            self._source.forget(self._owner, self._reader)
            raise _lost(error) from error
        if self._state == "PROC" and time.monotonic() < self._deadline:
            return False
        if self._state != "DONE":
            self._source.forget(self._owner, self._reader)
            late = self._state == "PROC"
            reason = RefusalReason.TRANSFER_TIMEOUT if late else RefusalReason.TRANSFER_FAILED
            raise PushLost(reason, "the push did not end in transfer.timeout_s" if late else f"NIXL says {self._state}")
        return True

    def drop(self) -> None:
        """See Pushing.drop."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with self._owner as agent, suppress(Exception):  # what is not over can't be released, and is, later
                agent.release_xfer_handle(handle)


def _lost(error: Exception) -> PushLost:
    return PushLost(RefusalReason.TRANSFER_FAILED, f"NIXL: {error or type(error).__name__}")


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """UCX reads its settings from the environment when an agent is made."""
    with _environment_lock:
        before = dict(os.environ)
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def _rows(address: int, count: int, block_bytes: int) -> npt.NDArray[np.uint64]:
    """NIXL's descriptors of consecutive blocks: uint64 [count, 3] of address, length, device."""
    rows = np.zeros((count, 3), np.uint64)
    rows[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(block_bytes)
    rows[:, 1] = block_bytes
    return rows
