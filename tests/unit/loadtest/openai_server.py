"""A small real HTTP server that speaks OpenAI's streaming API: words at a steady pace, usage at the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """What the server does, to be changed by a test; and what it was asked."""

    first_s: float = 0.05
    gap_s: float = 0.01
    line_end: bytes = b"\n"
    usage: bool = True
    usage_in_chunks: bool = False
    tokens_per_chunk: int = 1
    late_text: bool = False  # every second chunk has none: half a character
    status: int = 200
    break_after: int | None = None  # tokens, then the connection is cut
    error_after: int | None = None  # tokens, then an error event
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    cut: int = 0  # answers that a client did not read to the end


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def setup(self) -> None:
        super().setup()
        self.behaviour.connections += 1

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        known = self.path in ("/v1/models", "/health")
        body = json.dumps({"data": [{"id": "little"}]} if known else {"error": {"message": "no such path"}}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.behaviour.bodies.append({"path": self.path, "key": self.headers.get("Authorization"), **asked})
        if self.behaviour.status != 200:
            self._refuse()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(asked, chat="chat" in self.path)
        except OSError:
            self.behaviour.cut += 1
            self.close_connection = True

    def _refuse(self) -> None:
        body = b'{"error": {"message": "not today", "type": "overloaded"}}'
        self.send_response(self.behaviour.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, asked: dict[str, Any], chat: bool) -> None:
        behaviour = self.behaviour
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        time.sleep(behaviour.first_s)
        done = 0
        while done < asked["max_tokens"]:
            if behaviour.break_after == done:
                raise ConnectionAbortedError
            if behaviour.error_after == done:
                self._event({"error": {"message": "the engine broke"}})
                break
            count = min(behaviour.tokens_per_chunk, asked["max_tokens"] - done)
            done += count
            text = "" if behaviour.late_text and done % 2 else " word" * count
            choice = {"delta": {"content": text}} if chat else {"text": text}
            chunk: dict[str, Any] = {"choices": [{**choice, "finish_reason": None}]}
            if behaviour.usage_in_chunks:
                chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": done}
            self._event(chunk)
            time.sleep(behaviour.gap_s)
        proof = {"baton": {"proof": {"route": "remote"}}} if asked.get("baton") == {"proof": True} else {}
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}], **proof})
        if behaviour.usage and asked.get("stream_options", {}).get("include_usage"):
            details = {"prompt_tokens_details": {"cached_tokens": 3}}
            self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": done, **details}})
        self._send(b"data: [DONE]" + behaviour.line_end * 2)
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: dict[str, Any]) -> None:
        self._send(b"data: " + json.dumps(value).encode() + self.behaviour.line_end * 2)

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def openai_server(port: int = 0) -> Iterator[tuple[str, Behaviour]]:
    """(address that ends in /v1, its behaviour)."""
    behaviour = Behaviour()
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
