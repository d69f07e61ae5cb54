from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.tiny_model import write_tiny_llama
from tests.engines.trtllm.bench import Trtllm, trtllm
from tests.engines.trtllm.playing import RELEASES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=list(RELEASES))
def engines(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Iterator[Trtllm]:
    """Of each release."""
    with trtllm(request.param, tiny, tmp_path) as made:
        yield made


@pytest.fixture
def engines12(tiny: Path, tmp_path: Path) -> Iterator[Trtllm]:
    """Of 1.2, the release of the container."""
    with trtllm("1.2", tiny, tmp_path) as made:
        yield made


@pytest.fixture
def engines13(tiny: Path, tmp_path: Path) -> Iterator[Trtllm]:
    with trtllm("1.3", tiny, tmp_path) as made:
        yield made
