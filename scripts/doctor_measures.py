"""Measures what bounds an engine on this machine: reads from memory, matrix products, and how fast KV moves.

A second or so each. Best of a few, since whatever else runs can only slow it down.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import get_args, get_type_hints

import numpy as np
import psutil

from python_backends.core.config import TransferConfig
from python_backends.core.errors import BatonError, HandoffRefused
from python_backends.core.handoff import TICKET_VERSION, KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.types import Epoch, Role, WorkerId
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.base import block_digest

_READ_BYTES = 512 << 20  # more than any cache
_MATRIX = 1536
_SLOW_MATRIX = 512  # in bfloat16, which many processors only emulate
_REPEATS = 3
_LONG_S = 1.0
_LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32")  # SmolLM2-135M's
_BLOCKS = 64
_TRANSFER_TIMEOUT_S = 5.0


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: fewer where one takes long. The first one warms up."""
    times: list[float] = []
    while len(times) <= _REPEATS and sum(times) < _LONG_S:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return min(times)


def memory_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` read from memory."""
    import torch

    count = min(_READ_BYTES, psutil.virtual_memory().available // 8) // 4
    values = torch.ones(count)
    return count * 4 / _with_threads(threads, values.sum)


def matrix_rate(threads: int) -> float:
    """Operations per second of a product of square float32 matrices."""
    return _matrix_rate(threads, _MATRIX, "float32")


def bfloat16_rate(threads: int) -> float:
    """As matrix_rate, in bfloat16."""
    return _matrix_rate(threads, _SLOW_MATRIX, "bfloat16")


def _matrix_rate(threads: int, size: int, dtype: str) -> float:
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    return 2 * size**3 / _with_threads(threads, lambda: a @ a)


def _with_threads(threads: int, work: Callable[[], object]) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _best(work)
    finally:
        torch.set_num_threads(before)


def transports() -> tuple[str, ...]:
    """Names that `transfer.transport` takes, but for cuda_ipc, which is nothing within a process: scripts/verify-gpu has it."""
    names = get_args(get_args(get_type_hints(TransferConfig, include_extras=True)["transport"])[0])
    return tuple(name for name in names if name != "cuda_ipc")


def transfer_rate(name: str) -> tuple[float, str]:
    """(bytes per second from one pool of this process to another, digests checked, why it could not be measured)."""
    with ExitStack() as ends:
        return _transfer_rate(name, ends)


def _transfer_rate(name: str, ends: ExitStack) -> tuple[float, str]:
    try:
        source = PoolMemory(_BLOCKS, _LAYOUT.block_bytes, Epoch(1))
        ends.callback(source.close)
        target = PoolMemory(_BLOCKS, _LAYOUT.block_bytes, Epoch(2))
        ends.callback(target.close)
        key = secrets.token_bytes(32)
        sender = create_transport(TransferConfig(transport=name), key)  # type: ignore[arg-type]
        ends.callback(sender.close)
        receiver = create_transport(TransferConfig(transport=name), key)  # type: ignore[arg-type]
        ends.callback(receiver.close)
        sender.attach(source, Role.PREFILL)
        receiver.attach(target, Role.DECODE)
        source.blocks[:] = np.arange(source.blocks.shape[1], dtype=np.uint8)
        blocks = list(range(_BLOCKS))
        digests = [block_digest(source.blocks[block]) for block in blocks]

        def move() -> None:
            published = sender.publish(source, blocks, "doctor")
            handoff = KVHandoff(
                version=TICKET_VERSION,
                transport=name,
                source=WorkerId("doctor"),
                epoch=source.epoch,
                lease_id="doctor",
                expires_at=time.time() + _TRANSFER_TIMEOUT_S,
                layout=_LAYOUT,
                fingerprint="",
                num_tokens=_BLOCKS * _LAYOUT.block_size,
                blocks=blocks,
                generations=[int(generation) for generation in source.generations],
                digests=digests,
                locator=published.locator,
                opaque=published.opaque,
            )
            receiver.fetch(handoff, blocks, target, blocks, time.monotonic() + _TRANSFER_TIMEOUT_S)

        return _BLOCKS * _LAYOUT.block_bytes / _best(move), ""
    except (BatonError, HandoffRefused) as error:
        return 0.0, str(error)


def gpu_rates(index: int) -> tuple[float, float]:
    """(bytes per second read, operations per second of float16 products) of one GPU."""
    import torch

    device = torch.device("cuda", index)
    values = torch.ones(_READ_BYTES // 4, device=device)
    a = torch.ones(4 * _MATRIX, 4 * _MATRIX, device=device, dtype=torch.float16)

    def timed(work: Callable[[], object]) -> float:
        def whole() -> None:
            work()
            torch.cuda.synchronize(device)

        return _best(whole)

    return _READ_BYTES / timed(values.sum), 2 * (4 * _MATRIX) ** 3 / timed(lambda: a @ a)


def gpu_copy_rate(source: int, target: int) -> float:
    """Bytes per second from one GPU's memory to another's."""
    import torch

    values = torch.ones(_READ_BYTES // 4, device=torch.device("cuda", source))
    into = torch.empty_like(values, device=torch.device("cuda", target))

    def copy() -> None:
        into.copy_(values)
        torch.cuda.synchronize(target)

    return _READ_BYTES / _best(copy)
