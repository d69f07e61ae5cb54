"""What a profile's figures mean: the verdict on figures as they were recorded, and the shares of a machine's limits."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.interference import gaps_of
from loadtest.record import Record, write_run
from python_backends.core.config import Deployment, ModelConfig, WorkerConfig
from python_backends.core.errors import BatonError
from python_backends.core.types import Role
from scripts.profile_measures import Limits, Model, model_of, profile_of, served_by, use_of
from scripts.profile_picture import table, write_profile
from scripts.profile_verdict import Kind, Level, Profile, Spread, Use, Verdict, judge
from tests.unit.loadtest.made import record, run

STREAM = Kind("stream", 40, 0, 0.55, 180.0, 900.0, 22.0, 240.0, 2000.0, 100.0)
LONG = Kind("long", 10, 0, 1.0, 1500.0, 2600.0, 25.0, 90.0, 4000.0, 200.0)
BUSY = Use(0.35, 0.70, 0.20, 0.06, 0.66)
MIXED = Profile(
    undisturbed=Spread(6_000, 21.0, 29.0),
    disturbed=Spread(900, 150.0, 245.0),
    lost_share=0.31,
    prefill_share=0.28,
    streams=7.6,
    cache_potential=0.0,
    cache_found=0.0,
    kinds=[STREAM, LONG],
    use=BUSY,
)
"""A mixed load on one aggregated worker: long prompts hold up eight streams."""


def _judged(**changed: Any) -> Verdict:
    return judge(msgspec.structs.replace(MIXED, **changed))


def _good(*kinds: Kind) -> list[Kind]:
    return [msgspec.structs.replace(kind, good=1.0, itl_p99=40.0) for kind in kinds]


def test_prompts_that_disturb_streams_are_what_disaggregation_cures() -> None:
    verdict = judge(MIXED)
    assert verdict.level is Level.YES
    said = " ".join(verdict.reasons)
    assert "21 ms at the median and 29 ms at p99 while no prompt is in prefill, 150 ms and 245 ms while one is" in said
    assert "8.4 times the p99" in said
    assert "lose 31% of their time" in said
    assert "70% of the arithmetic and 20% of the memory bandwidth are used; while only streams run, 6% and 66%" in said
    assert "stream: 55% of 40 requests met their SLO (TTFT p99 900 ms of 2e+03" not in said
    assert any("scripts/compare" in advice for advice in verdict.advice)
    assert any("step_tokens" in advice for advice in verdict.advice), "the cheaper cure is told, too"


def test_a_machine_that_is_full_is_not_made_larger() -> None:
    verdict = _judged(use=msgspec.structs.replace(BUSY, arithmetic=0.8))
    assert verdict.level is Level.PARTLY
    assert "prompts would wait longer" in verdict.headline


def test_rare_long_gaps_count_when_they_break_the_slo() -> None:
    """The time lost is small; the 99th percentile is not."""
    assert _judged(lost_share=0.05).level is Level.YES
    within = [msgspec.structs.replace(kind, slo_itl=300.0) for kind in (STREAM, LONG)]
    assert _judged(lost_share=0.05, kinds=within).level is Level.NO
    assert _judged(lost_share=0.02).level is Level.NO


def test_where_nothing_is_wrong_nothing_is_to_be_cured() -> None:
    verdict = _judged(disturbed=Spread(900, 22.0, 31.0), lost_share=0.01, kinds=_good(STREAM, LONG))
    assert verdict.level is Level.NO
    assert "nothing is wrong" in verdict.headline


@pytest.mark.parametrize(
    ("changed", "says", "advises"),
    [
        ({"use": Use(0.9, 0.9, 0.1, 0.1, 0.3)}, "arithmetic is used up", "makes none"),
        ({"use": Use(0.1, 0.5, 0.1, 0.1, 0.85)}, "at the memory's bandwidth", "model.weights"),
        ({"cache_potential": 0.6, "cache_found": 0.1}, "prefix cache would save more", "engine.kv_pool_mib"),
        ({"use": None}, "hardly disturb", "scripts/trace slowest"),
    ],
)
def test_other_troubles_are_named(changed: dict[str, Any], says: str, advises: str) -> None:
    verdict = _judged(disturbed=Spread(900, 22.0, 31.0), lost_share=0.01, **changed)
    assert verdict.level is Level.NO
    assert says in verdict.headline
    assert any(advises in advice for advice in verdict.advice)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"handed_over": 0.9}, "disaggregated already"),
        ({"kinds": [msgspec.structs.replace(STREAM, failed=30)]}, "too few requests were answered"),
        ({"undisturbed": Spread(20, 21.0, 29.0), "disturbed": Spread(10, 30.0, 40.0)}, "too short"),
        ({"undisturbed": Spread(0, math.nan, math.nan)}, "computed all the time"),
    ],
)
def test_what_can_not_be_told_is_not_told(changed: dict[str, Any], says: str) -> None:
    verdict = _judged(**changed)
    assert verdict.level is Level.UNKNOWN
    assert says in verdict.headline
    assert verdict.advice


def test_few_disturbed_gaps_are_no_verdict_against_prompts() -> None:
    verdict = _judged(disturbed=Spread(8, 500.0, 900.0), lost_share=0.4)
    assert verdict.level is Level.NO
    assert "Only 8 of 6008 gaps" in verdict.reasons[0]


# --- measures ----------------------------------------------------------------------------------------------------------


def _records() -> list[Record]:
    """Four streams, 20 ms a token; a prompt of 3,000 tokens in prefill for half a second, in which tokens take 100 ms."""
    gaps_s = [0.02] * 45 + [0.1] * 5 + [0.02] * 100
    long = record(4, 3.005, 0.49, [0.02], kind="long", input_tokens=3000)
    return [*(record(number, 2.0, 0.1, gaps_s) for number in range(4)), long]


def test_shares_of_the_limits() -> None:
    """Weights of 1 GB read in 20 ms are 50 GB/s; a prompt of 3,000 tokens in 0.49 s is 612 Gflop/s of 0.1 G weights."""
    gaps = gaps_of(run(kinds=("stream", "long")), _records())
    model = Model(parameters=100_000_000, weight_bytes=1e9, kv_token_bytes=0)
    used = use_of(gaps, 3000, 0.49, 8.0, Limits(100e9, 1e12, "2 cores"), model, 256, 1)
    assert used.bandwidth_in_decode == pytest.approx(0.5, rel=0.02)
    assert used.arithmetic_in_decode == pytest.approx(4 * 2e8 / 0.02 / 1e12, rel=0.02)
    assert used.arithmetic_in_prefill == pytest.approx((3000 + 20) * 2e8 / 0.49 / 1e12, rel=0.02)
    assert used.bandwidth_in_prefill == pytest.approx(3000 / 256 * 1e9 / 0.49 / 100e9, rel=0.02), "a chunk is a step"
    assert used.arithmetic == pytest.approx((3000 + 4 * 150 + 1) * 2e8 / 8 / 1e12, rel=0.02)


def test_a_profile_from_records() -> None:
    made = run(kinds=("stream", "long"))
    profile = profile_of(made, _records(), None, None, 256, 1)
    assert profile.undisturbed.p50 == pytest.approx(20)
    assert profile.disturbed.p50 == pytest.approx(100)
    assert profile.lost_share == pytest.approx(4 * 5 * 0.08 / (4 * (145 * 0.02 + 0.5) + 0.02), rel=0.01)
    assert profile.streams == pytest.approx(4, rel=0.02)
    assert [kind.name for kind in profile.kinds] == ["stream", "long"]
    assert profile.use is None


def test_the_model_is_measured_by_what_every_token_passes(smollm2_dir: Path) -> None:
    deployment = Deployment(workers=(WorkerConfig(role=Role.AGGREGATED), WorkerConfig(role=Role.PREFILL)))
    worker = served_by(deployment)
    assert worker.role is Role.AGGREGATED
    model = model_of(deployment, worker)
    assert model.parameters == pytest.approx(134.5e6, rel=0.001)
    assert model.weight_bytes == pytest.approx(4 * 134.5e6, rel=0.001)
    assert model.kv_token_bytes == 2 * 30 * 3 * 64 * 4
    narrow = Deployment(model=ModelConfig(weights="int8", kv_dtype="float16"), workers=deployment.workers)
    assert model_of(narrow, worker).weight_bytes == pytest.approx(1.0625 * 134.5e6, rel=0.001)
    assert model_of(narrow, worker).kv_token_bytes == 2 * 30 * 3 * 64 * 2
    with pytest.raises(BatonError, match="engine fake"):
        model_of(deployment, WorkerConfig(role=Role.AGGREGATED, engine="fake"))


# --- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict(tmp_path: Path) -> None:
    made = run(kinds=("stream", "long"))
    write_run(tmp_path, made, _records())
    page = write_profile(tmp_path, made, _records(), MIXED, judge(MIXED), ["A remark."])
    text = page.read_text()
    assert text.index("<h1>Yes: long prompts disturb") < text.index("lose 31% of their time") < text.index("A remark.")
    assert text.count("<figure>") == 3
    drawings = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    for drawing in drawings:
        ElementTree.fromstring(f"<svg{drawing}</svg>")
    assert "70%" in text
    assert [row.values for row in table(MIXED) if row.name.startswith("arithmetic")] == [("70% / 6% / 35%",)]
