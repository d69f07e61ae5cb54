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
from python_backends.engines.torch.kernels.tile import (
    FLOAT16,
    FLOAT32,
    INT8,
    KV_PANELS,
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
    add_in_order,
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
_ENTRIES = PIECES + 2 * max(KV_PANELS)  # of a table: the last tile may go beyond the keys, and looks as far ahead again
TILE_QUERIES = 96  # rows of a prompt's tile: keys and values in the second-level cache serve so many
_PIECES_AT_ONCE = 4  # of a row whose powers are computed: their latencies overlap
KV_BYTES = {FLOAT32: 4, FLOAT16: 2, INT8: 1}

_LOG2E = np.float32(np.log2(np.e))
_LOWEST = np.finfo(np.float32).min  # the highest score of no keys: a number, so that differences are


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


class Room(NamedTuple):
    """A thread's scratch memory, as addresses. `part` and `total` have `partial_floats`."""

    queries: int  # [TILE_QUERIES, head_dim]
    part: int  # one span's result
    total: int  # that of the spans so far
    scores: int  # [ROWS, SPAN]
    scales: int  # [2, SPAN], of keys and values (INT8)
    tables: int  # [2, _ENTRIES] int64, where keys and values lie
    expanded: int  # [2, SPAN, head_dim], keys and values of narrow formats


@kernel
def partial_floats(rows: int, head_dim: int) -> int:
    """Size of a result: out [rows, head_dim], not yet divided by the sums; then peaks and sums [rows] each, with room up to
    whole vectors."""
    return rows * head_dim + 2 * _whole_vectors(rows)


@kernel
def _whole_vectors(rows: int) -> int:
    return (rows + LANES - 1) // LANES * LANES


@kernel
def room_at(scratch: int, head_dim: int) -> Room:
    """Laid out in `scratch_floats`."""
    part = scratch + 4 * TILE_QUERIES * head_dim
    total = part + 4 * partial_floats(TILE_QUERIES, head_dim)
    scores = total + 4 * partial_floats(TILE_QUERIES, head_dim)
    scales = scores + 4 * ROWS * SPAN
    tables = scales + 8 * SPAN
    return Room(scratch, part, total, scores, scales, tables, tables + 16 * _ENTRIES)


def scratch_floats(head_dim: int) -> int:
    """Size of a `Room`."""
    return (3 * TILE_QUERIES + 2 * SPAN) * head_dim + 4 * TILE_QUERIES + (ROWS + 2) * SPAN + 4 * _ENTRIES


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
def _find_span(pool: KVPool, layer: int, kv_head: int, table: int, first: int, keys: int, room: Room) -> None:
    """Fill the room's tables with where the span's keys and values lie as float32.

    table: the sequence's block numbers, int64. first: position of the span's first key. Narrow formats are widened first
    (without their scales, which belong to whole columns and rows). Behind the addresses of keys come those of the first
    values, and behind the values' the last once more: what is needed next.
    """
    dim, pieces, per_block = pool.head_dim, (keys + LANES - 1) // LANES, pool.block_size // LANES
    piece_bytes = LANES * dim * _element_bytes(pool.kv_format)
    entry, inside = table + 8 * (first // LANES // per_block), first // LANES % per_block
    for piece in range(pieces):
        block = load_int64(entry)
        for what in range(2):
            head = head_address(pool, layer, what, kv_head, block)
            address = head + inside * piece_bytes
            if pool.kv_format != FLOAT32:
                wide = room.expanded + (what * PIECES + piece) * LANE_BYTES * dim
                if pool.kv_format == FLOAT16:
                    expand_panel(FLOAT16, address, dim, wide)
                else:
                    for i in range(dim):
                        store(wide + i * LANE_BYTES, _load_codes(address + i * LANES))
                    scales = head + pool.block_size * dim + inside * LANE_BYTES
                    store(room.scales + (what * PIECES + piece) * LANE_BYTES, load(scales))
                address = wide
            _store_int64(room.tables + 8 * (what * _ENTRIES + piece), address)
        inside += 1
        if inside == per_block:
            entry, inside = entry + 8, 0
    for i in range(_ENTRIES - PIECES):
        last = room.tables + 8 * (_ENTRIES + pieces + i)
        _store_int64(last, load_int64(last - 8))
        _store_int64(room.tables + 8 * (pieces + i), load_int64(room.tables + 8 * (_ENTRIES + min(i, pieces - 1))))


@kernel
def _powers(pool: KVPool, room: Room, scores: int, keys: int, low: int, high: int) -> tuple[Any, Any]:
    """Turn one row of scores (in powers of two) into weights relative to the highest; (highest score, sum of weights).

    The row sees the keys low .. high of the span. Weights of the others are 0; so is all if it sees none: (_LOWEST, 0).
    """
    pieces = (keys + _PIECES_AT_ONCE * LANES - 1) // (_PIECES_AT_ONCE * LANES) * _PIECES_AT_ONCE
    if pool.kv_format == INT8:
        for piece in range(pieces):
            at = piece * LANE_BYTES
            store(scores + at, load(scores + at) * load(room.scales + at))
    if low > 0 or high < pieces * LANES - 1:
        for piece in range(pieces):
            key, at = piece * LANES, scores + piece * LANE_BYTES
            if key < low or key + LANES - 1 > high:
                store(at, keep_lanes(load(at), low - key, high + 1 - key))
    end = scores + pieces * LANE_BYTES
    a = b = c = d = broadcast(_LOWEST)
    for at in range(scores, end, _PIECES_AT_ONCE * LANE_BYTES):
        a, b = maximum(a, load(at)), maximum(b, load(at + LANE_BYTES))
        c, d = maximum(c, load(at + 2 * LANE_BYTES)), maximum(d, load(at + 3 * LANE_BYTES))
    peak = lane_max(maximum(maximum(a, b), maximum(c, d)))
    highest = broadcast(peak)
    a = b = c = d = broadcast(np.float32(0.0))
    for at in range(scores, end, _PIECES_AT_ONCE * LANE_BYTES):
        a, b = _add_power(a, at, highest), _add_power(b, at + LANE_BYTES, highest)
        c, d = _add_power(c, at + 2 * LANE_BYTES, highest), _add_power(d, at + 3 * LANE_BYTES, highest)
    if pool.kv_format == INT8:
        for piece in range(pieces):
            at = piece * LANE_BYTES
            store(scores + at, load(scores + at) * load(room.scales + 4 * SPAN + at))
    return peak, lane_sum(add_in_order(add_in_order(a, b), add_in_order(c, d)))


@kernel
def _add_power(total: Any, at: int, highest: Any) -> Any:
    """Turn the scores at the address into weights; the total with them."""
    weight = exp2(load(at) - highest)
    store(at, weight)
    return add_in_order(total, weight)


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
    pool: KVPool,
    layer: int,
    kv_head: int,
    table: int,
    first: int,
    keys: int,
    rows: int,
    group: int,
    start: int,
    window: int,
    room: Room,
    part: int,
) -> None:
    """One span for the room's first rows of queries, row r being token r // group, whose position is start + that.

    keys: how many of the span exist. window: keys a token sees, 0: all. Writes its result to `part`. Rows go through
    scores, powers and values a tile at a time, so that the tile's scores stay in the first-level cache.
    """
    dim = pool.head_dim
    peaks = part + 4 * rows * dim
    sums = peaks + 4 * _whole_vectors(rows)
    _find_span(pool, layer, kv_head, table, first, keys, room)
    pieces, columns, tiles = (keys + LANES - 1) // LANES, dim // LANES, (rows + ROWS - 1) // ROWS
    for tile in range(tiles):
        begin, end = rows * tile // tiles, rows * (tile + 1) // tiles
        count, queries, out = end - begin, room.queries + 4 * begin * dim, part + 4 * begin * dim
        at_once = KV_PANELS[count]
        for piece in range(0, pieces, at_once):
            scores = room.scores + piece * LANE_BYTES
            multiply_pieces_tile(count, queries, 4 * dim, room.tables + 8 * piece, dim, scores, 4 * SPAN)
        for row in range(begin, end):
            last = start + row // group - first
            low = last - window + 1 if window > 0 else 0
            peak, total = _powers(pool, room, room.scores + 4 * (row - begin) * SPAN, keys, low, last)
            store_scalar(peaks + 4 * row, peak)
            store_scalar(sums + 4 * row, total)
        for column in range(0, columns, at_once):
            multiply_blocks_tile(
                count,
                min(at_once, columns - column),
                room.scores,
                4 * SPAN,
                room.tables + 8 * _ENTRIES,
                column * LANE_BYTES,
                4 * dim,
                keys,
                out + column * LANE_BYTES,
                4 * dim,
            )


@part
def merge_span(head_dim: int, rows: int, part: int, total: int) -> None:
    """Merge a span's result into what the spans before it gave. Its peaks and sums are used up."""
    peaks, into_peaks = part + 4 * rows * head_dim, total + 4 * rows * head_dim
    to_sums = 4 * _whole_vectors(rows)
    for at in range(0, 4 * rows, LANE_BYTES):
        peak, before = load(peaks + at), load(into_peaks + at)
        highest = maximum(before, peak)
        take, keep = exp2(peak - highest), exp2(before - highest)
        sums, into_sums = peaks + to_sums + at, into_peaks + to_sums + at
        store(into_peaks + at, highest)
        store(into_sums, fma(load(sums), take, load(into_sums) * keep))
        store(peaks + at, take)
        store(sums, keep)
    for row in range(rows):
        take = broadcast(load_scalar(peaks + 4 * row))
        keep = broadcast(load_scalar(peaks + to_sums + 4 * row))
        for i in range(row * head_dim, (row + 1) * head_dim, LANES):
            at = total + 4 * i
            store(at, fma(load(part + 4 * i), take, load(at) * keep))


@part
def clear_rows(head_dim: int, rows: int, total: int) -> None:
    """The result of no keys."""
    peaks = total + 4 * rows * head_dim
    sums = peaks + 4 * _whole_vectors(rows)
    for at in range(total, peaks, LANE_BYTES):
        store(at, broadcast(np.float32(0.0)))
    for at in range(0, 4 * rows, LANE_BYTES):
        store(peaks + at, broadcast(_LOWEST))
        store(sums + at, broadcast(np.float32(0.0)))


@part
def scatter_rows(head_dim: int, tokens: int, group: int, total: int, out: int, row_bytes: int) -> None:
    """Divide by the sums, and put rows [tokens * group, head_dim] to their tokens and heads."""
    rows = tokens * group
    sums = total + 4 * (rows * head_dim + _whole_vectors(rows))
    row = 0
    for token in range(tokens):
        for head in range(group):
            factor = broadcast(np.float32(1.0) / load_scalar(sums + 4 * row))
            for i in range(0, head_dim, LANES):
                store(out + token * row_bytes + 4 * (head * head_dim + i), load(total + 4 * (row * head_dim + i)) * factor)
            row += 1
