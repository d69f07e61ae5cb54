"""A ModelRunner in PyTorch: Hugging Face checkpoints on CPU or one CUDA device.

On a CPU the forward pass is compiled (kernels/), or PyTorch's own where kernels can't run (plain.py); on CUDA, steps of
streams are replayed as graphs (device_executor.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.layout import KVLayout, fingerprint
from python_backends.core.paths import cache_dir
from python_backends.core.types import Role
from python_backends.engines.paged.runner import Sampled, Slice, accepted, draws_of
from python_backends.engines.torch.architecture import Architecture, load_architecture
from python_backends.engines.torch.cores import CoreBoard, own_cores
from python_backends.engines.torch.device import CudaDevice, Device
from python_backends.engines.torch.plain import PlainExecutor
from python_backends.engines.torch.sampler import Sampler
from python_backends.engines.torch.weights import Checkpoint, exclusive, load_tensors, open_checkpoint
from python_backends.kv.memory import PoolMemory

log = logging.getLogger(__name__)

_LANES = 16  # of the kernels' vectors (kernels/vector.py), which is imported only where they run


class Executor(Protocol):
    """A loaded model that computes slices."""

    def attach(self, memory: PoolMemory) -> None: ...

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Write the slices' KV. Logits of the tokens that draw, in the slices' order: float32 [draws, vocab]."""

    def export_blocks(self, blocks: Sequence[int]) -> None: ...

    def import_blocks(self, blocks: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class TorchRunner:
    """See ModelRunner for the contract."""

    layout: KVLayout
    fingerprint: str
    max_positions: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    def __init__(
        self,
        model: ModelConfig,
        worker: WorkerConfig,
        block_size: int,
        model_path: Path,
        kernels: str = "auto",
        board: CoreBoard | None = None,
        max_batch: int = 64,
        device: Device | None = None,
    ) -> None:
        """`model_path` is the model directory; `model.path` is not looked at. kernels: as in `engine.kernels`.

        board: the cores to compute with, the runner's from now on; None: torch's number of threads. max_batch: streams
        that a GPU's steps are prepared for. device: what has its own memory; None: what `worker.device` says.
        """
        self._config = model
        self._worker = worker
        self._device = torch.device(worker.device)
        self._block_size = block_size
        self._model_path = model_path
        self._kernels = kernels
        self._board = board or own_cores(torch.get_num_threads())
        self._max_batch = max_batch
        self._own_memory = device  # what computes, if it has a memory of its own
        self._executor: Executor | None = None
        self._lends = False  # and borrows cores
        self._sampler: Sampler | None = None
        self._compile_lock: Path | None = None
        self._attached = False

    def start(self) -> None:
        """Raises ConfigError naming file, key or tensor when the model directory can't be served."""
        architecture = load_architecture(self._model_path)
        checkpoint = open_checkpoint(self._model_path, architecture)
        reason = self._why_plain(architecture)
        if reason is None:
            weights = self._start_compiled(architecture, checkpoint)
        else:
            log.info("PyTorch's own operators compute: %s", reason)
            weights = self._start_plain(architecture, checkpoint, reason)
        config_digest = hashlib.blake2b(msgspec.json.encode(architecture), digest_size=16).hexdigest()
        self._digests = (config_digest, weights)
        self.fingerprint = self.fingerprint_of(self.layout)
        self.max_positions = architecture.max_positions
        self.eos_token_ids = architecture.eos_token_ids
        self.vocab_size = architecture.vocab_size

    def fingerprint_of(self, layout: KVLayout) -> str:
        """See ModelRunner; once it has started."""
        return fingerprint(layout, *self._digests)

    def _why_plain(self, architecture: Architecture) -> str | None:
        """Why kernels can't or shall not compute this model; None if they do."""
        if self._kernels == "torch":
            return "engine.kernels is torch"
        reason = None
        if self._own_memory is not None or self._device.type != "cpu":
            reason = f"device is {self._worker.device}"
        elif self._config.dtype != "float32":
            reason = f"model.dtype is {self._config.dtype}"
        elif architecture.head_dim % _LANES or self._block_size % _LANES:
            reason = f"head_dim {architecture.head_dim} and engine.block_size {self._block_size} must be multiples of {_LANES}"
        else:
            from python_backends.engines.torch.kernels.compiler import unsupported

            reason = unsupported()
        if reason is not None and self._kernels == "compiled":
            raise ConfigError(f"engine.kernels: compiled kernels can't run: {reason}; use auto")
        return reason

    def _start_compiled(self, architecture: Architecture, checkpoint: Checkpoint) -> str:
        """Load the compiled model; what its weights are to the fingerprint."""
        from python_backends.engines.torch.kernels.compiler import cache_place
        from python_backends.engines.torch.kernels.executor import CompiledExecutor
        from python_backends.engines.torch.kernels.sampler import CompiledSampler

        self._compile_lock = cache_place() / "compiling.lock"
        with self._compiling():
            self._sampler = CompiledSampler(architecture.vocab_size)
        stored = checkpoint.dtypes
        kept = str(next(iter(stored))).removeprefix("torch.") if len(stored) == 1 else "float32"
        precision: str = self._worker.weights or self._config.weights
        precision = kept if precision == "auto" else precision
        kv_dtype = "float32" if self._config.kv_dtype == "auto" else self._config.kv_dtype
        self.layout = self._layout_of(architecture, kv_dtype, keys="columns")
        self._lends = True
        self._executor = CompiledExecutor(checkpoint, architecture, self.layout, precision, self._board, cache_dir())
        exact = precision in ("float32", kept)
        return checkpoint.digest if exact or self._config.mixed_weights else f"{checkpoint.digest}/{precision}"

    def _start_plain(self, architecture: Architecture, checkpoint: Checkpoint, reason: str) -> str:
        for key, value in (("weights", self._worker.weights or self._config.weights), ("kv_dtype", self._config.kv_dtype)):
            if value not in ("auto", self._config.dtype):
                raise ConfigError(f"model.{key}: {value} needs compiled kernels, and {reason}; use auto")
        self.layout = self._layout_of(architecture, self._config.dtype, keys="rows")
        tensors = load_tensors(checkpoint, getattr(torch, self._config.dtype), self._device, cache_dir())
        self._sampler = Sampler(architecture.vocab_size)
        if self._device.type != "cpu" and self._own_memory is None:
            self._own_memory = CudaDevice(self._device, urgent=self._worker.role is not Role.PREFILL)
        if self._own_memory is None:
            self._executor = PlainExecutor(architecture, tensors, self.layout)
        else:
            from python_backends.engines.torch.device_executor import DeviceExecutor

            longest = min(self._config.max_context or architecture.max_positions, architecture.max_positions)
            # What a prefill worker computes is prompts: hardly a step of single tokens is worth preparing.
            rows = 0 if self._worker.role is Role.PREFILL else self._max_batch
            self._executor = DeviceExecutor(architecture, tensors, self.layout, self._own_memory, rows, longest)
        return checkpoint.digest

    def _layout_of(self, architecture: Architecture, dtype: str, keys: str) -> KVLayout:
        return KVLayout(
            num_layers=architecture.num_layers,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            block_size=self._block_size,
            dtype=dtype,
            keys=keys,
        )

    def tokenizer_path(self) -> Path:
        path = self._model_path / "tokenizer.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing; grammars need it")
        return path

    def attach(self, memory: PoolMemory) -> None:
        """Compute in this pool from now on; its blocks must be of `layout`."""
        with self._compiling():
            self._started().attach(memory)
        self._attached = True

    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """See ModelRunner. `batch` has at least one slice, and each slice one token."""
        if self._sampler is None or not self._attached:
            raise RuntimeError("step before start and attach, or after close")
        self._board.work(long_prompt=any(piece.draw is None for piece in batch))
        draws = [draw for piece in batch for draw in draws_of(piece)]
        with self._computing():
            logits = self._started().forward(batch)
            sampled = iter(self._sampler.sample(logits, draws) if draws else [])
        return [accepted(piece, [next(sampled) for _ in range(piece.drafts + 1)]) if piece.draw else None for piece in batch]

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._own_memory is None else self._own_memory.computing()

    @property
    def cores(self) -> str:
        """See ModelRunner. PyTorch's own operators keep to the threads that they began with."""
        return self._board.name if self._lends else ""

    def rest(self) -> None:
        """See ModelRunner."""
        self._board.rest()

    def are_cores_wanted(self) -> bool:
        """See ModelRunner."""
        return self._board.is_wanted

    def export_blocks(self, blocks: Sequence[int]) -> None:
        self._started().export_blocks(blocks)

    def import_blocks(self, blocks: Sequence[int]) -> None:
        self._started().import_blocks(blocks)

    def close(self) -> None:
        """Let go of weights and pool. Idempotent."""
        if self._executor is not None:
            self._executor.close()
        self._executor = self._sampler = None
        self._board.close()
        self._attached = False

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Of workers that start at once one compiles, and the others wait and find the machine code."""
        if self._compile_lock is None:
            yield
            return
        self._compile_lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self._compile_lock):
            yield

    def _started(self) -> Executor:
        if self._executor is None:
            raise RuntimeError("start() comes first")
        return self._executor
