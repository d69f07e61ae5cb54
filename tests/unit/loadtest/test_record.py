"""Records and the files of a run."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from loadtest.record import UNFINISHED, read_run, write_run
from loadtest.workload import Slo
from python_backends.core.errors import ConfigError
from tests.unit.loadtest.made import failed, record, run


def test_times_of_one_request() -> None:
    made = record(0, 1.0, 0.5, [0.02, 0.02, 0.1, 0.02])
    assert made.ttft_ms == pytest.approx(500)
    assert made.e2e_ms == pytest.approx(660)
    assert made.tpot_ms == pytest.approx(40)
    assert made.gaps().tolist() == pytest.approx([20, 20, 100, 20])


def test_a_good_request_is_in_time_and_smooth() -> None:
    smooth = record(0, 1.0, 0.5, [0.02] * 100)
    assert smooth.meets(Slo(500.1, 20.1))
    assert not smooth.meets(Slo(499, 20.1))
    assert not smooth.meets(Slo(500.1, 19))
    stalled = record(0, 1.0, 0.5, [0.02] * 98 + [0.5] * 2)
    assert not stalled.meets(Slo(1000, 100)), "two stalls in a hundred"
    assert record(0, 1.0, 0.5, []).meets(Slo(1000, 1)), "one token has no gap"
    assert not record(0, 1.0, 0.5, [], error="broke").meets(Slo(1000, 1))
    assert not failed(0, 1.0, UNFINISHED).meets(Slo(1e9, 1e9))


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    kept = [record(0, 1.0, 0.5, [0.02, 0.03]), failed(1, 2.0, "line one\nline two"), record(2, 3.0, 0.1, [])]
    kept[0].output_tokens_counted, kept[0].cached_tokens, kept[0].route = 6, 32, "remote"
    write_run(tmp_path, run(), kept)
    again, records = read_run(tmp_path)
    assert again == run()
    assert [r.arrival_s.tolist() for r in records] == [pytest.approx(r.arrival_s.tolist()) for r in kept]
    assert records[0].output_tokens == 6
    assert (records[0].cached_tokens, records[0].route, records[0].finish_reason) == (32, "remote", "length")
    assert records[1].error == "line one line two"
    assert math.isnan(records[1].ttft_ms)


def test_requests_are_a_table_for_spreadsheets(tmp_path: Path) -> None:
    write_run(tmp_path, run(), [record(0, 1.0, 0.5, [0.02, 0.03]), failed(1, 2.0, "broke")])
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["ttft_ms"]) == pytest.approx(500)
    assert float(rows[0]["tpot_ms"]) == pytest.approx(25)
    assert [row["good"] for row in rows] == ["1", "0"]
    assert rows[1]["ttft_ms"] == ""


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the directory of a load test"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="of this version"):
        read_run(tmp_path)
