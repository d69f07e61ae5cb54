"""POST and server-sent events over the standard library's HTTP client: the least work per token that was measured.

Connections are kept alive and shared between requests, one request at a time on each.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from python_backends.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Unavailable,
)

_READ_BYTES = 1 << 16
_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
_PROBE_EVERY_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_ERROR_BYTES = 4096


class HttpServer:
    """One server and its idle connections. `url`: with the path that all requests begin with. Thread-safe."""

    def __init__(self, url: str, timeout_s: float, headers: dict[str, str] | None = None) -> None:
        split = urlsplit(url)
        self.url = url.rstrip("/")
        self._kind = http.client.HTTPSConnection if split.scheme == "https" else http.client.HTTPConnection
        self._place = split.netloc
        self._path = split.path.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {**_HEADERS, **(headers or {})}
        self._idle: list[http.client.HTTPConnection] = []  # append and pop are atomic

    def get(self, path: str, timeout_s: float = _PROBE_TIMEOUT_S) -> bytes:
        """The body. Raises BatonError when nobody answers or the status is not 2xx."""
        connection = self._kind(self._place, timeout=timeout_s)
        try:
            connection.request("GET", self._path + path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"no server answers at {self.url}: {error}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise status_error(response.status, body)
        return body

    def wait_for(self, path: str, timeout_s: float) -> bytes:
        """`get`, tried until it works. Raises the last BatonError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.get(path)
            except BatonError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PROBE_EVERY_S)

    def post(self, path: str, body: dict[str, Any]) -> EventStream:
        """A request, encoded; it is sent when the result is iterated."""
        return EventStream(self, path, json.dumps(body, separators=(",", ":")).encode())

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def send(self, connection: http.client.HTTPConnection, path: str, body: bytes) -> http.client.HTTPResponse:
        connection.request("POST", self._path + path, body, self._headers)
        return connection.getresponse()

    def take(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it has been used before: then the server may have closed it in the meantime."""
        try:
            return self._idle.pop(), True
        except IndexError:
            return self.fresh(), False

    def fresh(self) -> http.client.HTTPConnection:
        connection = self._kind(self._place, timeout=self.timeout_s)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def give(self, connection: http.client.HTTPConnection) -> None:
        self._idle.append(connection)


class EventStream:
    """One POST whose answer is server-sent events. Iterate once, in one thread; `cancel` from any."""

    def __init__(self, server: HttpServer, path: str, body: bytes) -> None:
        self._server, self._path, self._body = server, path, body
        self._connection: http.client.HTTPConnection | None = None
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[tuple[float, bytes]]:
        """(arrival in time.monotonic() seconds, data) of each event. Raises BatonError."""
        deadline = time.monotonic() + self._server.timeout_s
        try:
            response = self._send()
            if response.status >= 300:
                raise status_error(response.status, response.read(_ERROR_BYTES))
            for event in _events(response):
                yield event
                if event[0] > deadline:
                    raise TimeoutError
            if response.isclosed() and not response.will_close and self._connection is not None:
                self._server.give(self._connection)
                self._connection = None
        except TimeoutError as error:
            raise DeadlineExceeded(f"no whole answer from {self._server.url} in {self._server.timeout_s:g} s") from error
        except (OSError, http.client.HTTPException, AttributeError, ValueError) as error:
            # http.client meets a socket that `cancel` has shut with any of these.
            if self._cancelled.is_set():
                raise Cancelled("cancelled") from error
            raise EngineFailure(f"the connection to {self._server.url} broke: {error or type(error).__name__}") from error
        finally:
            if self._connection is not None:
                self._connection.close()

    def cancel(self) -> None:
        self._cancelled.set()
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                return

    def _send(self) -> http.client.HTTPResponse:
        """On a connection that was idle; when that turns out to be closed, on a new one."""
        if self._cancelled.is_set():
            raise Cancelled("cancelled before it was sent")
        try:
            self._connection, used = self._server.take()
        except ConnectionRefusedError as error:
            raise Unavailable(f"no server answers at {self._server.url}") from error
        try:
            return self._server.send(self._connection, self._path, self._body)
        except (ConnectionError, http.client.BadStatusLine):
            if not used or self._cancelled.is_set():
                raise
        self._connection.close()
        self._connection = self._server.fresh()
        return self._server.send(self._connection, self._path, self._body)


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[float, bytes]]:
    """The data of each event as soon as its last byte is here (WHATWG HTML, 9.2.6; only `data` matters here)."""
    rest = b""
    data: list[bytes] = []
    while received := response.read1(_READ_BYTES):
        now = time.monotonic()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and data:
                yield now, b"\n".join(data)
                data = []
    if rest or data:
        raise EngineFailure("the answer ended in the middle of an event")


def status_error(status: int, body: bytes) -> BatonError:
    """The error that an HTTP status and its body mean."""
    kind: type[BatonError] = EngineFailure
    if status in (408, 504):
        kind = DeadlineExceeded
    elif status in (429, 503):
        kind = Unavailable
    elif 400 <= status < 500:
        kind = InvalidRequest
    return kind(f"HTTP {status}: {error_text(body)}")


def error_text(body: bytes) -> str:
    """The sentence in an error body of Triton ({"error": "..."}), OpenAI ({"error": {"message": ...}}) or anybody."""
    try:
        error = json.loads(body)
    except ValueError:
        return body.decode(errors="replace").strip()[:300] or "no reason given"
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and error.get(key):
            error = error[key]
    return error if isinstance(error, str) else json.dumps(error)
