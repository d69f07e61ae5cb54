"""Baton's metrics on Triton's metrics port. Labels: workers, ways and outcomes only, so their number is bounded."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from python_backends.core.types import Role
from router.cost_model import TERMS
from router.lifecycle import LIVE
from router.seams import Snapshot
from router.types import Outcome, Proof, Way

_COUNTERS = {
    "baton_requests_total": "Requests that ended, by outcome",
    "baton_routes_total": "Routing decisions, by way",
    "baton_retries_total": "Attempts after a failed one",
    "baton_prompt_tokens_total": "Prompt tokens by where the decode worker had their KV from",
    "baton_kv_received_bytes_total": "KV bytes moved and verified",
    "baton_handoffs_total": "Handoffs by verdict: verified, or why the KV was not used",
    "baton_requests_by_tokens_total": "Requests that ended well, by part and by its tokens: the next power of two",
    "baton_predictions_total": "Predictions that could be compared with what came: ttft, itl",
    "baton_prediction_error_ratio_total": "Sum of |predicted - real| / real; divide by baton_predictions_total",
    "baton_ttft_seconds_total": "Sum of times to first token; divide by baton_requests_total{outcome=ok}",
}
_GAUGES = {
    "baton_worker_up": "1 when the worker is up",
    "baton_worker_requests": "Requests at the worker, by state",
    "baton_worker_queued_tokens": "Prompt tokens the worker has yet to compute",
    "baton_kv_blocks": "KV blocks of the worker, by state; free + cached + held is the pool",
    "baton_leases": "Published KV waiting to be fetched or released",
    "baton_router_requests": "Requests in the router",
    "baton_live_requests": "Requests in the router, by state of their life",
    "baton_router_waiting_requests": "Requests in the router that wait for a worker with room",
    "baton_step_model_ms": "What the router has learned of a worker's steps: ms per unit of each term",
    "baton_step_model_error_ratio": "Running mean of |predicted - real| / real of the worker's steps",
    "baton_link_bytes_per_second": "Rate at which KV arrives at the worker, as learned",
    "baton_link_overhead_seconds": "What fetching KV takes besides the moving, as learned",
    "baton_hop_seconds": "Time to the worker and back, as learned",
    "baton_router_queued_tokens": "Prompt tokens that wait for their first token",
    "baton_prefix_index_blocks": "Blocks in the router's prefix index",
}


_MODELS_EVERY = 25  # refreshes; what was learned changes slowly, and every value is a call to the server


_Key = tuple[str, tuple[tuple[str, str], ...]]  # name, labels


class Metrics:
    """Implements router.seams.Observer on the event loop; `refresh` copies how things stand into the gauges."""

    def __init__(self) -> None:
        family = pb_utils.MetricFamily
        self._families = {name: family(name=name, description=text, kind=family.COUNTER) for name, text in _COUNTERS.items()}
        self._families |= {name: family(name=name, description=text, kind=family.GAUGE) for name, text in _GAUGES.items()}
        self._metrics: dict[_Key, Any] = {}
        self._values: dict[_Key, float] = {}  # of gauges, as last set
        self._refreshes = 0
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
        if proof.digest != "none":
            self._metric("baton_handoffs_total", verdict=proof.digest).increment(1)
        self._compare("ttft", proof.predicted_ttft_ms, proof.ttft_ms)
        if proof.itl_ms:
            self._compare("itl", proof.predicted_itl_ms, proof.itl_ms)
        for part, tokens in (("prompt", proof.prompt_tokens), ("output", proof.output_tokens)):
            self._metric(
                "baton_requests_by_tokens_total", part=part, tokens=str(1 << max(tokens - 1, 0).bit_length())
            ).increment(1)
        for source in ("reused", "received", "recomputed", "computed"):
            self._metric("baton_prompt_tokens_total", source=source).increment(getattr(proof, f"kv_tokens_{source}"))

    def _compare(self, what: str, predicted_ms: float, real_ms: float) -> None:
        self._metric("baton_predictions_total", what=what).increment(1)
        error = abs(predicted_ms - real_ms) / max(real_ms, 1e-3)
        self._metric("baton_prediction_error_ratio_total", what=what).increment(error)

    def refresh(self, snapshot: Snapshot) -> None:
        """Called on the event loop now and then."""
        self._set("baton_router_requests", snapshot.requests)
        self._set("baton_router_waiting_requests", snapshot.waiting)
        self._set("baton_router_queued_tokens", snapshot.queued_tokens)
        self._set("baton_prefix_index_blocks", snapshot.index_blocks)
        for state in LIVE:
            self._set("baton_live_requests", snapshot.states.get(state, 0), state=state.value)
        for worker in snapshot.workers:
            load, labels = worker.heartbeat.load, {"worker": worker.id, "role": worker.role.value}
            self._set("baton_worker_up", int(worker.up), **labels)
            self._set("baton_worker_queued_tokens", load.queued_tokens, **labels)
            self._set("baton_leases", load.active_leases, **labels)
            for name in ("queued", "running"):
                self._set("baton_worker_requests", getattr(load, f"{name}_requests"), **labels, state=name)
            for name in ("free", "cached", "held"):
                self._set("baton_kv_blocks", getattr(load, f"{name}_blocks"), **labels, state=name)

        if self._refreshes % _MODELS_EVERY == 0:
            self._show_models(snapshot)
        self._refreshes += 1

    def _show_models(self, snapshot: Snapshot) -> None:
        for worker in snapshot.workers:
            labels = {"worker": worker.id, "role": worker.role.value}
            for term, coefficient in zip(TERMS, worker.model.coefficients, strict=True):
                self._set("baton_step_model_ms", _rounded(coefficient), **labels, term=term)
            self._set("baton_step_model_error_ratio", _rounded(worker.model.error), **labels)
            self._set("baton_hop_seconds", _rounded(worker.hop_ms / 1e3), **labels)
            if worker.role is Role.DECODE:
                self._set("baton_link_bytes_per_second", _rounded(worker.link.bytes_per_ms * 1e3), **labels)
                self._set("baton_link_overhead_seconds", _rounded(worker.link.overhead_ms / 1e3), **labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
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


def _rounded(value: float) -> float:
    """To three digits: noise is no change."""
    return float(f"{value:.3g}")
