"""Connections between workers of one deployment, for KV: both ends prove that they have its key before anything else.

    reader -> source   magic, lowest and highest version spoken, 32 random bytes
    source -> reader   magic, chosen version (0: none fits, and the connection ends), 32 random bytes, source's proof
    reader -> source   reader's proof

A proof is an HMAC with the deployment's key over all that was said before, one domain per side, so that neither can be
made to speak for the other. Then frames (length, msgpack) and raw bytes alternate as the messages say. With certificates
the whole is in TLS, which also keeps the bytes secret; the proofs are made all the same.

Every wait has a deadline, in time.monotonic() seconds.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from hmac import compare_digest
from typing import ClassVar

import msgspec

from python_backends.core.errors import UNREADABLE
from python_backends.core.signing import MAC_BYTES, Domain, mac

CODEC_VERSION = 2  # of the protocol; from it on blocks may be encoded
_MAGIC = b"BATON-KV"
_HELLO = struct.Struct("<8sHH32s")
_ANSWER = struct.Struct("<8sH32s")
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 16 << 20  # of a frame
_BUFFER_BYTES = 4 << 20  # of the kernel, per direction
_VECTOR_MOST = 256  # pieces in one system call
_UNPACED = b"reno"  # congestion control within a machine: where the default paces (bbr), that costs half of the rate


class SessionError(Exception):
    """The other end is not what it should be, or has gone. Nothing more can be said to it."""


class Claim(msgspec.Struct, frozen=True, tag=True):
    """The signed ticket that the next requests on this connection are about. Not answered."""

    ticket: bytes


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Send the bytes of these positions of the ticket, in this order. Answered by a Status, the bytes, another Status.

    `codec`: in which the bytes are welcome, raw | lossless | float16 | int8 (codec.py). The first Status says what comes:
    that, or raw.
    """

    positions: list[int]
    codec: str = "raw"


class Landing(msgspec.Struct, frozen=True, tag=True):
    """Memory of the reader that the next requests write to by NIXL: `slots` blocks from `address` on. Not answered."""

    agent: str  # NIXL's name of the reader
    metadata: bytes  # NIXL's own description of it
    address: int
    slots: int


class Push(msgspec.Struct, frozen=True, tag=True):
    """Write these positions of the ticket into these slots of the landing. Answered by a Status when all is there."""

    positions: list[int]
    slots: list[int]


class Status(msgspec.Struct, frozen=True, tag=True):
    """`reason` is a RefusalReason's value, or empty when all is well. `late`: bytes of a push may still arrive.

    Of a Fetch: `codec` of the bytes that follow; `encode_s` that the source spent on encoding, when they are over.
    """

    reason: str = ""
    detail: str = ""
    late: bool = False
    codec: str = "raw"
    encode_s: float = 0.0


Message = Claim | Fetch | Landing | Push | Status


class TlsContexts(msgspec.Struct, frozen=True):
    """Of both sides; each end shows a certificate that the other end's authority has signed."""

    client: ssl.SSLContext
    server: ssl.SSLContext


def load_tls(cert_file: str, key_file: str, ca_file: str) -> TlsContexts:
    """Raises OSError (ssl.SSLError included) when a file is missing or wrong."""
    contexts = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    for context in contexts:
        context.load_cert_chain(cert_file, key_file)
        context.load_verify_locations(ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return TlsContexts(*contexts)


class Session:
    """One connection, used by one thread at a time. `greet` or `welcome` comes first.

    Every method raises SessionError, or OSError: TimeoutError when the deadline has passed.
    """

    versions: ClassVar[tuple[int, int]] = (1, CODEC_VERSION)  # lowest and highest that this end speaks

    def __init__(self, sock: socket.socket) -> None:
        """The session owns the socket from now on."""
        self._socket = sock
        self.is_secret = False
        self.version = 0  # of the protocol, once both have agreed
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):  # it has gone, or the kernel has no other
            if self.is_local:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNPACED)
        # The kernel itself waits for whole blocks, and keeps the deadline meanwhile (SO_RCVTIMEO, socket(7)).
        sock.settimeout(None)

    # --- the beginning ---

    def greet(self, host: str, key: bytes, tls: TlsContexts | None, deadline: float) -> None:
        """The reader's part: know the other end for a worker of this deployment, and be known."""
        if tls is not None:
            self._encrypt(tls.client, deadline, host)
        hello = _HELLO.pack(_MAGIC, *self.versions, secrets.token_bytes(32))
        self.send_pieces([memoryview(hello)], deadline)
        answer = self.receive(_ANSWER.size, deadline)
        magic, version, _ = _ANSWER.unpack(answer)
        if magic != _MAGIC:
            raise SessionError("it does not speak this protocol")
        lowest, highest = self.versions
        if not lowest <= version <= highest:
            raise SessionError(f"it speaks no version from {lowest} to {highest} of the protocol")
        if not compare_digest(self.receive(MAC_BYTES, deadline), mac(Domain.TRANSFER_SERVER, hello + answer, key)):
            raise SessionError("it has another deployment's key")
        self.send_pieces([memoryview(mac(Domain.TRANSFER_CLIENT, hello + answer, key))], deadline)
        self.version = version

    def welcome(self, key: bytes, tls: TlsContexts | None, deadline: float) -> None:
        """The source's part."""
        if tls is not None:
            self._encrypt(tls.server, deadline)
        hello = self.receive(_HELLO.size, deadline)
        magic, lowest, highest, _ = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise SessionError("it does not speak this protocol")
        version = min(highest, self.versions[1])
        fits = version >= max(lowest, self.versions[0])
        answer = _ANSWER.pack(_MAGIC, version if fits else 0, secrets.token_bytes(32))
        proof = mac(Domain.TRANSFER_SERVER, hello + answer, key)
        self.send_pieces([memoryview(answer + proof)], deadline)
        if not fits:
            raise SessionError(f"it speaks versions {lowest} to {highest} of the protocol")
        if not compare_digest(self.receive(MAC_BYTES, deadline), mac(Domain.TRANSFER_CLIENT, hello + answer, key)):
            raise SessionError("it has another deployment's key")
        self.version = version

    def _encrypt(self, context: ssl.SSLContext, deadline: float, host: str | None = None) -> None:
        self._socket = encrypted = context.wrap_socket(
            self._socket, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )
        self.is_secret = True
        self._limit(socket.SO_RCVTIMEO, deadline)
        encrypted.do_handshake()

    # --- messages and bytes ---

    @property
    def is_local(self) -> bool:
        """Whether the other end has our own address, so that bytes never leave this machine."""
        return bool(self._socket.getpeername()[0] == self._socket.getsockname()[0])

    @property
    def is_idle(self) -> bool:
        """Whether the other end is still there and has nothing to say. A secret session is believed to be."""
        if self.is_secret:
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send_message(self, message: Message, deadline: float) -> None:
        body = _encoder.encode(message)
        self.send_pieces([memoryview(_LENGTH.pack(len(body)) + body)], deadline)

    def receive_message(self, deadline: float) -> Message:
        (length,) = _LENGTH.unpack(self.receive(_LENGTH.size, deadline))
        if length > _MOST_BYTES:
            raise SessionError(f"it announces a message of {length} bytes")
        try:
            message: Message = _decoder.decode(self.receive(length, deadline))
        except UNREADABLE as error:
            raise SessionError(f"its message can't be read: {error}") from error
        return message

    def send_pieces(self, pieces: Sequence[memoryview], deadline: float) -> None:
        """All bytes of all pieces, gathered by the kernel."""
        left = [piece for piece in pieces if len(piece)]
        while left:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self._socket.send(left[0]) if self.is_secret else self._socket.sendmsg(left[:_VECTOR_MOST])
            except BlockingIOError:
                continue  # the time is over, which _limit tells
            left = _behind(left, sent)

    def send_file(self, fd: int, offset: int, count: int, deadline: float) -> None:
        """From a file's pages, without a copy where the network card can gather them (sendfile(2)). Not if secret.

        The pages may still be read after this has returned, until the other end has their bytes.
        """
        end = offset + count
        while offset < end:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = os.sendfile(self._socket.fileno(), fd, offset, end - offset)
            except BlockingIOError:
                continue
            if sent == 0:
                raise SessionError("the file ends too early")
            offset += sent

    def receive_into(self, views: Sequence[memoryview], deadline: float) -> None:
        """Fill all of the views, several by one system call."""
        left = [view for view in views if len(view)]
        while left:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                if self.is_secret:
                    count = self._socket.recv_into(left[0])
                else:
                    count = self._socket.recvmsg_into(left[:_VECTOR_MOST], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue
            if count == 0:
                raise SessionError("it has closed the connection")
            left = _behind(left, count)

    def receive(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        self.receive_into([memoryview(data)], deadline)
        return bytes(data)

    @property
    def has_news(self) -> bool:
        """Whether receiving would find something now, be it the end."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        return bool(select.select([self._socket], [], [], 0)[0])

    def wake(self) -> None:
        """End the connection under whatever thread waits for it."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _limit(self, option: int, deadline: float) -> None:
        """The next system call ends by the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        if self.is_secret:
            self._socket.settimeout(left)
        else:
            seconds, microseconds = divmod(int(left * 1e6) + 1, 1_000_000)
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, microseconds))


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views behind their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
