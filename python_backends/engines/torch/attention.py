"""Attention over the paged KV pool, gathering what each sequence sees. paged_attention.py does without the copy.

The pool is one tensor [num_blocks, layers, 2 (K, V), kv_heads, block_size, head_dim]; sequences own blocks of it in any
order. A layer first writes the keys and values of all new tokens to their slots, then gathers each sequence's blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from python_backends.engines.torch.batch import AttentionGroup, Batch


def clear_blocks(pool: torch.Tensor, blocks: torch.Tensor) -> None:
    """Zero blocks that are begun in this step, int64 [count], in all layers.

    Attention reads whole blocks and masks what is not yet written; a NaN there, left over from damaged KV that was once
    received into the block, would get through the mask (0 * NaN is NaN).
    """
    pool.index_fill_(0, blocks, 0)


class GatheredAttention:
    """Of any batch, by PyTorch's own operators. See model.Attention."""

    def __init__(self, batch: Batch, pool: torch.Tensor) -> None:
        clear_blocks(pool, batch.new_blocks)
        self._batch = batch
        self._pool = pool

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, window: int | None
    ) -> torch.Tensor:
        """See Attention.attend."""
        batch, pool = self._batch, self._pool
        pool[:, layer, 0][batch.blocks, :, batch.slots] = keys
        pool[:, layer, 1][batch.blocks, :, batch.slots] = values
        outputs = [_attend_group(queries[group.begin : group.end], pool, layer, group) for group in batch.groups[window]]
        return torch.cat(outputs).flatten(1)


def _attend_group(queries: torch.Tensor, pool: torch.Tensor, layer: int, group: AttentionGroup) -> torch.Tensor:
    """[tokens of the group, heads, head_dim], as `queries`."""
    tokens, heads, head_dim = queries.shape
    kv_heads = pool.shape[3]
    rows = group.rows + layer * 2 * kv_heads
    torch.index_select(pool.view(-1, group.gathered.shape[1]), 0, rows, out=group.gathered)
    keys, values = group.gathered.view(2, group.num_sequences, kv_heads, -1, head_dim)
    output = F.scaled_dot_product_attention(
        queries.view(group.num_sequences, -1, heads, head_dim).transpose(1, 2),
        keys,
        values,
        attn_mask=group.mask,
        enable_gqa=heads != kv_heads,
    )
    return output.transpose(1, 2).reshape(tokens, heads, head_dim)
