"""Recorded traces: Mooncake's JSON lines and Azure's CSV, read into requests in order of time.

Mooncake: {"timestamp": ms, "input_length", "output_length", "hash_ids": [one id per 512 tokens of the prompt]}.
Azure: TIMESTAMP,ContextTokens,GeneratedTokens; nothing is known of prefixes, so nothing is shared.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from loadtest.generators import MOONCAKE_BLOCK, alone
from loadtest.workload import Planned
from python_backends.core.errors import ConfigError

_KIND = "trace"
_AZURE_COLUMNS = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
_MICROSECOND_DIGITS = len("2023-11-16 18:17:03.979960")  # Azure writes 100 ns, strptime reads no more than these
_BATCHED = 2.0  # rows per distinct time from which on times are taken for those of batches


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[int, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[int]


def read_trace(path: Path, rng: random.Random) -> list[Planned]:
    """All requests of a file, the first at second 0. `rng` spreads arrivals that were written down in batches.

    Raises ConfigError that names file, line and what is wrong.
    """
    try:
        with path.open(newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = list(_read_mooncake(file, path) if first.lstrip().startswith("{") else _read_azure(file, path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a Mooncake JSONL or an Azure CSV file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text; give a Mooncake JSONL or an Azure CSV file") from error
    if not rows:
        raise ConfigError(f"{path}: has no requests")
    rows.sort(key=lambda row: row.time_s)
    start = rows[0].time_s
    return spread_batches([replace(row, time_s=row.time_s - start) for row in rows], rng)


def _read_mooncake(lines: Iterable[str], path: Path) -> Iterator[Planned]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from error
        if len(row.hash_ids) != -(-row.input_length // MOONCAKE_BLOCK):
            raise ConfigError(f"{path}: line {number}: {len(row.hash_ids)} hash_ids for {row.input_length} tokens")
        yield Planned(row.timestamp / 1e3, _KIND, row.input_length, row.output_length, tuple(row.hash_ids), MOONCAKE_BLOCK)


def _read_azure(lines: Iterable[str], path: Path) -> Iterator[Planned]:
    reader = csv.DictReader(lines)
    missing = _AZURE_COLUMNS - set(reader.fieldnames or ())
    if missing:
        raise ConfigError(f"{path}: line 1: no column {', '.join(sorted(missing))}; neither Mooncake JSONL nor Azure CSV")
    for block, row in enumerate(reader):
        try:
            time = datetime.strptime(row["TIMESTAMP"][:_MICROSECOND_DIGITS], "%Y-%m-%d %H:%M:%S.%f")
            tokens, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: line {block + 2}: {error}") from error
        yield alone(time.replace(tzinfo=timezone.utc).timestamp(), _KIND, max(1, tokens), max(1, output), block)


def spread_batches(rows: Sequence[Planned], rng: random.Random) -> list[Planned]:
    """Rows that share a time are spread at random over the time up to the next one; order is kept.

    Only where most times are shared (Mooncake's conversation trace was written down every 3 s): sent as they are, they
    would be bursts that no user made.
    """
    times = sorted({row.time_s for row in rows})
    if len(times) < 2 or len(rows) / len(times) < _BATCHED:
        return list(rows)
    gaps = [after - before for before, after in pairwise(times)]
    widths = dict(zip(times, [*gaps, sorted(gaps)[len(gaps) // 2]], strict=True))
    spread: list[Planned] = []
    for time_s, group in groupby(rows, key=lambda row: row.time_s):
        batch = list(group)
        offsets = sorted(rng.random() * widths[time_s] for _ in batch)
        spread += [replace(row, time_s=time_s + offset) for row, offset in zip(batch, offsets, strict=True)]
    return spread


def thin(rows: Sequence[Planned], rate: float, rng: random.Random) -> list[Planned]:
    """About `rate` requests per second out of more: whole conversations are kept or left out, so prefixes stay shared.

    Raises ConfigError when the trace has fewer.
    """
    natural = len(rows) / max(rows[-1].time_s, 1e-9)
    if rate > natural * 1.001:
        raise ConfigError(f"--rate {rate:g}: the trace has {natural:.3g} requests per second; raise --time-scale to have more")
    kept: dict[int, bool] = {}
    return [row for row, root in zip(rows, _conversations(rows), strict=True) if _keeps(kept, root, rate / natural, rng)]


def _keeps(kept: dict[int, bool], root: int, share: float, rng: random.Random) -> bool:
    if root not in kept:
        kept[root] = rng.random() < share
    return kept[root]


def _conversations(rows: Sequence[Planned]) -> Iterator[int]:
    """Per row the number of its conversation: that of the row that last had the longest of its prefixes.

    Leading blocks that most rows have (a system prompt) tie nobody together.
    """
    counts = Counter(block for row in rows for block in set(row.blocks))
    owner: dict[int, int] = {}
    for number, row in enumerate(rows):
        own = [block for block in row.blocks if counts[block] * 2 <= len(rows)]
        root = next((owner[block] for block in reversed(own) if block in owner), number)
        owner.update(dict.fromkeys(own, root))
        yield root
