"""Transport `tcp`: to any host, over several connections at once, resumed where one breaks.

The reader connects to the source's TransferServer and asks for blocks by the ticket itself, signed; they come straight
into its pool. Each connection carries a share of the blocks. When one breaks, what it had brought stays, and the rest is
asked for again until the deadline.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff, seal
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Fetched, Published, check_time, failed
from python_backends.kv.transfer.codec import LENGTH, BadEncoding, create_codec, roundings
from python_backends.kv.transfer.codec_choice import CodecChoice, Moved
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import (
    CODEC_VERSION,
    Claim,
    Fetch,
    Session,
    SessionError,
    Status,
    TlsContexts,
)

_STREAM_BYTES = 2 << 20  # a share of less is not worth another connection
_PIECE_BYTES = 512 << 10  # received before it is digested, while it is in the core's own cache: from there that costs little
_TRIES = 3  # in a row that bring nothing
_PAUSE_S = 0.02  # before another try
_IDLE_MOST = 64  # connections kept for the next handoff


class Sessions:
    """Connections to other workers' servers, kept open between handoffs. May be used from several threads."""

    def __init__(self, key: bytes, tls: TlsContexts | None) -> None:
        self._key = key
        self._tls = tls
        self._lock = threading.Lock()
        self._idle: dict[str, list[Session]] = {}
        self._busy: set[Session] = set()
        self._local: set[str] = set()
        self._closed = False

    def take(self, address: str, deadline: float) -> Session:
        """One that nobody else uses. Raises OSError or SessionError."""
        while True:
            with self._lock:
                idle = self._idle.get(address)
                session = idle.pop() if idle else None
            if session is None:
                break
            if session.is_idle:
                return self._enter(session)
            session.close()
        return self._connect(address, deadline)

    def give_back(self, address: str, session: Session, *, usable: bool) -> None:
        """`usable`: everything that was asked for has been answered and read."""
        with self._lock:
            self._busy.discard(session)
            idle = self._idle.setdefault(address, [])
            if usable and not self._closed and len(idle) < _IDLE_MOST:
                idle.append(session)
                return
        session.close()

    def is_local(self, address: str) -> bool:
        """Whether it is known to be of this machine."""
        return address in self._local

    def close(self) -> None:
        """Wake who waits. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
            busy = list(self._busy)
        for session in busy:
            session.wake()
        for sessions in idle.values():
            for session in sessions:
                session.close()

    def _connect(self, address: str, deadline: float) -> Session:
        host, port = _parse(address)
        sock = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 1e-3))
        session = self._enter(Session(sock))
        try:
            session.greet(host, self._key, self._tls, deadline)
            if session.is_local:
                self._local.add(address)
        except BaseException:
            self.give_back(address, session, usable=False)
            raise
        return session

    def _enter(self, session: Session) -> Session:
        with self._lock:
            self._busy.add(session)
            if self._closed:
                session.wake()
        return session


class TcpTransport(CheckedTransport):
    def __init__(
        self,
        server: TransferServer | None,
        key: bytes,
        tls: TlsContexts | None,
        streams: int,
        codec: str = "auto",
        rounding: str = "none",
    ) -> None:
        """`server`: of this worker; it is closed with the transport. None: it only fetches, and tells no locator.

        `streams`: connections per handoff, at most. `codec`: as CodecChoice takes it. `rounding`: as in `transfer.rounding`.
        """
        self.name = "tcp"
        self._server = server
        self._key = key
        self._streams = streams
        self._choice = CodecChoice(codec)
        self._rounding = rounding
        self._sessions = Sessions(key, tls)
        self._threads = ThreadPoolExecutor(max(1, 4 * streams), thread_name_prefix="tcp")

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """See KVTransport.publish."""
        if self._server is None:
            return Published()
        self._server.publish(memory, blocks, lease_id)
        return Published(locator=self._server.address)

    def release(self, lease_id: str) -> None:
        """See KVTransport.release."""
        if self._server is not None:
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
    ) -> Fetched | None:
        """See CheckedTransport.copy."""
        check_time(deadline)
        if not wanted:
            return None
        began = time.monotonic()
        narrower = () if exact else roundings(handoff.layout.dtype, self._rounding)
        codec = self._choice.choose(handoff.locator, len(wanted) * into.block_bytes, narrower)
        ticket = seal(handoff, self._key)
        size = into.block_bytes
        streams = self._streams
        if self._sessions.is_local(handoff.locator):  # each stream takes a core at either end
            streams = min(streams, (os.cpu_count() or 2) // 2)
        count = max(1, min(streams, len(wanted) * size // _STREAM_BYTES, len(wanted)))
        bounds = [len(wanted) * i // count for i in range(count + 1)]
        shares = [
            _Share(ticket, self._key, handoff, wanted, into, blocks, range(first, last), arrived, codec)
            for first, last in pairwise(bounds)
        ]
        others = [self._threads.submit(self._receive, share, deadline) for share in shares[1:]]
        try:
            self._receive(shares[0], deadline)
        finally:
            wait(others)  # they have the same deadline, and nobody may write into the pool after us
        for other in others:
            other.result()
        moved = Moved(
            kv_bytes=len(wanted) * size,
            wire_bytes=sum(share.wire_bytes for share in shares),
            seconds=time.monotonic() - began,
            codec_s=max(share.encode_s + share.decode_s for share in shares),
            codec=codec if any(share.was_encoded for share in shares) else "raw",
        )
        self._choice.learn(handoff.locator, moved)
        rounded = codec if any(share.was_rounded for share in shares) else ""
        return Fetched(self.name, codec=moved.codec, wire_bytes=moved.wire_bytes, rounded=rounded)

    def close(self) -> None:
        self._sessions.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._server is not None:
            self._server.close()

    def _receive(self, share: _Share, deadline: float) -> None:
        """Bring one share, over as many connections as it takes. Raises HandoffRefused."""
        address = share.handoff.locator
        tries = 0
        while share.left:
            check_time(deadline)
            before = len(share.left)
            session: Session | None = None
            try:
                session = self._sessions.take(address, deadline)
                share.receive(session, deadline)
            except ConnectionRefusedError as error:
                raise failed(f"{share.handoff.source} does not answer at {address}") from error
            except (OSError, SessionError, ValueError) as error:
                check_time(deadline)
                tries = 1 if len(share.left) < before else tries + 1
                if tries >= _TRIES:
                    raise failed(f"{share.handoff.source} at {address}: {error or type(error).__name__}") from error
                time.sleep(min(_PAUSE_S, max(0.0, deadline - time.monotonic())))
            finally:
                if session is not None:
                    self._sessions.give_back(address, session, usable=share.answered)


class _Share:
    """The part of a handoff that one connection brings, and what of it is still missing."""

    def __init__(
        self,
        ticket: bytes,
        key: bytes,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        indices: Sequence[int],
        arrived: Arrived,
        codec: str,
    ) -> None:
        """`indices` into `wanted` and `blocks`. `codec`: in which blocks are asked for."""
        self.handoff = handoff
        self.left = list(indices)
        self.answered = True  # whether the connection owes nothing
        self.wire_bytes = 0
        self.encode_s = 0.0  # spent by the source
        self.decode_s = 0.0
        self.was_encoded = False
        self.was_rounded = False
        self._codec = codec
        self._ticket = ticket
        self._key = key
        self._wanted = wanted
        self._into = into
        self._blocks = blocks
        self._arrived = arrived

    def receive(self, session: Session, deadline: float) -> None:
        """Ask for what is missing and take it in. Raises HandoffRefused, OSError or SessionError."""
        self.answered = False
        session.send_message(Claim(self._ticket), deadline)
        codec = self._codec if session.version >= CODEC_VERSION else "raw"
        session.send_message(Fetch([self._wanted[index] for index in self.left], codec), deadline)
        status = self._read_status(session, deadline)
        self.answered = False
        if status.codec == "raw":
            self._receive_raw(session, deadline)
        elif status.codec == codec:
            self._receive_encoded(session, deadline)
        else:
            raise SessionError(f"it answers in codec {status.codec!r}, and was asked for {codec}")
        self.encode_s += max(0.0, self._read_status(session, deadline).encode_s)

    def _receive_raw(self, session: Session, deadline: float) -> None:
        step = max(1, _PIECE_BYTES // self._into.block_bytes)
        while self.left:
            some = self.left[:step]
            session.receive_into([self._into.blocks[self._blocks[index]].data for index in some], deadline)
            self.wire_bytes += len(some) * self._into.block_bytes
            self._arrived(some)
            self.left = self.left[step:]

    def _receive_encoded(self, session: Session, deadline: float) -> None:
        codec = create_codec(self._codec, self.handoff.layout, self._key)
        self.was_encoded = True
        while self.left:
            index = self.left[0]
            block = self._into.blocks[self._blocks[index]]
            (length,) = LENGTH.unpack(session.receive(LENGTH.size, deadline))
            try:
                pieces = codec.landing(length, block)
                session.receive_into(pieces, deadline)
                began = time.monotonic()
                rounded = codec.decode(length, block, self.handoff.digests[self._wanted[index]])
            except BadEncoding as error:
                detail = f"block {self._wanted[index]} of {self.handoff.source} arrived damaged: {error}"
                raise HandoffRefused(RefusalReason.DIGEST_MISMATCH, detail) from error
            self.decode_s += time.monotonic() - began
            self.wire_bytes += LENGTH.size + sum(piece.nbytes for piece in pieces)
            self._arrived([index], rounded=rounded)
            self.was_rounded |= rounded
            self.left.pop(0)

    def _read_status(self, session: Session, deadline: float) -> Status:
        status = session.receive_message(deadline)
        if not isinstance(status, Status):
            raise SessionError("it answers with something else")
        self.answered = True
        if status.reason:
            raise refusal(status)
        return status


def refusal(status: Status) -> HandoffRefused:
    """What the source says against a request."""
    try:
        reason = RefusalReason(status.reason)
    except ValueError:
        reason = RefusalReason.TRANSFER_FAILED
    return HandoffRefused(reason, status.detail)


def _parse(address: str) -> tuple[str, int]:
    """`host:port`, `[host]:port`. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not port.isascii() or len(port) > 5:
        raise ValueError(f"{address!r} is no address")
    return host.strip("[]"), int(port)
