"""From options to a plan: which requests, when, and what they have to meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from loadtest import generators, shapes
from loadtest.options import SCENARIOS, Options
from loadtest.traces import read_trace, thin
from loadtest.workload import Plan, Planned, Slo, Streams
from python_backends.core.errors import ConfigError

_STREAM_BLOCKS = 1 << 40  # blocks of streams are numbered from here, so they are nobody else's
_MIXED_STREAMS = 8
_STREAM_TOKENS = (128, 256)  # in, out
_LONG_TOKENS = (2_000, 4_000)
_LONG_OUTPUT = 16
_SLO = Slo(ttft_ms=2_000, itl_ms=100)
_LONG_SLO = Slo(ttft_ms=4_000, itl_ms=200)  # a reader waits longer for a long prompt


def make_plan(options: Options) -> Plan:
    """Raises ConfigError for an unknown scenario or a trace that can't be read."""
    rng = random.Random(options.seed)
    shape = _shape(options)
    if options.scenario == "mixed":
        count = options.streams or _MIXED_STREAMS
        # Equal requests: nothing is drawn for them, so how fast streams go does not change the long prompts.
        draw = _drawn_from((generators.alone(0.0, "stream", *_STREAM_TOKENS, block) for block in itertools.count()), options)
        long = generators.periodic(rng, options.period, _LONG_TOKENS, _LONG_OUTPUT, "long", 0)
        slos = {"stream": options.wanted_slo or _SLO, "long": options.wanted_slo or _LONG_SLO}
        return Plan(Streams(count, draw), _due(long, shape, options), shape, options.duration, slos)
    source, kind = _source(options, rng)
    slos = {kind: options.wanted_slo or _SLO}
    if options.streams:
        return Plan(Streams(options.streams, _drawn_from(source, options)), None, shape, options.duration, slos)
    return Plan(None, _due(source, shape, options), shape, options.duration, slos)


def _shape(options: Options) -> shapes.Shape:
    if options.shape == "ramp":
        return shapes.ramp(options.duration)
    return shapes.burst(options.duration) if options.shape == "burst" else shapes.constant()


def _source(options: Options, rng: random.Random) -> tuple[Iterator[Planned], str]:
    """Requests in order of time, and their kind."""
    rate = options.rate
    if options.scenario == "conversation":
        rate = rate or generators.CONVERSATION_RATE
        return generators.conversation(rng, rate, options.time_scale), "conversation"
    if options.scenario == "azure-conversation":
        return generators.azure_conversation(rng, rate or generators.AZURE_CONVERSATION_RATE), "conversation"
    if options.scenario == "azure-code":
        return generators.azure_code(rng, rate or generators.AZURE_CODE_RATE), "code"
    if options.scenario == "fixed":
        return generators.fixed(rng, rate or 1.0, options.input_tokens, options.output_tokens, "fixed"), "fixed"
    path = Path(options.scenario)
    if not path.suffix and not path.exists():
        raise ConfigError(f"--scenario: {options.scenario!r} is not a file and none of {', '.join(SCENARIOS)}")
    rows = [replace(row, time_s=row.time_s / options.time_scale) for row in read_trace(path, rng)]
    return iter(thin(rows, rate, rng) if rate else rows), "trace"


def _due(source: Iterator[Planned], shape: shapes.Shape, options: Options) -> Iterator[Planned]:
    """What is sent within the run, at the time that the shape gives it."""
    for planned in source:
        time_s = shape.when(planned.time_s)
        if time_s >= options.duration:
            return
        yield replace(scaled(planned, options.length_scale, options.max_input), time_s=time_s)


def _drawn_from(source: Iterator[Planned], options: Options) -> Callable[[], Planned]:
    def draw() -> Planned:
        planned = next(source, None)
        if planned is None:
            raise ConfigError("the trace is at its end; lower --duration or --streams")
        blocks = tuple(_STREAM_BLOCKS + block for block in planned.blocks)
        return replace(scaled(planned, options.length_scale, options.max_input), time_s=0.0, blocks=blocks)

    return draw


def scaled(planned: Planned, scale: float, max_input: int = 0) -> Planned:
    """All lengths times `scale`, at least 1, blocks included: so what was shared still is. Then cut to `max_input`."""
    full = len(planned.blocks) - 1
    block_tokens = max(1, round(planned.block_tokens * scale))
    rest = planned.input_tokens - full * planned.block_tokens
    tokens = full * block_tokens + max(1, min(block_tokens, round(rest * block_tokens / planned.block_tokens)))
    tokens = min(tokens, max_input or tokens)
    return replace(
        planned,
        input_tokens=tokens,
        output_tokens=max(1, round(planned.output_tokens * scale)),
        blocks=planned.blocks[: -(-tokens // block_tokens)],
        block_tokens=block_tokens,
    )
