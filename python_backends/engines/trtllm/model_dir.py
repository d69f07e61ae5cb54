"""What a model directory tells without loading it: the KV's shape, the end tokens, and a digest of all that makes KV.

The digest reads every weight file once, as TensorRT-LLM does right after; then the files are in the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from python_backends.core.errors import ConfigError
from python_backends.core.layout import KVLayout, fingerprint

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_QUANTISATION = "hf_quant_config.json"  # of which type weights and KV are
_CONFIGS = ("config.json", _QUANTISATION)
_READ_BYTES = 8 << 20

_T = TypeVar("_T")


class _Config(msgspec.Struct):
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    eos_token_id: int | list[int] | None = None


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _Quantised(msgspec.Struct):
    kv_cache_quant_algo: str | None = None


class _Quantisation(msgspec.Struct):
    quantization: _Quantised = msgspec.field(default_factory=_Quantised)


@dataclass(frozen=True, slots=True)
class ModelDir:
    """`layout.tp` is 1 whatever the workers' parallelism: TensorRT-LLM converts between sizes when it moves KV."""

    layout: KVLayout
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def read_model_dir(
    directory: Path, *, dtype: str, kv_dtype: str, block_size: int, max_context: int, library_version: str
) -> ModelDir:
    """`kv_dtype`: of kv_cache_config; auto is the checkpoint's own, which is `dtype` unless it says otherwise.

    Raises ConfigError naming the file and key that are missing or don't fit.
    """
    path = directory / "config.json"
    config = _decode(path, _Config)
    if config.max_position_embeddings is not None and max_context > config.max_position_embeddings:
        raise ConfigError(
            f"model.max_context is {max_context}, but {path} has max_position_embeddings "
            f"{config.max_position_embeddings}; lower it"
        )
    layout = KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        block_size=block_size,
        dtype=(_kv_dtype(directory) or dtype) if kv_dtype == "auto" else kv_dtype,
    )
    configs = "".join(_digest(directory / name) for name in _CONFIGS if (directory / name).exists())
    name = fingerprint(layout, f"TensorRT-LLM {library_version} {dtype} {configs}", weights_digest(directory))
    return ModelDir(layout, _eos_token_ids(directory, config), name)


def weights_digest(directory: Path) -> str:
    """Over names, sizes and bytes of all weight files. Raises ConfigError when there are none."""
    files = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    if not files:
        raise ConfigError(f"{directory}: has no weight files ({', '.join(_WEIGHTS)}); give a model directory with weights")
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0{_digest(path)}\0".encode())
    return digest.hexdigest()


def _kv_dtype(directory: Path) -> str | None:
    """What a quantised checkpoint says of the KV."""
    path = directory / _QUANTISATION
    algorithm = _decode(path, _Quantisation).quantization.kv_cache_quant_algo if path.exists() else None
    return "fp8" if algorithm == "FP8" else None


def _eos_token_ids(directory: Path, config: _Config) -> tuple[int, ...]:
    """generation_config.json wins, as in transformers."""
    path = directory / "generation_config.json"
    given = _decode(path, _Generation).eos_token_id if path.exists() else None
    given = config.eos_token_id if given is None else given
    return tuple(given) if isinstance(given, list) else () if given is None else (given,)


def _decode(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a Hugging Face model directory") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                yield part
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; fetch the model again") from error
