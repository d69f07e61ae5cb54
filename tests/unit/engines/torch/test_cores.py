"""The board of cores: who may compute with how many threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from python_backends.core.config import WorkerConfig
from python_backends.core.types import Role
from python_backends.engines.torch.cores import CoreBoard, own_cores, shared_cores
from python_backends.engines.torch.engine import _sharing
from python_backends.engines.torch.kernels.lending import Cores, cores_now

KEY = b"k" * 32
NAMES = ("prefill", "prefill_1", "decode", "decode_1")


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[list[CoreBoard]]:
    boards = [shared_cores(NAMES, name, 2, KEY, tmp_path) for name in NAMES]
    yield boards
    for board in boards:
        board.close()


def _now(board: CoreBoard) -> int:
    return int(cores_now(Cores(board.rows.ctypes.data, len(board.rows), board.row)))


def test_a_worker_alone_has_its_own() -> None:
    board = own_cores(3)
    board.work()
    assert _now(board) == board.most == 3


def test_they_have_a_name_that_nobody_else_has(boards: list[CoreBoard], tmp_path: Path) -> None:
    stranger = shared_cores(NAMES, "prefill", 2, b"x" * 32, tmp_path)
    stranger.close()
    assert len({board.name for board in boards}) == 1
    assert boards[0].name not in ("", stranger.name)
    assert own_cores(2).name == ""


def test_who_rests_lends_and_has_it_back_at_once(boards: list[CoreBoard]) -> None:
    prefill, _, decode, _ = boards
    prefill.work()
    assert _now(prefill) == prefill.most == 8
    decode.work()
    assert (_now(prefill), _now(decode)) == (4, 4)
    for board in boards:
        board.work()
    assert [_now(board) for board in boards] == [2, 2, 2, 2]
    prefill.rest()
    decode.rest()
    assert [_now(boards[1]), _now(boards[3])] == [4, 4]


def test_cores_are_wanted_by_those_who_compute_long_prompts(boards: list[CoreBoard]) -> None:
    prefill, _, decode, other = boards
    decode.work()
    other.work()
    assert not any(board.is_wanted for board in boards)
    prefill.work(long_prompt=True)
    assert (decode.is_wanted, other.is_wanted, prefill.is_wanted) == (True, True, False)
    prefill.work()
    assert not decode.is_wanted
    prefill.work(long_prompt=True)
    prefill.rest()
    assert not decode.is_wanted


def test_what_can_not_be_divided_goes_to_the_first(boards: list[CoreBoard]) -> None:
    for board in boards[:3]:
        board.work()
    assert [_now(board) for board in boards[:3]] == [3, 3, 2]


def test_workers_that_are_not_up_lend_nothing_yet(tmp_path: Path) -> None:
    first = shared_cores(NAMES[:2], "prefill", 2, KEY, tmp_path)
    first.work()
    assert (_now(first), first.most) == (2, 4)
    second = shared_cores(NAMES[:2], "prefill_1", 2, KEY, tmp_path)
    assert _now(first) == 4
    first.close()
    second.close()


def test_a_worker_that_died_at_work_lends_again_once_it_is_back(boards: list[CoreBoard], tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom python_backends.engines.torch.cores import shared_cores\n"
        f"shared_cores({NAMES!r}, 'decode', 2, {KEY!r}, Path(sys.argv[1])).work()\nos._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    prefill = boards[0]
    prefill.work()
    assert _now(prefill) == 4
    shared_cores(NAMES, "decode", 2, KEY, tmp_path).close()
    assert _now(prefill) == 8


def test_nothing_is_left_and_strangers_share_nothing(tmp_path: Path) -> None:
    ours = shared_cores(NAMES, "prefill", 2, KEY, tmp_path)
    theirs = shared_cores(NAMES, "decode", 2, b"t" * 32, tmp_path)
    ours.work()
    assert _now(ours) == 2
    ours.close()
    ours.close()
    theirs.close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_in_another_role_stays_where_the_others_expect_it() -> None:
    workers = [WorkerConfig(Role(name), name) for name in ("prefill", "decode", "aggregated")]
    changed = msgspec.structs.replace(workers[1], role=Role.AGGREGATED)
    assert [other.name for other in _sharing(changed, workers)] == ["prefill", "decode"]
    changed = msgspec.structs.replace(workers[2], role=Role.DECODE)
    assert [other.name for other in _sharing(changed, workers)] == ["aggregated"]
