"""The one key of a deployment: given as a file, or made by whichever process of a server comes first. Whoever reads it may
do all. From it also comes the secret for Triton's own APIs that can do harm; that one does not give the key away.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from python_backends.core.errors import ConfigError

OPERATOR_HEADER = "baton-operator"
"""HTTP header that opens Triton's restricted APIs, with `operator_secret` as its value."""
OPERATOR_METADATA = f"triton-grpc-protocol-{OPERATOR_HEADER}"
"""The same for gRPC: Triton puts this prefix before it."""
_KEY_BYTES = 32


def deployment_key(key_file: str, run_dir: Path) -> bytes:
    """The content of `key_file`, or of `run_dir`/key when that is empty, which is made with mode 0600 if it isn't there.

    Raises ConfigError.
    """
    return _read(Path(key_file)) if key_file else _shared(run_dir / "key")


def operator_secret(key: bytes) -> str:
    """Derived one way: Triton takes it on its command line, which other users of the host may see."""
    return hmac.digest(key, b"baton-operator\0", hashlib.sha256).hex()


def _shared(path: Path) -> bytes:
    if not path.exists():  # processes of a server that runs need no room on its disk
        _make(path)
    return _read(path)


def _make(path: Path) -> None:
    """Whole, or not at all. Somebody else may have been first."""
    fresh = path.with_name(f"key.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    except OSError as error:
        raise ConfigError(
            f"the deployment's key can't be written: {path}: {error.strerror}; make room, or set TMPDIR"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.key_file: {path}: {error.strerror}") from error
    if len(key) < _KEY_BYTES:
        raise ConfigError(f"security.key_file: {path} holds {len(key)} bytes; give at least {_KEY_BYTES} random ones")
    return key
