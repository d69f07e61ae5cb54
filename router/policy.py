"""How a request is served and by whom: a pure function of the fleet, the prefix matches and the wish.

1. A decode worker that has all but a few tokens of the prompt, or finds them in its stores, computes the rest itself,
   unless it is much busier than the others: `cached` when only tokens outside full blocks are missing, else `local`.
2. Otherwise the least busy decode worker is taken, and the prefill worker that is done with the prompt first, counted
   in tokens ahead of it plus tokens that it has not cached: `remote`. What it has not cached and another worker has, it
   borrows, if that is much; that counts as a fraction of computing it.
3. Without prefill workers the decode worker does it (`local`); without decode workers an aggregated one (`aggregated`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from python_backends.core.types import Role, WorkerId
from router.fleet import WorkerView
from router.types import RouteDecision, Way, Wish

_LOAN_TOKENS = 256  # fewer are not worth asking for
_LOAN_SHARE = 16  # borrowing so many tokens is taken to cost as much as computing one; the worker knows better
_STICKY_REQUESTS = 4  # a prefix hit is worth being so many requests busier than the least busy worker


@dataclass(frozen=True, slots=True)
class Query:
    """What the choice depends on besides the fleet."""

    num_tokens: int
    matched: Mapping[WorkerId, int]  # leading prompt tokens each worker is believed to have
    wish: Wish
    local_prefill_tokens: int
    stored: Mapping[WorkerId, int] = field(default_factory=dict)  # the same, with what it finds in its stores
    avoid: Collection[WorkerId] = ()  # workers that failed this request; taken only if there is no other


def choose(query: Query, workers: Sequence[WorkerView]) -> RouteDecision | None:
    """None when no worker that is up can serve the request now."""
    decodes = _candidates(workers, Role.DECODE, query)
    aggregated = _candidates(workers, Role.AGGREGATED, query)
    if aggregated and (query.wish is Wish.AGGREGATED or not decodes):
        return _aggregated(query, aggregated, "as asked" if query.wish is Wish.AGGREGATED else "no decode worker is up")
    if not decodes:
        return None
    idle = min(decodes, key=lambda w: (w.requests, -_has(query, w), w.id))
    near = None if query.wish is Wish.REMOTE else _nearly_cached(query, decodes, idle.requests)
    if near is not None:
        return _on_decode_worker(query, near)
    prefills = [
        worker
        for worker in _candidates(workers, Role.PREFILL, query)
        if worker.heartbeat.fingerprint == idle.heartbeat.fingerprint
    ]
    if query.wish is Wish.LOCAL or not prefills:
        return _local(query, idle, "as asked" if query.wish is Wish.LOCAL else "no prefill worker of this model is up")
    return _remote(query, prefills, idle, workers)


def _candidates(workers: Sequence[WorkerView], role: Role, query: Query) -> list[WorkerView]:
    able = [w for w in workers if w.up and w.role is role and query.num_tokens < w.heartbeat.max_context]
    return [w for w in able if w.id not in query.avoid] or able


def _nearly_cached(query: Query, decodes: Sequence[WorkerView], fewest: int) -> WorkerView | None:
    near = [
        worker
        for worker in decodes
        if _uncached(query, worker) <= query.local_prefill_tokens and worker.requests <= fewest + _STICKY_REQUESTS
    ]
    return min(near, key=lambda w: (_uncached(query, w), w.requests, w.id), default=None)


def _uncached(query: Query, worker: WorkerView) -> int:
    return query.num_tokens - _has(query, worker)


def _has(query: Query, worker: WorkerView) -> int:
    return max(query.matched.get(worker.id, 0), query.stored.get(worker.id, 0))


def _where(query: Query, worker: WorkerView) -> str:
    """Of what the worker has of the prompt."""
    return "in the stores" if query.stored.get(worker.id, 0) > query.matched.get(worker.id, 0) else "cached"


def _on_decode_worker(query: Query, worker: WorkerView) -> RouteDecision:
    uncached = _uncached(query, worker)
    size = worker.heartbeat.layout.block_size
    if query.num_tokens - uncached == (query.num_tokens - 1) // size * size > 0:
        why = f"{worker.id} has every full block of the prompt {_where(query, worker)}; {uncached} tokens are left"
        return RouteDecision(Way.CACHED, None, worker.id, uncached, why)
    return _local(query, worker, f"{uncached} uncached tokens are at most router.local_prefill_tokens")


def _local(query: Query, worker: WorkerView, reason: str) -> RouteDecision:
    uncached = _uncached(query, worker)
    why = f"{reason}; {worker.id} has {query.num_tokens - uncached} of {query.num_tokens} tokens {_where(query, worker)}"
    return RouteDecision(Way.LOCAL, None, worker.id, uncached, why)


def _remote(query: Query, prefills: Sequence[WorkerView], decode: WorkerView, workers: Sequence[WorkerView]) -> RouteDecision:
    lender = _lender(query, decode.heartbeat.fingerprint, workers)
    best = min(prefills, key=lambda w: (w.prefill_tokens + _cost(query, w, lender), w.id))
    borrowed = _borrowed(query, best, lender)
    uncached = _uncached(query, best) - borrowed
    why = (
        f"{_uncached(query, decode)} of {query.num_tokens} tokens are uncached at {decode.id} ({decode.requests} requests); "
        f"{best.id} computes {uncached} after {best.prefill_tokens} ahead"
    )
    if borrowed and lender is not None:
        why += f", and borrows {borrowed} from {lender.id}"
        return RouteDecision(Way.REMOTE, best.id, decode.id, uncached, why, lender.id)
    return RouteDecision(Way.REMOTE, best.id, decode.id, uncached, why)


def _lender(query: Query, fingerprint: str, workers: Sequence[WorkerView]) -> WorkerView | None:
    """Who has the most of the prompt in its pool, and lends it."""
    able = [w for w in workers if w.up and w.heartbeat.lends and w.heartbeat.fingerprint == fingerprint]
    able = [w for w in able if w.id not in query.avoid]
    return max(able, key=lambda w: (query.matched.get(w.id, 0), -w.requests, w.id), default=None)


def _borrowed(query: Query, worker: WorkerView, lender: WorkerView | None) -> int:
    """Tokens that the worker would borrow."""
    if lender is None or lender.id == worker.id or not worker.heartbeat.lends:
        return 0
    more = query.matched.get(lender.id, 0) - _has(query, worker)
    return more if more >= _LOAN_TOKENS else 0


def _cost(query: Query, worker: WorkerView, lender: WorkerView | None) -> int:
    """Of the prompt on this worker, in computed tokens."""
    borrowed = _borrowed(query, worker, lender)
    return _uncached(query, worker) - borrowed + borrowed // _LOAN_SHARE


def _aggregated(query: Query, workers: Sequence[WorkerView], reason: str) -> RouteDecision:
    best = min(workers, key=lambda w: (w.prefill_tokens + _uncached(query, w), w.requests, w.id))
    why = f"{reason}; {best.id} has {_has(query, best)} of {query.num_tokens} tokens {_where(query, best)}"
    return RouteDecision(Way.AGGREGATED, None, best.id, _uncached(query, best), why)
