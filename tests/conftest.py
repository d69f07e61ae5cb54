"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.paths import resolve_model


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The converted demo weights; `scripts/test` makes them."""
    try:
        return resolve_model("smollm2-135m-instruct")
    except ConfigError as error:
        pytest.fail(f"{error}")
