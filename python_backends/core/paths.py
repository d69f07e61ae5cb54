"""Where things lie on disk: the repository, the cache, and the model directory that a deployment file names."""

from __future__ import annotations

import os
from pathlib import Path

from python_backends.core.errors import ConfigError

DEMO_MODEL = "smollm2-135m-instruct"


def repository_root() -> Path:
    """The checkout this file belongs to, symbolic links resolved."""
    return Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """$BATON_CACHE, else ~/.cache/baton. It need not exist."""
    return Path(os.environ.get("BATON_CACHE") or "~/.cache/baton").expanduser().absolute()


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
