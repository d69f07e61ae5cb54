"""Where things lie on disk: the repository, the cache, what runs, and the model directory that a deployment file names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from python_backends.core.errors import ConfigError

DEMO_MODEL = "smollm2-135m-instruct"


def repository_root() -> Path:
    """The checkout this file belongs to, symbolic links resolved."""
    return Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """$BATON_CACHE, else ~/.cache/baton. It need not exist."""
    return Path(os.environ.get("BATON_CACHE") or "~/.cache/baton").expanduser().absolute()


def run_base() -> Path:
    """This user's directory for what lives as long as a server: short, since paths of Unix sockets have 107 bytes only.

    Mode 0700, made if need be. Raises ConfigError when it belongs to somebody else.
    """
    base = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    if len(os.fsencode(base)) > 60:
        base = Path("/tmp") / base.name
    base.mkdir(mode=0o700, exist_ok=True)
    if base.is_symlink() or base.stat().st_uid != os.getuid():
        raise ConfigError(f"{base} belongs to another user; remove it or set TMPDIR to a directory of your own")
    return base


def demo_model_dir() -> Path:
    """Where `scripts/weights` puts the demo model. It need not exist."""
    return cache_dir() / "models" / DEMO_MODEL


def resolve_model(path: str) -> Path:
    """The directory that `model.path` means: the demo model's name, or a directory.

    A relative directory is looked up in the repository first, then in the working directory. Raises ConfigError.
    """
    if path == DEMO_MODEL:
        if not demo_model_dir().is_dir():
            raise ConfigError(f"model.path: the weights of {path} are not at {demo_model_dir()}; run scripts/weights")
        return demo_model_dir()
    given = Path(path).expanduser()
    for directory in (repository_root() / given, Path.cwd() / given):
        if directory.is_dir():
            return directory
    raise ConfigError(f"model.path: {path!r} is not a directory; give a Hugging Face model directory or {DEMO_MODEL}")
