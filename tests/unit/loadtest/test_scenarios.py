"""From options to plans."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from loadtest.options import Options
from loadtest.scenarios import make_plan, scaled
from loadtest.workload import Planned
from python_backends.core.errors import ConfigError


def test_the_mixed_load() -> None:
    plan = make_plan(Options(duration=30.0, period=6.0))
    assert plan.streams is not None
    assert plan.arrivals is not None
    assert plan.streams.count == 8
    drawn = [plan.streams.draw() for _ in range(3)]
    assert {(r.kind, r.input_tokens, r.output_tokens) for r in drawn} == {("stream", 128, 256)}
    long = list(plan.arrivals)
    assert [r.time_s for r in long] == [3.0, 9.0, 15.0, 21.0, 27.0]
    assert all(2000 <= r.input_tokens <= 4000 and r.kind == "long" for r in long)
    assert len({r.blocks for r in (*drawn, *long)}) == 8, "nothing is shared"
    assert plan.kinds == ["stream", "long"]


def test_how_fast_streams_go_does_not_change_the_long_prompts() -> None:
    calm, busy = make_plan(Options()), make_plan(Options())
    assert busy.streams is not None
    assert calm.arrivals is not None
    assert busy.arrivals is not None
    for _ in range(100):
        busy.streams.draw()
    assert list(calm.arrivals) == list(busy.arrivals)


def test_arrivals_or_streams() -> None:
    arriving = make_plan(Options(scenario="azure-code", duration=20.0, rate=5.0))
    assert arriving.streams is None
    assert arriving.arrivals is not None
    assert len(list(arriving.arrivals)) == pytest.approx(100, rel=0.5)
    streaming = make_plan(Options(scenario="azure-code", streams=3))
    assert streaming.arrivals is None
    assert streaming.streams is not None
    assert streaming.streams.count == 3


def test_a_trace_is_replayed_faster_and_shorter(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * n, "input_length": 1000, "output_length": 50, "hash_ids": [0, n + 1]} for n in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    plan = make_plan(Options(scenario=str(path), time_scale=4.0, duration=10.0, length_scale=0.125))
    assert plan.arrivals is not None
    requests = list(plan.arrivals)
    assert [r.time_s for r in requests[:3]] == pytest.approx([0.0, 0.25, 0.5])
    assert len(requests) == 40
    assert {(r.input_tokens, r.output_tokens, r.block_tokens) for r in requests} == {(125, 6, 64)}


def test_a_trace_that_ends_says_so_to_streams(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [0]}')
    plan = make_plan(Options(scenario=str(path), streams=1))
    assert plan.streams is not None
    plan.streams.draw()
    with pytest.raises(ConfigError, match="the trace is at its end"):
        plan.streams.draw()


def test_unknown_scenarios_are_refused() -> None:
    with pytest.raises(ConfigError, match="'mixd' is not a file and none of mixed, conversation"):
        make_plan(Options(scenario="mixd"))
    with pytest.raises(ConfigError, match="No such file"):
        make_plan(Options(scenario="nowhere.jsonl"))


def test_scaling_keeps_what_is_shared() -> None:
    """A prompt of three blocks, and one that goes on from its two full ones."""
    one = Planned(0.0, "k", 1200, 100, (1, 2, 3), 512)
    two = Planned(0.0, "k", 2000, 100, (1, 2, 4, 5), 512)
    for scale in (2.0, 0.5, 0.1, 0.001):
        small = [scaled(request, scale) for request in (one, two)]
        assert {s.block_tokens for s in small} == {max(1, round(512 * scale))}
        for request, s in zip((one, two), small, strict=True):
            assert len(s.blocks) == -(-s.input_tokens // s.block_tokens)
            assert s.blocks == request.blocks[: len(s.blocks)]
            assert s.input_tokens == pytest.approx(request.input_tokens * scale, rel=0.05, abs=4)
    assert scaled(one, 1.0) == one
    cut = scaled(two, 1.0, max_input=600)
    assert (cut.input_tokens, cut.blocks) == (600, (1, 2))


def test_slos_can_be_given() -> None:
    plan = make_plan(Options(slo="ttft=500,itl=20"))
    assert {(slo.ttft_ms, slo.itl_ms) for slo in plan.slos.values()} == {(500, 20)}


def test_endless_sources_end_with_the_run() -> None:
    for scenario in ("conversation", "azure-conversation", "azure-code", "fixed"):
        plan = make_plan(Options(scenario=scenario, duration=5.0, shape="burst"))
        assert plan.arrivals is not None
        assert all(r.time_s < 5.0 for r in itertools.islice(plan.arrivals, 10_000))
