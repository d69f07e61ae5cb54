"""Traces as a collector gets them, and that no collector can hold anything up."""

from __future__ import annotations

import logging
import time

import msgspec
import pytest

from python_backends.core.config import TracingConfig
from router.journal import Trouble
from router.tracing import Tracer
from router.types import Outcome
from tests.collector import Collector
from tests.unit.router.journals import remote_record

SERVER, INTERNAL = 2, 1  # SpanKind in OTLP


def _tracer(url: str, sample: float = 1.0, dropped: list[int] | None = None) -> Tracer:
    config = TracingConfig(otlp_endpoint=url, sample=sample, service_name="baton-test")
    return Tracer(config, "tiny", lambda: None if dropped is None else dropped.append(1))


def test_a_request_is_one_trace() -> None:
    record = remote_record()
    with Collector() as collector:
        tracer = _tracer(collector.url)
        tracer.put(record)
        spans = collector.trace("a" * 32)
        tracer.close()
    root = spans["generate"]
    assert (root.span_id, root.parent_id, root.kind, root.service) == ("b" * 16, "c" * 16, SERVER, "baton-test")
    assert {span.kind for name, span in spans.items() if name != "generate"} == {INTERNAL}
    ids = {span.span_id: name for name, span in spans.items()}
    parents = {name: ids.get(span.parent_id) for name, span in spans.items()}
    assert parents == {
        "generate": None,
        "front end": "generate",
        "tokenize": "front end",
        "router": "generate",
        "queue": "router",
        "prefill": "router",
        "handoff": "router",
        "transfer": "handoff",
        "decode": "router",
        "first decode": "decode",
    }
    assert spans["router"].start_ns == record.arrival_ns
    assert root.ms == pytest.approx(103)
    assert spans["queue"].ms + spans["prefill"].ms == pytest.approx(record.ttft_ms)
    assert root.attributes["gen_ai.usage.input_tokens"] == 101
    assert root.attributes["baton.route"] == "remote"
    assert spans["prefill"].attributes["baton.worker"] == "prefill"
    assert spans["transfer"].attributes["baton.kv.bytes"] == 1 << 20


def test_failures_and_failed_attempts_can_be_seen() -> None:
    record = remote_record()
    troubled = msgspec.structs.replace(
        record, outcome=Outcome.FAILED, proof=None, error="no worker", troubles=[Trouble(5.0, "worker decode died")]
    )
    with Collector() as collector:
        tracer = _tracer(collector.url)
        tracer.put(troubled)
        spans = collector.trace("a" * 32)
        tracer.close()
    assert spans["generate"].failed
    assert spans["router"].events == ["attempt failed"]


@pytest.mark.parametrize(("sampled", "share", "expected"), [(False, 1.0, 0), (True, 0.0, 3), (None, 0.0, 0), (None, 1.0, 3)])
def test_the_client_decides_and_else_the_share(sampled: bool | None, share: float, expected: int) -> None:
    with Collector() as collector:
        tracer = _tracer(collector.url, share)
        for _ in range(3):
            tracer.put(remote_record(sampled=sampled))
        tracer.close()  # exports what is queued
        assert len([span for span in collector.spans if span.name == "generate"]) == expected


def test_many_traces_all_arrive() -> None:
    with Collector() as collector:
        tracer = _tracer(collector.url)
        for number in range(300):
            tracer.put(remote_record(f"r.{number}"))
        collector.wait_for(lambda: len(collector.spans) == 300 * 10)
        tracer.close()


def test_a_collector_that_is_slow_costs_traces_and_nothing_else() -> None:
    dropped: list[int] = []
    record = remote_record()
    with Collector(delay_s=1.0) as collector:
        tracer = _tracer(collector.url, dropped=dropped)
        began = time.monotonic()
        for _ in range(5000):
            tracer.put(record)
        assert time.monotonic() - began < 0.5
        assert len(dropped) >= 5000 - 2000 - 32
        began = time.monotonic()
        tracer.close()
        assert time.monotonic() - began < 8


@pytest.mark.parametrize("trouble", ["nobody listens", "refuses"])
def test_no_collector_is_no_trouble(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with Collector(status=400) as collector:
        tracer = _tracer("http://127.0.0.1:9/v1/traces" if trouble == "nobody listens" else collector.url)
        for _ in range(3):
            tracer.put(remote_record())
        began = time.monotonic()
        tracer.close()
        assert time.monotonic() - began < 8
        assert collector.spans == []
