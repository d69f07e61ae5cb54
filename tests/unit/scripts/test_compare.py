"""What scripts/compare takes for a side, and who goes after whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from scripts.compare import Target, order, read_target, read_targets
from scripts.rivalry.servers import RIVALS


def test_files_and_urls_and_rivals(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.touch()
    assert read_target(f"mine={path}") == Target("mine", path)
    assert read_target("vllm=http://127.0.0.1:9000/v1") == Target("vllm", url="http://127.0.0.1:9000/v1")
    assert read_target("vllm") == Target("vllm", rival=RIVALS["vllm"])
    assert read_target("theirs=vllm-default") == Target("theirs", rival=RIVALS["vllm-default"])


@pytest.mark.parametrize("text", ["configs/default.yaml", "=a.yaml", "=vllm", "mine=", "mine=nowhere.yaml", "vllm:none"])
def test_anything_else_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"NAME=TARGET|neither a deployment file nor a URL"):
        read_target(text)


def test_sides_are_two_or_more_and_differ() -> None:
    assert len(read_targets(["a=http://x", "b=http://x", "vllm"])) == 3
    with pytest.raises(ConfigError, match="must differ"):
        read_targets(["a=http://x", "a=http://y"])
    with pytest.raises(ConfigError, match="2 to 6 sides"):
        read_targets(["a=http://x"])


def test_each_side_begins_in_turn() -> None:
    sides = [Target("a"), Target("b"), Target("c")]
    orders = ["".join(side.name for side in order(sides, number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert [side.name for side in order(sides[:2], 1)] == ["b", "a"]
