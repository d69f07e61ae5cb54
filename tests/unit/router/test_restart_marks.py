"""Which restarts a router that died has left undone."""

from __future__ import annotations

from pathlib import Path

from python_backends.core.types import Epoch, WorkerId
from router.seams import Destination
from router.triton.restart_marks import RestartMarks

OWN = Destination(WorkerId("decode_1"), "decode_1", "", Epoch(7))
ELSEWHERE = Destination(WorkerId("prefill@10.0.0.2:8001"), "prefill", "10.0.0.2:8001", Epoch(8))


def _left(directory: Path) -> list[tuple[str, str, str]]:
    """As a router that is new sees it."""
    return [(left.worker, left.model, left.server) for left in RestartMarks(directory).left()]


def test_a_restart_that_has_ended_leaves_nothing(tmp_path: Path) -> None:
    marks = RestartMarks(tmp_path)
    with marks.mark(OWN), marks.mark(ELSEWHERE):
        assert _left(tmp_path) == [("decode_1", "decode_1", ""), ("prefill@10.0.0.2:8001", "prefill", "10.0.0.2:8001")]
    assert _left(tmp_path) == []


def test_without_a_place_for_marks_it_is_restarted_all_the_same(tmp_path: Path) -> None:
    with RestartMarks(tmp_path / "missing").mark(OWN):
        pass
    assert _left(tmp_path / "missing") == []
