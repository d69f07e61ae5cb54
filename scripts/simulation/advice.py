"""Would disaggregation help? Simulates a workload on the same number of workers, aggregated and split, and says why.

The answer is no as readily as yes: prompts may be too short to disturb anybody, users too few to be disturbed, or the link
too slow for what has to move over it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import msgspec

from python_backends.core.config import EngineConfig, SloConfig
from python_backends.core.step_model import longest_step_ms, tokens_within
from python_backends.core.types import Role
from router.cost_model import prefill_ms
from router.types import Way
from scripts.simulation.fleets import Plan, default_fleets, make_plans
from scripts.simulation.hardware import Rates
from scripts.simulation.report import Summary
from scripts.simulation.workload import Workload

_WORTH = 1.05  # gains below are not worth two kinds of workers
_LINK_DIVISORS = (4, 16, 64)
_LINK_LOSS = 0.95  # of the goodput, that is kept at the least link speed
_FEW_STREAMS = 2.0  # per worker: below, there is nearly nobody whom a prompt could disturb
_SHORT_SHARE = 0.5  # of the target: a step with a whole median prompt that takes less disturbs nobody

Runs = Callable[[Sequence[Plan]], list[Summary]]
"""scripts.simulation.fleets.run_all."""


class Advice(msgspec.Struct, frozen=True):
    """`fleet` is the best of all; `disaggregate` says whether it is one of prefill and decode workers.

    gain: its goodput over that of the aggregated workers. threshold: uncached prompt tokens from which on most requests
    went to a prefill worker; 0: none did. link_gb_s: at which speed of the link the goodput is kept; 0: it makes no
    difference, or nothing moves.
    """

    disaggregate: bool
    fleet: str
    gain: float
    threshold: int
    link_gb_s: float
    reasons: list[str]
    summaries: list[Summary]


def advise(
    workload: Workload, workers: int, rates: Mapping[Role, Rates], slo: SloConfig, engine: EngineConfig, run: Runs
) -> Advice:
    """rates: of decode workers, and of prefill workers if they are others; aggregated ones are taken to be like decode."""
    rates = {Role.PREFILL: rates.get(Role.PREFILL, rates[Role.DECODE]), Role.DECODE: rates[Role.DECODE]}
    rates[Role.AGGREGATED] = rates[Role.DECODE]
    fleets = default_fleets(workers)
    summaries = run(make_plans(workload, fleets, ["adaptive"], rates, slo, engine))
    aggregated, split = summaries[0], summaries[1:]
    best = max(split, key=_merit, default=aggregated)
    gain = _merit(best) / max(_merit(aggregated), 1e-9)
    disaggregate = bool(split) and gain >= _WORTH
    reasons = _reasons(workload, aggregated, best, rates, slo, engine, disaggregate)
    link = 0.0
    if disaggregate:
        fleet = fleets[summaries.index(best)]
        link = _least_link(workload, fleet, rates, slo, engine, run, best)
        reasons += _link_reasons(workload, rates, engine, link)
    chosen = best if disaggregate else aggregated
    return Advice(disaggregate, chosen.fleet, gain, _threshold(best) if disaggregate else 0, link, reasons, summaries)


def _merit(summary: Summary) -> float:
    """Requests per second that kept the targets; a little for what they are short of, so that ties are broken."""
    return summary.goodput + 1e-6 / max(summary.ttft_ms["p90"], 1e-6)


def _threshold(summary: Summary) -> int:
    """The smallest power of two from which on at least half of the prompts went to prefill workers."""
    sizes = sorted({int(size) for size in summary.ways_by_tokens})
    for size in sizes:
        if all(_remote_share(summary, larger) >= 0.5 for larger in sizes if larger >= size):
            return size // 2
    return 0


def _remote_share(summary: Summary, size: int) -> float:
    ways = summary.ways_by_tokens[str(size)]
    return ways.get(Way.REMOTE.value, 0) / sum(ways.values())


def _least_link(
    workload: Workload,
    fleet: Mapping[Role, int],
    rates: Mapping[Role, Rates],
    slo: SloConfig,
    engine: EngineConfig,
    run: Runs,
    best: Summary,
) -> float:
    """GB/s of the slowest of some links that keeps the goodput."""
    full = rates[Role.DECODE].link_bytes_per_ms
    plans = []
    for divisor in _LINK_DIVISORS:
        slower = {role: msgspec.structs.replace(each, link_bytes_per_ms=full / divisor) for role, each in rates.items()}
        plans += make_plans(workload, [fleet], ["adaptive"], slower, slo, engine)
    least = full
    for divisor, summary in zip(_LINK_DIVISORS, run(plans), strict=True):
        if summary.goodput < _LINK_LOSS * best.goodput:
            break
        least = full / divisor
    return least / 1e6


def _reasons(
    workload: Workload,
    aggregated: Summary,
    best: Summary,
    rates: Mapping[Role, Rates],
    slo: SloConfig,
    engine: EngineConfig,
    disaggregate: bool,
) -> list[str]:
    decode, split = rates[Role.DECODE], best.fleet
    prompt = int(statistics.median(arrival.input_length for arrival in workload.arrivals))
    streams = aggregated.output_tokens_per_s * aggregated.tpot_ms["mean"] / 1e3
    chunk = min(prompt, _chunk(decode, slo, engine, 8, 8 * prompt))
    disturbed = decode.step_ms(chunk, chunk * chunk / 2, 8, 8 * prompt)
    reasons = [
        f"time between tokens, p99: {aggregated.itl_ms['p99']:.0f} ms aggregated, {best.itl_ms['p99']:.0f} ms as {split} "
        f"(target {slo.itl_ms:.0f} ms)",
        f"time to first token, p90: {aggregated.ttft_ms['p90']:.0f} ms aggregated, {best.ttft_ms['p90']:.0f} ms as {split} "
        f"(target {slo.ttft_ms:.0f} ms)",
        f"answers per second that keep both: {aggregated.goodput:.2f} aggregated, {best.goodput:.2f} as {split}",
    ]
    if disaggregate:
        reasons.append(
            f"a step that computes {chunk} prompt tokens takes {disturbed:.0f} ms instead of "
            f"{decode.step_ms(0, 0, 8, 8 * prompt):.0f}, and every stream beside it waits so long"
        )
        return reasons
    workers = sum(int(part[:-1]) for part in aggregated.fleet.split(" + "))
    if disturbed < slo.itl_ms * _SHORT_SHARE:
        reasons.append(
            f"prompts are short: a step with all {chunk} tokens of a median one takes {disturbed:.0f} ms, which disturbs nobody"
        )
    if streams / workers < _FEW_STREAMS:
        reasons.append(
            f"users are few: {streams / workers:.1f} streams run on a worker at a time, so hardly anybody is disturbed"
        )
    transfer = decode.link_ms + prompt * decode.token_bytes / decode.link_bytes_per_ms
    computing = prefill_ms(rates[Role.PREFILL], engine.step_tokens, prompt, 0)
    if transfer > computing / 2:
        reasons.append(
            f"the link is slow: KV of a median prompt takes {transfer:.0f} ms to move and {computing:.0f} ms to compute"
        )
    if aggregated.in_target > 0.95 and aggregated.refused == 0:
        reasons.append(f"there is nothing to mend: {aggregated.in_target:.1%} of the answers keep the targets as it is")
    return reasons


def _chunk(decode: Rates, slo: SloConfig, engine: EngineConfig, streams: int, context: int) -> int:
    """Prompt tokens of a step beside so many streams: what a worker computes that has a target to keep."""
    if not slo.itl_ms:
        return engine.step_tokens
    return tokens_within(decode, longest_step_ms(slo.itl_ms), streams, context, 0, engine.step_tokens)


def _link_reasons(workload: Workload, rates: Mapping[Role, Rates], engine: EngineConfig, link_gb_s: float) -> list[str]:
    lengths = sorted(arrival.input_length for arrival in workload.arrivals)
    long = lengths[int(len(lengths) * 0.9)]
    decode = rates[Role.DECODE]
    megabytes = long * decode.token_bytes / 1e6
    transfer = decode.link_ms + long * decode.token_bytes / decode.link_bytes_per_ms
    return [
        f"KV of a long prompt (p90, {long} tokens) is {megabytes:.0f} MB: {transfer:.0f} ms on this link, "
        f"{prefill_ms(rates[Role.PREFILL], engine.step_tokens, long, 0):.0f} ms to compute",
        f"down to {link_gb_s:.2g} GB/s per worker the goodput stays the same",
    ]
