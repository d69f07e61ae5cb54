"""A model's tensors, mapped from safetensors files so that the workers of a host share one copy in the page cache.

Files whose tensors have the wanted dtype are mapped as they are. Others are converted once, by whichever worker comes
first, into the cache directory; all workers then map the converted file.

    <cache>/prepared/<digest of the original file>-<dtype>.safetensors

kernels/packing.py keeps weights in the order of its kernels beside them, made in the same way.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from python_backends.core.errors import ConfigError
from python_backends.engines.torch.architecture import Architecture

_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LOCK_TIMEOUT_S = 600.0  # another worker converts one file meanwhile
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file, and the digest of all its bytes."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: frozenset[torch.dtype]
    digest: str


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, checked against its architecture but not yet read.

    names: of the tensors to load. digest: 32 hex digits over the bytes of all files.
    """

    shards: Sequence[Shard]
    names: frozenset[str]
    digest: str

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset().union(*(shard.dtypes for shard in self.shards))

    def read(self, name: str) -> torch.Tensor:
        """As stored, viewing the mapped file."""
        shard = next(shard for shard in self.shards if name in shard.shapes)
        with safe_open(shard.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def open_checkpoint(directory: Path, architecture: Architecture) -> Checkpoint:
    """Raises ConfigError naming the file or tensor that is missing, foreign, damaged or of the wrong shape."""
    shards = [_read_shard(path) for path in _shard_paths(directory)]
    names = _check_tensors(directory, shards, architecture)
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(shard.digest.encode())
    return Checkpoint(shards, frozenset(names), digest.hexdigest())


@dataclass(frozen=True)
class Weights:
    """tensors: by their names in the checkpoint, read-only. digest: as in Checkpoint."""

    tensors: Mapping[str, torch.Tensor]
    digest: str


def load_weights(directory: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device, cache: Path) -> Weights:
    """All tensors in one dtype: mapped (cpu) or copied to the device. Raises ConfigError as open_checkpoint does."""
    checkpoint = open_checkpoint(directory, architecture)
    return Weights(load_tensors(checkpoint, dtype, device, cache), checkpoint.digest)


def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, cache: Path) -> dict[str, torch.Tensor]:
    """By their names in the checkpoint, read-only: mapped (cpu) or copied to the device."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        path = shard.path if shard.dtypes <= {dtype} else _converted(shard, dtype, cache)
        tensors.update(_map(path, checkpoint.names & shard.shapes.keys(), device))
    return tensors


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model computes with."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, architecture.qkv_bias),
        "self_attn.k_proj": (keys, hidden, architecture.qkv_bias),
        "self_attn.v_proj": (keys, hidden, architecture.qkv_bias),
        "self_attn.o_proj": (hidden, queries, architecture.o_bias),
        "mlp.gate_proj": (ffn, hidden, architecture.mlp_bias),
        "mlp.up_proj": (ffn, hidden, architecture.mlp_bias),
        "mlp.down_proj": (hidden, ffn, architecture.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if architecture.qk_norm:
        norms |= {"self_attn.q_norm": architecture.head_dim, "self_attn.k_norm": architecture.head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (architecture.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.tied_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"{prefix}.{name}.weight": (rows, columns) for name, (rows, columns, _) in linears.items()}
        shapes |= {f"{prefix}.{name}.bias": (rows,) for name, (rows, _, bias) in linears.items() if bias}
    return shapes


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _shard_paths(directory: Path) -> list[Path]:
    """The one file, or those that the index names, sorted."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except FileNotFoundError:
        raise ConfigError(f"{directory}: has neither {single.name} nor {index.name}; convert the weights to them") from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(f"{index}: {error}") from error
    return [directory / name for name in sorted(set(weight_map.values()))]


def _read_shard(path: Path) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            dtypes = {name: header.get_dtype() for name, header in headers.items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: {error}; fetch the model again") from error
    for name, dtype in dtypes.items():
        if dtype not in _STORED_DTYPES:
            raise ConfigError(f"{path}: tensor {name} is {dtype}; supported are {', '.join(_STORED_DTYPES)}")
    return Shard(path, shapes, frozenset(_STORED_DTYPES[dtype] for dtype in dtypes.values()), _file_digest(path))


def _check_tensors(directory: Path, shards: Sequence[Shard], architecture: Architecture) -> set[str]:
    """The names to load. Raises ConfigError when the files don't hold exactly the architecture's tensors."""
    expected = expected_tensors(architecture)
    found = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{directory}: tensor {name} is missing; config.json asks for it")
        if found[name] != shape:
            raise ConfigError(f"{directory}: tensor {name} has shape {found[name]}; config.json asks for {shape}")
    for name in found.keys() - expected.keys():
        if not _is_redundant(name, architecture):
            raise ConfigError(f"{directory}: tensor {name} is not one of {architecture.name}; is config.json of this model?")
    return set(expected)


def _is_redundant(name: str, architecture: Architecture) -> bool:
    """Older checkpoints carry the rotary frequencies, and some the output matrix although it is tied."""
    return name.endswith(".rotary_emb.inv_freq") or (architecture.tied_embeddings and name == "lm_head.weight")


def _file_digest(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return str(digest.hexdigest())


def _map(path: Path, names: Set[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors that view the mapped file (cpu), or copies on the device."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).to(device) for name in names}
    except SafetensorError as error:
        raise ConfigError(f"{path}: {error}; delete the file, it is made again") from error


def prepared(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, made by `write` (to the path it is given) unless another start or worker has made it."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            if not path.exists():
                write(partial)
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
                partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: {error}; make room for converted weights, or set model.dtype to the stored one") from error
    return path


def _converted(shard: Shard, dtype: torch.dtype, cache: Path) -> Path:
    """The file in `dtype`."""

    def write(partial: Path) -> None:
        with safe_open(shard.path, framework="pt") as file:
            save_file({name: file.get_tensor(name).to(dtype, copy=True) for name in shard.shapes}, partial)

    return prepared(cache / "prepared" / f"{shard.digest}-{str(dtype).removeprefix('torch.')}.safetensors", write)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Held by one process of this host at a time, and let go by the kernel when it dies."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{path}: held by another worker for {_LOCK_TIMEOUT_S:.0f} s; is it stuck?") from None
                time.sleep(0.1)
        yield
