"""The cache transceiver: a prefill engine answers pulls on a Unix socket, whose path travels in opaque_state."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

_LENGTH = struct.Struct("!Q")

Pull = Callable[[int], bytes | None]


class Server:
    """Answers one pull per connection with what `pull(key)` gives; None: it stays silent for ever."""

    def __init__(self, pull: Pull, pulled: Callable[[int], None]) -> None:
        self._pull = pull
        self._pulled = pulled
        self._kept: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        address = f"\0trtllm-{uuid4().hex}"  # abstract: a process that is killed leaves no file behind
        self._listener.bind(address)
        self._listener.listen(64)
        self.opaque_state = json.dumps({"address": address}).encode()
        threading.Thread(target=self._serve, name="trtllm-transceiver", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        for connection in self._kept:
            connection.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error):
            (key,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
            kv = self._pull(key)
            if kv is None:
                self._kept.append(connection)
                return
            connection.sendall(_LENGTH.pack(len(kv)) + kv)
            self._pulled(key)
        connection.close()


def pull(opaque_state: bytes, key: int) -> bytes | None:
    """Blocks until the KV has come. None when it never will: the caller then waits for ever, as the real one does."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(json.loads(opaque_state)["address"])
            connection.sendall(_LENGTH.pack(key))
            (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
            return _receive(connection, size)
    except (OSError, struct.error, ValueError, KeyError):
        return None


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise OSError("the other end is gone")
        parts += part
    return bytes(parts)
