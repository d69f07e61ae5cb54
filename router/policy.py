"""How a request is served and by whom: a pure function of the fleet, the prefix matches, the targets and the wish.

For a few workers of each role - those that have most of the prompt, and the least loaded - it predicts

    remote       time to first token on the prefill worker: its queue, then the uncached tokens; on the decode worker: what
                 a step takes with one stream more, and the wait for the KV
    local        the same work on the decode worker itself, between the steps of its running streams, which it delays
    aggregated   as local

and takes the way that misses the targets least and, among those that keep them, the cheapest. The two choices of a remote
way do not depend on each other: the first token leaves before the decode worker is asked. So every worker is looked at
once, not every pair. Of ways that cost nearly the same, two are drawn and the less busy one is taken (Mitzenmacher, "The
Power of Two Choices in Randomized Load Balancing", 2001): several routers that know the same must not all choose the same.

What a worker finds in its stores counts as cached, except for the room that it takes. A prefill worker that lacks a long
prefix which another worker's pool has borrows it; that counts as a fraction of computing it.

Workers that lend each other cores (Heartbeat.cores) are faster alone than together. A prompt that is computed beside
another's shares the cores with it until the shorter one is done; what the other loses counts as if this one lost it, and
so does what streams beside it lose, as those of a local way.

A hot prefix needs no rule: as long as queueing for it is cheaper than computing it elsewhere, it is queued for; then
another worker computes it, and has it, too. Nor does a conversation: its last worker has most of the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from itertools import islice
from operator import attrgetter
from random import Random
from typing import Protocol

import msgspec

from python_backends.core.step_model import StepModel
from python_backends.core.types import Role, WorkerId
from router.cost_model import prefill_ms
from router.fleet import Fleet, WorkerView
from router.types import RouteDecision, Slo, Way, Wish

_LOAN_TOKENS = 256  # fewer are not worth asking for
_LOAN_SHARE = 16  # borrowing so many tokens is taken to cost as much as computing one; the worker knows better
_HIT = 0.5  # who has to compute at most so much of what others have to compute, has most of the prompt
_LOOKED_AT = 2  # of the least loaded workers of a role; as many again that have most of the prompt
_NEAR = 1.03  # costs that differ less are the same ...
_NEAR_MS = 0.5  # ... and so are these
_TOKENS_VALUED = 10  # a millisecond more between tokens is worth so many to the first token
_DELAY_VALUED = 0.05  # a running stream's delay against a delay of this request's first token; more ...
_LEAST_SLACK = 0.05  # ... the fuller the worker is, up to 1 / this: time spent there is missed by streams to come, as well
_CORES_LOST = 0.5  # of a worker's speed while another computes on the same cores


class Cached(Protocol):
    """router.prefix_index.Match."""

    def get(self, worker: WorkerId) -> int:
        """Leading prompt tokens that the worker is believed to have."""


class Query(msgspec.Struct, frozen=True):
    """What the choice depends on besides the fleet."""

    num_tokens: int
    cached: Cached
    hits: Sequence[WorkerId]  # workers that have most of the prompt, best first
    wish: Wish
    slo: Slo
    output_tokens: int = 128  # expected
    contended: bool = False  # more requests wait at the door
    avoid: Collection[WorkerId] = ()  # workers that failed this request; taken only if there is no other
    stored: Mapping[WorkerId, int] = {}  # leading prompt tokens in the worker's pool and stores together
    longest_step_ms: float = 0.0  # of streams alone, where the deployment has a target between tokens; 0: it has none


class Room(Enum):
    """What a request may have to wait for."""

    PROMPT = "prompt"  # a prefill worker that has little to compute
    STREAM = "stream"  # a decode worker with KV blocks to spare, and a place in its batch
    BOTH = "both"  # a decode worker that has little to compute and takes one more stream
    AGGREGATED = "aggregated"  # an aggregated worker that does


_TOGETHER = (Room.BOTH, Room.AGGREGATED)  # of the worker that computes the prompt and has the stream


class Choice(msgspec.Struct, frozen=True):
    """Where to go. `lacks` is None when the request can go there now.

    Otherwise it is better off waiting in the router, where its turn is kept: nobody else who has room would do as well.
    """

    decision: RouteDecision
    lacks: Room | None
    full: bool  # what it lacks is a place for its stream
    missing: int  # prompt tokens that the decode worker has not cached
    output_tokens: int  # expected
    alone_ms: float  # to the first token if the worker had nothing else to do


class _Decoder:
    """A worker that decodes, and what all ways over it need to know of it."""

    __slots__ = ("has_room", "itl", "missing", "worker")

    def __init__(self, query: Query, worker: WorkerView) -> None:
        self.worker = worker
        self.missing = query.num_tokens - query.cached.get(worker.id)  # prompt tokens not in its pool
        streams = worker.requests + worker.foreign_requests + 1
        step_ms = worker.model.step_ms(0, 0, streams, worker.context_tokens + query.num_tokens)
        self.itl = step_ms / worker.tokens_per_step  # ms between tokens with this stream
        longest_ms = worker.longest_step_ms(query.longest_step_ms)
        keeps_up = not longest_ms or step_ms <= longest_ms or worker.model.step_ms(0, 0, 1, query.num_tokens) > longest_ms
        self.has_room = (streams == 1 or keeps_up) and worker.takes_stream(self.missing, query.output_tokens)


class _Option:
    """One way to serve the request. Times in ms. `excess`: how far it misses the targets. `rank`: what is best is least."""

    __slots__ = ("cost", "excess", "itl", "lacks", "lender", "peak", "prefill", "rank", "ttft", "uncached", "way", "worker")

    def __init__(
        self,
        way: Way,
        worker: WorkerView,
        prefill: WorkerView | None,
        uncached: int,
        ttft: float,
        itl: float,
        peak: float,
        cost: float,
        lacks: Room | None,
        slo: Slo,
        lender: WorkerId | None = None,
    ) -> None:
        """worker: who decodes. lender: of whom `prefill` borrows.

        itl: between two tokens of this stream. peak: the longest gap that running streams see."""
        self.way = way
        self.worker = worker
        self.prefill = prefill
        self.uncached = uncached
        self.ttft = ttft
        self.itl = itl
        self.peak = peak
        self.cost = cost
        self.lacks = lacks
        self.lender = lender
        excess = 0.0
        if slo.ttft_ms and ttft > slo.ttft_ms:
            excess = ttft / slo.ttft_ms - 1
        gap = peak if peak > itl else itl
        if slo.itl_ms and gap > slo.itl_ms:  # for each of those who see it
            excess += max(worker.streams, 1) * (gap / slo.itl_ms - 1)
        self.excess = excess
        self.rank = (excess, cost)


_RANK = attrgetter("rank")
_PROMPTS = attrgetter("prompt_samples")


def choose(query: Query, fleet: Fleet, random: Random) -> Choice | None:
    """None when no worker that is up can serve the request. `random` settles what is nearly equal."""
    options = _options(query, fleet, random)
    if not options:
        return None
    best = _pick(options, random)
    lacks = None if _is_worth_queueing(best, options) else best.lacks
    why = _why(query, best, options) if lacks is None else ""
    decision = RouteDecision(
        best.way,
        best.prefill.id if best.prefill else None,
        best.worker.id,
        best.uncached,
        why,
        best.ttft,
        best.itl,
        best.lender,
    )
    computes, cached = best.prefill or best.worker, query.num_tokens - best.uncached
    alone = computes.hop_ms + prefill_ms(_model(computes), computes.step_tokens, best.uncached, cached)
    missing = query.num_tokens - query.cached.get(best.worker.id)
    full = lacks is Room.STREAM or (lacks in _TOGETHER and best.worker.takes_prompt(best.uncached))
    return Choice(decision, lacks, full, missing, query.output_tokens, alone)


def _is_worth_queueing(best: _Option, options: Sequence[_Option]) -> bool:
    """Whether the best way is to be taken even if its worker has no room: it has most of the prompt, and who has room not."""
    others = [option.uncached for option in options if option.lacks is None and option.excess <= best.excess]
    return bool(others) and best.uncached <= _HIT * min(others)


def has_room(lacked: Room, fleet: Fleet) -> bool:
    """Whether it is worth asking `choose` again for a request that lacked this."""
    role = {Room.PROMPT: Role.PREFILL, Room.AGGREGATED: Role.AGGREGATED}.get(lacked, Role.DECODE)
    return any(
        (lacked is Room.STREAM or worker.takes_prompt()) and (lacked is Room.PROMPT or worker.takes_stream())
        for worker in islice(fleet.ranked[role], _LOOKED_AT)
    )


def _options(query: Query, fleet: Fleet, random: Random) -> list[_Option]:
    """All ways that wish and fleet allow. A wish that nobody can serve is served another way."""
    decodes = _candidates(query, fleet, Role.DECODE, random)
    aggregated = _candidates(query, fleet, Role.AGGREGATED, random)
    if aggregated and (query.wish is Wish.AGGREGATED or not decodes):
        return [_alone(query, _Decoder(query, worker), Way.AGGREGATED) for worker in aggregated]
    if not decodes:
        return []
    decoders = [_Decoder(query, worker) for worker in decodes]
    options = _remote(query, fleet, decoders, random) if query.wish is not Wish.LOCAL else []
    if query.wish is Wish.REMOTE and options:
        return options
    options += [_alone(query, decoder, Way.LOCAL) for decoder in decoders]
    if query.wish is Wish.AUTO:
        if query.avoid:  # rather than fail again on the only prefill worker, compute it elsewhere
            options = [option for option in options if option.prefill is None or option.prefill.id not in query.avoid]
        others = [worker for worker in aggregated if worker.id not in fleet.standby]
        options += [_alone(query, _Decoder(query, worker), Way.AGGREGATED) for worker in others]
    return options


def _candidates(query: Query, fleet: Fleet, role: Role, random: Random, other: WorkerView | None = None) -> list[WorkerView]:
    """A few workers of the role that can take the prompt, and hand over to the other one; those that failed it only if there
    are no others."""
    ranked = fleet.ranked[role]
    if not ranked:
        return []
    num_tokens, avoid = query.num_tokens, query.avoid

    def able(worker: WorkerView) -> bool:
        return num_tokens < worker.max_context and (other is None or worker.exchanges_with(other))

    def trusted(worker: WorkerView) -> bool:
        return worker.id not in avoid and able(worker)

    for fits in (trusted, able) if avoid else (able,):
        found = ranked.few(_LOOKED_AT, fits, random)
        for name in query.hits:
            worker = ranked.get(name)
            if worker is not None and worker not in found and fits(worker):
                found.append(worker)
        if found:
            return found
    return []


def _remote(query: Query, fleet: Fleet, decoders: Sequence[_Decoder], random: Random) -> list[_Option]:
    """Each prefill worker with the decode worker that suits best."""
    receivers = [_receiving(query, decoder) for decoder in decoders]
    decode = _pick([option for option in receivers if option.lacks is None] or receivers, random)
    lender = _lender(query, fleet, decode.worker)
    options = []
    for worker in _candidates(query, fleet, Role.PREFILL, random, decode.worker):
        borrowed = _borrowed(query, worker, lender)
        uncached, ttft, has_room = _first_token(query, worker, borrowed)
        later, lost = _on_shared_cores(query, worker, ttft)
        ttft += later
        lacks = decode.lacks or (None if has_room and worker.has_kv_for(uncached + borrowed) else Room.PROMPT)
        options.append(
            _Option(
                Way.REMOTE,
                decode.worker,
                worker,
                uncached,
                ttft,
                decode.itl,
                decode.peak,
                ttft + lost + decode.cost - _moved_meanwhile(worker, decode.worker, uncached, decode.uncached, ttft),
                lacks,
                query.slo,
                lender.id if lender is not None and borrowed else None,
            )
        )
    return options


def _moved_meanwhile(prefill: WorkerView, decode: WorkerView, uncached: int, missing: int, ttft: float) -> float:
    """Ms of the transfer of `missing` tokens that pass while the prompt is computed: a decode worker that follows has all
    but those of the last step by then, if its link is as fast."""
    if not decode.may_follow(prefill, uncached):
        return 0.0
    ahead = max(missing - prefill.step_tokens, 0)
    computing = (ttft - prefill.hop_ms) * (1 - prefill.step_tokens / uncached)
    return min(ahead * decode.token_bytes / decode.link.bytes_per_ms, computing)


def _lender(query: Query, fleet: Fleet, decode: WorkerView) -> WorkerView | None:
    """Who has the most of the prompt in its pool, and lends it."""
    hits = [worker for name in query.hits if (worker := fleet.get(name)) is not None and worker.heartbeat.lends]
    able = [w for w in hits if w.available and w.id not in query.avoid and w.exchanges_with(decode)]
    return max(able, key=lambda worker: (query.cached.get(worker.id), -worker.requests), default=None)


def _borrowed(query: Query, worker: WorkerView, lender: WorkerView | None) -> int:
    """Tokens that a prefill worker would borrow."""
    if lender is None or lender is worker or not worker.heartbeat.lends or lender.fingerprint != worker.fingerprint:
        return 0  # what is borrowed is not converted
    more = query.cached.get(lender.id) - _has(query, worker)
    return more if more >= _LOAN_TOKENS else 0


def _has(query: Query, worker: WorkerView) -> int:
    """Tokens that the worker need not compute."""
    cached = query.cached.get(worker.id)
    return max(cached, query.stored.get(worker.id, 0)) if query.stored else cached


def _receiving(query: Query, decoder: _Decoder) -> _Option:
    """The decode worker's part of a remote way; the cost is that of this part."""
    worker, itl, missing = decoder.worker, decoder.itl, decoder.missing
    peak = _peak(worker, 0, 0) if worker.prompts and query.slo.itl_ms else itl
    cost = _TOKENS_VALUED * itl + worker.link.transfer_ms(missing * worker.token_bytes)
    lacks = None if decoder.has_room else Room.STREAM
    return _Option(Way.REMOTE, worker, None, missing, 0.0, itl, peak, cost, lacks, query.slo)


def _alone(query: Query, decoder: _Decoder, way: Way) -> _Option:
    """The worker computes the uncached rest of the prompt itself, and goes on."""
    worker, itl = decoder.worker, decoder.itl
    uncached, ttft, has_room = _first_token(query, worker)
    later, lost = _on_shared_cores(query, worker, ttft)
    streams = worker.streams
    ttft += later
    cost, peak = ttft + lost + _TOKENS_VALUED * itl, 0.0
    if streams:
        peak = _peak(worker, uncached, query.num_tokens)
        cost += _value_of(query, worker, itl, max(0.0, ttft - worker.hop_ms) * _share_lost(worker, peak))
    lacks = None
    if not has_room or not decoder.has_room:
        lacks = Room.AGGREGATED if way is Way.AGGREGATED else Room.BOTH
    if way is Way.LOCAL and _has_every_full_block(query, uncached, worker.block_size):
        way = Way.CACHED
    return _Option(way, worker, None, uncached, ttft, itl, peak, cost, lacks, query.slo)


def _first_token(query: Query, worker: WorkerView, borrowed: int = 0) -> tuple[int, float, bool]:
    """Tokens to compute, ms until the first token is here, and whether the worker takes the prompt now."""
    cached = _has(query, worker) + borrowed
    uncached = query.num_tokens - cached
    ahead, has_room = 0, True
    if worker.prompts or worker.foreign_tokens:
        has_room = worker.takes_prompt(uncached)
        ahead = worker.tokens_before(uncached, query.contended, may_overtake=has_room)
    beside = worker.prefill_tokens - ahead if worker.prefill_tokens > ahead else 0
    chunk = worker.chunk(cached + uncached / 2)
    ms = prefill_ms(_model(worker), chunk, uncached, cached, ahead, beside, worker.streams, worker.context_tokens)
    if borrowed:
        ms += worker.model.step_ms(borrowed / _LOAN_SHARE, 0, 0, 0)
    return uncached, worker.hop_ms + ms, has_room


def _model(worker: WorkerView) -> StepModel:
    """How long prompts take there. On cores that workers share they take everyone as long: whoever has computed most knows."""
    alike = [other.model for other in worker.on_cores if other.up and other.fingerprint == worker.fingerprint]
    return max(alike, key=_PROMPTS) if alike else worker.model


def _on_shared_cores(query: Query, worker: WorkerView, ms: float) -> tuple[float, float]:
    """Of a prompt that takes so many ms where nobody else computes: how much longer it takes beside what others compute on
    these cores, and the value of what they lose by it."""
    later = lost = 0.0
    for other in worker.on_cores:
        if other is worker or not other.up:
            continue
        tokens = other.prefill_tokens + other.foreign_tokens
        if tokens:
            together = min(ms, _model(other).step_ms(tokens, 0, 0, 0))
            later += together
            lost += together * (len(other.prompts) + bool(other.foreign_tokens))
        if other.streams:
            itl = other.model.step_ms(0, 0, other.streams, other.context_tokens) / other.tokens_per_step
            lost += _value_of(query, other, itl, ms * _CORES_LOST)
    return later, lost


def _value_of(query: Query, worker: WorkerView, itl: float, delay: float) -> float:
    """Of so many ms that the worker's streams lose."""
    return _DELAY_VALUED * worker.streams * delay / max(1 - _pressure(query, worker, itl), _LEAST_SLACK)


def _pressure(query: Query, worker: WorkerView, itl: float) -> float:
    """How near a worker is to having all the streams it can: its time is the dearer."""
    full = max(worker.requests / worker.max_batch, worker.kv_share())
    return max(full, itl / query.slo.itl_ms) if query.slo.itl_ms else full


def _peak(worker: WorkerView, uncached: int, length: int) -> float:
    """The longest step of the worker while it computes the rest of a prompt of that length besides those it has."""
    chunk = min(uncached + worker.prefill_tokens, max(worker.chunk(length) - worker.streams, 1))
    pairs = chunk * max(length - chunk / 2, chunk / 2)  # the last chunk sees most
    return worker.model.step_ms(chunk, pairs, worker.streams, worker.context_tokens)


def _share_lost(worker: WorkerView, peak: float) -> float:
    """Of the time that a prompt takes beside streams, what these lose: all of it, but for their own part of each step.

    With full chunks that part is small, and the router takes none for granted; with chunks that are cut it is most.
    """
    if not worker.step_ms or peak <= 0.0:
        return 1.0
    return max(0.0, 1 - worker.model.step_ms(0, 0, worker.streams, worker.context_tokens) / peak)


def _has_every_full_block(query: Query, uncached: int, block_size: int) -> bool:
    return query.num_tokens - uncached == (query.num_tokens - 1) // block_size * block_size > 0


def _pick(options: Sequence[_Option], random: Random) -> _Option:
    """The option that misses the targets least, then the cheapest.

    Of near equals those that compute least, and of these the less busy of two that are drawn.
    """
    if len(options) == 1:
        return options[0]
    least = min(options, key=_RANK)
    excess, most = least.excess, least.cost * _NEAR + _NEAR_MS
    near = [option for option in options if option.cost <= most and option.excess <= excess]
    if len(near) > 1:
        fewest = min([option.uncached for option in near])
        near = [option for option in near if option.uncached == fewest]
    if len(near) == 1:
        return near[0]
    first, second = random.choice(near), random.choice(near)
    return first if _busy(first) <= _busy(second) else second


def _busy(option: _Option) -> int:
    return option.worker.requests + (option.prefill.requests if option.prefill else 0)


def _why(query: Query, best: _Option, options: Sequence[_Option]) -> str:
    """In plain words, with the predicted milliseconds."""
    computes = best.prefill or best.worker
    cached = query.num_tokens - best.uncached
    where = "in the stores" if query.stored.get(computes.id, 0) > query.cached.get(computes.id) else "cached"
    where += f" or lent by {best.lender}" if best.lender else ""
    sentence = (
        f"first token in {best.ttft:.0f} ms on {computes.id} ({cached} of {query.num_tokens} tokens {where}, "
        f"{computes.prefill_tokens} ahead), then {best.itl:.1f} ms per token on {best.worker.id}"
    )
    if best.excess:
        sentence += "; no way keeps the targets"
    if query.wish is not Wish.AUTO:
        return f"{query.wish.value} as asked: {sentence}" if best.way.value == query.wish.value else sentence
    others = [option for option in options if (option.prefill is None) is not (best.prefill is None)]
    if not others:
        return sentence
    other = min(others, key=_RANK)
    sentence += f"; {other.way.value} {other.ttft:.0f} ms"
    return (
        f"{sentence} and {other.peak:.0f} ms between tokens of {other.worker.streams} streams"
        if other.peak > other.itl
        else sentence
    )
