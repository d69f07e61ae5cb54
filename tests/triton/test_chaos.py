"""The short form of scripts/chaos: what it breaks on a real server costs no request, and it says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from scripts import chaos

pytestmark = pytest.mark.triton


def test_workers_of_each_kind_are_broken(tmp_path: Path, smollm2_dir: Path) -> None:
    found = tmp_path / "table.json"
    only = ("kill prefill prefilling", "SIGSTOP decode decoding", "slow decode decoding", "SIGCONT router decoding", "cancel")
    arguments = ["--rounds", "1", "--clients", "4", "--json", str(found)]
    assert chaos.main([*arguments, *(word for kind in only for word in ("--only", kind))]) == 0
    table = msgspec.json.decode(found.read_bytes())
    rows = {(row["what"], row["where"]): row for row in table["rows"]}
    assert len(rows) == 6  # SIGSTOP alone, and with SIGCONT
    for row in rows.values():
        assert row["ok"], row
        assert row["injected"] == 1
    assert all(rows[kind]["hit"] > 0 for kind in (("kill -9", "prefill"), ("SIGSTOP", "decode"), ("slow", "decode")))
