from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from python_backends.core.deployment_key import deployment_key, operator_secret
from python_backends.core.errors import ConfigError


def test_a_key_is_made_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    key = deployment_key("", tmp_path)
    assert len(key) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert deployment_key("", tmp_path) == key


def test_once_it_is_there_nothing_is_written(tmp_path: Path) -> None:
    """A worker is restarted while the disk is full."""
    key = deployment_key("", tmp_path)
    (tmp_path / f"key.{os.getpid()}").mkdir()  # in the way of any writing
    assert deployment_key("", tmp_path) == key
    with pytest.raises(ConfigError, match=r"key can't be written: .*missing/key: No such file or directory; make room"):
        deployment_key("", tmp_path / "missing")


def test_two_servers_have_two_keys(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    assert deployment_key("", tmp_path / "a") != deployment_key("", tmp_path / "b")


def test_a_given_key_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(b"g" * 40)
    assert deployment_key(str(tmp_path / "given"), tmp_path) == b"g" * 40
    assert not (tmp_path / "key").exists()


def test_a_short_or_missing_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"g" * 31)
    with pytest.raises(ConfigError, match=r"security.key_file: .*short holds 31 bytes; give at least 32 random ones"):
        deployment_key(str(tmp_path / "short"), tmp_path)
    with pytest.raises(ConfigError, match=r"security.key_file: .*nothing: No such file"):
        deployment_key(str(tmp_path / "nothing"), tmp_path)


def test_what_triton_is_told_does_not_give_the_key_away() -> None:
    secret = operator_secret(b"k" * 32)
    assert len(secret) == 64
    assert int(secret, 16)
    assert secret != operator_secret(b"l" * 32)
    assert b"k" * 32 not in secret.encode()
