"""Requests to simulate: read from a trace, or drawn with the statistics of published ones.

Formats: Mooncake's JSON lines (timestamp in ms, input_length, output_length, hash_ids of 512-token blocks) and CSV, either
Azure's (TIMESTAMP, ContextTokens, GeneratedTokens) or plain (timestamp_ms, input_length, output_length).
"""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from random import Random
from typing import overload

import numpy as np
import numpy.typing as npt

from python_backends.core.errors import ConfigError
from python_backends.core.types import BlockHash

Floats = npt.NDArray[np.float64]

SILENT = 1  # the token that simulated workers make; it has no text
MOONCAKE_BLOCK = 512  # tokens
PLAIN_BLOCK = 256  # tokens; of workloads that share no prefixes


class Tokens(Sequence[int]):
    """Stands for a prompt of which only the length and the hashes of its blocks are known."""

    def __init__(self, length: int, hashes: Sequence[BlockHash]) -> None:
        self._length = length
        self.hashes = hashes

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return 0 if isinstance(index, int) else [0] * len(range(*index.indices(self._length)))

    def __add__(self, more: Sequence[int]) -> Tokens:
        return Tokens(self._length + len(more), self.hashes)

    def __iter__(self) -> Iterator[int]:
        return iter((0,))  # all are alike: whoever looks for the largest has it with the first


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    input_length: int
    output_length: int
    hashes: tuple[BlockHash, ...] = ()  # of the full blocks, chained: equal means an equal prefix
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """`block_size`: tokens that one of the arrivals' hashes stands for."""

    name: str
    arrivals: Sequence[Arrival]
    block_size: int

    def scaled(self, speed: float = 1.0, length: float = 1.0, most: int = 0, longest: int = 0) -> Workload:
        """Arrivals `speed` times faster, lengths times `length` and at most `longest`, and only the first `most`."""
        if speed <= 0 or length <= 0:
            raise ConfigError("a workload can only be scaled by numbers above 0")
        size = max(int(self.block_size * length), 1)
        return Workload(
            self.name,
            [
                replace(
                    arrival,
                    at_s=arrival.at_s / speed,
                    input_length=_cut(arrival.input_length * length, longest),
                    output_length=_cut(arrival.output_length * length, longest),
                )
                for arrival in self.arrivals[: most or None]
            ],
            size,
        )

    def split(self, share: float) -> tuple[Workload, Workload]:
        """The first `share` of the requests, and the others, as if they came first."""
        at = int(len(self.arrivals) * share)
        begin = self.arrivals[at].at_s
        rest = [replace(arrival, at_s=arrival.at_s - begin) for arrival in self.arrivals[at:]]
        return Workload(self.name, self.arrivals[:at], self.block_size), Workload(self.name, rest, self.block_size)

    def through(self, day: Day) -> Workload:
        """The same requests, come as the day's curve has it: on average as many per second as now."""
        times = day.when([arrival.at_s for arrival in self.arrivals])
        arrivals = [replace(arrival, at_s=at) for arrival, at in zip(self.arrivals, times, strict=True)]
        return Workload(f"{self.name} over a day", arrivals, self.block_size)

    def filling(self, seconds: float) -> Workload:
        """Repeated as often as it takes, and cut off then."""
        period = max(self.arrivals[-1].at_s, 1e-3)
        longer = self.repeated(math.ceil(seconds / period)) if seconds > period else self
        return Workload(self.name, [each for each in longer.arrivals if each.at_s < seconds], self.block_size)

    def repeated(self, times: int) -> Workload:
        """One after the other; every repetition has prefixes of its own."""
        if not self.arrivals:
            return self
        period = self.arrivals[-1].at_s * (1 + 1 / len(self.arrivals))
        arrivals = [
            replace(
                arrival,
                at_s=arrival.at_s + turn * period,
                hashes=tuple(BlockHash(bytes((turn % 256, turn // 256 % 256)) + block[2:]) for block in arrival.hashes),
            )
            for turn in range(times)
            for arrival in self.arrivals
        ]
        return Workload(self.name, arrivals, self.block_size)


@dataclass(frozen=True, slots=True)
class Day:
    """How the rate of requests goes up and down: a sine, lowest at 4 o'clock and highest at 16, from midnight on.

    swing: the highest rate in terms of the lowest.
    """

    swing: float = 4.0
    seconds: float = 86_400.0  # of a whole day

    def load_s(self, until_s: float) -> float:
        """Seconds at the mean rate that bring as many requests as the day until then."""
        return float(self._load(np.array([until_s]))[0])

    def when(self, load_s: Sequence[float]) -> list[float]:
        """The inverse of `load_s`: when a request comes that would come then at the mean rate."""
        if not load_s:
            return []
        most = (1 + self._depth) * load_s[-1] / (1 - self._depth) + self.seconds
        times = np.arange(0.0, most, self.seconds / 1440)
        return [float(time) for time in np.interp(load_s, self._load(times), times)]

    @property
    def _depth(self) -> float:
        return (self.swing - 1) / (self.swing + 1)

    def _load(self, times: Floats) -> Floats:
        """The integral of 1 - depth x cos(angle since the quietest hour)."""
        turn = 2 * math.pi / self.seconds
        quietest = self.seconds / 6
        loads: Floats = times - self._depth / turn * (np.sin(turn * (times - quietest)) + math.sin(turn * quietest))
        return loads


def read_trace(path: Path, random: Random) -> Workload:
    """Raises ConfigError that names the file, and the line if there is one to blame."""
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".csv":
                return Workload(path.stem, _sorted(_read_csv(lines)), PLAIN_BLOCK)
            return Workload(path.stem, _spread(_read_mooncake(lines), random), MOONCAKE_BLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file") from error
    except _BadLine as error:
        raise ConfigError(f"{path}: {error}") from error


class _BadLine(Exception):
    pass


def _read_mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            hashes = tuple(_block(0, int(name)) for name in row["hash_ids"][: int(row["input_length"]) // MOONCAKE_BLOCK])
            yield Arrival(
                float(row["timestamp"]) / 1e3, max(int(row["input_length"]), 1), max(int(row["output_length"]), 1), hashes
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _BadLine(f"line {number} is not a line of a Mooncake trace: {error!r}") from error


def _read_csv(lines: Iterable[str]) -> Iterator[Arrival]:
    first: datetime | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            if "TIMESTAMP" in row:
                when = datetime.fromisoformat(row["TIMESTAMP"][:26])  # it has more digits than a datetime
                first = first or when
                yield Arrival((when - first).total_seconds(), *_lengths(row["ContextTokens"], row["GeneratedTokens"]))
            else:
                yield Arrival(float(row["timestamp_ms"]) / 1e3, *_lengths(row["input_length"], row["output_length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _BadLine(
                f"line {number}: {error!r}; columns must be TIMESTAMP, ContextTokens, GeneratedTokens or timestamp_ms, "
                "input_length, output_length"
            ) from error


def _lengths(prompt: str, output: str) -> tuple[int, int]:
    return max(int(prompt), 1), max(int(output), 1)


def _sorted(arrivals: Iterable[Arrival]) -> list[Arrival]:
    ordered = sorted(arrivals, key=lambda arrival: arrival.at_s)
    begin = ordered[0].at_s if ordered else 0.0
    return [replace(arrival, at_s=arrival.at_s - begin) for arrival in ordered]


def _spread(arrivals: Iterable[Arrival], random: Random) -> list[Arrival]:
    """Timestamps rounded to seconds make bursts that never were: spread each over the time until the next."""
    groups = [(at, list(group)) for at, group in groupby(_sorted(arrivals), key=lambda arrival: arrival.at_s)]
    spread: list[Arrival] = []
    for (at, group), (until, _) in zip(groups, [*groups[1:], (groups[-1][0] + 1.0, []) if groups else (0.0, [])], strict=False):
        times = sorted(at + random.random() * (until - at) for _ in group) if len(group) > 1 else [at]
        spread += [replace(arrival, at_s=time) for arrival, time in zip(group, times, strict=True)]
    return spread


def _block(space: int, number: int) -> BlockHash:
    return BlockHash(space.to_bytes(8, "big") + number.to_bytes(8, "big"))


def _cut(value: float, most: int) -> int:
    value = max(int(value), 1)
    return min(value, most) if most else value


@dataclass(frozen=True, slots=True)
class Profile:
    """Statistics to draw requests with. Lengths in tokens are log-normal: median, and deviation of the logarithm.

    turns: mean number of requests of a conversation, each with all before it as its prefix. system: tokens that all
    conversations begin with. pause_s: mean time from an answer's request to the next question.
    """

    input: tuple[float, float]
    output: tuple[float, float]
    longest: int
    turns: float = 1.0
    system: int = 0
    pause_s: float = 30.0
    source: str = ""


PROFILES = {
    "chat": Profile(
        (1020, 0.985), (129, 0.859), 14_050, source="Azure LLM inference trace 2023, conversation (Splitwise, ISCA 2024)"
    ),
    "code": Profile((1469, 1.36), (13, 0.847), 7_437, source="Azure LLM inference trace 2023, code (Splitwise, ISCA 2024)"),
    "reasoning": Profile(
        (1020, 0.985),
        (9000, 0.75),
        60_000,
        source="prompts as chat; answers of 12,000 tokens on average, as DeepSeek-R1 thinks on AIME (model card of R1-0528)",
    ),
    "conversation": Profile(
        (4200, 1.2), (350, 1.0), 120_000, turns=2.5, system=512, source="Mooncake conversation trace (FAST 2025)"
    ),
}


def generate(name: str, rate: float, seconds: float, random: Random, tenants: int = 1) -> Workload:
    """`rate` requests per second for so long, Poisson. `mixed` is half chat, half code, a fifth of it in conversations.

    Raises ConfigError for an unknown name.
    """
    if name == "mixed":
        parts = {"chat": 0.45, "code": 0.35, "conversation": 0.2}
    elif name in PROFILES:
        parts = {name: 1.0}
    else:
        raise ConfigError(f"no workload is named {name!r}; there are mixed, {', '.join(PROFILES)}, or give a trace file")
    streams = [_draw(PROFILES[part], rate * share, seconds, random, space) for space, (part, share) in enumerate(parts.items())]
    arrivals = list(heapq.merge(*streams, key=lambda arrival: arrival.at_s))
    if tenants > 1:
        arrivals = [replace(arrival, tenant=f"tenant-{random.randrange(tenants)}") for arrival in arrivals]
    return Workload(name, arrivals, PLAIN_BLOCK)


def _draw(profile: Profile, rate: float, seconds: float, random: Random, space: int) -> Iterator[Arrival]:
    """In order of time. Conversations go on after a pause with what was said as prefix."""
    later: list[tuple[float, int, int, list[BlockHash]]] = []  # at, number, tokens so far, their hashes
    system = [_block(space << 8, index) for index in range(profile.system // PLAIN_BLOCK)]
    at, number = 0.0, 0
    goes_on = 1 - 1 / profile.turns
    while True:
        if later and later[0][0] <= at:
            now, mine, said, hashes = heapq.heappop(later)
        else:
            at += random.expovariate(rate / profile.turns)
            if at > seconds and not later:
                return
            if at > seconds:
                at = math.inf
                continue
            number += 1
            now, mine, said, hashes = at, number, profile.system, system
            if later and later[0][0] < now:
                heapq.heappush(later, (now, mine, said, hashes))
                now, mine, said, hashes = heapq.heappop(later)
        if now > seconds:
            continue
        length = min(said + _lognormal(profile.input, random), profile.longest)
        output = _lognormal(profile.output, random)
        hashes = [
            *hashes,
            *(_block((space << 8) + 1, (mine << 24) + index) for index in range(len(hashes), length // PLAIN_BLOCK)),
        ]
        yield Arrival(now, length, output, tuple(hashes[: length // PLAIN_BLOCK]))
        if random.random() < goes_on and length + output < profile.longest:
            heapq.heappush(later, (now + random.expovariate(1 / profile.pause_s), mine, length + output, hashes))


def _lognormal(shape: tuple[float, float], random: Random) -> int:
    median, deviation = shape
    return max(int(median * math.exp(random.gauss(0, deviation))), 1)
