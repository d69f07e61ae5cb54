"""A collector of OpenTelemetry traces: takes them by OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Span:
    """As it came. Ids in hexadecimal digits, times in ns."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[str]
    failed: bool
    service: str

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class Collector:
    """A context manager; `url` is what `tracing.otlp_endpoint` is to be. `delay_s`: how long each answer takes."""

    def __init__(self, *, delay_s: float = 0.0, status: int = 200) -> None:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                time.sleep(delay_s)
                if status == 200 and self.headers["Content-Type"] == "application/x-protobuf":  # Triton's own come as JSON
                    collector.take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing: it would be mixed with the tests' own output."""

        self.spans: list[Span] = []
        self._arrived = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        found = []
        for resource in request.resource_spans:
            service = _attributes(resource.resource.attributes).get("service.name", "")
            found += [_span(span, service) for scope in resource.scope_spans for span in scope.spans]
        with self._arrived:
            self.spans += found
            self._arrived.notify_all()

    def trace(self, trace_id: str, within_s: float = TIMEOUT_S) -> dict[str, Span]:
        """The spans of one trace by name; waits for its first ones, which come together with all others of a request."""
        self.wait_for(lambda: any(span.trace_id == trace_id for span in self.spans), within_s)
        return {span.name: span for span in self.spans if span.trace_id == trace_id}

    def wait_for(self, condition: Callable[[], bool], within_s: float = TIMEOUT_S) -> None:
        with self._arrived:
            assert self._arrived.wait_for(condition, within_s), f"not within {within_s} s; there are {len(self.spans)} spans"


def _span(span: Any, service: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=[event.name for event in span.events],
        failed=span.status.code == 2,
        service=service,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
