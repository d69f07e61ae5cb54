"""One step's slices as the arrays of a `Step`, by compiled code: this comes before every step, however short it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from python_backends.core.errors import EngineFailure
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.kernels.attention import SPAN, TILE_QUERIES
from python_backends.engines.torch.kernels.compiler import kernel
from python_backends.engines.torch.kernels.forward import Step

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_SHORT_QUERIES = 48  # rows of queries per key head up to which a slice's spans are shared out


def lay_out(slices: Sequence[Slice], tables: Sequence[Ints], group: int, frequencies: Floats, vocab_size: int) -> Step:
    """tables: block numbers of each slice; the step has their addresses and does not keep them. group: query heads per key
    head. frequencies: of the rotary positions, float32 [head_dim / 2].

    Raises EngineFailure for tokens outside the vocabulary, since kernels would read beyond the embedding.
    """
    counts = np.array([len(piece.token_ids) for piece in slices], np.int64)
    starts = np.array([piece.start for piece in slices], np.int64)
    draws = np.array([piece.drafts + 1 if piece.draw else 0 for piece in slices], np.int64)
    num_tokens, num_draws, num_short, num_spans, num_tiles = _sizes(counts, starts, draws, group)
    tokens = np.fromiter(chain.from_iterable([piece.token_ids for piece in slices]), np.int64, num_tokens)
    if not _are_within(tokens, vocab_size):
        raise EngineFailure(f"a token id is outside the model's vocabulary of {vocab_size}")
    positions, of_slice, begins = np.empty_like(tokens), np.empty_like(tokens), np.empty_like(counts)
    short, first_span, drawing = np.empty(num_short, np.int64), np.empty_like(counts), np.empty(num_draws, np.int64)
    spans, tiles = np.empty((num_spans, 2), np.int64), np.empty((num_tiles, 3), np.int64)
    angles = np.empty((num_tokens, len(frequencies)), np.float32)
    _lay_tokens(counts, starts, draws, frequencies, positions, of_slice, begins, angles, drawing)
    _share_out(counts, starts, group, short, first_span, spans, tiles)
    return Step(
        tokens=tokens,
        positions=positions,
        slices=of_slice,
        cos=np.cos(angles),
        sin=np.sin(angles),
        tables=np.array([table.ctypes.data for table in tables], np.int64),
        starts=starts,
        begins=begins,
        counts=counts,
        short=short,
        first_span=first_span,
        spans=spans,
        tiles=tiles,
        drawing=drawing,
    )


@kernel
def _sizes(counts: Ints, starts: Ints, draws: Ints, group: int) -> tuple[int, int, int, int, int]:
    """Tokens, draws, short slices, their spans, and tiles of the long ones."""
    tokens, drawn, short, spans, tiles = 0, 0, 0, 0, 0
    for index in range(counts.size):
        tokens, drawn = tokens + counts[index], drawn + draws[index]
        if counts[index] * group <= _SHORT_QUERIES:
            short, spans = short + 1, spans + _num_spans(starts[index] + counts[index])
        else:
            tiles += (counts[index] + _tile_tokens(group) - 1) // _tile_tokens(group)
    return tokens, drawn, short, spans, tiles


@kernel
def _num_spans(length: int) -> int:
    return (length + SPAN - 1) // SPAN


@kernel
def _tile_tokens(group: int) -> int:
    return max(1, TILE_QUERIES // group)


@kernel
def _lay_tokens(
    counts: Ints,
    starts: Ints,
    draws: Ints,
    frequencies: Floats,
    positions: Ints,
    of_slice: Ints,
    begins: Ints,
    angles: Floats,
    drawing: Ints,
) -> None:
    """Everything by token. Those that draw are the last of their slice."""
    token, drawn = 0, 0
    for index in range(counts.size):
        begins[index] = token
        for offset in range(counts[index]):
            positions[token], of_slice[token] = starts[index] + offset, index
            for i in range(frequencies.size):
                angles[token, i] = np.float32(positions[token]) * frequencies[i]
            token += 1
        for draw in range(draws[index]):
            drawing[drawn] = token - draws[index] + draw
            drawn += 1


@kernel
def _share_out(counts: Ints, starts: Ints, group: int, short: Ints, first_span: Ints, spans: Ints, tiles: Ints) -> None:
    """Spans of short slices, tiles of long ones."""
    shorts, span, tile, size = 0, 0, 0, _tile_tokens(group)
    for index in range(counts.size):
        first_span[index] = span
        if counts[index] * group <= _SHORT_QUERIES:
            short[shorts] = index
            shorts += 1
            for number in range(_num_spans(starts[index] + counts[index])):
                spans[span, 0], spans[span, 1] = index, number
                span += 1
        else:
            for first in range(0, counts[index], size):
                tiles[tile, 0], tiles[tile, 1], tiles[tile, 2] = index, first, min(size, counts[index] - first)
                tile += 1


@kernel
def _are_within(tokens: Ints, vocab_size: int) -> bool:
    outside = 0
    for token in tokens:
        outside += token < 0 or token >= vocab_size
    return outside == 0
