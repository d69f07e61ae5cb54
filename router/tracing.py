"""One OpenTelemetry trace per request, made from its record when it has ended, and exported by OTLP over HTTP.

This happens in the router's process, since every request passes there, whichever protocol brought it; no SDK runs in workers
or front ends, whose times are in the record. It happens on a thread of its own behind a bounded queue: what doesn't fit is
dropped and counted. Batches are small, so that the thread never holds the interpreter from the event loop for long.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from python_backends.core.config import TracingConfig
from router.journal import Record
from router.phases import Phase, phases
from router.types import Outcome

log = logging.getLogger(__name__)

_MOST_QUEUED = 2000  # records
_BATCH = 16  # records, 150 spans or so
_GATHER_S = 0.5  # a batch waits so long for more
_TIMEOUT_S = 5.0
_STOP_S = 2.0

_SCOPE = InstrumentationScope("baton")


def spans(record: Record, resource: Resource) -> list[ReadableSpan]:
    """The same as OpenTelemetry's spans."""
    trace, made = record.trace, phases(record)
    own = {phase.name: int(secrets.token_hex(8), 16) for phase in made} | {"request": int(trace.span_id, 16)}
    state = TraceState.from_header([trace.tracestate]) if trace.tracestate else None

    def context(span_id: int, remote: bool = False) -> SpanContext:
        return SpanContext(int(trace.trace_id, 16), span_id, remote, TraceFlags(TraceFlags.SAMPLED), state)

    def parent(phase: Phase) -> SpanContext | None:
        if phase.parent:
            return context(own[phase.parent])
        return context(int(trace.parent_id, 16), remote=True) if trace.parent_id else None

    def instant(ms: float) -> int:
        return record.arrival_ns + int(ms * 1e6)

    troubles = [Event("attempt failed", {"baton.why": trouble.why}, instant(trouble.ms)) for trouble in record.troubles]
    failed = Status(StatusCode.ERROR, record.error) if record.outcome is Outcome.FAILED else Status()
    return [
        ReadableSpan(
            name="generate" if phase.name == "request" else phase.name,
            context=context(own[phase.name]),
            parent=parent(phase),
            resource=resource,
            attributes=phase.attributes,
            events=troubles if phase.name == "router" else (),
            kind=SpanKind.INTERNAL if phase.parent else SpanKind.SERVER,
            status=failed if phase.name in ("request", "router") else Status(),
            start_time=instant(phase.start_ms),
            end_time=instant(phase.end_ms),
            instrumentation_scope=_SCOPE,
        )
        for phase in made
    ]


class Tracer:
    """Exports records as they are put in, on its own thread."""

    def __init__(self, config: TracingConfig, model: str, dropped: Callable[[], None]) -> None:
        """Nothing is connected to yet; what no collector takes is lost. `dropped` is told of each record without room."""
        self._fraction = config.sample
        self._resource = Resource.create({"service.name": config.service_name, "baton.model": model})
        self._exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=_TIMEOUT_S)
        self._queue: queue.Queue[Record | None] = queue.Queue(_MOST_QUEUED)
        self._closing = threading.Event()
        self._dropped = dropped
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """From any thread; never blocks."""
        sampled = record.trace.sampled
        if sampled is False or (sampled is None and random.random() >= self._fraction):
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped()

    def close(self) -> None:
        """What is queued is still exported, if the collector takes it within two seconds."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # it may be waiting
        self._thread.join(_STOP_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            batch = self._batch()
            try:
                if batch:
                    self._exporter.export([span for record in batch for span in spans(record, self._resource)])
            except Exception:  # a record or a collector that nobody thought of must not end tracing
                log.exception("%d traces could not be exported", len(batch))

    def _batch(self) -> list[Record]:
        """The next records: waits for the first one, and a moment for more."""
        batch: list[Record] = []
        with suppress(queue.Empty):
            item = self._queue.get()
            while item is not None:
                batch.append(item)
                if len(batch) == _BATCH:
                    break
                item = self._queue.get(timeout=0.0 if self._closing.is_set() else _GATHER_S)
        return batch
