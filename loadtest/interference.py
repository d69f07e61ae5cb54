"""What prefill does to running streams, and how much an engine computes and reads: all of it from what clients saw.

A gap between two tokens is *disturbed* when some prompt of the run was in prefill meanwhile: sent, and without its first
token. Prompts that wait in a queue count, since another one is computed then.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from loadtest.options import Options
from loadtest.record import Floats, Record, Run
from loadtest.scenarios import make_plan
from loadtest.summary import prefill_end

_NEVER = 1e18


@dataclass(frozen=True, slots=True)
class Gaps:
    """Gaps between arrivals of one request that ended in the window, all requests together; arrays of equal length.

    `ms`: length. `streams`: how many requests were decoding meanwhile, the own one included. `context`: tokens of the own
    request at that time. `tokens`: that came at its end. `disturbed`: a prompt was in prefill meanwhile.
    """

    ms: Floats
    streams: Floats
    context: Floats
    tokens: Floats
    disturbed: npt.NDArray[np.bool_]

    def only(self, disturbed: bool) -> Gaps:
        chosen = self.disturbed == disturbed
        return Gaps(self.ms[chosen], self.streams[chosen], self.context[chosen], self.tokens[chosen], self.disturbed[chosen])

    @property
    def steps(self) -> float:
        """Steps of one engine that made these tokens: each of `streams` requests has one token of a step."""
        return float((1 / self.streams).sum())

    @property
    def seconds(self) -> float:
        """Time in which they were made, counted once however many streams there were."""
        return float((self.ms / self.streams).sum()) / 1e3

    def lost_share(self, undisturbed_ms: float) -> float:
        """Share of all gaps' time by which they were longer than an undisturbed one usually is, where disturbed."""
        total = self.ms.sum()
        lost = np.maximum(self.ms[self.disturbed] - undisturbed_ms, 0).sum()
        return float(lost / total) if total else 0.0


def gaps_of(run: Run, records: Sequence[Record]) -> Gaps:
    answered = [record for record in records if record.arrival_s]
    if not answered:
        none = np.empty(0)
        return Gaps(none, none, none, none, np.empty(0, np.bool_))
    times = [np.frombuffer(record.arrival_s, np.float64) for record in answered]
    counts = [np.frombuffer(record.arrival_tokens, np.dtype("l")).astype(np.float64) for record in answered]
    begin = np.concatenate([t[:-1] for t in times])
    end = np.concatenate([t[1:] for t in times])
    context = np.concatenate([r.input_tokens + np.cumsum(c)[:-1] for r, c in zip(answered, counts, strict=True)])
    tokens = np.concatenate([c[1:] for c in counts])
    first, last = np.sort([t[0] for t in times]), np.sort([t[-1] for t in times])
    middle = (begin + end) / 2
    streams = np.searchsorted(first, middle, side="right") - np.searchsorted(last, middle, side="left")
    # A request's own prefill is over when its first gap begins, so it disturbs none of its own.
    prompts = [record for record in records if prefill_end(record) > record.sent_s]  # what failed was no load
    sent, computed = np.sort([p.sent_s for p in prompts]), np.sort([min(prefill_end(p), _NEVER) for p in prompts])
    disturbed = np.searchsorted(sent, end, side="left") > np.searchsorted(computed, begin, side="right")
    inside = (end >= run.window[0]) & (end < run.window[1])
    streams = np.maximum(streams, 1).astype(np.float64)
    return Gaps((end - begin)[inside] * 1e3, streams[inside], context[inside], tokens[inside], disturbed[inside])


def prefill_seconds(run: Run, records: Sequence[Record]) -> float:
    """Seconds of the window in which some prompt was in prefill."""
    low, high = run.window
    spans = sorted((max(record.sent_s, low), min(prefill_end(record), high)) for record in records)
    total, reached = 0.0, low
    for begin, end in spans:
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def computed_tokens(run: Run, records: Sequence[Record]) -> int:
    """Prompt tokens that were computed in the window: those of first tokens in it, less what caches had."""
    low, high = run.window
    done = [record for record in records if record.arrival_s and low <= record.arrival_s[0] < high]
    return sum(max(record.input_tokens - record.cached_tokens, 0) for record in done)


def cache_potential(options: Options, records: Sequence[Record]) -> float:
    """Share of prompt tokens that a cache without end, shared by all workers, would have found in this load.

    From the block ids that prompts are made of: what a prompt begins with and an earlier prompt began with, too. The plan
    is made again; options and seed are all there is to it.
    """
    plan = make_plan(msgspec.structs.replace(options, nonce=options.nonce or 1))
    sent: dict[str, int] = {}
    for record in records:
        sent[record.kind] = sent.get(record.kind, 0) + 1
    drawn = next(iter(plan.slos)) if plan.streams else ""
    planned = list(plan.arrivals or ())
    if plan.streams:
        planned += [plan.streams.draw() for _ in range(sent.get(drawn, 0))]
    seen: set[int] = set()
    found = total = 0
    for one in planned:
        if sent.get(one.kind, 0) == 0:
            continue
        sent[one.kind] -= 1
        known = sum(1 for _ in itertools.takewhile(seen.__contains__, one.blocks))
        found += min(known * one.block_tokens, one.input_tokens - 1)
        total += one.input_tokens
        seen.update(one.blocks)
    return found / total if total else 0.0
