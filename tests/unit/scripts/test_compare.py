"""What scripts/compare takes for a side."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from scripts.compare import Target, read_target


def test_files_and_urls(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.touch()
    assert read_target(f"mine={path}") == Target("mine", path, "")
    assert read_target("vllm=http://127.0.0.1:9000/v1") == Target("vllm", None, "http://127.0.0.1:9000/v1")


@pytest.mark.parametrize("text", ["configs/default.yaml", "=a.yaml", "mine=", "mine=nowhere.yaml"])
def test_anything_else_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"NAME=TARGET|neither a deployment file nor a URL"):
        read_target(text)
