"""The forward pass by PyTorch's own operators: of any slices, and the whole engine on processors without kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.attention import GatheredAttention
from python_backends.engines.torch.batch import execution_order, prepare
from python_backends.engines.torch.model import Model
from python_backends.kv.memory import PoolMemory


class PlainForward:
    """A model over the slices of a step, whatever their shapes."""

    def __init__(self, model: Model, architecture: Architecture, layout: KVLayout, device: torch.device) -> None:
        self._model = model
        self._windows = architecture.windows
        self._layout = layout
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._device = device

    def logits(self, slices: Sequence[Slice], pool: torch.Tensor) -> torch.Tensor:
        """Write the slices' KV to the pool [blocks, *layout.block_shape]. Logits of the tokens that draw, float32
        [draws, vocab], in the order of the slices."""
        order = execution_order(slices)
        batch = prepare([slices[index] for index in order], self._windows, self._layout, self._dtype, self._device)
        logits = self._model.forward(batch.token_ids, batch.positions, GatheredAttention(batch, pool), batch.last_tokens)
        rows: dict[int, range] = {}
        first = 0
        for index in order:
            count = slices[index].drafts + 1 if slices[index].draw else 0
            rows[index] = range(first, first + count)
            first += count
        return logits[[row for index in range(len(slices)) for row in rows[index]]]


class PlainExecutor:
    """See runner.Executor. The pool memory is the KV cache."""

    def __init__(self, architecture: Architecture, tensors: dict[str, torch.Tensor], layout: KVLayout) -> None:
        self._layout = layout
        self._forward = PlainForward(Model(architecture, tensors), architecture, layout, torch.device("cpu"))
        self._pool: torch.Tensor | None = None

    def attach(self, memory: PoolMemory) -> None:
        shape = (memory.num_blocks, *self._layout.block_shape)
        self._pool = torch.from_numpy(memory.blocks).view(getattr(torch, self._layout.dtype)).view(shape)

    @torch.inference_mode()
    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """See runner.Executor."""
        assert self._pool is not None, "attach() comes first"
        return self._forward.logits(slices, self._pool)

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """They are there already."""

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """They are there already."""

    def close(self) -> None:
        """Let go of the pool."""
        self._pool = None
