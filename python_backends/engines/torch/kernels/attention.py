"""Attention over the paged KV pool, read in place.

Keys of a sequence are looked at in spans of SPAN positions, each on its own: scores, their maximum, the powers, their
sum, and the sum of values weighted with them. Spans are then merged in order, as FlashAttention does (Dao et al., 2022,
arXiv:2205.14135). Since spans lie at fixed positions and every sum goes through keys in order, a token's result is the
same bit for bit whether it is decoded or part of a prompt's chunk, and however its spans were shared among threads.

Queries of one key head that are next to each other (heads of its group, times tokens) are the rows of a tile. In the pool
sixteen keys lie as a panel [head_dim, 16], so scores are products like any other; values lie as [token, head_dim].

    block    [layers, 2 (K, V), kv_heads, piece of 16 tokens, head_dim * 16]
    INT8     after the pieces of a head: one float32 scale per token
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from python_backends.engines.torch.kernels.compiler import kernel, part
from python_backends.engines.torch.kernels.linear import panels_at_once
from python_backends.engines.torch.kernels.tile import (
    FLOAT16,
    FLOAT32,
    INT8,
    PANELS,
    ROWS,
    expand_panel,
    multiply_blocks_tile,
    multiply_pieces_tile,
)
from python_backends.engines.torch.kernels.vector import (
    LANE_BYTES,
    LANES,
    POINTER,
    VECTOR,
    Float32x16,
    broadcast,
    exp2,
    fma,
    keep_lanes,
    lane_max,
    lane_sum,
    load,
    load_scalar,
    maximum,
    store,
    store_scalar,
)

SPAN = 256  # keys
PIECES = SPAN // LANES
_ENTRIES = PIECES + PANELS[1]  # of a table: a tile looks so far ahead
TILE_QUERIES = 96  # rows of a prompt's tile: keys and values in the second-level cache serve so many
KV_BYTES = {FLOAT32: 4, FLOAT16: 2, INT8: 1}

_LOG2E = np.float32(np.log2(np.e))
_NEVER = np.float32(-np.inf)


class KVPool(NamedTuple):
    """Where keys and values lie. Sizes in bytes, but block_size in tokens."""

    address: int
    block_bytes: int
    block_size: int
    head_bytes: int  # of one head's keys or values in a block
    kv_heads: int
    head_dim: int
    kv_format: int  # FLOAT32, FLOAT16 or INT8


def head_bytes(kv_format: int, block_size: int, head_dim: int) -> int:
    return block_size * (head_dim * KV_BYTES[kv_format] + (4 if kv_format == INT8 else 0))


def scratch_floats(head_dim: int) -> int:
    """Room that `attend_rows` and `attend_span` need per thread."""
    return TILE_QUERIES * (3 * head_dim + SPAN + 4) + 2 * SPAN * head_dim + 4 * _ENTRIES


@intrinsic
def _store_half(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(builder.fptrunc(args[1], ir.HalfType()), builder.inttoptr(args[0], POINTER), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def _store_byte(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(builder.fptosi(args[1], ir.IntType(8)), builder.inttoptr(args[0], POINTER), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def _load_codes(_context: Any, _address: Any) -> Any:
    """Sixteen signed bytes as float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        codes = builder.load(builder.inttoptr(args[0], POINTER), typ=ir.VectorType(ir.IntType(8), LANES), align=1)
        return builder.sitofp(codes, VECTOR)

    return Float32x16(types.intp), codegen


@intrinsic
def load_int64(_context: Any, _address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], POINTER), typ=ir.IntType(64), align=8)

    return types.intp(types.intp), codegen


@intrinsic
def _store_int64(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], POINTER), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@part
def head_address(pool: Any, layer: int, what: int, kv_head: int, block: int) -> int:
    """Of the keys (what 0) or values (1) of a head in a block."""
    place = (layer * 2 + what) * pool.kv_heads + kv_head
    return pool.address + block * pool.block_bytes + place * pool.head_bytes


@part
def write_vector(pool: Any, head: int, slot: int, vector: int, what: int) -> None:
    """Put the head_dim floats at `vector` into a head's keys (what 0) or values (1), as token `slot` of the block."""
    piece = head + slot // LANES * (LANES * pool.head_dim * _element_bytes(pool.kv_format))
    first = slot % LANES if what == 0 else slot % LANES * pool.head_dim
    stride = LANES if what == 0 else 1
    if pool.kv_format == FLOAT32:
        for i in range(pool.head_dim):
            store_scalar(piece + 4 * (first + i * stride), load_scalar(vector + 4 * i))
    elif pool.kv_format == FLOAT16:
        for i in range(pool.head_dim):
            _store_half(piece + 2 * (first + i * stride), load_scalar(vector + 4 * i))
    else:
        largest = np.float32(0.0)
        for i in range(pool.head_dim):
            largest = max(largest, abs(load_scalar(vector + 4 * i)))
        scale = largest / np.float32(127.0)
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        for i in range(pool.head_dim):
            _store_byte(piece + first + i * stride, np.rint(load_scalar(vector + 4 * i) * inverse))
        store_scalar(head + pool.block_size * pool.head_dim + 4 * slot, scale)


@kernel
def _element_bytes(kv_format: int) -> int:
    return 4 if kv_format == FLOAT32 else 2 if kv_format == FLOAT16 else 1


@part
def _find_span(pool: Any, layer: int, kv_head: int, table: int, first: int, keys: int, tables: int, expanded: int) -> None:
    """Fill two tables, _ENTRIES addresses each, with where the span's keys and values lie as float32.

    table: the sequence's block numbers, int64. first: position of the span's first key. Narrow formats are widened to
    `expanded` first (without their scales, which belong to whole columns and rows). Behind the addresses of keys come
    those of the first values, and behind the values' the last once more: what is needed next.
    """
    piece_bytes, pieces = LANES * pool.head_dim * _element_bytes(pool.kv_format), (keys + LANES - 1) // LANES
    for piece in range(pieces):
        position = first + piece * LANES
        block = load_int64(table + 8 * (position // pool.block_size))
        inside = position % pool.block_size // LANES * piece_bytes
        for what in range(2):
            address = head_address(pool, layer, what, kv_head, block) + inside
            if pool.kv_format != FLOAT32:
                wide = expanded + (what * PIECES + piece) * LANE_BYTES * pool.head_dim
                if pool.kv_format == FLOAT16:
                    expand_panel(FLOAT16, address, pool.head_dim, wide)
                else:
                    for i in range(pool.head_dim):
                        store(wide + i * LANE_BYTES, _load_codes(address + i * LANES))
                address = wide
            _store_int64(tables + 8 * (what * _ENTRIES + piece), address)
    for i in range(_ENTRIES - PIECES):
        last = tables + 8 * (_ENTRIES + pieces + i)
        _store_int64(last, load_int64(last - 8))
        _store_int64(tables + 8 * (pieces + i), load_int64(tables + 8 * (_ENTRIES + min(i, pieces - 1))))


@kernel
def _scales(pool: Any, layer: int, what: int, kv_head: int, table: int, position: int) -> Any:
    """The scales of sixteen keys or values from `position` on (INT8)."""
    block = load_int64(table + 8 * (position // pool.block_size))
    head = head_address(pool, layer, what, kv_head, block)
    return load(head + pool.block_size * pool.head_dim + 4 * (position % pool.block_size))


@kernel
def _powers(
    pool: Any, layer: int, kv_head: int, table: int, scores: int, first: int, keys: int, low: int, high: int
) -> tuple[Any, Any]:
    """Turn one row of scores (in powers of two) into weights relative to the highest; (highest score, sum of weights).

    The row sees the keys at positions low .. high. Weights of the others are 0; so is all if it sees none: (-inf, 0).
    """
    pieces = (keys + LANES - 1) // LANES
    highest = broadcast(_NEVER)
    for piece in range(pieces):
        at, position = scores + piece * LANE_BYTES, first + piece * LANES
        value = load(at)
        if pool.kv_format == INT8:
            value = value * _scales(pool, layer, 0, kv_head, table, position)
        if position < low or position + LANES - 1 > high:
            value = keep_lanes(value, low - position, high + 1 - position)
        if pool.kv_format == INT8 or position < low or position + LANES - 1 > high:
            store(at, value)
        highest = maximum(highest, value)
    peak = lane_max(highest)
    if peak == _NEVER:
        for piece in range(pieces):
            store(scores + piece * LANE_BYTES, broadcast(np.float32(0.0)))
        return peak, np.float32(0.0)
    total = broadcast(np.float32(0.0))
    for piece in range(pieces):
        at = scores + piece * LANE_BYTES
        weight = exp2(load(at) - broadcast(peak))
        total = total + weight
        if pool.kv_format == INT8:
            weight = weight * _scales(pool, layer, 1, kv_head, table, first + piece * LANES)
        store(at, weight)
    return peak, lane_sum(total)


@part
def gather_queries(queries: int, row_bytes: int, tokens: int, group: int, head_dim: int, out: int) -> int:
    """Queries of `group` heads next to each other, of `tokens` tokens, as rows [tokens * group, head_dim]; their number.

    They are scaled so that scores are powers of two.
    """
    scale = _LOG2E / np.float32(np.sqrt(np.float32(head_dim)))
    factor = broadcast(scale)
    row = 0
    for token in range(tokens):
        for head in range(group):
            source, target = queries + token * row_bytes + 4 * head * head_dim, out + 4 * row * head_dim
            for i in range(0, head_dim, LANES):
                store(target + 4 * i, load(source + 4 * i) * factor)
            row += 1
    return row


@part
def attend_span(
    pool: Any,
    layer: int,
    kv_head: int,
    table: int,
    first: int,
    keys: int,
    queries: int,
    rows: int,
    group: int,
    start: int,
    window: int,
    scores: int,
    tables: int,
    expanded: int,
    out: int,
    peaks: int,
    sums: int,
) -> None:
    """One span for some rows of queries [rows, head_dim], row r being token r // group, whose position is start + that.

    keys: how many of the span exist. window: keys a token sees, 0: all. Writes out [rows, head_dim] (not yet divided by
    the sum), peaks [rows] and sums [rows].
    """
    head_dim = pool.head_dim
    _find_span(pool, layer, kv_head, table, first, keys, tables, expanded)
    pieces, columns = (keys + LANES - 1) // LANES, head_dim // LANES
    tiles, at_once = (rows + ROWS - 1) // ROWS, panels_at_once(rows)
    for piece in range(0, pieces, at_once):
        for tile in range(tiles):
            row = rows * tile // tiles
            multiply_pieces_tile(
                rows * (tile + 1) // tiles - row,
                min(at_once, pieces - piece),
                queries + 4 * row * head_dim,
                4 * head_dim,
                tables + 8 * piece,
                head_dim,
                scores + 4 * row * SPAN + piece * LANE_BYTES,
                4 * SPAN,
            )
    for row in range(rows):
        position = start + row // group
        low = max(0, position - window + 1) if window > 0 else 0
        peak, total = _powers(pool, layer, kv_head, table, scores + 4 * row * SPAN, first, keys, low, position)
        store_scalar(peaks + 4 * row, peak)
        store_scalar(sums + 4 * row, total)
    for column in range(0, columns, at_once):
        for tile in range(tiles):
            row = rows * tile // tiles
            multiply_blocks_tile(
                rows * (tile + 1) // tiles - row,
                min(at_once, columns - column),
                scores + 4 * row * SPAN,
                4 * SPAN,
                tables + 8 * _ENTRIES,
                column * LANE_BYTES,
                4 * head_dim,
                keys,
                out + 4 * row * head_dim + column * LANE_BYTES,
                4 * head_dim,
            )


@part
def merge_span(head_dim: int, rows: int, out: int, peaks: int, sums: int, into: int, into_peaks: int, into_sums: int) -> None:
    """Merge a span's result into what the spans before it gave."""
    for row in range(rows):
        peak = load_scalar(peaks + 4 * row)
        before = load_scalar(into_peaks + 4 * row)
        if peak == _NEVER:
            continue
        highest = max(before, peak)
        keep = _power(before - highest) if before != _NEVER else np.float32(0.0)
        take = _power(peak - highest)
        total = fma(
            broadcast(load_scalar(sums + 4 * row)),
            broadcast(take),
            broadcast(load_scalar(into_sums + 4 * row)) * broadcast(keep),
        )
        store_scalar(into_peaks + 4 * row, highest)
        store_scalar(into_sums + 4 * row, lane_max(total))
        for i in range(0, head_dim, LANES):
            at, source = into + 4 * (row * head_dim + i), out + 4 * (row * head_dim + i)
            store(at, fma(load(source), broadcast(take), load(at) * broadcast(keep)))


@kernel
def _power(exponent: float) -> float:
    return lane_max(exp2(broadcast(exponent)))


@part
def clear_rows(head_dim: int, rows: int, into: int, into_peaks: int, into_sums: int) -> None:
    for row in range(rows):
        store_scalar(into_peaks + 4 * row, _NEVER)
        store_scalar(into_sums + 4 * row, np.float32(0.0))
        for i in range(0, head_dim, LANES):
            store(into + 4 * (row * head_dim + i), broadcast(np.float32(0.0)))


@part
def scatter_rows(head_dim: int, tokens: int, group: int, rows: int, row_sums: int, out: int, row_bytes: int) -> None:
    """Divide by the sums, and put rows [tokens * group, head_dim] to their tokens and heads."""
    row = 0
    for token in range(tokens):
        for head in range(group):
            factor = broadcast(np.float32(1.0) / load_scalar(row_sums + 4 * row))
            for i in range(0, head_dim, LANES):
                store(out + token * row_bytes + 4 * (head * head_dim + i), load(rows + 4 * (row * head_dim + i)) * factor)
            row += 1
