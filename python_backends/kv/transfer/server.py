"""The source's end of transports that leave the host: hands out blocks of live leases to workers that prove the key.

What may be read is said three times: by the key of the connection, by the signed ticket in each request, and by the leases
of this moment. A block is sent only if all agree, and its generation is looked at again when it has been sent.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from python_backends.core.errors import ConfigError, HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff, unseal
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import failed
from python_backends.kv.transfer.codec import BlockCodec, create_codec
from python_backends.kv.transfer.session import (
    CODEC_VERSION,
    Claim,
    Fetch,
    Landing,
    Message,
    Push,
    Session,
    SessionError,
    Status,
    TlsContexts,
)

log = logging.getLogger(__name__)

_HANDSHAKE_S = 2.0
_IDLE_S = 600.0  # a connection that asks for nothing is closed
_MOST_CONNECTIONS = 1024
_BACKLOG = 128
_CLOSE_S = 5.0


class PushLost(HandoffRefused):
    """A push has begun and was given up. Its bytes may still arrive, or not."""


class Pushing(Protocol):
    """Blocks on their way into a reader's memory."""

    def has_ended(self) -> bool:
        """Whether all is there; meanwhile gives the transfer some of the processor. Raises PushLost."""

    def drop(self) -> None:
        """Nobody waits for it any more. Idempotent; also called when it has ended."""


class Pusher(Protocol):
    """Writes blocks into readers' memory."""

    def begin(
        self, memory: PoolMemory, blocks: Sequence[int], landing: Landing, slots: Sequence[int], deadline: float
    ) -> Pushing:
        """Raises HandoffRefused when nothing has moved and nothing will, PushLost when that is not sure."""


@dataclass(slots=True)
class _Conversation:
    """What was said on one connection and is still meant."""

    claim: KVHandoff | HandoffRefused | None = None
    landing: Landing | None = None


@dataclass(slots=True)
class _Lease:
    memory: PoolMemory
    blocks: set[int]


@dataclass(slots=True)
class _UnderWay:
    """One push, from its request to its answer."""

    pushing: Pushing | None
    refused: HandoffRefused | None
    check: Callable[[], None]  # that what was pushed was meant to the end; raises HandoffRefused

    def status(self) -> Status | None:
        """The answer, once there is one."""
        try:
            if self.refused is not None:
                raise self.refused
            assert self.pushing is not None
            if not self.pushing.has_ended():
                return None
            self.drop()
            self.check()
        except HandoffRefused as refused:
            self.drop()
            return _refusal(refused)
        return Status()

    def drop(self) -> None:
        if self.pushing is not None:
            self.pushing.drop()


class TransferServer:
    """Listens from construction to `close`. Publishing and releasing is the engine's thread's."""

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        key: bytes,
        tls: TlsContexts | None,
        timeout_s: float,
        told: str = "",
        codecs: Collection[str] = ("lossless",),
    ) -> None:
        """Listens at `host`, the first free one of `ports`; none given: any. `timeout_s`: for one request.

        `told`: the host that others are told; empty: the same. `codecs`: besides raw, for readers who ask for them. Raises
        ConfigError.
        """
        self._key = key
        self._tls = tls
        self._timeout_s = timeout_s
        self._codecs = codecs
        self._leases: dict[str, _Lease] = {}
        self._sessions: dict[Session, threading.Thread] = {}
        self._lock = threading.Lock()  # of leases and sessions
        self._closed = threading.Event()
        self.pusher: Pusher | None = None  # where there is NIXL
        self._listener = _listen(host, ports)
        self.address = f"{_bracketed(told or host)}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="transfer-server", daemon=True)
        self._thread.start()

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> None:
        """These blocks may be asked for from now on; more of a lease may follow."""
        with self._lock:
            self._leases.setdefault(lease_id, _Lease(memory, set())).blocks.update(blocks)

    def release(self, lease_id: str) -> None:
        with self._lock:
            self._leases.pop(lease_id, None)

    def close(self) -> None:
        """End all connections; nobody reads the pools any more when it returns. Idempotent."""
        with self._lock:
            self._closed.set()
            sessions = dict(self._sessions)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for session in sessions:
            session.wake()
        for thread in (self._thread, *sessions.values()):
            thread.join(_CLOSE_S)

    # --- on the listening thread, then on one thread per connection ---

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                self._closed.wait(0.1)  # or out of descriptors for now
                continue
            if len(self._sessions) >= _MOST_CONNECTIONS:
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock, address[0]), name="transfer-serve", daemon=True).start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        session = Session(sock)
        with self._lock:
            if self._closed.is_set():
                session.wake()
            self._sessions[session] = threading.current_thread()
        known = False
        state = _Conversation()
        try:
            session.welcome(self._key, self._tls, time.monotonic() + _HANDSHAKE_S)
            known = True
            while True:
                self._hear(session, state, session.receive_message(time.monotonic() + _IDLE_S))
        except (OSError, SessionError) as error:
            log.log(logging.DEBUG if known else logging.WARNING, "the connection from %s is closed: %s", peer, error)
        finally:
            with self._lock:
                self._sessions.pop(session, None)
            session.close()

    def _hear(self, session: Session, state: _Conversation, message: Message) -> None:
        if isinstance(message, Claim):
            state.claim = self._read_ticket(message.ticket)
        elif isinstance(message, Landing):
            state.landing = message
        elif isinstance(message, Fetch):
            self._send(session, state, message)
        elif isinstance(message, Push):
            self._push(session, state, message)
        else:
            raise SessionError("it does not ask for anything")

    def _read_ticket(self, ticket: bytes) -> KVHandoff | HandoffRefused:
        try:
            return unseal(ticket, self._key, time.time())
        except HandoffRefused as refused:
            return refused

    def _send(self, session: Session, state: _Conversation, request: Fetch) -> None:
        deadline = time.monotonic() + self._timeout_s
        status = Status()
        try:
            handoff, memory = self._check(state.claim, request.positions)
            encoded = request.codec in self._codecs and session.version >= CODEC_VERSION
            codec = create_codec(request.codec, handoff.layout, self._key) if encoded else None
            session.send_message(Status(codec=request.codec if encoded else "raw"), deadline)
            if codec is not None:
                status = Status(encode_s=_send_encoded(session, memory, handoff, request.positions, codec, deadline))
            else:
                self._send_blocks(session, memory, [handoff.blocks[position] for position in request.positions], deadline)
            self._check_generations(handoff, request.positions, memory)  # what was sent was meant to the end
        except HandoffRefused as refused:
            status = _refusal(refused)
        session.send_message(status, deadline)

    def _push(self, session: Session, state: _Conversation, request: Push) -> None:
        """Several pushes overlap, so that the network does not wait for answers. They are answered in order."""
        under_way = deque([self._begin_push(state, request)])
        try:
            while under_way:
                if session.has_news:
                    more = session.receive_message(time.monotonic() + self._timeout_s)
                    if not isinstance(more, Push):
                        raise SessionError("it asks for something else while blocks are pushed")
                    under_way.append(self._begin_push(state, more))
                status = under_way[0].status()
                if status is None:
                    time.sleep(0)  # lets the engine's thread have the GIL
                else:
                    under_way.popleft()
                    session.send_message(status, time.monotonic() + self._timeout_s)
        finally:
            for push in under_way:
                push.drop()

    def _begin_push(self, state: _Conversation, request: Push) -> _UnderWay:
        try:
            handoff, memory = self._check(state.claim, request.positions)
            if self.pusher is None or state.landing is None:
                raise failed("this worker has no NIXL, or no landing was named")
            blocks = [handoff.blocks[position] for position in request.positions]
            deadline = time.monotonic() + self._timeout_s
            pushing = self.pusher.begin(memory, blocks, state.landing, request.slots, deadline)
        except HandoffRefused as refused:
            return _UnderWay(None, refused, lambda: None)
        return _UnderWay(pushing, None, lambda: self._check_generations(handoff, request.positions, memory))

    def _check(self, claim: KVHandoff | HandoffRefused | None, positions: Sequence[int]) -> tuple[KVHandoff, PoolMemory]:
        """What the ticket claims and where it lies. Raises HandoffRefused when it may not be had, or not any more."""
        if claim is None:
            raise failed("no ticket was shown")
        if isinstance(claim, HandoffRefused):
            raise claim
        if not all(0 <= position < len(claim.blocks) for position in positions):
            raise failed("positions are asked for that the ticket does not have")
        with self._lock:
            lease = self._leases.get(claim.lease_id)
            if lease is None:
                raise HandoffRefused(RefusalReason.EXPIRED, f"the lease has ended, or {claim.source} has restarted")
            if claim.epoch != lease.memory.epoch or not lease.memory.is_open:
                raise HandoffRefused(RefusalReason.STALE_EPOCH, f"{claim.source} has restarted since the ticket")
            if not lease.blocks.issuperset(claim.blocks[position] for position in positions):
                raise failed("the ticket names blocks that are not of its lease")
        self._check_generations(claim, positions, lease.memory)
        return claim, lease.memory

    def _check_generations(self, handoff: KVHandoff, positions: Sequence[int], memory: PoolMemory) -> None:
        for position in positions:
            if memory.generations[handoff.blocks[position]] != handoff.generations[position]:
                detail = f"{handoff.source} has reused block {position} since the ticket"
                raise HandoffRefused(RefusalReason.STALE_EPOCH, detail)

    def _send_blocks(self, session: Session, memory: PoolMemory, blocks: Sequence[int], deadline: float) -> None:
        if session.is_local or session.is_secret:  # gathered copies are faster where the kernel has to copy anyway
            session.send_pieces([memory.blocks[block].data for block in blocks], deadline)
            return
        for block in blocks:
            session.send_file(memory.fd, memory.offset_of(block), memory.block_bytes, deadline)


def _send_encoded(
    session: Session, memory: PoolMemory, handoff: KVHandoff, positions: Sequence[int], codec: BlockCodec, deadline: float
) -> float:
    """Seconds spent on encoding. The kernel sends one block while the next one is encoded."""
    spent = 0.0
    for position in positions:
        began = time.monotonic()
        pieces = codec.encode(memory.blocks[handoff.blocks[position]], handoff.digests[position])
        spent += time.monotonic() - began
        session.send_pieces(pieces, deadline)
    return spent


def _refusal(refused: HandoffRefused) -> Status:
    return Status(refused.reason.value, refused.detail, late=isinstance(refused, PushLost))


def _listen(host: str, ports: Sequence[int]) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConfigError(f"transfer.listen: {host!r}: {error.strerror or error}; give an address of this host") from error
    problem = ""
    for port in ports or [0]:
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            problem = str(error.strerror or error)
    where = f"{host}, ports {ports[0]} to {ports[-1]}" if ports else host
    raise ConfigError(f"transfer.listen: {where}: {problem}; give an address of this host, or more ports in transfer.ports")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
