"""What the PyTorch engine must do on a GPU, asked of it without a server: for scripts/verify-gpu.

graphs     steps replayed as graphs draw what PyTorch's own operators draw
decode     tokens per second by streams, and the bytes they read, beside what the GPU copies
prefill    tokens per second of a long prompt, and its operations, beside a plain product of matrices
handoff    another process's KV arrives as it was, by CUDA IPC
"""

from __future__ import annotations

import multiprocessing
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import torch

from python_backends.core.config import Deployment
from python_backends.core.errors import ConfigError
from python_backends.core.handoff import TICKET_VERSION, KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.paths import cache_dir, resolve_model
from python_backends.core.types import Epoch, SamplingParams, WorkerId
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.architecture import load_architecture
from python_backends.engines.torch.device import CudaDevice, Device
from python_backends.engines.torch.device_executor import DeviceExecutor
from python_backends.engines.torch.device_pool import DevicePool
from python_backends.engines.torch.weights import load_tensors, open_checkpoint
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.cuda_ipc import CudaIpcTransport
from scripts.verification import Failed, Result, run_checks

_STEPS = 32  # of each stream whose tokens are compared
_TIMED_STEPS = 20
_CLOSE = 0.05  # of the largest logit: what 16-bit rounding in another order may change
_TRANSFER_S = 30.0

MakeDevice = Callable[[], Device]


@dataclass(frozen=True, slots=True)
class Sizes:
    """streams: batches that are timed, at `context` tokens each. prompt: tokens. handoff_mib: of KV."""

    streams: Sequence[int] = (1, 8, 64)
    context: int = 1024
    prompt: int = 2048
    handoff_mib: int = 512


class TorchVerification:
    """Checks of one deployment's model on one GPU. Each returns what it saw or raises Failed."""

    def __init__(self, deployment: Deployment, make_device: MakeDevice, sizes: Sizes = Sizes()) -> None:
        self._model = deployment.model
        self._path = resolve_model(deployment.model.path)
        self._block_size = deployment.engine.block_size
        self._make_device = make_device
        self._sizes = sizes

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        return [("graphs", self.graphs), ("decode", self.decode), ("prefill", self.prefill), ("handoff", self.handoff)]

    def graphs(self) -> str:
        """The same streams by both, each fed what the plain operators draw, so that rounding does not part them."""
        lengths = [length for length in (5, 16, 100, 300) if length + _STEPS < self._sizes.context]
        count = len(lengths)
        with self._streams(count, prepared=False) as plain, self._streams(count, prepared=True) as prepared:
            worst, same = 0.0, 0
            tokens = [random.Random(length).choices(range(plain.vocab_size), k=length) for length in lengths]
            for each in (plain, prepared):
                each.logits([each.prompt(index, text[:-1]) for index, text in enumerate(tokens)])
            for _ in range(_STEPS):
                expected, got = (
                    each.logits([each.stream(index, text) for index, text in enumerate(tokens)]) for each in (plain, prepared)
                )
                worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
                same += int((got.argmax(-1) == expected.argmax(-1)).sum())
                for text, token in zip(tokens, expected.argmax(-1).tolist(), strict=True):
                    text.append(token)
        seen = f"{same} of {_STEPS * count} tokens the same, logits at most {worst:.2%} apart"
        if worst > _CLOSE:
            raise Failed(seen)
        return seen

    def decode(self) -> str:
        limit = _copied_per_s(self._make_device().torch_device)
        told = []
        with self._streams(max(self._sizes.streams), prepared=True) as made:
            for streams in self._sizes.streams:
                text = [1] * self._sizes.context
                seconds = made.seconds([made.stream(index, text) for index in range(streams)])
                read = made.weight_bytes + streams * len(text) * made.layout.token_bytes
                share = read / seconds / limit
                told.append(
                    f"{streams} streams {streams / seconds:,.0f} tokens/s, {read / seconds / 1e9:,.0f} GB/s ({share:.0%})"
                )
        return f"{'; '.join(told)}; the GPU reads {limit / 1e9:,.0f} GB/s when it copies"

    def prefill(self) -> str:
        limit = _products_per_s(self._make_device().torch_device, getattr(torch, self._model.dtype))
        with self._streams(1, prepared=False) as made:
            seconds = made.seconds([made.prompt(0, [1] * self._sizes.prompt, draw=True)])
            rate = self._sizes.prompt / seconds
            operations = 2 * made.num_weights * rate
        share = operations / limit
        return f"{rate:,.0f} tokens/s, {operations / 1e12:,.1f} TFLOP/s ({share:.0%} of a product of matrices)"

    def handoff(self) -> str:
        with self._streams(1, prepared=False) as made:
            layout = made.layout
        num_blocks = max(2, (self._sizes.handoff_mib << 20) // layout.block_bytes)
        memory = PoolMemory(num_blocks, layout.block_bytes, Epoch(2))
        pool = memory.device = DevicePool(memory, layout, self._make_device())
        transport = CudaIpcTransport()
        try:
            with _owner(num_blocks, layout, self._make_device) as ticket:
                seconds = []
                for _ in range(3):  # the first one opens the source's memory
                    began = time.monotonic()
                    blocks = list(range(num_blocks))
                    transport.fetch(ticket, blocks, memory, blocks[::-1], began + _TRANSFER_S)
                    seconds.append(time.monotonic() - began)
            pool.to_host(range(num_blocks))
            if not np.array_equal(memory.blocks[::-1], _content(num_blocks, layout)):
                raise Failed("digests were equal, but other bytes arrived")
        finally:
            transport.close()
            memory.close()
        size = num_blocks * layout.block_bytes / 2**30
        return f"{size * 1024:,.0f} MiB in {min(seconds) * 1e3:.1f} ms ({size / min(seconds):.1f} GiB/s), digests checked"

    @contextmanager
    def _streams(self, streams: int, *, prepared: bool) -> Iterator[_Streams]:
        longest = max(self._sizes.context, self._sizes.prompt) + _STEPS
        made = _Streams(self._path, self._model.dtype, self._block_size, self._make_device(), streams, longest, prepared)
        try:
            yield made
        finally:
            made.close()


class _Streams:
    """The model with room for so many sequences of at most `longest` tokens, each in blocks of its own."""

    def __init__(
        self, path: Path, dtype: str, block_size: int, device: Device, streams: int, longest: int, prepared: bool
    ) -> None:
        architecture = load_architecture(path)
        tensors = load_tensors(open_checkpoint(path, architecture), getattr(torch, dtype), device.torch_device, cache_dir())
        self.num_weights = sum(tensor.numel() for tensor in tensors.values())
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.vocab_size = architecture.vocab_size
        self.layout = KVLayout(
            num_layers=architecture.num_layers,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        each = self.layout.blocks_for(longest)
        self._tables = [list(range(index * each, (index + 1) * each)) for index in range(streams)]
        self._memory = PoolMemory(streams * each, self.layout.block_bytes, Epoch(1))
        self._device = device
        self._executor = DeviceExecutor(architecture, tensors, self.layout, device, streams if prepared else 0, longest)
        self._executor.attach(self._memory)
        if prepared and not self._executor.is_prepared:
            raise Failed("no steps were prepared: see the log")

    def prompt(self, index: int, tokens: Sequence[int], *, draw: bool = False) -> Slice:
        return Slice(tokens, 0, self._tables[index], _greedy() if draw else None)

    def stream(self, index: int, tokens: Sequence[int]) -> Slice:
        """The last of the tokens."""
        return Slice(tokens[-1:], len(tokens) - 1, self._tables[index], _greedy())

    def logits(self, slices: Sequence[Slice]) -> torch.Tensor:
        """On the host, float32 [draws, vocab]."""
        with self._device.computing():
            return self._executor.forward(slices).to("cpu", copy=True)

    def seconds(self, slices: Sequence[Slice]) -> float:
        """Of a step with a greedy draw; the best of several, after some to warm up."""
        times = []
        for _ in range(_TIMED_STEPS):
            began = time.monotonic()
            with self._device.computing():
                self._executor.forward(slices).argmax(-1).tolist()
            times.append(time.monotonic() - began)
        return min(times[2:])

    def close(self) -> None:
        self._executor.close()
        self._memory.close()


def _greedy() -> Draw:
    return Draw(SamplingParams(temperature=0, seed=0), [1], [], [])


@contextmanager
def _owner(num_blocks: int, layout: KVLayout, make_device: MakeDevice) -> Iterator[KVHandoff]:
    """A process with KV on its GPU, and its ticket for all of it."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(theirs, num_blocks, layout, make_device), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(120):
            raise Failed("the other process did not start in 120 s")
        yield msgspec.msgpack.decode(ours.recv_bytes(), type=KVHandoff)
    except EOFError:
        raise Failed("the other process has ended: see its output") from None
    finally:
        ours.close()
        process.join(30)


def _own(line: Connection, num_blocks: int, layout: KVLayout, make_device: MakeDevice) -> None:
    """In the other process, until the line is closed."""
    memory = PoolMemory(num_blocks, layout.block_bytes, Epoch(1))
    pool = memory.device = DevicePool(memory, layout, make_device())
    memory.blocks[:] = _content(num_blocks, layout)
    blocks = list(range(num_blocks))
    pool.to_device(blocks)
    transport = CudaIpcTransport()
    published = transport.publish(memory, blocks, "lease")
    ticket = KVHandoff(
        version=TICKET_VERSION,
        transport=transport.name,
        source=WorkerId("other"),
        epoch=memory.epoch,
        lease_id=secrets.token_hex(8),
        expires_at=time.time() + 600,
        layout=layout,
        fingerprint="",
        num_tokens=num_blocks * layout.block_size,
        blocks=blocks,
        generations=[0] * num_blocks,
        digests=transport.digests(memory, blocks),
        locator=published.locator,
        opaque=published.opaque,
    )
    line.send_bytes(msgspec.msgpack.encode(ticket))
    line.poll(None)


def _content(num_blocks: int, layout: KVLayout) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(7).integers(0, 256, (num_blocks, layout.block_bytes), np.uint8)


def _copied_per_s(device: torch.device, num_bytes: int = 1 << 28) -> float:
    """Bytes read while a copy is made of them, which writes as many."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best(lambda: target.copy_(source), device)


def _products_per_s(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Operations of a product of square matrices."""
    size = size if device.type == "cuda" else size // 8
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return float(2 * size**3 / _best(lambda: matrix @ matrix, device))


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(5):
        began = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - began)
    return min(times)


def verify_on_gpu(deployment: Deployment, told: Callable[[Result], None]) -> list[Result]:
    """On the first GPU of the deployment's workers. Raises ConfigError where there is none."""
    devices = sorted({worker.device for worker in deployment.workers})
    gpus = [device for device in devices if device != "cpu"]
    if not gpus or not torch.cuda.is_available():
        raise ConfigError(f"workers are on {', '.join(devices)}, and torch sees {torch.cuda.device_count()} GPUs here")
    return verify_torch(deployment, partial(CudaDevice, torch.device(gpus[0]), urgent=True), told)


def verify_torch(
    deployment: Deployment,
    make_device: MakeDevice,
    told: Callable[[Result], None],
    sizes: Sizes = Sizes(),
) -> list[Result]:
    """Run all checks, as run_checks says."""
    return run_checks(TorchVerification(deployment, make_device, sizes).checks(), told)
