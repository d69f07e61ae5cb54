"""A few thousand inputs for each reader; and readers with a hole, which is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from python_backends.core import handoff, orders
from scripts import fuzz


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_nothing_breaks_a_reader_and_nothing_unsigned_gets_in(reader: str) -> None:
    result = fuzz.feed(reader, seed=1, inputs=5_000)
    assert result.faults == []
    assert (result.broken, result.inputs) == (0, 5_000)
    assert result.refused > 2_500


def test_a_reader_that_checks_no_signature_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "verify", lambda domain, signed, key: signed[:-32])
    monkeypatch.setattr(orders, "verify", lambda domain, signed, key: signed[:-32])
    assert any("nobody signed" in fault for fault in fuzz.feed("tickets", 1, 2_000).faults)
    assert any("nobody signed" in fault for fault in fuzz.feed("orders", 1, 2_000).faults)


def test_a_reader_that_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "UNREADABLE", ())
    result = fuzz.feed("tickets", 1, 2_000)
    assert result.broken
    assert "input " in result.faults[0]


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert fuzz.main(["events", "--inputs", "6000", "--processes", "2", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())
    assert (result["reader"], result["inputs"], result["broken"]) == ("events", 6_000, 0)
    assert result["refused"] + result["accepted"] == 6_000
    assert "events" in capsys.readouterr().out


def test_a_reader_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["ticket"])
    assert "no reader ticket" in capsys.readouterr().err
