"""One step's slices as index tensors: all that is the same in every layer, computed once.

Tokens of all slices lie flat, one after the other, in the order of `execution_order`: first the slices of one token
(decoding sequences), by length of their context, then prompt chunks. So what attention computes together is a range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.paged.runner import Slice

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences with equally many new tokens, whose attention is computed in one call; the longest context sets the width.

    begin, end: range of their flat tokens.
    num_sequences: B. Each has (end - begin) / B new tokens, in order.
    rows: int64 [2 (K, V) * B * kv_heads * blocks]: where layer 0 of their blocks lies in the pool, seen as rows of
        [block_size * head_dim]; layer n lies 2 * kv_heads * n rows behind.
    mask: [B, 1, new tokens, blocks * block_size], 0 where a token sees a key and -inf where not.
    gathered: [len(rows), block_size * head_dim], scratch that each layer overwrites with its keys and values.
    """

    begin: int
    end: int
    num_sequences: int
    rows: torch.Tensor
    mask: torch.Tensor
    gathered: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, positions, blocks, slots: int64 [tokens]; `slots` is the token's place in its block.

    new_blocks: int64, blocks whose first slot is written in this step.
    last_tokens: int64, flat indices of the tokens that draw: the last of each slice with a draw, drafts included.
    groups: by attention window (None: unlimited), for each window that the model has.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    new_blocks: torch.Tensor
    last_tokens: torch.Tensor
    groups: Mapping[int | None, Sequence[AttentionGroup]]


def execution_order(slices: Sequence[Slice]) -> list[int]:
    """Indices of `slices` in the order in which their tokens are laid out."""
    return sorted(range(len(slices)), key=lambda i: (len(slices[i].token_ids) > 1, slices[i].start))


def prepare(
    slices: Sequence[Slice], windows: Sequence[int | None], layout: KVLayout, dtype: torch.dtype, device: torch.device
) -> Batch:
    """`slices` in execution order; `windows` as in Architecture."""
    lengths = [len(piece.token_ids) for piece in slices]
    positions = np.concatenate([_span(piece) for piece in slices])
    blocks = np.concatenate([_table(piece)[_span(piece) // layout.block_size] for piece in slices])
    slots = positions % layout.block_size
    ends = np.cumsum(lengths)
    drawing = [np.arange(end - piece.drafts - 1, end) for piece, end in zip(slices, ends, strict=True) if piece.draw]

    def on_device(array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=on_device(np.concatenate([np.asarray(piece.token_ids, np.int64) for piece in slices])),
        positions=on_device(positions),
        blocks=on_device(blocks),
        slots=on_device(slots),
        new_blocks=on_device(blocks[slots == 0]),
        last_tokens=on_device(np.concatenate([np.empty(0, np.int64), *drawing])),
        groups={window: _attention_groups(slices, window, layout, dtype, device) for window in set(windows)},
    )


def _span(piece: Slice) -> Ints:
    """Positions of the slice's tokens."""
    return np.arange(piece.start, piece.start + len(piece.token_ids), dtype=np.int64)


def _table(piece: Slice) -> Ints:
    return np.asarray(piece.block_table, np.int64)


def _attention_groups(
    slices: Sequence[Slice], window: int | None, layout: KVLayout, dtype: torch.dtype, device: torch.device
) -> list[AttentionGroup]:
    """Decoding sequences go together while no one is padded to more than twice its context; a prompt chunk goes alone."""

    def magnitude(piece: Slice) -> int:
        first, last = _visible_blocks(piece, window, layout.block_size)
        return (last - first).bit_length()

    decoding = [piece for piece in slices if len(piece.token_ids) == 1]
    members = [list(run) for _, run in groupby(decoding, magnitude)] + [[piece] for piece in slices[len(decoding) :]]
    groups, begin = [], 0
    for group in members:
        rows, visible = _rows(group, window, layout), _visible(group, window, layout.block_size)
        end = begin + len(group) * len(group[0].token_ids)
        groups.append(
            AttentionGroup(
                begin=begin,
                end=end,
                num_sequences=len(group),
                rows=torch.from_numpy(rows).to(device),
                mask=_mask(visible, dtype, device),
                gathered=torch.empty(rows.size, layout.block_size * layout.head_dim, dtype=dtype, device=device),
            )
        )
        begin = end
    return groups


def _visible_blocks(piece: Slice, window: int | None, block_size: int) -> tuple[int, int]:
    """Range of the block table that holds all keys the slice's tokens may see."""
    first_key = 0 if window is None else max(0, piece.start - window + 1)
    return first_key // block_size, (piece.start + len(piece.token_ids) - 1) // block_size + 1


def _rows(group: Sequence[Slice], window: int | None, layout: KVLayout) -> Ints:
    ranges = [_visible_blocks(piece, window, layout.block_size) for piece in group]
    width = max(last - first for first, last in ranges)
    tables = np.empty((len(group), width), np.int64)
    for row, piece, (first, last) in zip(tables, group, ranges, strict=True):
        row[: last - first] = piece.block_table[first:last]
        # Padding is masked, but must be finite: no other block than one of the sequence itself is known to be.
        row[last - first :] = row[last - first - 1]
    heads = np.arange(layout.num_kv_heads)
    keys = (tables * (layout.num_layers * 2 * layout.num_kv_heads))[:, None, :] + heads[:, None]
    rows: Ints = np.stack((keys, keys + layout.num_kv_heads)).reshape(-1)
    return rows


def _visible(group: Sequence[Slice], window: int | None, block_size: int) -> npt.NDArray[np.bool_]:
    """[sequences, new tokens, keys]: does the token see the key?"""
    ranges = [_visible_blocks(piece, window, block_size) for piece in group]
    num_keys = max(last - first for first, last in ranges) * block_size
    first_keys = np.array([first * block_size for first, _ in ranges])
    keys = (first_keys[:, None] + np.arange(num_keys))[:, None, :]
    tokens = np.stack([_span(piece) for piece in group])[:, :, None]
    visible: npt.NDArray[np.bool_] = keys <= tokens
    if window is not None:
        visible &= keys > tokens - window
    return visible


def _mask(visible: npt.NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    hidden = torch.from_numpy(~visible[:, None]).to(device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
