"""Workloads that need no file: lengths, pauses and shared prefixes drawn from the published statistics of real traces.

The figures are percentiles of
- the conversation trace of Mooncake (Qin et al., FAST 2025; Apache-2.0), with its turns found by shared prefix blocks;
- the code and conversation traces of Azure (Patel et al., Splitwise, ISCA 2024; CC-BY 4.0).
Between two percentiles the logarithm is taken as linear. Everything is drawn from the generator `rng` alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtest.workload import Planned

MOONCAKE_BLOCK = 512  # tokens per prefix block in Mooncake's traces
CONVERSATION_RATE = 3.4  # requests per second in the trace, as the others
AZURE_CONVERSATION_RATE = 5.5
AZURE_CODE_RATE = 2.6

_PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)


class Percentiles:
    """A distribution of positive numbers known by its 0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9 and 100th percentile."""

    def __init__(self, *values: float) -> None:
        self._points = [(percent / 100, math.log(value)) for percent, value in zip(_PERCENTS, values, strict=True)]

    def draw(self, rng: random.Random) -> float:
        at = rng.random()
        upper = next(i for i in range(1, len(self._points)) if at <= self._points[i][0])
        (x0, y0), (x1, y1) = self._points[upper - 1 : upper + 1]
        return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))

    def mean(self) -> float:
        """Exact: the mean of exp over a linear piece is (e^b - e^a) / (b - a)."""
        pieces = itertools.pairwise(self._points)
        return sum((x1 - x0) * _mean_exp(y0, y1) for (x0, y0), (x1, y1) in pieces)


def _mean_exp(a: float, b: float) -> float:
    return math.exp(a) if b - a < 1e-9 else (math.exp(b) - math.exp(a)) / (b - a)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Of requests that share nothing. `gaps`: between arrivals; only their proportions are used."""

    kind: str
    input: Percentiles
    output: Percentiles
    gaps: Percentiles


_AZURE_CONVERSATION = _Lengths(
    "conversation",
    Percentiles(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6180, 14050),
    Percentiles(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000),
    Percentiles(0.1, 0.5, 6.3, 16.1, 48.3, 118.4, 246.7, 420.7, 565.2, 889.7, 1411, 4315),
)
# The pauses of more than two seconds (1 in 100, up to minutes) are left out: a short run would be one of them.
_AZURE_CODE = _Lengths(
    "code",
    Percentiles(3, 17, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437, 7437),
    Percentiles(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 825, 1899),
    Percentiles(0.01, 0.02, 0.1, 0.2, 2.1, 63.8, 104, 272.9, 400.8, 2205, 2205, 2205),
)

_FIRST_TURN = Percentiles(891, 894, 897, 905, 1336, 5264, 13056, 25559, 38494, 89868, 121160, 126195)
_GROWTH = Percentiles(8, 23, 60, 110, 187, 454, 900, 3000, 6000, 16000, 39800, 91900)  # last answer and next question
_ANSWER = Percentiles(1, 3, 10, 24, 156, 350, 472, 597, 698, 1118, 2000, 2000)
_THINK_S = Percentiles(3, 12, 30, 42, 66, 123, 264, 483, 615, 1477, 2639, 3030)  # from one turn's arrival to the next
_GOES_ON = (0.31, 0.42, 0.51, 0.59, 0.62, 0.68)  # share of conversations that have one more turn; the last one from there on
TURNS = 1.0 + sum(math.prod(_GOES_ON[:turn]) for turn in range(1, 6)) + math.prod(_GOES_ON) / (1 - _GOES_ON[-1])
_SYSTEM_BLOCK = 0  # every conversation of the trace begins with it


def azure_conversation(rng: random.Random, rate: float) -> Iterator[Planned]:
    """Endless; `rate` in requests per second."""
    return _independent(_AZURE_CONVERSATION, rng, rate)


def azure_code(rng: random.Random, rate: float) -> Iterator[Planned]:
    """Endless; `rate` in requests per second. Arrivals come in clusters."""
    return _independent(_AZURE_CODE, rng, rate)


def fixed(rng: random.Random, rate: float, input_tokens: int, output_tokens: int, kind: str) -> Iterator[Planned]:
    """Endless Poisson arrivals of equal requests with nothing shared."""
    time_s = 0.0
    for block in itertools.count():
        time_s += rng.expovariate(rate)
        yield alone(time_s, kind, input_tokens, output_tokens, block)


def periodic(
    rng: random.Random, period_s: float, input_tokens: tuple[int, int], output_tokens: int, kind: str, first_block: int
) -> Iterator[Planned]:
    """One request every `period_s`, the first after half of it; lengths even between the two bounds, nothing shared."""
    for index in itertools.count():
        tokens = rng.randint(*input_tokens)
        yield alone((index + 0.5) * period_s, kind, tokens, output_tokens, first_block + index)


def alone(time_s: float, kind: str, input_tokens: int, output_tokens: int, block: int) -> Planned:
    """A request whose prompt is one block of its own."""
    return Planned(time_s, kind, input_tokens, output_tokens, (block,), input_tokens)


def _independent(lengths: _Lengths, rng: random.Random, rate: float) -> Iterator[Planned]:
    scale = 1 / (rate * lengths.gaps.mean())
    time_s = 0.0
    for block in itertools.count():
        time_s += lengths.gaps.draw(rng) * scale
        input_tokens, output_tokens = round(lengths.input.draw(rng)), round(lengths.output.draw(rng))
        yield alone(time_s, lengths.kind, input_tokens, output_tokens, block)


def conversation(rng: random.Random, rate: float, time_scale: float) -> Iterator[Planned]:
    """Endless conversations of several turns, each turn's prompt the last one's and more; all share their first block.

    `rate`: requests per second once conversations have gone on for a while (in the first minutes most are first turns).
    `time_scale`: how many times faster than the trace's people answer.
    """
    new_block = itertools.count(_SYSTEM_BLOCK + 1)
    first_s = rng.expovariate(rate / TURNS)
    waiting: list[tuple[float, int, int, tuple[int, ...]]] = [(first_s, 0, 0, ())]  # (when, turn, length before, blocks)
    while True:
        time_s, turn, before, blocks = heapq.heappop(waiting)
        if turn == 0:
            heapq.heappush(waiting, (time_s + rng.expovariate(rate / TURNS), 0, 0, ()))
        tokens = before + round(_GROWTH.draw(rng)) if turn else round(_FIRST_TURN.draw(rng))
        blocks = _longer(blocks or (_SYSTEM_BLOCK,), before or MOONCAKE_BLOCK, tokens, new_block)
        yield Planned(time_s, "conversation", tokens, round(_ANSWER.draw(rng)), blocks, MOONCAKE_BLOCK)
        if rng.random() < _GOES_ON[min(turn, len(_GOES_ON) - 1)]:
            heapq.heappush(waiting, (time_s + _THINK_S.draw(rng) / time_scale, turn + 1, tokens, blocks))


def _longer(blocks: Sequence[int], before: int, tokens: int, new_block: Iterator[int]) -> tuple[int, ...]:
    """The blocks of a prompt that has grown: full ones stay, one that was cut is another once there is more in it."""
    full = before // MOONCAKE_BLOCK
    missing = -(-tokens // MOONCAKE_BLOCK) - full
    return (*blocks[:full], *itertools.islice(new_block, missing))
