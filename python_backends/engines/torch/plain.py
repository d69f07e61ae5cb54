"""The forward pass by PyTorch's own operators: for CUDA, 16-bit arithmetic, and processors without kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.batch import execution_order, prepare
from python_backends.engines.torch.model import Model
from python_backends.kv.memory import PoolMemory


class PlainExecutor:
    """See runner.Executor. On a CPU the pool memory is the KV cache; on a GPU it mirrors the device's."""

    def __init__(
        self, architecture: Architecture, tensors: dict[str, torch.Tensor], layout: KVLayout, device: torch.device
    ) -> None:
        self._windows = architecture.windows
        self._layout = layout
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._device = device
        self._model = Model(architecture, tensors)
        self._host_pool: torch.Tensor | None = None  # PoolMemory, [num_blocks, *layout.block_shape]
        self._pool: torch.Tensor | None = None  # where KV is computed: the host pool, or as large on the device

    def attach(self, memory: PoolMemory) -> None:
        shape = (memory.num_blocks, *self._layout.block_shape)
        self._host_pool = torch.from_numpy(memory.blocks).view(self._dtype).view(shape)
        if self._device.type == "cpu":
            self._pool = self._host_pool
        else:
            self._pool = torch.zeros(shape, dtype=self._dtype, device=self._device)

    @torch.inference_mode()
    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Logits of the tokens that draw, float32 [draws, vocab], in the order of the slices."""
        assert self._pool is not None, "attach() comes first"
        order = execution_order(slices)
        ordered = [slices[index] for index in order]
        logits = self._model.forward(prepare(ordered, self._windows, self._layout, self._dtype, self._device), self._pool)
        rows: dict[int, range] = {}
        for index in order:
            first = max((span.stop for span in rows.values()), default=0)
            rows[index] = range(first, first + (slices[index].drafts + 1 if slices[index].draw else 0))
        return logits[[row for index in range(len(slices)) for row in rows[index]]]

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """Copy these blocks from the device to the pool memory; they are there when this returns."""
        if self._pool is not None and self._host_pool is not None and self._pool is not self._host_pool:
            self._host_pool[list(blocks)] = self._pool[list(blocks)].cpu()

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """Copy these blocks from the pool memory to the device."""
        if self._pool is not None and self._host_pool is not None and self._pool is not self._host_pool:
            self._pool[list(blocks)] = self._host_pool[list(blocks)].to(self._device)

    def close(self) -> None:
        """Let go of the pool."""
        self._pool = self._host_pool = None
