"""What a server's processes leave for each other in its run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.types import Role
from python_backends.triton.home import Home
from tests.flow.house import deployment


def home(run_dir: Path) -> Home:
    """As any process of the server has it."""
    return Home(deployment(), run_dir, b"key")


def test_a_role_is_remembered_for_the_next_life(tmp_path: Path) -> None:
    assert home(tmp_path).role_of("decode_1") is None
    home(tmp_path).remember_role("decode_1", Role.PREFILL)
    assert home(tmp_path).role_of("decode_1") is Role.PREFILL
    assert home(tmp_path).role_of("decode") is None
    home(tmp_path).remember_role("decode_1", Role.DECODE)
    assert home(tmp_path).role_of("decode_1") is Role.DECODE


def test_what_can_not_be_written_leaves_the_role_before(tmp_path: Path) -> None:
    home(tmp_path).remember_role("decode_1", Role.PREFILL)
    (tmp_path / "role-decode_1.new").mkdir()  # root may write anywhere
    with pytest.raises(OSError, match="role-decode_1"):
        home(tmp_path).remember_role("decode_1", Role.AGGREGATED)
    assert home(tmp_path).role_of("decode_1") is Role.PREFILL


def test_where_no_mark_can_be_left_a_server_stops_all_the_same(tmp_path: Path) -> None:
    home(tmp_path / "missing").drained()
