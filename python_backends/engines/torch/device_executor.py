"""The forward pass on a device with a memory of its own: streams by prepared steps, prompts by PyTorch's own operators."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.decode import DecodeSteps, num_rows, row_sizes
from python_backends.engines.torch.device import Device
from python_backends.engines.torch.device_pool import DevicePool
from python_backends.engines.torch.model import Model
from python_backends.engines.torch.paged_attention import LEAST_BLOCK_SIZE
from python_backends.engines.torch.plain import PlainForward
from python_backends.kv.memory import PoolMemory

log = logging.getLogger(__name__)


class DeviceExecutor:
    """See runner.Executor. The device has the KV; the pool memory has what was exported, and what is to be imported."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: dict[str, torch.Tensor],
        layout: KVLayout,
        device: Device,
        most_rows: int,
        max_context: int,
    ) -> None:
        """most_rows: of prepared steps; 0: none are prepared. max_context: tokens."""
        self._architecture = architecture
        self._layout = layout
        self._device = device
        self._most_rows = most_rows
        self._max_context = max_context
        self._model = Model(architecture, tensors)
        self._forward = PlainForward(self._model, architecture, layout, device.torch_device)
        self._pool: DevicePool | None = None
        self._decode: DecodeSteps | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether streams are computed by prepared steps."""
        return self._decode is not None

    def attach(self, memory: PoolMemory) -> None:
        """Prepares steps, which takes long where kernels are to be compiled."""
        self._pool = DevicePool(memory, self._layout, self._device)
        memory.device = self._pool
        reason = self._why_unprepared()
        if reason is None:
            reason = self._prepare(self._pool, memory.num_blocks)
        if reason is not None:
            log.info("streams are computed by PyTorch's own operators: %s", reason)

    def _why_unprepared(self) -> str | None:
        block_size, head_dim = self._layout.block_size, self._layout.head_dim
        if min(block_size, head_dim) < LEAST_BLOCK_SIZE or block_size & (block_size - 1):
            return f"engine.block_size {block_size} must be a power of two, and like head_dim {head_dim} at least 16"
        return None if self._most_rows else "no steps are prepared"

    @torch.inference_mode()
    def _prepare(self, pool: DevicePool, num_blocks: int) -> str | None:
        """Returns why there are no prepared steps: they are faster, and nothing depends on them."""
        began = time.monotonic()
        width = min(self._layout.blocks_for(self._max_context), num_blocks)
        kinds = len(row_sizes(self._most_rows)) * len(set(self._architecture.windows))
        try:
            flex = self._device.flex(kinds)
            with self._device.computing():
                self._decode = DecodeSteps(
                    self._model, self._architecture, pool.tensor, self._device, flex, self._most_rows, width
                )
        except Exception as error:  # compilers and drivers raise what they like
            log.exception("preparing steps failed")
            return f"they can't be prepared: {error}"
        log.info("steps of up to %d tokens prepared in %.1f s", self._decode.most, time.monotonic() - began)
        return None

    @torch.inference_mode()
    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """See runner.Executor."""
        assert self._pool is not None, "attach() comes first"
        counts = [num_rows(piece) for piece in slices]
        total = sum(counts)
        if self._decode is None or not 0 < total <= self._decode.most:
            return self._forward.logits(slices, self._pool.tensor)
        streams = [piece for piece, count in zip(slices, counts, strict=True) if count]
        others = [piece for piece, count in zip(slices, counts, strict=True) if not count]
        drawn = self._decode.logits(streams)
        if not others:
            return drawn
        logits = torch.cat([drawn, self._forward.logits(others, self._pool.tensor)])
        return logits[_places(slices, counts)]

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """See ModelRunner."""
        if self._pool is not None:
            with self._device.computing():
                self._pool.to_host(blocks)

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """See ModelRunner."""
        if self._pool is not None:
            with self._device.computing():
                self._pool.to_device(blocks)

    def close(self) -> None:
        """Let go of pool and steps."""
        self._pool = self._decode = None


def _places(slices: Sequence[Slice], counts: Sequence[int]) -> list[int]:
    """Where the logits of each slice are, if those of `counts` rows lie first and then those of the others."""
    row, other = 0, sum(counts)
    places: list[int] = []
    for piece, count in zip(slices, counts, strict=True):
        if count:
            places += range(row, row + count)
            row += count
        elif piece.draw is not None:
            places += range(other, other + piece.drafts + 1)
            other += piece.drafts + 1
    return places
