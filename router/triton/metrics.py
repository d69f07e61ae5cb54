"""Baton's metrics on Triton's metrics port. Labels: workers, ways and outcomes only, so their number is bounded."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from router.house import House
from router.types import Outcome, Proof, Way

_COUNTERS = {
    "baton_requests_total": "Requests that ended, by outcome",
    "baton_routes_total": "Routing decisions, by way",
    "baton_retries_total": "Attempts after a failed one",
    "baton_prompt_tokens_total": "Prompt tokens by where the decode worker had their KV from",
    "baton_prefill_tokens_total": "Prompt tokens by where the worker that prefilled had their KV from",
    "baton_store_bytes_total": "KV bytes taken from stores and other workers' caches, verified",
    "baton_kv_received_bytes_total": "KV bytes moved and verified",
    "baton_handoffs_total": "Handoffs by verdict: verified, or why the KV was not used",
    "baton_ttft_seconds_total": "Sum of times to first token; divide by baton_requests_total{outcome=ok}",
}
_GAUGES = {
    "baton_worker_up": "1 when the worker is up",
    "baton_worker_requests": "Requests at the worker, by state",
    "baton_worker_queued_tokens": "Prompt tokens the worker has yet to compute",
    "baton_kv_blocks": "KV blocks of the worker, by state; free + cached + held is the pool",
    "baton_store_up": "1 when the worker can use the store tier",
    "baton_store_used_bytes": "Bytes in the store tier, as the worker knows",
    "baton_store_blocks": "Blocks since the worker's start: read, missed (prefixes), written, corrupt, dropped",
    "baton_leases": "Published KV waiting to be fetched or released",
    "baton_router_requests": "Requests in the router",
    "baton_router_queued_tokens": "Prompt tokens that wait for their first token",
    "baton_prefix_index_blocks": "Blocks in the router's prefix index",
}


class Metrics:
    """Implements router.seams.Observer; `refresh` copies the workers' state into the gauges."""

    def __init__(self) -> None:
        family = pb_utils.MetricFamily
        self._families = {name: family(name=name, description=text, kind=family.COUNTER) for name, text in _COUNTERS.items()}
        self._families |= {name: family(name=name, description=text, kind=family.GAUGE) for name, text in _GAUGES.items()}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._lock = threading.Lock()
        for outcome in Outcome:
            self._metric("baton_requests_total", outcome=outcome.value)

    def decided(self, way: Way) -> None:
        self._metric("baton_routes_total", way=way.value).increment(1)

    def retried(self) -> None:
        self._metric("baton_retries_total").increment(1)

    def ended(self, outcome: Outcome, proof: Proof | None) -> None:
        self._metric("baton_requests_total", outcome=outcome.value).increment(1)
        if proof is None:
            return
        self._metric("baton_ttft_seconds_total").increment(proof.ttft_ms / 1e3)
        self._metric("baton_kv_received_bytes_total").increment(proof.kv_bytes)
        self._metric("baton_store_bytes_total").increment(proof.store_bytes)
        if proof.digest != "none":
            self._metric("baton_handoffs_total", verdict=proof.digest).increment(1)
        for source in ("reused", "received", "node", "remote", "recomputed", "computed"):
            self._metric("baton_prompt_tokens_total", source=source).increment(getattr(proof, f"kv_tokens_{source}"))
        for source in ("reused", "node", "remote", "peer", "computed"):
            self._metric("baton_prefill_tokens_total", source=source).increment(getattr(proof, f"prefill_tokens_{source}"))

    def refresh(self, house: House) -> None:
        """Called on the event loop now and then."""
        self._metric("baton_router_requests").set(house.admission.requests)
        self._metric("baton_router_queued_tokens").set(house.admission.queued_tokens)
        self._metric("baton_prefix_index_blocks").set(len(house.index))
        for worker in house.fleet:
            load, labels = worker.heartbeat.load, {"worker": worker.id, "role": worker.role.value}
            self._metric("baton_worker_up", **labels).set(int(worker.up))
            self._metric("baton_worker_queued_tokens", **labels).set(load.queued_tokens)
            self._metric("baton_leases", **labels).set(load.active_leases)
            for state in ("queued", "running"):
                self._metric("baton_worker_requests", **labels, state=state).set(getattr(load, f"{state}_requests"))
            for tier, counts in worker.heartbeat.stores.items():
                self._metric("baton_store_up", **labels, tier=tier).set(int(counts.up))
                self._metric("baton_store_used_bytes", **labels, tier=tier).set(counts.used_bytes)
                for what in ("read", "missed", "written", "corrupt", "dropped"):
                    self._metric("baton_store_blocks", **labels, tier=tier, what=what).set(getattr(counts, what))
            for state in ("free", "cached", "held"):
                self._metric("baton_kv_blocks", **labels, state=state).set(getattr(load, f"{state}_blocks"))

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, tuple(labels.items()))
        with self._lock:
            metric = self._metrics.get(key)
            if metric is None:
                metric = self._metrics[key] = self._families[name].Metric(labels=labels)
        return metric
