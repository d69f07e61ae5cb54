from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from python_backends.core.errors import ConfigError
from scripts.simulation.workload import PROFILES, Tokens, Workload, generate, read_trace


def mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    file = path / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return file


def test_mooncake_rows_share_prefixes_by_their_hashes(tmp_path: Path) -> None:
    file = mooncake(tmp_path, [(0, 1200, 5, [7, 8, 9]), (1000, 1600, 6, [7, 8, 10, 11])])
    trace = read_trace(file, Random(0))
    first, second = trace.arrivals
    assert (trace.block_size, first.input_length, second.output_length, second.at_s) == (512, 1200, 6, 1.0)
    assert len(first.hashes) == 2  # the third block is not full
    assert first.hashes[:2] == second.hashes[:2]
    assert len(set(second.hashes)) == 3


def test_times_that_were_rounded_are_spread_out_again(tmp_path: Path) -> None:
    file = mooncake(tmp_path, [(t, 10, 1, [0]) for t in (0, 0, 0, 0, 3000, 3000, 6000)])
    times = [arrival.at_s for arrival in read_trace(file, Random(0)).arrivals]
    assert len(set(times)) == 7
    assert times == sorted(times)
    assert all(0 <= at < 3 for at in times[:4])
    assert all(3 <= at < 6 for at in times[4:6])


def test_azure_rows(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,0,0\n"
    )
    first, second = read_trace(file, Random(0)).arrivals
    assert (first.at_s, first.input_length, first.output_length, first.hashes) == (0.0, 4808, 10, ())
    assert (second.at_s, second.input_length, second.output_length) == (1.5, 1, 1)


def test_plain_rows(tmp_path: Path) -> None:
    file = tmp_path / "plain.csv"
    file.write_text("timestamp_ms,input_length,output_length\n6011,178,8\n6911,258,40\n")
    assert [(a.at_s, a.input_length) for a in read_trace(file, Random(0)).arrivals] == [(0, 178), (pytest.approx(0.9), 258)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"timestamp": 0}', "line 1 is not a line of a Mooncake trace"),
        ("a.jsonl", "nonsense", "line 1"),
        ("a.csv", "x,y\n1,2\n", "line 2.*columns must be"),
        ("a.csv", "timestamp_ms,input_length,output_length\n1,many,2\n", "line 2"),
    ],
)
def test_bad_traces_are_refused_with_the_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / name, Random(0))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv", Random(0))


@pytest.mark.parametrize("name", PROFILES)
def test_drawn_requests_have_the_statistics_asked_for(name: str) -> None:
    profile = PROFILES[name]
    drawn = generate(name, rate=20, seconds=400, random=Random(1)).arrivals
    assert len(drawn) == pytest.approx(8000, rel=0.15)
    times = [arrival.at_s for arrival in drawn]
    assert times == sorted(times)
    assert max(times) <= 400
    assert statistics.median(arrival.output_length for arrival in drawn) == pytest.approx(profile.output[0], rel=0.1)
    if profile.turns == 1:
        assert statistics.median(arrival.input_length for arrival in drawn) == pytest.approx(profile.input[0], rel=0.1)
    assert max(arrival.input_length for arrival in drawn) <= profile.longest


def test_conversations_go_on_with_what_was_said_as_prefix() -> None:
    drawn = generate("conversation", rate=5, seconds=600, random=Random(1))
    system = {arrival.hashes[:2] for arrival in drawn.arrivals if len(arrival.hashes) >= 2}
    assert len(system) == 1  # all begin alike
    by_third = [arrival for arrival in drawn.arrivals if len(arrival.hashes) > 2]
    again = len(by_third) - len({arrival.hashes[2] for arrival in by_third})
    assert again / len(by_third) > 0.3
    for earlier, later in pairwise(sorted(by_third, key=lambda a: (a.hashes[2], a.at_s))):
        if earlier.hashes[2] == later.hashes[2]:
            assert later.hashes[: len(earlier.hashes)] == earlier.hashes
            assert later.input_length > earlier.input_length


def test_the_same_seed_draws_the_same_and_unknown_names_are_refused() -> None:
    assert generate("mixed", 5, 60, Random(3)) == generate("mixed", 5, 60, Random(3))
    with pytest.raises(ConfigError, match="no workload is named 'weird'"):
        generate("weird", 5, 60, Random(3))


def test_tenants_share_the_requests() -> None:
    drawn = generate("chat", 20, 60, Random(0), tenants=3)
    assert {arrival.tenant for arrival in drawn.arrivals} == {"tenant-0", "tenant-1", "tenant-2"}


def test_scaling_and_repeating() -> None:
    workload = generate("conversation", 2, 100, Random(0))
    small = workload.scaled(speed=2, length=0.5, most=10)
    assert len(small.arrivals) == 10
    assert small.block_size == workload.block_size // 2
    for before, after in zip(workload.arrivals, small.arrivals, strict=False):
        assert after.at_s == before.at_s / 2
        assert after.input_length == max(before.input_length // 2, 1)
        assert len(after.hashes) * small.block_size <= after.input_length + small.block_size
    twice = workload.repeated(2)
    count = len(workload.arrivals)
    assert len(twice.arrivals) == 2 * count
    assert [a.at_s for a in twice.arrivals] == sorted(a.at_s for a in twice.arrivals)
    assert not set(twice.arrivals[0].hashes) & set(twice.arrivals[count].hashes)
    with pytest.raises(ConfigError):
        workload.scaled(speed=0)


def test_splitting_loses_nothing() -> None:
    workload = generate("chat", 2, 100, Random(0))
    first, rest = workload.split(0.3)
    assert len(first.arrivals) + len(rest.arrivals) == len(workload.arrivals)
    assert rest.arrivals[0].at_s == 0.0
    assert Workload("x", [], 16).repeated(3).arrivals == []


def test_a_prompt_of_which_only_the_length_is_known() -> None:
    tokens = Tokens(5000, [])
    assert (len(tokens), min(tokens), max(tokens), tokens[17], list(tokens[10:12])) == (5000, 0, 0, 0, [0, 0])
