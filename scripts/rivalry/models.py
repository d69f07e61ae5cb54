"""The models that rivals read, made once from a Hugging Face directory and kept under $BATON_CACHE/rivals/models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash
from gguf import GGMLQuantizationType

from python_backends.core.errors import Unavailable
from scripts.rivalry.environments import ENVIRONMENTS, rivals_dir
from scripts.rivalry.gguf_model import write_gguf

_LAST_WORDS = 1500  # characters
_MOST_TOKENS = 8192  # of a request; a longer context would only take memory


def most_tokens(model: Path) -> int:
    """Of a request to a rival that has to be told so at its start."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return min(_MOST_TOKENS, int(config.get("max_position_embeddings", _MOST_TOKENS)))


def gguf_of(model: Path, matrices: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    """The file that llama.cpp and OpenVINO read. matrices: see write_gguf. Raises ConfigError for other models than Llamas."""
    form = f"gguf-{matrices.name.lower()}"
    return _converted(model, form, lambda target: write_gguf(model, target / "model.gguf", matrices)) / "model.gguf"


def onnx_of(model: Path) -> Path:
    """The directory that ONNX Runtime GenAI reads, in float32. Raises Unavailable when its model builder fails."""

    def build(target: Path) -> None:
        command = [str(ENVIRONMENTS["onnxruntime"].program("python")), "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(model), "-o", str(target), "-p", "fp32", "-e", "cpu", "-c", str(target / "cache")]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"onnxruntime's model builder failed: {done.stderr.strip()[-_LAST_WORDS:]}")

    return _converted(model, "onnx", build)


def _converted(model: Path, form: str, convert: Callable[[Path], None]) -> Path:
    """The directory of `model` in another form; `convert` fills it when it is not there yet."""
    target = rivals_dir() / "models" / f"{model.name}-{_digest(model)}-{form}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            convert(fresh)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target


def _digest(model: Path) -> str:
    """Changes when one of the model's files does."""
    digest = xxhash.xxh3_64()
    for path in sorted(model.iterdir()):
        found = os.stat(path)
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return str(digest.hexdigest())
