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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

from python_backends.core.config import TracingConfig
from router.journal import Record
from router.types import Outcome, Way

log = logging.getLogger(__name__)

_MOST_QUEUED = 2000  # records
_BATCH = 16  # records, 150 spans or so
_GATHER_S = 0.5  # a batch waits so long for more
_TIMEOUT_S = 5.0
_STOP_S = 2.0

_SCOPE = InstrumentationScope("baton")


@dataclass(frozen=True, slots=True)
class Phase:
    """A span of a request. Times are milliseconds after the record's arrival; a front end's are negative."""

    name: str
    start_ms: float
    end_ms: float
    parent: str = "request"  # name of the phase it belongs to
    attributes: dict[str, AttributeValue] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return self.end_ms - self.start_ms


def phases(record: Record) -> list[Phase]:
    """What a request consisted of, parents first, as far as it came.

    queue + prefill reach from the arrival to the first token, handoff + first decode from there to the second one.
    """
    return [*_around(record), *_until_first_token(record), *_until_end(record)]


def _around(record: Record) -> Iterator[Phase]:
    started = 0.0
    if record.front_end is not None:
        started = min((record.front_end.received_ns - record.arrival_ns) / 1e6, 0.0)
    yield Phase("request", started, record.age_ms, "", _attributes(record))
    if record.front_end is not None:
        yield Phase("front end", started, 0.0)
        tokenize_ms = min(record.front_end.tokenize_ms, -started)
        yield Phase("tokenize", -tokenize_ms, 0.0, "front end")
    yield Phase("router", 0.0, record.age_ms, attributes={"baton.request_id": record.id})


def _until_first_token(record: Record) -> Iterator[Phase]:
    proof = record.proof
    if proof is None:  # it failed, or goes on: where the time to the first token went is not known
        yield Phase("queue and prefill", 0.0, record.ttft_ms or record.age_ms, "router")
        return
    yield Phase("queue", 0.0, proof.queue_ms, "router")
    reused, computed = proof.prefill_tokens_reused, proof.prefill_tokens_computed
    attributes: dict[str, AttributeValue] = {
        "baton.worker": proof.prefill_worker,
        "baton.tokens.reused": reused,
        "baton.tokens.computed": computed,
    }
    yield Phase("prefill", proof.queue_ms, proof.ttft_ms, "router", attributes)


def _until_end(record: Record) -> Iterator[Phase]:
    if not record.ttft_ms:
        return
    proof, ready = record.proof, record.ttft_ms
    if proof is not None and proof.route == Way.REMOTE and proof.decode_worker and record.second_token_ms:
        ready = record.ttft_ms + proof.handoff_ms
        yield Phase("handoff", record.ttft_ms, ready, "router", {"baton.worker": proof.decode_worker})
        if proof.transport:
            transferred: dict[str, AttributeValue] = {
                "baton.transport": proof.transport,
                "baton.kv.bytes": proof.kv_bytes,
                "baton.kv.digest": proof.digest,
            }
            yield Phase("transfer", ready - min(proof.transfer_ms, proof.handoff_ms), ready, "handoff", transferred)
    if record.second_token_ms:
        yield Phase("decode", ready, record.age_ms, "router", {"baton.worker": record.decode_worker})
        yield Phase("first decode", ready, max(record.second_token_ms, ready), "decode")


def _attributes(record: Record) -> dict[str, AttributeValue]:
    """Those of the request's own span; gen_ai.* as OpenTelemetry's conventions for generative AI name them."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "baton.outcome": record.outcome.value if record.outcome else "in flight",
        "baton.attempts": record.attempts,
        "baton.ttft_ms": record.ttft_ms,
        "baton.itl_ms": record.itl_ms,
    }
    told = {"route": record.route, "why": record.why, "client_id": record.client_id, "answer_id": record.answer_id}
    attributes |= {f"baton.{name}": text for name, text in told.items() if text}
    if record.proof is not None:
        for source in ("reused", "received", "recomputed", "computed"):
            attributes[f"baton.kv.tokens.{source}"] = getattr(record.proof, f"kv_tokens_{source}")
    return attributes


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
