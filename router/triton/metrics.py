"""Baton's metrics on Triton's metrics port. Labels: workers, ways and outcomes only, so their number is bounded."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from router.lifecycle import LIVE
from router.seams import Snapshot
from router.types import Outcome, Proof, Way

_COUNTERS = {
    "baton_requests_total": "Requests that ended, by outcome",
    "baton_routes_total": "Routing decisions, by way",
    "baton_retries_total": "Attempts after a failed one",
    "baton_warm_ups_total": "First handoffs between two workers, by verdict; only engines that need them",
    "baton_prompt_tokens_total": "Prompt tokens by where the decode worker had their KV from",
    "baton_kv_received_bytes_total": "KV bytes moved and verified",
    "baton_handoffs_total": "Handoffs by verdict: verified, or why the KV was not used",
    "baton_ttft_seconds_total": "Sum of times to first token; divide by baton_requests_total{outcome=ok}",
}
_GAUGES = {
    "baton_worker_up": "1 when the worker is up",
    "baton_worker_requests": "Requests at the worker, by state",
    "baton_worker_queued_tokens": "Prompt tokens the worker has yet to compute",
    "baton_kv_blocks": "KV blocks of the worker, by state; free + cached + held is the pool",
    "baton_leases": "Published KV waiting to be fetched or released",
    "baton_prefix_events": "1 when the worker tells what its prefix cache holds; 0: prefixes are not routed to it",
    "baton_router_requests": "Requests in the router",
    "baton_live_requests": "Requests in the router, by state of their life",
    "baton_router_queued_tokens": "Prompt tokens that wait for their first token",
    "baton_prefix_index_blocks": "Blocks in the router's prefix index",
}


_Key = tuple[str, tuple[tuple[str, str], ...]]  # name, labels


class Metrics:
    """Implements router.seams.Observer on the event loop; `refresh` copies how things stand into the gauges."""

    def __init__(self) -> None:
        family = pb_utils.MetricFamily
        self._families = {name: family(name=name, description=text, kind=family.COUNTER) for name, text in _COUNTERS.items()}
        self._families |= {name: family(name=name, description=text, kind=family.GAUGE) for name, text in _GAUGES.items()}
        self._metrics: dict[_Key, Any] = {}
        self._values: dict[_Key, int] = {}  # of gauges, as last set
        for outcome in Outcome:
            self._metric("baton_requests_total", outcome=outcome.value)

    def close(self) -> None:
        """Let go of the server's objects: Triton's stub crashes when they outlive the model."""
        self._metrics.clear()
        self._families.clear()

    def decided(self, way: Way) -> None:
        self._metric("baton_routes_total", way=way.value).increment(1)

    def retried(self) -> None:
        self._metric("baton_retries_total").increment(1)

    def warmed(self, verdict: str) -> None:
        self._metric("baton_warm_ups_total", verdict=verdict.partition(" ")[0]).increment(1)

    def ended(self, outcome: Outcome, proof: Proof | None) -> None:
        self._metric("baton_requests_total", outcome=outcome.value).increment(1)
        if proof is None:
            return
        self._metric("baton_ttft_seconds_total").increment(proof.ttft_ms / 1e3)
        self._metric("baton_kv_received_bytes_total").increment(proof.kv_bytes)
        if proof.digest != "none":
            self._metric("baton_handoffs_total", verdict=proof.digest).increment(1)
        for source in ("reused", "received", "recomputed", "computed"):
            self._metric("baton_prompt_tokens_total", source=source).increment(getattr(proof, f"kv_tokens_{source}"))

    def refresh(self, snapshot: Snapshot) -> None:
        """Called on the event loop now and then."""
        self._set("baton_router_requests", snapshot.requests)
        self._set("baton_router_queued_tokens", snapshot.queued_tokens)
        self._set("baton_prefix_index_blocks", snapshot.index_blocks)
        for state in LIVE:
            self._set("baton_live_requests", snapshot.states.get(state, 0), state=state.value)
        for worker in snapshot.workers:
            load, labels = worker.heartbeat.load, {"worker": worker.id, "role": worker.role.value}
            self._set("baton_worker_up", int(worker.up), **labels)
            self._set("baton_worker_queued_tokens", load.queued_tokens, **labels)
            self._set("baton_leases", load.active_leases, **labels)
            self._set("baton_prefix_events", int(load.tells_blocks), **labels)
            for name in ("queued", "running"):
                self._set("baton_worker_requests", getattr(load, f"{name}_requests"), **labels, state=name)
            for name in ("free", "cached", "held"):
                self._set("baton_kv_blocks", getattr(load, f"{name}_blocks"), **labels, state=name)

    def _set(self, name: str, value: int, **labels: str) -> None:
        """Only what has changed: each setting is a call to the server, and an idle router is to be idle."""
        key = (name, tuple(labels.items()))
        if self._values.get(key) != value:
            self._values[key] = value
            self._metric(name, **labels).set(value)

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, tuple(labels.items()))
        metric = self._metrics.get(key)
        if metric is None:
            metric = self._metrics[key] = self._families[name].Metric(labels=labels)
        return metric
