"""scripts/bench overload: what is counted as accepted, on time, refused and failed; and the deployment it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from loadtest.workload import Slo
from python_backends.core.errors import ConfigError
from scripts.benchmarks.overload import _deployment, outcome, table
from tests.unit.loadtest.made import failed, record

SLO = Slo(ttft_ms=1000, itl_ms=50)
REFUSAL = "9 prompt tokens are waiting, 9 of them of this tenant (router.max_queued_tokens is 9); try again in 1.5 s"


def test_requests_are_told_apart_by_how_they_ended() -> None:
    in_time, late = record(0, 1.0, 0.5, [0.02, 0.03]), record(1, 1.0, 1.5, [0.02])
    refused, broken = failed(2, 2.0, REFUSAL), failed(3, 2.0, "the worker is gone")
    refused.ended_s = 2.004
    found = outcome([in_time, late, refused, broken], SLO, 2.0, 0.5, [100.0] * 5 + [110.0] * 5, 0.3)
    assert (found.accepted, found.on_time, found.refused, found.failed) == (2, 1, 1, 1)
    assert (found.offered, found.goodput, found.memory) == (2.0, 0.5, (100.0, 110.0))
    assert found.refusal.p50 == pytest.approx(4.0)
    assert (found.itl.n, found.joining.n, found.running.n) == (3, 2, 1)
    cells = dict(zip(table(found, SLO).columns[0].cells, table(found, SLO).columns[1].cells, strict=True))
    assert cells["accepted"] == "2 of 4"
    assert cells["of these with their first token in time"] == "50.0%"


def test_a_run_in_which_nobody_was_accepted_has_a_table_too() -> None:
    found = outcome([failed(0, 1.0, REFUSAL)], SLO, 1.0, 1.0, [10.0], 0.0)
    assert "-" in list(table(found, SLO).columns[1].cells)


def test_a_deployment_keeps_its_targets_and_is_given_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("router: {slo: {itl_ms: 80}}\n")
    path, slo = _deployment(file, 700.0, tmp_path)
    assert slo == Slo(700.0, 80.0)
    assert yaml.safe_load(path.read_text())["router"]["slo"] == {"itl_ms": 80, "ttft_ms": 700.0}
    file.write_text("router: {slo: {ttft_ms: 90}}\n")
    assert _deployment(file, 700.0, tmp_path)[1].ttft_ms == 90.0


def test_a_deployment_that_cant_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: .*missing\.yaml"):
        _deployment(tmp_path / "missing.yaml", 700.0, tmp_path)
