"""What chaos says about what it has counted. What it does is in tests/triton/test_chaos.py."""

from __future__ import annotations

import msgspec
import pytest

from python_backends.core.types import Role
from router.lifecycle import LIVE, State
from scripts.chaos import main, parse_options
from scripts.injection.load import Sample, known_requests
from scripts.injection.tally import Row, Table, quantile, wilson


def test_intervals_are_those_of_the_textbook() -> None:
    """Figures of R's binom::binom.wilson."""
    assert wilson(0, 100) == pytest.approx((0.0, 0.0369935), abs=1e-6)
    assert wilson(5, 100) == pytest.approx((0.0215437, 0.1117512), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_quantiles() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([3, 1, 2], 0.99) == 3
    assert quantile([], 0.5) is None


def _row(**changes: object) -> Row:
    usual = {"what": "kill -9", "where": "decode", "when": "decoding", "injected": 2, "requests": 50, "back_s": [1.0, 2.0]}
    return msgspec.convert({**usual, **changes}, Row)


def _table(*rows: Row) -> Table:
    return Table(command="scripts/chaos", began="2026-01-01T00:00:00+00:00", engine="fake", seconds=3.0, rows=list(rows))


@pytest.mark.parametrize(
    "broken", [{"failed": 1}, {"wrong": 1}, {"leaked_blocks": 1}, {"injected": 0}, {"problems": ["it is not back"]}]
)
def test_a_promise_is_broken_by_any_of(broken: dict[str, object]) -> None:
    assert _row().ok
    assert not _row(**broken).ok
    assert not _table(_row(), _row(**broken)).ok


def test_files() -> None:
    table = _table(_row(), _row(what="SIGSTOP", failed=1))
    lines = table.markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "0 (0.00% to 7.13%)" in lines[2]
    assert lines[2].endswith("| holds |")
    assert lines[3].endswith("| BROKEN |")
    read = msgspec.json.decode(table.json())
    assert read["ok"] is False
    assert read["rows"][0]["back_s_p99"] == 2.0
    assert read["rows"][1]["failed_95"][1] == pytest.approx(wilson(1, 50)[1])


def test_samples() -> None:
    sample = Sample("c", sent=1.0)
    sample.arrivals.extend([2.0, 3.0])
    assert sample.next_after(2.0) == 3.0
    assert sample.next_after(3.0) is None
    assert sample.overlaps(5.0, 6.0)
    sample.ended = 4.0
    assert sample.next_after(3.0) == 4.0
    assert not sample.overlaps(5.0, 6.0)


def test_requests_are_the_same_each_time_and_no_two_alike() -> None:
    requests = known_requests(16)
    assert requests == known_requests(16)
    assert len({request.prompt for request in requests}) == 16
    assert {request.temperature > 0 for request in requests} == {True, False}


def test_kinds_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    kinds = capsys.readouterr().out
    for role in Role:
        assert f"kill -9 {role.value}" in kinds
        assert f"slow {role.value}" in kinds
        assert f"engine hangs {role.value}" in kinds
    for state in LIVE:
        for where in ("prefill", "decode", "router"):
            if (where, state) not in (("prefill", State.DECODING), ("decode", State.PREFILLING)):
                assert f"kill -9 {where} {state.value}" in kinds
    for where in ("router", "front end"):
        assert f"SIGSTOP, SIGCONT {where}" in kinds
    assert main(["--list", "--only", "corrupt"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["--list", "--only", "meteorite"]) == 1
    assert "meteorite" in capsys.readouterr().err
    assert parse_options([]).rounds > 0
