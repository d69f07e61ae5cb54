"""A disk that is full to the last byte, in a process that has mounts of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from python_backends.core.errors import Unavailable
from python_backends.core.paths import repository_root
from scripts.injection.small_disks import SHM, SmallDisks

CHILD = """
    import sys
    from python_backends.core.errors import Unavailable
    from python_backends.core.paths import run_base
    from scripts.injection.small_disks import SHM, SmallDisks, enter_own_mounts

    enter_own_mounts("child", [])
    disks = SmallDisks()
    try:
        with disks.ready("fake"):
            for place in (SHM, run_base()):
                before = list(place.iterdir())
                with disks.full(place):
                    try:
                        (place / "more").write_bytes(b"x")
                    except OSError as error:
                        print(error.strerror)
                (place / "more").write_bytes(b"x")
                print(before)
    except Unavailable as missing:
        print("skipped", missing)
"""


def test_a_disk_is_full_and_then_it_is_not(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("child")
    (directory / "child.py").write_text(textwrap.dedent(CHILD))
    marker = SHM / f"baton_test_{directory.name}"
    marker.touch()
    try:
        command = [sys.executable, "-m", "child"]
        found = {**os.environ, "PYTHONPATH": f"{directory}:{repository_root()}"}
        ended = subprocess.run(command, env=found, capture_output=True, text=True, timeout=60, check=True)
        assert marker.exists()
        assert not (SHM / "more").exists()
    finally:
        marker.unlink()
    if ended.stdout.startswith("skipped"):
        pytest.skip(ended.stdout)
    assert ended.stdout.splitlines() == ["No space left on device", "[]"] * 2


def test_the_file_systems_of_others_are_never_filled() -> None:
    with pytest.raises(Unavailable, match="without mounts of one's own"), SmallDisks().ready("fake"):
        pass
