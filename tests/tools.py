"""Programs that some tests need and that pip does not bring."""

from __future__ import annotations

import os
import shutil

import pytest


def require_program(name: str, package: str) -> str:
    """Its path. Without it the test is skipped with the command that brings it; in CI it fails, for there it must run."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is missing; run: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
