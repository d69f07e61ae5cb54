"""Figures of benchmarks: medians, ratios within rounds, and every part's own help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from python_backends.core.layout import KVLayout
from scripts import bench
from scripts.benchmarks.codec import measure
from scripts.benchmarks.figures import Figure, draw, ratio_to, table

SLOW = Figure("serving", "32 streams", "engine alone", "tokens/s", (100.0, 200.0, 400.0))
FAST = Figure("serving", "32 streams", "served", "tokens/s", (90.0, 150.0, 380.0))


def test_median_and_spread() -> None:
    assert (SLOW.median, SLOW.spread) == (200.0, (100.0, 400.0))


def test_a_ratio_is_taken_within_each_round() -> None:
    """The machine was twice as fast each time; the contenders' relation hardly changed."""
    assert ratio_to(SLOW, FAST) == pytest.approx(0.9)


def test_the_table_has_a_row_per_figure_and_a_ratio_to_the_first() -> None:
    shown = table([SLOW, FAST])
    assert list(shown.columns[-1].cells) == ["", "0.90"]
    assert list(shown.columns[3].cells) == ["200", "150"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw([SLOW, FAST], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["mixed", "served", "engine", "transfer", "codec", "router", "overload"])
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
