"""What links and stores have to carry: KV bytes of a model, time of a handoff, hits that pay for a store.

All of it is arithmetic on figures that the caller gives; nothing is measured here. Times in seconds, rates in bytes/s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_backends.core.errors import ConfigError
from python_backends.core.layout import DTYPE_BYTES, KVLayout

GIB = 1 << 30
_GBIT_BYTES = 1e9 / 8

# Nominal rates, Gbit/s each way.
LINKS: Mapping[str, float] = {
    "1 GbE": 1,
    "10 GbE": 10,
    "25 GbE": 25,
    "100 GbE": 100,
    "InfiniBand HDR": 200,
    "InfiniBand NDR": 400,
    "PCIe 4.0 x16": 252,
    "NVLink 4": 3600,
}


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token leaves in the KV cache. `latent` is that of multi-head latent attention, per layer; else 0."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    latent: int = 0
    dtype: str = "bfloat16"

    def token_bytes(self, dtype: str) -> int:
        """Raises ConfigError for a dtype that is none."""
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"--kv-dtype: {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.latent:
            return self.layers * self.latent * DTYPE_BYTES[dtype]
        return KVLayout(self.layers, self.kv_heads, self.head_dim, 1, dtype).token_bytes


SHAPES = (
    KVShape("smollm2-135m", 30, 3, 64),
    KVShape("llama-3.2-1b", 16, 8, 64),
    KVShape("llama-3.2-3b", 28, 8, 128),
    KVShape("llama-3.1-8b", 32, 8, 128),
    KVShape("llama-3.1-70b", 80, 8, 128),
    KVShape("llama-3.1-405b", 126, 8, 128),
    KVShape("qwen3-8b", 36, 8, 128),
    KVShape("qwen3-32b", 64, 8, 128),
    KVShape("deepseek-v3", 61, 1, 576, latent=512 + 64),
)


def shape_of(model: str) -> KVShape:
    """A well-known shape by its name, or that of a `config.json` or of the model directory that has one. Raises ConfigError."""
    for shape in SHAPES:
        if shape.name == model.lower():
            return shape
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(shape.name for shape in SHAPES)
        raise ConfigError(f"{model!r} is no model directory, no config.json and no known shape ({known})")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a model's config.json: its top level is no object")
    return _read_shape(config, path)


def _read_shape(config: dict[str, Any], path: Path) -> KVShape:
    """By the names that Hugging Face's configurations have; those of a multimodal model are one level down.

    Layers that look back over a window only keep no more than that, so of models that have such it is an upper bound.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    name = path.parent.name or str(path)
    dtype = text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = dtype if dtype in DTYPE_BYTES else "bfloat16"
    layers = _count(text, "num_hidden_layers", path)
    if text.get("kv_lora_rank"):
        latent = _count(text, "kv_lora_rank", path) + _count(text, "qk_rope_head_dim", path)
        return KVShape(name, layers, 1, latent, latent, dtype)
    heads = _count(text, "num_attention_heads", path)
    kv_heads = heads if text.get("num_key_value_heads") is None else _count(text, "num_key_value_heads", path)
    if text.get("head_dim") is None:
        return KVShape(name, layers, kv_heads, _count(text, "hidden_size", path) // heads, dtype=dtype)
    return KVShape(name, layers, kv_heads, _count(text, "head_dim", path), dtype=dtype)


def _count(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}: {key} is {value!r}; a positive number is needed to know the shape of the KV cache")
    return value


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt, and how a prefill worker computes it."""

    prompt: int  # tokens
    chunk: int  # tokens computed at once, and sent while the next ones are computed
    prefill_rate: float  # tokens/s
    token_bytes: int

    @property
    def prefill_s(self) -> float:
        return self.prompt / self.prefill_rate

    @property
    def prompt_bytes(self) -> int:
        return self.prompt * self.token_bytes

    @property
    def break_even(self) -> float:
        """bytes/s below which moving KV takes longer than computing it."""
        return self.token_bytes * self.prefill_rate


@dataclass(frozen=True, slots=True)
class Handoff:
    """One prompt over one link. `whole`: sent after prefill; `overlapped`: each chunk while later ones are computed."""

    link: str
    bytes_s: float
    whole_s: float  # after the end of prefill
    overlapped_s: float
    whole_share: float  # of the time of prefill
    overlapped_share: float
    prompts_s: float  # prompts per second that fill the link


def handoff(work: Work, link: str, bytes_s: float) -> Handoff:
    """Chunks are a pipeline of two stages: what is left after prefill is the last chunk's transfer where the link keeps up,
    else all transfers less the time in which chunks were still computed.
    """
    whole = work.prompt_bytes / bytes_s
    chunks = math.ceil(work.prompt / work.chunk)
    compute, send = work.prefill_s / chunks, whole / chunks
    overlapped = send if send <= compute else whole - (chunks - 1) * compute
    return Handoff(link, bytes_s, whole, overlapped, whole / work.prefill_s, overlapped / work.prefill_s, 1 / whole)


@dataclass(frozen=True, slots=True)
class Store:
    """A shared store of KV, as one worker sees it. `hits`: that pay for storing a prompt; infinite when none ever do."""

    read_bytes_s: float
    write_bytes_s: float
    read_s: float  # of the prompt
    write_s: float
    saved_s: float  # by one hit: computing less reading
    hits: float
    tokens_per_gib: int


def store(work: Work, read_bytes_s: float, write_bytes_s: float) -> Store:
    """A prompt that is stored costs its write once and saves, with each hit, its computation less its read."""
    read, write = work.prompt_bytes / read_bytes_s, work.prompt_bytes / write_bytes_s
    saved = work.prefill_s - read
    hits = write / saved if saved > 0 else math.inf
    return Store(read_bytes_s, write_bytes_s, read, write, saved, hits, GIB // work.token_bytes)


def link_rate(gbit: float, reached: float) -> float:
    """bytes/s of a nominal rate of which a share is reached."""
    return gbit * _GBIT_BYTES * reached
