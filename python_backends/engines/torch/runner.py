"""A ModelRunner in PyTorch: Hugging Face checkpoints on CPU or one CUDA device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.layout import KVLayout, fingerprint
from python_backends.core.paths import cache_dir
from python_backends.engines.paged.runner import Sampled, Slice
from python_backends.engines.torch.architecture import Architecture, load_architecture
from python_backends.engines.torch.batch import execution_order, prepare
from python_backends.engines.torch.model import Model
from python_backends.engines.torch.sampler import Sampler
from python_backends.engines.torch.weights import load_weights
from python_backends.kv.memory import PoolMemory


class TorchRunner:
    """See ModelRunner for the contract. On a CPU the pool memory is the KV cache; on a GPU it mirrors the device's."""

    layout: KVLayout
    fingerprint: str
    max_positions: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    def __init__(self, model: ModelConfig, worker: WorkerConfig, block_size: int, model_path: Path) -> None:
        """`model_path` is the model directory; `model.path` is not looked at."""
        self._dtype_name = model.dtype
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._device = torch.device(worker.device)
        self._block_size = block_size
        self._model_path = model_path
        self._architecture: Architecture | None = None
        self._model: Model | None = None
        self._sampler: Sampler | None = None
        self._host_pool: torch.Tensor | None = None  # PoolMemory, [num_blocks, *layout.block_shape]
        self._pool: torch.Tensor | None = None  # where KV is computed: the host pool, or as large on the device

    def start(self) -> None:
        """Raises ConfigError naming file, key or tensor when the model directory can't be served."""
        architecture = load_architecture(self._model_path)
        weights = load_weights(self._model_path, architecture, self._dtype, self._device, cache_dir())
        self.layout = KVLayout(
            num_layers=architecture.num_layers,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            block_size=self._block_size,
            dtype=self._dtype_name,
        )
        config_digest = hashlib.blake2b(msgspec.json.encode(architecture), digest_size=16).hexdigest()
        self.fingerprint = fingerprint(self.layout, config_digest, weights.digest)
        self.max_positions = architecture.max_positions
        self.eos_token_ids = architecture.eos_token_ids
        self.vocab_size = architecture.vocab_size
        self._architecture = architecture
        self._model = Model(architecture, weights.tensors)
        self._sampler = Sampler(architecture.vocab_size)

    def tokenizer_path(self) -> Path:
        path = self._model_path / "tokenizer.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing; grammars need it")
        return path

    def attach(self, memory: PoolMemory) -> None:
        """Compute in this pool from now on; its blocks must be of `layout`."""
        shape = (memory.num_blocks, *self.layout.block_shape)
        self._host_pool = torch.from_numpy(memory.blocks).view(self._dtype).view(shape)
        if self._device.type == "cpu":
            self._pool = self._host_pool
        else:
            self._pool = torch.zeros(shape, dtype=self._dtype, device=self._device)

    @torch.inference_mode()
    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """See ModelRunner. `batch` has at least one slice, and each slice one token."""
        if self._architecture is None or self._model is None or self._sampler is None or self._pool is None:
            raise RuntimeError("step before start and attach, or after close")
        order = execution_order(batch)
        slices = [batch[index] for index in order]
        prepared = prepare(slices, self._architecture.windows, self.layout, self._dtype, self._device)
        logits = self._model.forward(prepared, self._pool)
        drawing = [(index, draw) for index in order if (draw := batch[index].draw) is not None]
        sampled: list[Sampled | None] = [None] * len(batch)
        if drawing:
            drawn = self._sampler.sample(logits, [draw for _, draw in drawing])
            for (index, _), token in zip(drawing, drawn, strict=True):
                sampled[index] = token
        return sampled

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """Copy these blocks from the device to the pool memory; they are there when this returns."""
        if self._pool is not None and self._host_pool is not None and self._pool is not self._host_pool:
            self._host_pool[list(blocks)] = self._pool[list(blocks)].cpu()

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """Copy these blocks from the pool memory to the device."""
        if self._pool is not None and self._host_pool is not None and self._pool is not self._host_pool:
            self._pool[list(blocks)] = self._host_pool[list(blocks)].to(self._device)

    def close(self) -> None:
        """Let go of weights and pool. Idempotent."""
        self._model = self._sampler = self._pool = self._host_pool = None
