"""Redis commands over a connection of redis-py, with bulk replies received straight into the KV pool.

redis-py connects, authenticates, speaks TLS and knows clusters. Its parsers copy a reply twice and hold the GIL meanwhile,
and its time-outs are per system call; blocks are megabytes, and a read has one deadline. So commands and replies (RESP 2,
redis.io/docs/reference/protocol-spec) are written and read here.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis
from redis.connection import Connection

log = logging.getLogger(__name__)

_BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # without a server that failed so many times in a row; the last one repeats
_PATIENCE_S = 0.1  # whoever waited less does not know yet that the server hangs: this machine may just be busy
_STRIKES = 3  # but so many times in a row count
_FULL_S = 2.0  # without writes to a server that takes none
_BUFFER_BYTES = 4096  # for what is not a block: a larger one would take in parts of blocks, to be copied again

Argument = bytes | tuple[bytes, memoryview]
"""Of a command. A pair is one argument in two parts, the second too large to be copied."""


class WireError(Exception):
    """The other side does not speak as it should, or no more."""


class ReplyError(Exception):
    """An error reply; the connection is as good as before."""


FAILURES = (OSError, WireError, redis.RedisError, ValueError)  # the last of redis-py, for a length that is no number
"""What a server that is down, slow or mad causes."""


class Wire:
    """One conversation over a connection, until a deadline (time.monotonic() seconds).

    Every method raises OSError (TimeoutError at the deadline) or WireError when the connection is of no use any more.
    """

    def __init__(self, connection: Connection, deadline: float) -> None:
        self._socket: socket.socket | None = connection._sock
        self._began = time.monotonic()
        self._deadline = deadline
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = self._end = 0  # what was received and not read yet
        self._unread = 0  # replies that were asked for and not begun
        self._given_up = False
        self.replies = 0
        self.failure: Exception | None = None

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def clean(self) -> bool:
        """Whether everything asked for was read, so that the connection can be used again."""
        return self.failure is None and self._unread == 0 and not self._given_up

    def send(self, commands: Sequence[Sequence[Argument]]) -> None:
        """Send commands, each a list of arguments; every one owes a reply."""
        small: list[bytes] = []
        for arguments in commands:
            small.append(b"*%d\r\n" % len(arguments))
            for argument in arguments:
                if isinstance(argument, bytes):
                    small.append(b"$%d\r\n%s\r\n" % (len(argument), argument))
                    continue
                head, body = argument
                small.append(b"$%d\r\n%s" % (len(head) + len(body), head))
                self._send(b"".join(small))
                self._send(body)
                small = [b"\r\n"]
        self._send(b"".join(small))
        self._unread += len(commands)

    def bulk_length(self) -> int | None:
        """The beginning of a bulk reply: how many bytes follow, to be read by `read_into` and `end_bulk`. None: nil.

        Raises ReplyError.
        """
        line = self._reply_line()
        if line[:1] != b"$":
            raise self._error(line)
        length = self._number(line)
        return None if length < 0 else length

    def read_into(self, view: memoryview) -> None:
        """Exactly len(view) bytes."""
        have = min(len(view), self._end - self._start)
        view[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(view):
            have += self._receive(view[have:])

    def end_bulk(self) -> None:
        end = bytearray(2)
        self.read_into(memoryview(end))
        if end != b"\r\n":
            raise self._failed(WireError("a bulk reply is longer than it says"))

    def reply(self) -> int | bytes | None:
        """An integer, simple or short bulk reply. Raises ReplyError."""
        line = self._reply_line()
        if line[:1] == b":":
            return self._number(line)
        if line[:1] == b"+":
            return line[1:]
        if line[:1] != b"$":
            raise self._error(line)
        length = self._number(line)
        if length < 0:
            return None
        body = bytearray(length)
        self.read_into(memoryview(body))
        self.end_bulk()
        return bytes(body)

    def skip_nils(self) -> None:
        """Read what is still owed as long as it is nil; whatever else comes makes the connection useless."""
        while self.clean and self._unread:
            if self._reply_line() != b"$-1":
                self.give_up()

    def give_up(self) -> None:
        """The rest of what was asked for is not going to be read."""
        self._given_up = True

    def _reply_line(self) -> bytes:
        line = self._line()
        self._unread -= 1
        self.replies += 1
        return line

    def _number(self, line: bytes) -> int:
        try:
            return int(line[1:])
        except ValueError:
            raise self._error(line) from None

    def _error(self, line: bytes) -> Exception:
        text = line[1:].decode(errors="replace")
        return ReplyError(text) if line[:1] == b"-" else self._failed(WireError(f"an unexpected reply: {text[:40]!r}"))

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                left = self._end - self._start
                self._buffer[:left] = self._buffer[self._start : self._end]
                self._start, self._end = 0, left
            if self._end == len(self._buffer):
                raise self._failed(WireError("a reply without an end"))
            self._end += self._receive(memoryview(self._buffer)[self._end :])
        line = bytes(self._buffer[self._start : end])
        self._start = end + 2
        return line

    def _receive(self, view: memoryview) -> int:
        try:
            count = self._ready().recv_into(view)
        except OSError as error:
            raise self._failed(error) from error
        if count == 0:
            raise self._failed(WireError("the server closed the connection"))
        return count

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._ready().sendall(data)
        except OSError as error:
            raise self._failed(error) from error

    def _ready(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        if self._socket is None:
            raise ConnectionError("not connected")
        self._socket.settimeout(left)
        return self._socket

    def _failed(self, error: Exception) -> Exception:
        self.failure = error
        return error


class RedisServer:
    """One server and how it is doing. A server that fails is left alone for a while, so that it costs no time."""

    def __init__(self, name: str, pool: redis.ConnectionPool) -> None:
        """`name`: for the log, without credentials."""
        self.name = name
        self._pool = pool
        self._failing = threading.Lock()
        self._failures = 0
        self._strikes = 0
        self._down_until = 0.0
        self._full_until = 0.0
        self.used_bytes = 0  # as it last said
        self.said_at = 0.0  # monotonic, s

    @property
    def up(self) -> bool:
        return time.monotonic() >= self._down_until

    @property
    def takes_writes(self) -> bool:
        return self.up and time.monotonic() >= self._full_until

    @contextmanager
    def conversation(self, deadline: float) -> Iterator[Wire]:
        """A connection for the caller alone. Raises one of FAILURES, as the wire does; the server is judged by that."""
        try:
            connection = self._pool.get_connection()
        except (redis.RedisError, OSError) as error:
            self.failed(error)
            raise
        wire = Wire(connection, deadline)
        try:
            yield wire
        finally:
            if not wire.clean:
                connection.disconnect()  # type: ignore[no-untyped-call]
            self._pool.release(connection)
            self._judge(wire)

    def failed(self, error: Exception) -> None:
        with self._failing:  # several threads may meet the same trouble at the same time
            if self._failures == 0:
                log.warning("remote store %s: %s; going on without it", self.name, str(error) or type(error).__name__)
            self._down_until = time.monotonic() + _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]
            self._failures += 1

    def refused_write(self, error: ReplyError) -> None:
        """It is full, or not ours to write to; reading goes on."""
        if self.takes_writes:
            log.warning("remote store %s takes no blocks now: %s", self.name, error)
        self._full_until = time.monotonic() + _FULL_S

    def close(self) -> None:
        self._pool.disconnect()

    def _judge(self, wire: Wire) -> None:
        timed_out = isinstance(wire.failure, TimeoutError)
        if wire.replies:
            self._strikes = 0
        elif timed_out and wire.age_s < _PATIENCE_S:
            self._strikes += 1
            if self._strikes < _STRIKES:
                return
        if wire.failure is not None and not (timed_out and wire.replies):  # slow it may be: that is measured elsewhere
            self.failed(wire.failure)
        elif self._failures and wire.replies:
            log.info("remote store %s is back", self.name)
            self._failures = 0
