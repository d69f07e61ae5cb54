"""Two doctors on two hosts: they compare versions and measure the link between them, over one TCP connection.

`scripts/doctor --listen PORT` there, `scripts/doctor --peer HOST:PORT` here. Messages are a 4-byte length (big endian) and
JSON; then the asking side sends pings, which come back, and then stretches of bytes, each acknowledged, until one is long
enough to be timed.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from python_backends.core.errors import ConfigError, Unavailable

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 1 << 16  # of a message
_PINGS = 20
_PIECE = bytes(1 << 20)
_LONG_ENOUGH_S = 0.4
_MOST_PIECES = 2048
_TIMEOUT_S = 10.0
_HELLO = "baton-doctor"


@dataclass(frozen=True, slots=True)
class Link:
    """What one connection between two hosts can do, and the versions at its other end."""

    versions: dict[str, str]
    round_trip_ms: float
    bytes_s: float


def listen(address: str, port: int, versions: dict[str, str], timeout_s: float) -> str:
    """Answer one doctor; returns its address. Raises ConfigError when the port is taken, Unavailable when nobody comes."""
    try:
        server = socket.create_server((address, port))
    except OSError as error:
        raise ConfigError(f"--listen: port {port}: {error.strerror}; give another") from error
    with server:
        server.settimeout(timeout_s)
        try:
            connection, peer = server.accept()
        except TimeoutError:
            raise Unavailable(f"no doctor came to port {port} in {timeout_s:.0f} s") from None
    with connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            _serve(connection, versions)
        except (OSError, ValueError, EOFError) as error:
            raise Unavailable(f"{peer[0]}: {error or 'the connection ended'}") from error
    return str(peer[0])


def _serve(connection: socket.socket, versions: dict[str, str]) -> None:
    if _receive(connection).get("hello") != _HELLO:
        raise ValueError("that was no doctor")
    _send(connection, {"versions": versions})
    for _ in range(_PINGS):
        connection.sendall(_exactly(connection, 1))
    buffer = bytearray(len(_PIECE))
    while (left := int(_receive(connection)["bytes"])) > 0:
        while left > 0:
            count = connection.recv_into(buffer, min(left, len(buffer)))
            if count == 0:
                raise EOFError
            left -= count
        connection.sendall(b"!")


def measure_link(peer: str) -> Link:
    """`peer`: HOST:PORT of a doctor that listens. Raises Unavailable with what is wrong."""
    host, _, port = peer.rpartition(":")
    if not (host and port.isdecimal()):
        raise ConfigError(f"--peer: {peer!r} is not HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _measure(connection)
    except (OSError, ValueError, EOFError) as error:
        raise Unavailable(
            f"{peer}: {error or 'the connection ended'}; run scripts/doctor --listen {port} there, and open the port"
        ) from error


def _measure(connection: socket.socket) -> Link:
    _send(connection, {"hello": _HELLO})
    versions = {str(name): str(value) for name, value in _receive(connection)["versions"].items()}
    trips = [_ping(connection) for _ in range(_PINGS)]
    rate = _rate(connection)
    _send(connection, {"bytes": 0})
    return Link(versions, min(trips) * 1e3, rate)


def _rate(connection: socket.socket) -> float:
    pieces, took_s = 2, 0.0
    while took_s < _LONG_ENOUGH_S and pieces < _MOST_PIECES:
        pieces *= 2
        _send(connection, {"bytes": pieces * len(_PIECE)})
        before = time.perf_counter()
        for _ in range(pieces):
            connection.sendall(_PIECE)
        _exactly(connection, 1)
        took_s = time.perf_counter() - before
    return pieces * len(_PIECE) / took_s


def _ping(connection: socket.socket) -> float:
    before = time.perf_counter()
    connection.sendall(b".")
    _exactly(connection, 1)
    return time.perf_counter() - before


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> dict[str, Any]:
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if size > _MOST_BYTES:
        raise ValueError("that was no doctor")
    message = json.loads(_exactly(connection, size))
    if not isinstance(message, dict):
        raise ValueError("that was no doctor")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received
