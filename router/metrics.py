"""Every metric in one table, and `Meter`, which counts in plain Python and hands on what has changed.

Handing on is a call between processes per series (router/triton/metrics.py), so it happens a few times a second and not per
request, and an idle router hands on nothing but canaries. Histograms are counters with a label `le`, which PromQL's
histogram_quantile reads like any other: Triton 24.10 has no histograms for Python models, and where a newer one has them each
observation would be a call of its own, while a counter takes a second's worth of them at once.

Labels are workers, routes, outcomes and the like: all of them from the deployment file or an enum, so their number is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from python_backends.core.step_model import TERMS
from python_backends.core.types import Role, WorkerId, WorkerLoad
from router.fleet import WorkerView
from router.journal import Record
from router.lifecycle import LIVE
from router.seams import Snapshot
from router.types import Outcome, Proof, Way

_NO_ROUTE = "none"  # the request ended before one was chosen
_HISTOGRAMS_EVERY = 5  # refreshes; they have many series
_MODELS_EVERY = 20  # refreshes; what was learned changes slowly

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 5.0)
_TRANSFER_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_TOKENS = tuple(float(1 << power) for power in range(4, 18))  # 16 to 131072
_ERRORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Kind(str, Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. A histogram is exported as `name`_bucket, `name`_sum and `name`_count."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> list[str]:
        return [self.name + suffix for suffix in _SUFFIXES] if self.kind is Kind.HISTOGRAM else [self.name]


_BUCKET, _SUM, _COUNT = _SUFFIXES = ("_bucket", "_sum", "_count")
_WORKER = ("worker", "role")


def _counter(name: str, meaning: str, *labels: str) -> Family:
    return Family(name, Kind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Family:
    return Family(name, Kind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Family:
    return Family(name, Kind.HISTOGRAM, meaning, labels, buckets)


FAMILIES: tuple[Family, ...] = (
    # requests
    _counter("baton_requests_total", "Requests that ended, by outcome and the route they took", "outcome", "route"),
    _counter("baton_routes_total", "Routing decisions; a retry is one more", "route"),
    _counter("baton_retries_total", "Attempts after a failed one"),
    _counter("baton_output_tokens_total", "Tokens produced"),
    _histogram("baton_request_prompt_tokens", "Length of prompts, tokens", _TOKENS),
    _histogram("baton_request_output_tokens", "Length of answers, tokens", _TOKENS),
    # their times: queue + prefill is TTFT; handoff + first decode is from there to the second token
    _histogram("baton_ttft_seconds", "Arrival at the router to the first token", _SECONDS, "route"),
    _histogram("baton_queue_seconds", "Part of TTFT that is not prefill: waiting, tokenising, hops", _SECONDS, "route"),
    _histogram("baton_prefill_seconds", "Part of TTFT in which the prompt was computed", _SECONDS, "route"),
    _histogram("baton_handoff_seconds", "First token to the decode worker having the KV", _SECONDS),
    _histogram("baton_first_decode_seconds", "The decode worker having the KV to the second token", _SECONDS),
    _histogram("baton_itl_seconds", "Between two token arrivals of a stream, at the router", _STEP_SECONDS),
    _histogram("baton_e2e_seconds", "Arrival to the last token", _SECONDS, "route"),
    # KV
    _counter("baton_prompt_tokens_total", "Prompt tokens by where the decode worker had their KV from", "source"),
    _counter("baton_prefill_tokens_total", "Prompt tokens by where whoever prefilled had their KV from", "source"),
    _counter("baton_kv_received_bytes_total", "KV bytes moved and verified"),
    _counter("baton_kv_wire_bytes_total", "Bytes that travelled for them", "codec"),
    _histogram("baton_transfer_seconds", "Duration of a transfer of KV", _TRANSFER_SECONDS, "transport"),
    _counter("baton_handoffs_total", "Handoffs by verdict: verified, or why the KV was not used", "verdict"),
    _gauge("baton_kv_blocks", "KV blocks of the worker, by state; free + cached + held is the pool", *_WORKER, "state"),
    _gauge("baton_kv_block_bytes", "Bytes of one KV block; 0: the worker has left the deployment", *_WORKER),
    _gauge("baton_leases", "Published KV waiting to be fetched or released", *_WORKER),
    _gauge("baton_prefix_index_blocks", "Blocks in the router's prefix index"),
    _gauge(
        "baton_prefix_events", "1 when the worker tells what its prefix cache holds; 0: no prefix is routed there", *_WORKER
    ),
    _counter("baton_warm_ups_total", "First handoffs between two workers, by verdict; only engines that need them", "verdict"),
    _counter("baton_store_bytes_total", "KV bytes taken from stores and from other workers' caches, verified"),
    _counter("baton_store_blocks_total", "KV blocks of a store tier, by what happened to them", *_WORKER, "tier", "event"),
    _gauge("baton_store_used_bytes", "Bytes in the store tier, as the worker sees it", *_WORKER, "tier"),
    _gauge("baton_store_up", "1 when the worker reaches the store tier", *_WORKER, "tier"),
    # queues, batches, health
    _gauge("baton_ready", "1 when requests can be served: a worker that decodes is given work"),
    _gauge("baton_worker_up", "1 when the worker is up", *_WORKER),
    _gauge(
        "baton_worker_available", "1 when the worker is given new work: it is up, its circuit closed, not drained", *_WORKER
    ),
    _counter("baton_canaries_total", "Canaries to the worker, by verdict: passed, failed or busy", *_WORKER, "verdict"),
    _counter(
        "baton_handoff_canaries_total", "Canaries handed from worker to worker, by verdict", "prefill", "decode", "verdict"
    ),
    _counter("baton_worker_starts_total", "Lives of the worker that this router has seen begin", *_WORKER),
    _gauge("baton_worker_requests", "Requests at the worker, by state; running is its batch", *_WORKER, "state"),
    _gauge(
        "baton_worker_fill_ratio",
        "Part that the worker has of the streams it can take: of its batch, its KV pool or its steps' time, the fullest",
        *_WORKER,
    ),
    _gauge("baton_worker_queued_tokens", "Prompt tokens the worker has yet to compute", *_WORKER),
    _counter("baton_worker_busy_seconds_total", "Time in which the worker has computed", *_WORKER),
    _gauge("baton_router_requests", "Requests in the router"),
    _gauge("baton_live_requests", "Requests in the router, by state of their life", "state"),
    _gauge("baton_router_waiting_requests", "Requests in the router that wait for a worker with room"),
    _gauge("baton_router_queued_tokens", "Prompt tokens that wait for their first token"),
    # what it has learned of its workers, and predicts from
    _gauge("baton_step_cost_seconds", "What a step of the worker takes per unit of the term", *_WORKER, "term"),
    _gauge("baton_step_cost_error_ratio", "Running mean of |predicted - measured| / measured of the worker's steps", *_WORKER),
    _gauge("baton_step_tokens_per_stream", "Tokens that a stream gets per step; more than 1 where it guesses ahead", *_WORKER),
    _gauge("baton_link_bytes_per_second", "Rate at which KV arrives at the worker", *_WORKER),
    _gauge("baton_link_overhead_seconds", "What fetching KV takes besides the moving of bytes", *_WORKER),
    _gauge("baton_hop_seconds", "From the router to the worker's queue, and back", *_WORKER),
    # the router about itself
    _histogram("baton_prediction_error_ratio", "Predicted against measured: |difference| / measured", _ERRORS, "what"),
    _counter("baton_traces_dropped_total", "Traces that were not exported because the exporter was behind"),
)

_BY_NAME = {family.name: family for family in FAMILIES}
_KV_SOURCES = [field.removeprefix("kv_tokens_") for field in Proof.__struct_fields__ if field.startswith("kv_tokens_")]
_PREFILL_SOURCES = [
    field.removeprefix("prefill_tokens_") for field in Proof.__struct_fields__ if field.startswith("prefill_tokens_")
]
_STORE_EVENTS = ("read", "missed", "written", "corrupt", "dropped")
# (label, predicted, measured), ms: of the proof's fields, as far as it has them
_PREDICTIONS = [
    (what, f"predicted_{what}_ms", f"{what}_ms")
    for what in ("ttft", "itl")
    if {f"predicted_{what}_ms", f"{what}_ms"} <= set(Proof.__struct_fields__)
]

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """Of one series. amount: what a counter has grown by, or a gauge's new value."""

    name: str
    labels: Labels
    is_gauge: bool
    amount: float


class Sink(Protocol):
    """Where changes go. Called on the event loop; must not block."""

    @property
    def ready(self) -> bool:
        """Whether it has dealt with what was pushed last."""

    def push(self, changes: list[Change]) -> None: ...


class _Histogram:
    """Observations since they were last handed on."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._counts = [0] * (len(family.buckets) + 1)
        self._sum = 0.0
        self._is_new = True

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._family.buckets, value)] += count
        self._sum += value * count

    def changes(self, labels: Labels) -> list[Change]:
        """Each bucket counts what is at most its bound, hence also all below. At first all of them are told of."""
        total, found = 0, []
        for bound, count in zip((*self._family.buckets, float("inf")), self._counts, strict=True):
            total += count
            if total or self._is_new:
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                found.append(Change(self._family.name + _BUCKET, (*labels, ("le", le)), False, total))
        if found:
            found.append(Change(self._family.name + _SUM, labels, False, self._sum))
            found.append(Change(self._family.name + _COUNT, labels, False, total))
        self._counts, self._sum, self._is_new = [0] * len(self._counts), 0.0, False
        return found


class Meter:
    """Implements router.seams.Observer on the event loop."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._counts: dict[tuple[str, Labels], float] = {}  # to be handed on
        self._gauges: dict[tuple[str, Labels], float] = {}  # as they are
        self._changed: set[tuple[str, Labels]] = set()
        self._histograms: dict[tuple[str, Labels], _Histogram] = {}
        self._epochs: dict[WorkerId, int] = {}
        self._reported: dict[tuple[str, Labels], tuple[int, float]] = {}  # epoch, total
        self._refreshes = 0
        self._models_due = 0
        self._itl = self._histogram("baton_itl_seconds")
        for outcome in Outcome:  # a series that begins at 0 shows its first event as a rate
            for route in (*Way, None):
                self.count("baton_requests_total", 0, outcome=outcome.value, route=route.value if route else _NO_ROUTE)
        for name in ("baton_retries_total", "baton_output_tokens_total", "baton_kv_received_bytes_total"):
            self.count(name, 0)

    # --- what happens ---

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        self._counts[key] = self._counts.get(key, 0) + amount

    def decided(self, way: Way) -> None:
        self.count("baton_routes_total", route=way.value)

    def retried(self) -> None:
        self.count("baton_retries_total")

    def warmed(self, verdict: str) -> None:
        self.count("baton_warm_ups_total", verdict=verdict.partition(" ")[0])

    def probed(self, worker: WorkerView, verdict: str) -> None:
        self.count("baton_canaries_total", worker=worker.id, role=worker.role.value, verdict=verdict)

    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None:
        word = verdict.partition(" ")[0]
        self.count("baton_handoff_canaries_total", prefill=prefill, decode=decode, verdict=word)

    def tokens(self, count: int, gap_s: float) -> None:
        self._itl.observe(gap_s / count, count)

    def ended(self, record: Record) -> None:
        assert record.outcome is not None
        route = record.route or _NO_ROUTE
        self.count("baton_requests_total", outcome=record.outcome.value, route=route)
        self.count("baton_output_tokens_total", record.output_tokens - record.resumed_tokens)
        if record.proof is not None:
            self._proven(record, record.proof)

    def _proven(self, record: Record, proof: Proof) -> None:
        for name in ("ttft", "queue", "prefill", "e2e"):
            self._observe(f"baton_{name}_seconds", getattr(proof, f"{name}_ms") / 1e3, route=record.route)
        self._observe("baton_request_prompt_tokens", record.prompt_tokens)
        self._observe("baton_request_output_tokens", record.output_tokens)
        if proof.first_decode_ms:
            self._observe("baton_handoff_seconds", proof.handoff_ms / 1e3)
            self._observe("baton_first_decode_seconds", proof.first_decode_ms / 1e3)
        for source in _KV_SOURCES:
            self.count("baton_prompt_tokens_total", getattr(proof, f"kv_tokens_{source}"), source=source)
        for source in _PREFILL_SOURCES:
            self.count("baton_prefill_tokens_total", getattr(proof, f"prefill_tokens_{source}"), source=source)
        self.count("baton_store_bytes_total", proof.store_bytes)
        self.count("baton_kv_received_bytes_total", proof.kv_bytes)
        if proof.digest != "none":
            self.count("baton_handoffs_total", verdict=proof.digest)
        if proof.kv_codec:
            self.count("baton_kv_wire_bytes_total", proof.kv_wire_bytes, codec=proof.kv_codec)
        if proof.kv_bytes:
            self._observe("baton_transfer_seconds", proof.transfer_ms / 1e3, transport=proof.transport)
        for what, predicted, measured in _PREDICTIONS:
            if getattr(proof, predicted) and getattr(proof, measured):
                error = abs(getattr(proof, predicted) / getattr(proof, measured) - 1)
                self._observe("baton_prediction_error_ratio", error, what=what)

    # --- how things stand ---

    def refresh(self, snapshot: Snapshot) -> None:
        self._set("baton_router_requests", snapshot.requests)
        self._set("baton_router_waiting_requests", snapshot.waiting)
        self._set("baton_router_queued_tokens", snapshot.queued_tokens)
        self._set("baton_prefix_index_blocks", snapshot.index_blocks)
        self._set("baton_ready", any(worker.available and worker.role.value != "prefill" for worker in snapshot.workers))
        for state in LIVE:
            self._set("baton_live_requests", snapshot.states.get(state, 0), state=state.value)
        for worker in snapshot.workers:
            self._look_at(worker)
            if worker.role is not Role.PREFILL:
                fill = worker.fill(snapshot.longest_step_ms) if worker.up else 0.0
                self._set("baton_worker_fill_ratio", _rounded(fill), worker=worker.id, role=worker.role.value)
            if self._models_due <= 0:
                self._look_at_model(worker)
        self._models_due = _MODELS_EVERY if self._models_due <= 0 else self._models_due - 1
        for gone in self._epochs.keys() - {worker.id for worker in snapshot.workers}:
            self._forget(gone)
        self._hand_on()

    def _forget(self, worker: WorkerId) -> None:
        """It has left the deployment. Triton can't end a series; its last figures must not stand for ever, or what scales on
        them would never shrink. baton_kv_block_bytes 0 tells it from a worker that is down.
        """
        del self._epochs[worker]
        self._end_series(worker)

    def _end_series(self, worker: WorkerId, but_of: Role | None = None) -> None:
        """Of the worker in every role, or in every other."""
        for name, labels in self._gauges:
            if ("worker", worker) in labels and (but_of is None or ("role", but_of.value) not in labels):
                self._set(name, 0, **dict(labels))

    def _look_at(self, worker: WorkerView) -> None:
        # One that is gone holds nothing, whatever it said last.
        load, labels = worker.heartbeat.load if worker.up else WorkerLoad(), {"worker": worker.id, "role": worker.role.value}
        if self._epochs.get(worker.id) != worker.epoch:
            self._epochs[worker.id] = worker.epoch
            self._end_series(worker.id, but_of=worker.role)
            self.count("baton_worker_starts_total", 1, **labels)
        self._set("baton_worker_up", worker.up, **labels)
        self._set("baton_worker_available", worker.available, **labels)
        self._set("baton_worker_queued_tokens", load.queued_tokens, **labels)
        self._set("baton_leases", load.active_leases, **labels)
        self._set("baton_prefix_events", load.tells_blocks, **labels)
        self._set("baton_kv_block_bytes", worker.heartbeat.layout.block_bytes, **labels)
        for state in ("queued", "running"):
            self._set("baton_worker_requests", getattr(load, f"{state}_requests"), **labels, state=state)
        for state in ("free", "cached", "held"):
            self._set("baton_kv_blocks", getattr(load, f"{state}_blocks"), **labels, state=state)
        for tier, counts in worker.heartbeat.stores.items():
            self._set("baton_store_used_bytes", counts.used_bytes, **labels, tier=tier)
            self._set("baton_store_up", counts.up, **labels, tier=tier)
            for event in _STORE_EVENTS:
                self._count_up(
                    worker.epoch, "baton_store_blocks_total", getattr(counts, event), **labels, tier=tier, event=event
                )

    def _look_at_model(self, worker: WorkerView) -> None:
        labels = {"worker": worker.id, "role": worker.role.value}
        self._count_busy(worker, labels)
        for term, ms in zip(TERMS, worker.model.coefficients, strict=True):
            self._set("baton_step_cost_seconds", _rounded(ms / 1e3), **labels, term=term)
        self._set("baton_step_cost_error_ratio", _rounded(worker.model.error), **labels)
        self._set("baton_step_tokens_per_stream", _rounded(worker.tokens_per_step), **labels)
        self._set("baton_hop_seconds", _rounded(worker.hop_ms / 1e3), **labels)
        if worker.role is Role.DECODE:
            self._set("baton_link_bytes_per_second", _rounded(worker.link.bytes_per_ms * 1e3), **labels)
            self._set("baton_link_overhead_seconds", _rounded(worker.link.overhead_ms / 1e3), **labels)

    def _count_busy(self, worker: WorkerView, labels: dict[str, str]) -> None:
        """Not what it did before this router came: a rate over that would be of more than the time that has passed."""
        name, busy_s = "baton_worker_busy_seconds_total", worker.heartbeat.load.busy_s
        key = (name, tuple(labels.items()))
        if key not in self._reported:
            self._reported[key] = (worker.epoch, busy_s)
            self.count(name, 0, **labels)
        self._count_up(worker.epoch, name, busy_s, **labels)

    def _count_up(self, epoch: int, name: str, total: float, **labels: str) -> None:
        """A worker's own counter, which begins at 0 in each of its lives."""
        key = (name, tuple(labels.items()))
        before_epoch, before = self._reported.get(key, (epoch, 0.0))
        self._reported[key] = (epoch, total)
        if total != before or before_epoch != epoch:
            self.count(name, total - before if before_epoch == epoch else total, **labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        if self._gauges.get(key) != value:
            self._gauges[key] = float(value)
            self._changed.add(key)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        self._histogram(name, **labels).observe(value)

    def _histogram(self, name: str, **labels: str) -> _Histogram:
        key = (name, tuple(labels.items()))
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = _Histogram(_BY_NAME[name])
        return histogram

    # --- handing on ---

    def _hand_on(self) -> None:
        """As soon as the sink has dealt with what it was given before."""
        self._refreshes += 1
        if not self._sink.ready:
            return
        changes = [Change(name, labels, True, self._gauges[name, labels]) for name, labels in self._changed]
        changes += [Change(name, labels, False, amount) for (name, labels), amount in self._counts.items()]
        self._changed, self._counts = set(), {}
        if self._refreshes >= _HISTOGRAMS_EVERY:
            self._refreshes = 0
            for (_, labels), histogram in self._histograms.items():
                changes += histogram.changes(labels)
        if changes:
            self._sink.push(changes)


def _rounded(value: float) -> float:
    """To three digits: noise is no change."""
    return float(f"{value:.3g}")


def exported_names() -> list[str]:
    """What may be seen on the metrics port."""
    return [name for family in FAMILIES for name in family.exported]
