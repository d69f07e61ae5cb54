from __future__ import annotations

from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.paths import DEMO_MODEL, cache_dir, repository_root, resolve_model


def test_repository_root_holds_this_file() -> None:
    assert Path(__file__).resolve().is_relative_to(repository_root())


def test_cache_dir_is_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("BATON_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "baton"


def test_demo_model_is_its_directory_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="run scripts/weights"):
        resolve_model(DEMO_MODEL)
    (tmp_path / "models" / DEMO_MODEL).mkdir(parents=True)
    assert resolve_model(DEMO_MODEL) == tmp_path / "models" / DEMO_MODEL


def test_directories_are_looked_up_in_the_repository_then_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(tmp_path / "my-model")) == tmp_path / "my-model"
    assert resolve_model("my-model") == tmp_path / "my-model"
    assert resolve_model("configs") == repository_root() / "configs"


def test_missing_directory_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: '/no/such/model'"):
        resolve_model("/no/such/model")
