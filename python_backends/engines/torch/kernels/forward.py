"""The forward pass of a Llama-like decoder on a CPU, for one step's tokens. Read `forward` from top to bottom.

It is one compiled function that every thread of the worker's team runs; each phase ends for all at once (team.py). Rows are
tokens. A row's arithmetic is the same whatever other rows are there, so logits depend on a sequence's own tokens only,
bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from python_backends.engines.torch.kernels.attention import (
    SPAN,
    KVPool,
    attend_span,
    clear_rows,
    gather_queries,
    head_address,
    load_int64,
    merge_span,
    room_at,
    scatter_rows,
    write_vector,
)
from python_backends.engines.torch.kernels.attention import scratch_floats as attention_floats
from python_backends.engines.torch.kernels.compiler import kernel, part
from python_backends.engines.torch.kernels.lending import Cores, cores_now
from python_backends.engines.torch.kernels.linear import multiply, multiply_floats, panels_at_once
from python_backends.engines.torch.kernels.team import claim, end_run, finish, nap
from python_backends.engines.torch.kernels.tile import ROWS, expand_panel
from python_backends.engines.torch.kernels.vector import LANE_BYTES, LANES, load, load_scalar, silu, store

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LAYER_PHASES = ("norms", "qkv", "rotate, store", "attend", "merge", "attention output", "norms", "gate and up", "down")
LAST_PHASES = ("norms", "output")
PHASES_PER_LAYER = len(LAYER_PHASES)
OTHER_PHASES = 1 + len(LAST_PHASES)  # the embedding before the layers

_CACHE_BYTES = 512 << 10  # of inputs that one block of rows may have: they stay in the second-level cache
_MOST_ROWS = 384
_UNITS_PER_THREAD = 8


class Linear(NamedTuple):
    """One kind of linear layer in all layers. addresses: int64 [layers] of panels; bias: float32 [layers, padded] or [0, 0]."""

    addresses: Ints
    bias: Floats
    panels: int
    panel_bytes: int
    depth: int
    weight_format: int


class Decoder(NamedTuple):
    """A model. `gate_up` has panels of gate and up in turns. Widths of rows (`*_stride`) are in floats, padded."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: Linear
    attention_output: Linear
    gate_up: Linear
    down: Linear
    output: Linear
    embedding: Linear
    input_norms: Floats  # [layers, hidden]
    ffn_norms: Floats  # [layers, hidden]
    final_norm: Floats  # [hidden]
    query_norms: Floats  # [layers, head_dim] or [0, 0]
    key_norms: Floats
    windows: Ints  # [layers], 0: unlimited


class Step(NamedTuple):
    """One step's tokens, flat, slice after slice.

    Slices of few rows ("short": decoding sequences) share out their spans among threads and are merged afterwards;
    `spans` has a row [slice, number of the span] each, and slice s keeps them from `first_span[s]` on.
    Others ("long": chunks of prompts) are cut into tiles: rows [slice, first token, tokens] of `tiles`.
    """

    tokens: Ints  # [tokens]
    positions: Ints  # [tokens]
    slices: Ints  # [tokens], which slice it is of
    cos: Floats  # [tokens, head_dim / 2]
    sin: Floats
    tables: Ints  # [slices], addresses of block numbers, int64
    starts: Ints  # [slices], position of the first token
    begins: Ints  # [slices], its flat index
    counts: Ints  # [slices], tokens
    short: Ints  # slices
    first_span: Ints  # [slices]
    spans: Ints  # [spans, 2]
    tiles: Ints  # [tiles, 3]
    drawing: Ints  # flat indices of the tokens whose logits are wanted


class Workspace(NamedTuple):
    """What a step computes in. Rows beyond its tokens are not looked at; padding columns stay zero."""

    control: Ints  # see team.py
    hidden: Floats  # [tokens, padded hidden]
    normed: Floats  # the same
    qkv: Floats  # [tokens, padded]
    attended: Floats  # [tokens, heads * head_dim]
    activated: Floats  # [tokens, padded ffn]
    logits: Floats  # [draws, padded vocabulary]
    partial: Floats  # [spans * kv_heads, partial_floats]
    scratch: Floats  # [threads, anything]


def scratch_floats(head_dim: int, deepest: int) -> int:
    """Of each thread. deepest: depth of the deepest linear layer."""
    return max(attention_floats(head_dim), 2 * _MOST_ROWS * LANES + multiply_floats(deepest))


@kernel
def forward(thread: int, threads: int, cores: Cores, model: Decoder, pool: KVPool, step: Step, work: Workspace) -> None:
    """Compute the step's tokens, write their keys and values to the pool, and the logits of `drawing`.

    One of about `threads` threads. Between layers it naps while its core is wanted elsewhere (never the first one): coming
    back it finds nothing left to claim in the phases that it has missed.
    """
    control, phase = work.control.ctypes.data, 0
    scratch = work.scratch[thread].ctypes.data
    rows = step.tokens.size

    embed(control, phase, model, step, work.hidden, scratch)
    phase += 1
    for layer in range(model.num_layers):
        while thread > 0 and thread >= cores_now(cores):
            if not nap(control):
                return
        normalise(control, phase, threads, rows, work.hidden, model.input_norms[layer], model.eps, work.normed)
        linear(control, phase + 1, threads, rows, work.normed, model.qkv, layer, work.qkv, 0, scratch)
        rotate_and_store(control, phase + 2, threads, layer, model, pool, step, work.qkv)
        attend(control, phase + 3, layer, model, pool, step, work, scratch)
        merge(control, phase + 4, layer, model, step, work, scratch)
        linear(control, phase + 5, threads, rows, work.attended, model.attention_output, layer, work.hidden, 1, scratch)

        normalise(control, phase + 6, threads, rows, work.hidden, model.ffn_norms[layer], model.eps, work.normed)
        gate_and_up(control, phase + 7, threads, rows, work.normed, model.gate_up, layer, work.activated, scratch)
        linear(control, phase + 8, threads, rows, work.activated, model.down, layer, work.hidden, 1, scratch)
        phase += PHASES_PER_LAYER

    if step.drawing.size:
        normalise_drawing(control, phase, step, work.hidden, model.final_norm, model.eps, work.normed)
        linear(control, phase + 1, threads, step.drawing.size, work.normed, model.output, 0, work.logits, 0, scratch)
    if thread == 0:
        end_run(control)


@part
def embed(control: int, phase: int, model: Decoder, step: Step, hidden: Floats, scratch: int) -> None:
    """hidden[row] = the embedding of its token: one column of a panel."""
    table = model.embedding
    units, mine, token = step.tokens.size, 0, claim(control, phase)
    while token < units:
        number = step.tokens[token]
        expand_panel(table.weight_format, table.addresses[0] + number // LANES * table.panel_bytes, table.depth, scratch)
        for i in range(model.hidden):
            hidden[token, i] = load_scalar(scratch + i * LANE_BYTES + 4 * (number % LANES))
        mine, token = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@part
def normalise(
    control: int, phase: int, threads: int, rows: int, source: Floats, weight: Floats, eps: float, target: Floats
) -> None:
    """Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    count = max(1, rows // (threads * _UNITS_PER_THREAD))
    units, mine, unit = (rows + count - 1) // count, 0, claim(control, phase)
    while unit < units:
        for row in range(unit * count, min(rows, (unit + 1) * count)):
            _normalise_row(source[row], weight, eps, target[row])
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@part
def normalise_drawing(control: int, phase: int, step: Step, source: Floats, weight: Floats, eps: float, target: Floats) -> None:
    units, mine, draw = step.drawing.size, 0, claim(control, phase)
    while draw < units:
        _normalise_row(source[step.drawing[draw]], weight, eps, target[draw])
        mine, draw = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@kernel
def _normalise_row(source: Floats, weight: Floats, eps: float, target: Floats) -> None:
    squares = np.float32(0.0)
    for i in range(weight.size):
        squares += source[i] * source[i]
    factor = np.float32(1.0) / np.sqrt(squares / np.float32(weight.size) + np.float32(eps))
    for i in range(weight.size):
        target[i] = weight[i] * (source[i] * factor)


@part
def linear(
    control: int,
    phase: int,
    threads: int,
    rows: int,
    source: Floats,
    layers: Linear,
    layer: int,
    target: Floats,
    add: int,
    scratch: int,
) -> None:
    """target = (or +=, with add) source @ weights + bias. Units: blocks of rows times groups of panels."""
    block = _block_rows(rows, layers.depth)
    blocks = (rows + block - 1) // block
    group = _group_panels(layers.panels, threads, panels_at_once(rows) if rows > ROWS else 1)
    groups = (layers.panels + group - 1) // group
    weights, has_bias = layers.addresses[layer], layers.bias.size > 0
    units, mine, unit = blocks * groups, 0, claim(control, phase)
    while unit < units:
        row, panel = unit // groups * block, unit % groups * group
        count, panels = min(block, rows - row), min(group, layers.panels - panel)
        if has_bias:
            _add_bias(
                target[row : row + count, panel * LANES : (panel + panels) * LANES], layers.bias[layer, panel * LANES :], add
            )
        multiply(
            layers.weight_format,
            count,
            source[row].ctypes.data,
            source.strides[0],
            weights + panel * layers.panel_bytes,
            layers.panel_bytes,
            panels,
            layers.depth,
            target[row].ctypes.data + panel * LANE_BYTES,
            target.strides[0],
            1 if has_bias else add,
            scratch,
            weights + _likely_next(unit, threads, units, groups, group) * layers.panel_bytes,
        )
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@kernel
def _block_rows(rows: int, depth: int) -> int:
    """As many as the cache has room for, or fewer so that all blocks are of about one size."""
    most = max(ROWS, min(_MOST_ROWS, _CACHE_BYTES // (4 * depth)) // ROWS * ROWS)
    blocks = max(1, (rows + most - 1) // most)
    each = (rows + blocks - 1) // blocks
    return max(ROWS, (each + ROWS - 1) // ROWS * ROWS)


@part
def _likely_next(unit: int, threads: int, units: int, groups: int, group: int) -> int:
    """First panel of the unit that the thread claims after this one if all take as long."""
    return (unit + threads if unit + threads < units else unit) % groups * group


@kernel
def _group_panels(panels: int, threads: int, least: int) -> int:
    """Panels of one unit: few enough that threads end together, a multiple of `least`."""
    if threads == 1:
        return panels
    group = max(1, panels // (threads * _UNITS_PER_THREAD))
    return (group + least - 1) // least * least


@kernel
def _add_bias(target: Floats, bias: Floats, add: int) -> None:
    for row in range(target.shape[0]):
        for i in range(target.shape[1]):
            target[row, i] = target[row, i] + bias[i] if add else bias[i]


@part
def gate_and_up(
    control: int, phase: int, threads: int, rows: int, source: Floats, layers: Linear, layer: int, target: Floats, scratch: int
) -> None:
    """target = silu(gate) * up, sixteen columns of both at a time."""
    block = _block_rows(rows, layers.depth)
    blocks = (rows + block - 1) // block
    at_once = max(2, panels_at_once(rows))  # one pair, or two for a single row
    group = _group_panels(layers.panels, threads, at_once)
    groups = (layers.panels + group - 1) // group
    weights, has_bias = layers.addresses[layer], layers.bias.size > 0
    both, expanded = scratch, scratch + 4 * _MOST_ROWS * 2 * LANES
    units, mine, unit = blocks * groups, 0, claim(control, phase)
    while unit < units:
        row, first = unit // groups * block, unit % groups * group
        count, end = min(block, rows - row), min(first + group, layers.panels)
        for panel in range(first, end, at_once):
            panels = min(at_once, layers.panels - panel)
            following = panel + panels if panel + panels < end else _likely_next(unit, threads, units, groups, group)
            stride = panels * LANE_BYTES
            if has_bias:
                _spread_bias(both, stride, count, panels, layers.bias[layer, panel * LANES :])
            multiply(
                layers.weight_format,
                count,
                source[row].ctypes.data,
                source.strides[0],
                weights + panel * layers.panel_bytes,
                layers.panel_bytes,
                panels,
                layers.depth,
                both,
                stride,
                1 if has_bias else 0,
                expanded,
                weights + following * layers.panel_bytes,
            )
            for pair in range(panels // 2):
                for i in range(count):
                    at = both + i * stride + 2 * pair * LANE_BYTES
                    out = target[row + i].ctypes.data + (panel // 2 + pair) * LANE_BYTES
                    store(out, silu(load(at)) * load(at + LANE_BYTES))
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@kernel
def _spread_bias(target: int, stride: int, rows: int, panels: int, bias: Floats) -> None:
    for row in range(rows):
        for panel in range(panels):
            store(target + row * stride + panel * LANE_BYTES, load(bias.ctypes.data + panel * LANE_BYTES))


@part
def rotate_and_store(
    control: int, phase: int, threads: int, layer: int, model: Decoder, pool: KVPool, step: Step, qkv: Floats
) -> None:
    """Norms of queries and keys where the model has them, rotary positions, keys and values into the pool.

    Units of a prompt are runs of tokens: keys of sixteen lie on the same cache lines, which two threads would take from
    each other.
    """
    rows = step.tokens.size
    count = max(1, min(LANES, rows // (threads * _UNITS_PER_THREAD)))
    units, mine, unit = (rows + count - 1) // count, 0, claim(control, phase)
    while unit < units:
        for token in range(unit * count, min(rows, (unit + 1) * count)):
            _rotate_and_store_token(token, layer, model, pool, step, qkv[token])
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@kernel
def _rotate_and_store_token(token: int, layer: int, model: Decoder, pool: KVPool, step: Step, row: Floats) -> None:
    dim, heads = model.head_dim, model.heads
    for head in range(heads + model.kv_heads):
        vector = row[head * dim : (head + 1) * dim]
        if model.query_norms.size > 0:
            norms = model.query_norms if head < heads else model.key_norms
            _normalise_row(vector, norms[layer], model.eps, vector)
        _rotate(vector, step.cos[token], step.sin[token])
    position, table = step.positions[token], step.tables[step.slices[token]]
    block = load_int64(table + 8 * (position // pool.block_size))
    for head in range(model.kv_heads):
        for what in range(2):
            source = row[(heads + what * model.kv_heads + head) * dim :].ctypes.data
            place = head_address(pool, layer, what, head, block)
            write_vector(pool, place, position % pool.block_size, source, what)


@kernel
def _rotate(vector: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary position embeddings (Su et al., 2021, arXiv:2104.09864), pairs being the two halves of a head."""
    half = cos.size
    for i in range(half):
        first, second = vector[i], vector[half + i]
        vector[i] = first * cos[i] - second * sin[i]
        vector[half + i] = second * cos[i] + first * sin[i]


@part
def attend(
    control: int, phase: int, layer: int, model: Decoder, pool: KVPool, step: Step, work: Workspace, scratch: int
) -> None:
    """Units: tiles of long slices from the last, most expensive one on, then spans of short ones; times key heads."""
    dim, group, kv_heads = model.head_dim, model.heads // model.kv_heads, model.kv_heads
    window = model.windows[layer]
    room = room_at(scratch, dim)
    num_tiles, num_spans = step.tiles.shape[0], step.spans.shape[0]

    units, mine, unit = (num_tiles + num_spans) * kv_heads, 0, claim(control, phase)
    while unit < units:
        index, kv_head = unit // kv_heads, unit % kv_heads
        if index < num_tiles:
            tile = step.tiles[num_tiles - 1 - index]
            which, offset, tokens = tile[0], tile[1], tile[2]
        else:
            which, offset = step.spans[index - num_tiles, 0], 0
            tokens = step.counts[which]
        token, start = step.begins[which] + offset, step.starts[which] + offset
        end, table = start + tokens, step.tables[which]
        source = work.qkv[token].ctypes.data + 4 * kv_head * group * dim
        rows = gather_queries(source, work.qkv.strides[0], tokens, group, dim, room.queries)
        if index < num_tiles:
            clear_rows(dim, rows, room.total)
            part = room.part
            span = max(0, start - window + 1) // SPAN if window > 0 else 0
            last_span = (end - 1) // SPAN
        else:
            part = work.partial[(index - num_tiles) * kv_heads + kv_head].ctypes.data
            span = step.spans[index - num_tiles, 1]
            last_span = span if _is_visible(span, start, window) else span - 1
        for number in range(span, last_span + 1):
            first = number * SPAN
            keys = min(SPAN, end - first)
            attend_span(pool, layer, kv_head, table, first, keys, rows, group, start, window, room, part)
            if index < num_tiles:
                merge_span(dim, rows, part, room.total)
        if index < num_tiles:
            target = work.attended[token].ctypes.data + 4 * kv_head * group * dim
            scatter_rows(dim, tokens, group, room.total, target, work.attended.strides[0])
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@part
def merge(control: int, phase: int, layer: int, model: Decoder, step: Step, work: Workspace, scratch: int) -> None:
    """Put the spans of short slices together, in order. Units: slices times key heads."""
    dim, group, kv_heads = model.head_dim, model.heads // model.kv_heads, model.kv_heads
    window = model.windows[layer]
    total = scratch
    units, mine, unit = step.short.size * kv_heads, 0, claim(control, phase)
    while unit < units:
        which, kv_head = step.short[unit // kv_heads], unit % kv_heads
        token, tokens, start = step.begins[which], step.counts[which], step.starts[which]
        rows = tokens * group
        clear_rows(dim, rows, total)
        index = step.first_span[which]
        while index < step.spans.shape[0] and step.spans[index, 0] == which:
            if _is_visible(step.spans[index, 1], start, window):
                part = work.partial[index * kv_heads + kv_head].ctypes.data
                merge_span(dim, rows, part, total)
            index += 1
        target = work.attended[token].ctypes.data + 4 * kv_head * group * dim
        scatter_rows(dim, tokens, group, total, target, work.attended.strides[0])
        mine, unit = mine + 1, claim(control, phase)
    finish(control, phase, units, mine)


@kernel
def _is_visible(span: int, start: int, window: int) -> bool:
    """Does the token at `start`, or one after it, see a key of the span?"""
    return window == 0 or (span + 1) * SPAN > start - window + 1
