"""Figures of benchmarks: medians, ratios within rounds, what becomes of a run that is cut short, and every part's own help."""

from __future__ import annotations

import argparse
import json
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loadtest.comparison import Side
from python_backends.core.errors import Unavailable
from python_backends.core.layout import KVLayout
from python_backends.engines.torch.architecture import load_architecture
from scripts import bench
from scripts.benchmarks import all as everything
from scripts.benchmarks import engine
from scripts.benchmarks.codec import measure
from scripts.benchmarks.figures import Figure, draw, ratio_to, table
from scripts.benchmarks.parts import Bench, Taken, add_options, read_options, run_parts
from scripts.rivalry.environments import ENVIRONMENTS
from tests.engines.tiny_model import write_tiny_llama
from tests.unit.loadtest.made import record, run

SLOW = Figure("serving", "32 streams", "engine alone", "tokens/s", (100.0, 200.0, 400.0))
FAST = Figure("serving", "32 streams", "served", "tokens/s", (90.0, 150.0, 380.0))


def test_median_and_spread() -> None:
    assert (SLOW.median, SLOW.spread) == (200.0, (100.0, 400.0))


def test_a_ratio_is_taken_within_each_round() -> None:
    """The machine was twice as fast each time; the contenders' relation hardly changed."""
    assert ratio_to(SLOW, FAST) == pytest.approx(0.9)


def test_the_table_has_a_row_per_figure_and_a_ratio_to_the_first() -> None:
    other = Figure("serving", "TTFT", "served", "ms", (7.0,))
    shown = table([SLOW, other, FAST])
    assert list(shown.columns[0].cells) == ["serving", "", ""]
    assert list(shown.columns[1].cells) == ["32 streams, tokens/s", "", "TTFT, ms"]
    assert list(shown.columns[2].cells) == ["engine alone", "served", "served"]
    assert list(shown.columns[3].cells) == ["200", "150", "7"]
    assert list(shown.columns[-1].cells) == ["", "0.9", ""]


def test_repetitions_without_a_partner_have_no_ratio() -> None:
    """Of a run that was interrupted, of a contender that sat out, of a round without an answer."""
    fewer = Figure("serving", "32 streams", "served", "tokens/s", (90.0, float("nan")))
    assert ratio_to(SLOW, fewer) == pytest.approx(0.9)
    assert (fewer.median, fewer.spread) == (90.0, (90.0, 90.0))


def test_a_picture_is_drawn_for_each_part(tmp_path: Path) -> None:
    other = Figure("scale", "streams", "1+1 workers", "tokens/s", (1.0,))
    assert draw([SLOW, FAST, other], tmp_path) == [tmp_path / "serving.png", tmp_path / "scale.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


# --- parts, one after the other ---


def _measured(bench: Bench, taken: Taken) -> None:
    bench.repeated(
        lambda: taken.add("what", "one", "ms", bench.rng.random()),
        lambda: taken.add("what", "other", "ms", bench.rng.random()),
    )


def _half(bench: Bench, taken: Taken) -> None:
    taken.add("what", "one", "ms", 99.0)  # warms up
    taken.add("what", "one", "ms", 1.0)
    taken.add("what", "not yet", "ms", 99.0)
    taken.leave_out("rival", Unavailable("rival is asleep"))
    raise Unavailable("the cable is out")


def _interrupted(bench: Bench, taken: Taken) -> None:
    taken.extend([Figure(taken.part, "what", "one", "ms", (2.0, 3.0)), Figure(taken.part, "what", "two", "ms", ())])
    signal.raise_signal(signal.SIGINT)


PARTS = {"whole": _measured, "half": _half, "interrupted": _interrupted, "never": _measured}


@pytest.fixture
def _own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _run_parts(out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, list[float]]], dict[str, str]]:
    """The code, values by part and contender, and what was left out."""
    parser = argparse.ArgumentParser(prog="scripts/bench some")
    add_options(parser, PARTS)
    code = run_parts(PARTS, read_options(parser, PARTS, [*arguments, "--repetitions", "2", "--out", str(out)]))
    written = json.loads((out / "bench.json").read_text())
    assert written["command"].startswith("scripts/bench some ")
    assert written["machine"]["cores"] > 0
    values: dict[str, dict[str, list[float]]] = {}
    for figure in written["figures"]:
        values.setdefault(figure["part"], {})[figure["contender"]] = figure["values"]
    return code, values, written["left_out"]


@pytest.mark.usefixtures("_own_signals")
def test_what_was_measured_outlives_what_goes_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, values, left_out = _run_parts(tmp_path)
    assert code == 130
    assert {part: list(found) for part, found in values.items()} == {
        "whole": ["one", "other"],
        "half": ["one"],
        "interrupted": ["one"],
    }
    assert values["half"]["one"] == [1.0]
    assert left_out == {"half": "the cable is out", "half: rival": "rival is asleep"}
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "whole.png", "half.png", "interrupted.png"}
    shown = capsys.readouterr().out
    assert "left out: half: the cable is out" in shown
    assert "Interrupted; this is what was measured before" in shown


@pytest.mark.usefixtures("_own_signals")
def test_parts_are_chosen_and_the_code_says_whether_all_was_measured(tmp_path: Path) -> None:
    code, values, left_out = _run_parts(tmp_path, "whole")
    assert (code, list(values), left_out) == (0, ["whole"], {})
    assert all(len(found) == 2 for found in values["whole"].values())
    assert _run_parts(tmp_path, "half")[0] == 1
    with pytest.raises(SystemExit):
        _run_parts(tmp_path, "other")


def test_repetitions_begin_at_either_end_in_turn(tmp_path: Path) -> None:
    called: list[str] = []
    bench = Bench(tmp_path, 3, Console(quiet=True), random.Random(1))
    bench.repeated(lambda: called.append("a"), lambda: called.append("b"))
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"


# --- the engine and the mixed load as parts ---


class _Contender:
    weights = "float32"

    def __init__(self, name: str, seconds: float, calls: int = 1000) -> None:
        self.name = name
        self._seconds = seconds
        self._calls = calls

    def prefill(self, tokens: Sequence[int]) -> float:
        self._calls -= 1
        if self._calls < 0:
            raise Unavailable(f"{self.name} has ended")
        return self._seconds

    def decode(self, batch: int, context: int) -> list[float]:
        return [9.0, 9.0, *[self._seconds] * 3]


def test_engines_are_measured_in_repetitions_and_one_that_ends_is_left_alone(tmp_path: Path) -> None:
    args = engine._parse(["--lengths", "100", "--batches", "4", "--contexts", "64", "--repeat", "3"])
    contenders = [_Contender("ours", 0.5), _Contender("theirs", 1.0, calls=3)]
    taken = Taken("engine")
    results = engine.prepared(contenders, load_architecture(write_tiny_llama(tmp_path)), args)
    engine.measure(Console(quiet=True), results, args, taken.leave_out)
    figures = [one for result in results.values() for one in result.figures("engine")]
    found = {(one.quantity, one.contender): list(one.values) for one in figures}
    assert found["prefill 100", "ours"] == [200, 200, 200]
    assert found["decode, batch 4, context 64", "ours"] == [8, 8, 8]
    assert found["ITL: decode, batch 4, context 64", "ours"] == [500, 500, 500]
    assert found["prefill 100", "theirs"] == [100]
    assert ("ITL: prefill 100", "ours") not in found
    assert taken.left_out == {"engine: theirs": "theirs has ended"}


def test_an_engine_that_is_not_installed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    taken = Taken("engine")
    args = engine._parse(["--against", "vllm"])
    path = write_tiny_llama(tmp_path)
    with ExitStack() as stack:
        assert list(engine._others(args, path, stack, taken.leave_out)) == []
    assert "run: scripts/rivals install vllm" in taken.left_out["engine: vllm"]


def test_the_mixed_load_gives_a_value_per_round() -> None:
    records = [record(number, 3.0 + number, 0.1, [0.02] * 9) for number in range(4)]
    sides = [Side("baton", [(run(), records)] * 2), Side("vllm", [(run(), records)])]
    found = {(one.quantity, one.contender): one for one in everything.mixed_figures("mixed", sides)}
    ttft = found["stream: TTFT p50", "baton"]
    assert ttft.unit == "ms"
    assert list(ttft.values) == pytest.approx([100, 100])
    assert len(found["stream: TTFT p50", "vllm"].values) == 1
    assert found["all: tokens out", "baton"].unit == "tokens/s"
    assert ("all: TTFT p50", "baton") not in found


def test_all_takes_installed_rivals_by_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    assert everything.installed_rivals() == ["torch", "transformers"]
    vllm = ENVIRONMENTS["vllm"]
    vllm.directory.mkdir(parents=True)
    (vllm.directory / "baton-installed").write_text("\n".join(vllm.packages))
    assert everything._against("installed,torch") == [
        "torch",
        "transformers",
        "vllm",
        "vllm-default",
        "vllm-disaggregated",
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="'nobody' is none of installed, torch"):
        everything._against("nobody")


# --- the command line ---


@pytest.mark.parametrize("part", ["all", "mixed", "served", "engine", "transfer", "codec", "router", "overload"])
def test_every_part_explains_itself(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main([part, "--help"])
    assert end.value.code == 0
    assert f"scripts/bench {part}" in capsys.readouterr().out


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["nonsense"]) == 2
    assert "'nonsense' is no benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(("codec", "ratios"), [("lossless", (1.05, 1.4)), ("float16", (1.9, 2.0)), ("int8", (3.0, 4.0))])
def test_codecs_are_measured_over_blocks_that_come_back(codec: str, ratios: tuple[float, float]) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32")
    blocks = np.random.default_rng(1).normal(size=(4, 2048)).astype(np.float32).view(np.uint8)
    measured = measure(layout, blocks, codec, rounds=2)
    assert ratios[0] < measured.ratio < ratios[1]
    assert measured.rounded == (codec != "lossless")
    assert min(measured.encode, measured.decode, measured.pays_below) > 0
