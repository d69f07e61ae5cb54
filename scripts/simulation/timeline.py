"""What a fleet was over the time, and what it would have needed to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from python_backends.core.config import EngineConfig, SloConfig
from python_backends.core.types import BlockHash, Role
from scripts.simulation.hardware import Rates
from scripts.simulation.workload import Workload

WATCH_S = 60.0


class Moment(msgspec.Struct, frozen=True):
    """After so many seconds. Counts are of all the time until then; `ttft_p90_ms` of the last WATCH_S."""

    at_s: float
    ready: dict[str, int]  # workers at work, by role
    pods: dict[str, int]  # replicas wanted, by Deployment
    arrived: int
    completed: int
    good: int
    refused: int
    failed: int
    tokens: int
    waiting: int
    ttft_p90_ms: float


def needs(
    workload: Workload, rates: Mapping[Role, Rates], slo: SloConfig, engine: EngineConfig, every_s: float
) -> dict[Role, list[float]]:
    """Workers that would be fully at work with what arrives in each `every_s`, if all arrived when it suits them.

    No fleet can do with fewer for long, and all real ones need more. Prompts begin with what any before them has had.
    """
    prefill = rates[Role.PREFILL]
    stream_s = _stream_seconds(workload, rates[Role.DECODE], slo, engine)
    periods = int(workload.arrivals[-1].at_s / every_s) + 1 if workload.arrivals else 0
    found = {Role.PREFILL: [0.0] * periods, Role.DECODE: [0.0] * periods}
    seen: set[BlockHash] = set()
    for arrival in workload.arrivals:
        period = int(arrival.at_s / every_s)
        cached = _cached(arrival.hashes, seen) * workload.block_size
        tokens = arrival.input_length - cached
        steps = tokens / engine.step_tokens
        ms = steps * prefill.step_ms(0, 0, 0, 0) + prefill.step_ms(tokens, tokens * (cached + tokens / 2), 0, 0)
        found[Role.PREFILL][period] += (ms - prefill.step_ms(0, 0, 0, 0)) / 1e3 / every_s
        found[Role.DECODE][period] += arrival.output_length * stream_s / every_s
    return found


def _cached(hashes: Sequence[BlockHash], seen: set[BlockHash]) -> int:
    """Leading blocks that were seen before; the others are from now on."""
    known = next((index for index, block in enumerate(hashes) if block not in seen), len(hashes))
    seen.update(hashes[known:])
    return known


def _stream_seconds(workload: Workload, rates: Rates, slo: SloConfig, engine: EngineConfig) -> float:
    """A decode worker's time per token, with as many streams as batch, pool and target allow."""
    tokens = sum(each.output_length for each in workload.arrivals)
    # a stream counts for as long as it lasts, hence by its tokens
    context = sum(each.output_length * (each.input_length + each.output_length / 2) for each in workload.arrivals) / max(
        tokens, 1
    )
    most = max(min(engine.max_batch, int(rates.pool_tokens / max(context, 1))), 1)

    def step_ms(streams: int) -> float:
        return rates.step_ms(0, 0, streams, streams * context) / rates.tokens_per_step

    while most > 1 and slo.itl_ms and step_ms(most) > slo.itl_ms:
        most -= 1
    return step_ms(most) / 1e3 / most
