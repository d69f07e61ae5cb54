"""Attention of single tokens over the paged pool without copying it, by PyTorch's FlexAttention.

FlexAttention, because it comes with the pinned torch, takes any dtype and blocks of 16 tokens, and its sparse block mask is
a block table: torch's varlen_attn wants pages of 256 tokens, FlashInfer and flash-attn are further packages for each CUDA.

The whole pool is one long row of vectors [head_dim], of which `block_size` after another are the keys, or the values, of
one block, layer and head. To FlexAttention each pair of a token and a KV head is one sequence, whose queries are the heads
that share it, and whose list of key blocks are the places of its blocks in the pool. Layers differ by where the row
begins, and so do keys and values; hence one list serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.attention.flex_attention import BlockMask

LEAST_BLOCK_SIZE = 16  # tokens; and the least head_dim: what FlexAttention's kernels for GPUs compute at once
_QUERIES_AT_ONCE = 128  # of the block mask; FlexAttention's own default


class Flex(Protocol):
    """torch.nn.attention.flex_attention.flex_attention, compiled: only then the mask's lists of blocks count."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: BlockMask
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of one step, each with its sequence's blocks.

    token_ids, positions: int64 [rows]. tables: int64 [rows, width], block numbers in prompt order; those behind the block
    of the row's own position are not looked at, but are numbers of blocks.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor


class PagedAttention:
    """Of rows. See model.Attention. All shapes follow from those of rows and pool, and nothing waits for the device."""

    def __init__(self, rows: Rows, windows: Iterable[int | None], pool: torch.Tensor, flex: Flex, group: int) -> None:
        """`pool` [blocks, *KVLayout.block_shape]; `windows` as in Architecture; `group`: query heads per KV head."""
        _, layers, _, self._kv_heads, block_size, _ = pool.shape
        self._pool = pool
        self._flex = flex
        self._stride = layers * 2 * self._kv_heads  # places per block
        self._slots = rows.positions % block_size
        self._blocks = rows.tables.gather(1, (rows.positions // block_size)[:, None])[:, 0]
        self._masks = {window: self._mask(rows, window, group) for window in set(windows)}

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, window: int | None
    ) -> torch.Tensor:
        """See Attention.attend."""
        rows, _, head_dim = queries.shape
        self._pool[:, layer, 0][self._blocks, :, self._slots] = keys
        self._pool[:, layer, 1][self._blocks, :, self._slots] = values
        first = layer * 2 * self._kv_heads
        output = self._flex(
            queries.view(rows * self._kv_heads, 1, -1, head_dim),
            self._vectors(first),
            self._vectors(first + self._kv_heads),
            block_mask=self._masks[window],
        )
        return output.reshape(rows, -1)

    def _vectors(self, first: int) -> torch.Tensor:
        """[1, 1, vectors, head_dim]: the pool from this place on. As many for every layer, so that one kernel serves all."""
        blocks, *_, block_size, head_dim = self._pool.shape
        count = self._num_places(blocks) * block_size
        return self._pool.view(-1, head_dim)[first * block_size : first * block_size + count][None, None]

    def _num_places(self, blocks: int) -> int:
        return (blocks - 1) * self._stride + self._kv_heads

    def _mask(self, rows: Rows, window: int | None, group: int) -> BlockMask:
        """What each pair of a row and a KV head sees: the places from the window's first to its own, in part."""
        blocks, *_, block_size, _ = self._pool.shape
        last = rows.positions // block_size
        oldest = torch.zeros_like(rows.positions) if window is None else (rows.positions - window + 1).clamp(min=0)
        first, tables = oldest // block_size, rows.tables
        if window is not None:
            width = tables.shape[1]
            order = torch.arange(width, device=tables.device) + first[:, None]
            tables = tables.gather(1, order.clamp(max=width - 1))
        heads = torch.arange(self._kv_heads, device=tables.device)[None, :, None]
        places = (tables[:, None, :] * self._stride + heads).flatten(0, 1).to(torch.int32)  # [pairs, width]
        own = self._of_pairs(last - first)
        newest = places.gather(1, own[:, None])[:, 0] * block_size + self._of_pairs(rows.positions % block_size)
        eldest = places[:, 0] * block_size + self._of_pairs(oldest % block_size)

        def sees(pair: torch.Tensor, _head: torch.Tensor, _query: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
            """All vectors of the listed places, but for those after the newest in its place, and before the eldest in its."""
            seen = (vector <= newest[pair]) | (vector // block_size != newest[pair] // block_size)
            if window is not None:
                seen = seen & ((vector >= eldest[pair]) | (vector // block_size != eldest[pair] // block_size))
            return seen

        return BlockMask.from_kv_blocks(
            (own + 1).to(torch.int32)[:, None, None],
            places[:, None, None, :],
            BLOCK_SIZE=(_QUERIES_AT_ONCE, block_size),
            mask_mod=sees,
            seq_lengths=(group, self._num_places(blocks) * block_size),
            compute_q_blocks=False,
        )

    def _of_pairs(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] -> [pairs]"""
        return of_rows[:, None].expand(-1, self._kv_heads).flatten()


def compiled_flex(kinds: int) -> Flex:
    """FlexAttention for so many shapes of rows, each compiled when it is first met."""
    from torch.nn.attention.flex_attention import flex_attention

    # Beyond its limit of recompilations torch would compute with all of the pool, and without saying so; with fullgraph it
    # raises instead.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, kinds)
    flex: Flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return flex
