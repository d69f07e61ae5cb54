"""Which Python the scripts run in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from python_backends.core.paths import repository_root

SCRIPTS = repository_root() / "scripts"


def _run(python: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BATON_PYTHON": python, "COLUMNS": "100"}
    return subprocess.run(
        [SCRIPTS / script, *arguments], env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", ["serve", "verify-gpu"])
def test_scripts_run_in_the_python_that_is_named(script: str) -> None:
    done = _run(sys.executable, script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: scripts/{script}")


def test_a_python_that_is_none_is_one_sentence() -> None:
    done = _run("/no/python", "serve")
    assert done.returncode == 1
    assert done.stderr == "error: BATON_PYTHON is /no/python, which is no program; set it to a Python, or unset it\n"


def test_a_python_without_packages_is_told_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = _run(str(bare), "serve")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {bare} lacks what Baton needs; run: {bare} -m pip install -r ")
