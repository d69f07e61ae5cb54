"""Trace files: small hand-made samples of both formats."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtest.traces import read_trace, spread_batches, thin
from loadtest.workload import Planned
from python_backends.core.errors import ConfigError


def _mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_mooncake_rows_keep_their_blocks(tmp_path: Path) -> None:
    rows = [(27_482, 1200, 52, [0, 1, 2]), (27_900, 600, 7, [0, 3]), (30_000, 512, 9, [0])]
    requests = read_trace(_mooncake(tmp_path / "trace.jsonl", rows), random.Random(0))
    assert [r.time_s for r in requests] == pytest.approx([0.0, 0.418, 2.518])
    assert [(r.input_tokens, r.output_tokens, r.blocks, r.block_tokens) for r in requests] == [
        (1200, 52, (0, 1, 2), 512),
        (600, 7, (0, 3), 512),
        (512, 9, (0,), 512),
    ]


def test_azure_rows_have_times_of_100_ns_and_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:17:03.9799600,4808,10\r\n"
        "2023-11-16 18:17:04.0319600,3180,8\r\n"
        "2023-11-17 00:00:00.0000000,110,27"
    )
    requests = read_trace(path, random.Random(0))
    assert [r.time_s for r in requests] == pytest.approx([0.0, 0.052, 20_576.02004])
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [(4808, 10), (3180, 8), (110, 27)]
    assert len({r.blocks for r in requests}) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "line 1: .*hash_ids"),
        ('{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "line 1: 1 hash_ids for 600 tokens"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{oops', "line 2"),
        ("TIMESTAMP,ContextTokens\n", "line 1: no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: .*yesterday"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(path, random.Random(0))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.jsonl", random.Random(0))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is not text"):
        read_trace(tmp_path / "binary", random.Random(0))


def _at(*times: float) -> list[Planned]:
    return [Planned(time_s, "trace", 10, 1, (number,), 512) for number, time_s in enumerate(times)]


def test_batches_are_spread_over_the_time_to_the_next() -> None:
    rows = _at(*[0.0] * 30, *[3.0] * 40, *[6.0] * 20)
    spread = spread_batches(rows, random.Random(1))
    times = [row.time_s for row in spread]
    assert [row.blocks for row in spread] == [row.blocks for row in rows], "nobody overtakes"
    assert times == sorted(times)
    assert len(set(times)) == 90
    for index, batch in enumerate((times[:30], times[30:70], times[70:])):
        assert 3.0 * index <= min(batch) < 3.0 * index + 0.5
        assert 3.0 * index + 2.5 < max(batch) < 3.0 * index + 3.0
    assert spread_batches(rows, random.Random(1)) == spread


def test_times_of_single_requests_stay() -> None:
    rows = _at(0.0, 0.5, 0.5, 1.0, 1.7, 2.0)
    assert spread_batches(rows, random.Random(1)) == rows


def test_thinning_keeps_or_drops_whole_conversations() -> None:
    """500 conversations of 4 turns behind a system prompt."""
    rows = [
        Planned(turn * 500.0 + number, "trace", 0, 1, (0, *range(number * 10 + 1, number * 10 + 2 + turn)), 512)
        for turn in range(4)
        for number in range(500)
    ]
    kept = thin(rows, 0.4, random.Random(2))
    assert len(kept) / rows[-1].time_s == pytest.approx(0.4, rel=0.15)
    turns: dict[int, int] = {}
    for row in kept:
        turns[row.blocks[1]] = turns.get(row.blocks[1], 0) + 1
    assert set(turns.values()) == {4}
    with pytest.raises(ConfigError, match=r"--rate 9: the trace has 1 requests per second; raise --time-scale"):
        thin(rows, 9.0, random.Random(2))
