"""The innermost loops: a few rows times panels of sixteen columns, with the sums in registers.

Matrices that rows are multiplied with lie in panels: sixteen columns, one step of depth after the other. A tile of
`ROWS` rows and one panel keeps its sums in registers for the whole depth, loads each step of the panel once, and
multiplies it with one element of each row:

    sums[row] += broadcast(rows[row, step]) * panel[step]        for step in order

Each sum adds its products in the order of depth, starting from zero, however many rows a tile has: so a row's result is
the same bit for bit whichever batch it is in. Few rows have too few sums to hide the latency of one multiply-add (four
cycles), so they take several panels at once; with wide registers all do, since one load of an element then serves two.

Panels come from memory once, for the first of several tiles. So that the memory is busy during the others too, each tile
asks for its part of what is needed next (`ahead`), step by step.

A panel of weights has one of the formats below. All are turned into float32 in registers, the same way everywhere.

    FLOAT32, BFLOAT16, FLOAT16    sixteen numbers a step
    INT8, INT4                    groups of GROUP steps: sixteen float16 scales, for INT4 sixteen float16 offsets, then words
                                  of 32 bits, one per column, with the signed codes of four or eight steps, lowest bits
                                  first; weight = code * scale (+ offset)

The functions are emitted as LLVM instructions, since no compiler finds this form from loops by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from python_backends.engines.torch.kernels.compiler import has_wide_registers
from python_backends.engines.torch.kernels.vector import (
    FLOAT,
    INT32,
    INT64,
    LANE_BYTES,
    LANES,
    POINTER,
    VECTOR,
    constant,
    emit_broadcast,
    emit_fma,
)

FORMATS = FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 = range(5)
STEP_BYTES = {FLOAT32: 64, BFLOAT16: 32, FLOAT16: 32}
CODE_BITS = {INT8: 8, INT4: 4}
GROUP = 32  # steps of depth with one scale per column
SCALE_BYTES = {INT8: 2 * LANES, INT4: 4 * LANES}  # of a group: scales, offsets

# Sums fit in the registers, beside a panel's step and a row's element.
ROWS = 12 if has_wide_registers() else 6
PANELS = (0, 4, *[2] * 11) if has_wide_registers() else (0, 4, 2, 2, 1, 1, 1)  # at most at once, by rows
# Of keys and values, whose panels lie on pages of their own: more of them at once, so that the memory is asked for several.
KV_PANELS = (0, *[4] * 6, *[2] * 6) if has_wide_registers() else PANELS
CODED_ROWS = 16 if has_wide_registers() else 6  # of tiles whose weights become float32 in registers; more share expanded ones
CODED_PANELS = tuple(PANELS[rows] if rows <= 4 else 1 for rows in range(ROWS + 1)) + (1,) * (CODED_ROWS - ROWS)
CONTINUE, LEAVE = 1, 2  # a tile of a part of the depth: begin with the sums that are there, leave them there
_UNROLL = 4
PREFETCH_BYTES = 1024  # ahead in a stream: beyond what the processor does when rows keep it busy

_INT8 = ir.IntType(8)
_INT16 = ir.IntType(16)
_WORDS = ir.VectorType(INT32, LANES)

_Body = Callable[[list[Any], list[Any]], list[Any]]


def panel_bytes(weight_format: int, depth: int) -> int:
    """Size of one panel, with room so that the next one begins on a cache line."""
    if weight_format in CODE_BITS:
        words = -(-depth // (32 // CODE_BITS[weight_format]))
        size = words * LANE_BYTES + -(-depth // GROUP) * SCALE_BYTES[weight_format]
    else:
        size = depth * STEP_BYTES[weight_format]
    return -(-size // 64) * 64


def group_bytes(weight_format: int) -> int:
    """Of GROUP steps of a panel."""
    if weight_format in CODE_BITS:
        return SCALE_BYTES[weight_format] + GROUP * CODE_BITS[weight_format] * LANES // 8
    return GROUP * STEP_BYTES[weight_format]


# --- emitting ---


def _int(value: int) -> Any:
    return ir.Constant(INT64, value)


def _at(builder: Any, pointer: Any, offset: Any) -> Any:
    return builder.gep(pointer, [_int(offset) if isinstance(offset, int) else offset], source_etype=_INT8)


def _repeat(
    builder: Any, count: Any, pointers: list[Any], strides: list[Any], values: list[Any], body: _Body
) -> tuple[list[Any], list[Any]]:
    """`values = body(pointers, values)`, `count` times, each pointer going on by its stride; what they are at the end."""
    before = builder.block
    loop, end = builder.append_basic_block("loop"), builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", count, _int(0)), loop, end)
    builder.position_at_end(loop)
    state = [count, *pointers, *values]
    phis = [builder.phi(value.type) for value in state]
    left, at, sums = phis[0], phis[1 : 1 + len(pointers)], phis[1 + len(pointers) :]
    sums = body(at, sums)
    left = builder.sub(left, _int(1))
    new = [left, *(_at(builder, pointer, stride) for pointer, stride in zip(at, strides, strict=True)), *sums]
    last = builder.block
    builder.cbranch(builder.icmp_signed(">", left, _int(0)), loop, end)
    for phi, initial, following in zip(phis, state, new, strict=True):
        phi.add_incoming(initial, before)
        phi.add_incoming(following, last)
    builder.position_at_end(end)
    results = []
    for initial, following in zip(state[1:], new[1:], strict=True):
        phi = builder.phi(initial.type)
        phi.add_incoming(initial, before)
        phi.add_incoming(following, last)
        results.append(phi)
    return results[: len(pointers)], results[len(pointers) :]


def _widen(builder: Any, pointer: Any) -> Any:
    """Sixteen bfloat16 are the upper halves of sixteen float32."""
    halves = builder.load(pointer, typ=ir.VectorType(_INT16, LANES), align=1)
    words = builder.zext(halves, _WORDS)
    return builder.bitcast(builder.shl(words, ir.Constant(_WORDS, [16] * LANES)), VECTOR)


def _load_step(builder: Any, weight_format: int, pointer: Any) -> Any:
    """Sixteen weights of one step as float32."""
    if weight_format == FLOAT32:
        return builder.load(pointer, typ=VECTOR, align=4)
    if weight_format == BFLOAT16:
        return _widen(builder, pointer)
    return _load_halves(builder, pointer)


def _load_halves(builder: Any, pointer: Any) -> Any:
    return builder.fpext(builder.load(pointer, typ=ir.VectorType(ir.HalfType(), LANES), align=1), VECTOR)


def _group_scale(builder: Any, weight_format: int, pointer: Any) -> tuple[Any, Any]:
    """What codes in the highest bits of their word are multiplied with: exact, since only the exponent differs. And what
    is added then, None for INT8."""
    scale = builder.fmul(_load_halves(builder, pointer), constant(2.0 ** (CODE_BITS[weight_format] - 32)))
    return scale, _load_halves(builder, _at(builder, pointer, 2 * LANES)) if weight_format == INT4 else None


def _decode(builder: Any, weight_format: int, words: Any, step: int, scale: tuple[Any, Any]) -> Any:
    """Sixteen weights of one of the steps in `words`: the code is moved to the highest bits, all others become zero."""
    bits = CODE_BITS[weight_format]
    if bits == 8:
        data = builder.bitcast(words, ir.VectorType(_INT8, 4 * LANES))
        zeros = ir.Constant(data.type, [0] * (4 * LANES))
        places = [4 * LANES if byte < 3 else 4 * lane + step for lane in range(LANES) for byte in range(4)]
        moved = builder.shuffle_vector(data, zeros, ir.Constant(ir.VectorType(INT32, 4 * LANES), places))
        high = builder.bitcast(moved, words.type)
    else:
        shifted = builder.shl(words, ir.Constant(words.type, [32 - bits * (step + 1)] * LANES))
        high = builder.and_(shifted, ir.Constant(words.type, [0x100000000 - (1 << (32 - bits))] * LANES))
    code, (factor, offset) = builder.sitofp(high, VECTOR), scale
    return builder.fmul(code, factor) if offset is None else emit_fma(builder, code, factor, offset)


def _after(builder: Any, pointer: Any, vectors: list[Any]) -> Any:
    """The same pointer, as if it depended on the vectors: no instruction, but the compiler can't load from it earlier. Else
    it loads the elements of many rows and steps first, and has no registers left for them."""
    kind = ir.FunctionType(POINTER, [POINTER, *([VECTOR] * len(vectors))])
    return builder.asm(kind, "", ",".join(["=r,0", *(["v"] * len(vectors))]), [pointer, *vectors], side_effect=False)


def _multiply_add(builder: Any, row_at: Any, offsets: list[Any], weights: list[Any], sums: list[Any], step: int) -> list[Any]:
    """One step of all rows and panels; `offsets`: of each row from the first, bytes."""
    new: list[Any] = []
    row_at = _at(builder, row_at, 4 * step)
    for row, offset in enumerate(offsets):
        if has_wide_registers() and len(weights) > 1 and len(offsets) > 2:
            row_at = _after(builder, row_at, (new or sums)[-len(weights) :])
        element = builder.load(_at(builder, row_at, offset), typ=FLOAT, align=4)
        spread = emit_broadcast(builder, element)
        new += [emit_fma(builder, spread, w, sums[row * len(weights) + i]) for i, w in enumerate(weights)]
    return new


def _steps(
    builder: Any,
    weight_format: int,
    depth: Any,
    row_at: Any,
    offsets: list[Any],
    panels: list[Any],
    sums: list[Any],
    ahead: list[Any],
    ahead_bytes: Any,
    step_bytes: Any = None,
) -> list[Any]:
    """All `depth` steps, _UNROLL at a time.

    ahead: of each panel, what to prefetch, `ahead_bytes` further at each step. step_bytes: between steps, where they don't
    lie side by side.
    """
    if step_bytes is None:
        step_bytes = _int(STEP_BYTES[weight_format])

    def unrolled(count: int) -> _Body:
        def body(at: list[Any], sums: list[Any]) -> list[Any]:
            for step in range(count):
                for place in at[1 + len(panels) :]:
                    _prefetch(builder, _at(builder, place, builder.mul(ahead_bytes, _int(step))))
                here = [_at(builder, panel, builder.mul(step_bytes, _int(step))) for panel in at[1 : 1 + len(panels)]]
                weights = [_load_step(builder, weight_format, panel) for panel in here]
                sums = _multiply_add(builder, at[0], offsets, weights, sums, step)
            return sums

        return body

    def strides(count: int) -> list[Any]:
        panel_stride, ahead_stride = (builder.mul(size, _int(count)) for size in (step_bytes, ahead_bytes))
        return [_int(4 * count), *([panel_stride] * len(panels)), *([ahead_stride] * len(ahead))]

    rounds = builder.ashr(depth, _int(_UNROLL.bit_length() - 1))
    at, sums = _repeat(builder, rounds, [row_at, *panels, *ahead], strides(_UNROLL), sums, unrolled(_UNROLL))
    return _repeat(builder, builder.and_(depth, _int(_UNROLL - 1)), at, strides(1), sums, unrolled(1))[1]


def _prefetch(builder: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [POINTER, INT32, INT32, INT32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [pointer, *(ir.Constant(INT32, value) for value in (0, 3, 1))])


def _for_each_group(
    builder: Any,
    weight_format: int,
    depth: Any,
    pointers: list[Any],
    strides: list[int],
    values: list[Any],
    body: Callable[..., list[Any]],
) -> list[Any]:
    """`values = body(number of words, pointers, values)` for each group, the last of which may be shorter.

    strides: of the pointers, in bytes per group. Steps beyond the depth, to the end of the last word, are computed too:
    their codes are zero, and so must be what they are multiplied with.
    """
    per_word = 32 // CODE_BITS[weight_format]
    words = builder.sdiv(builder.add(depth, _int(per_word - 1)), _int(per_word))
    per_group = _int(GROUP // per_word)
    full, rest = builder.sdiv(words, per_group), builder.srem(words, per_group)
    some = builder.zext(builder.icmp_signed(">", rest, _int(0)), INT64)
    each = [_int(stride) for stride in strides]
    at, values = _repeat(builder, full, pointers, each, values, lambda at, values: body(per_group, at, values))
    return _repeat(builder, some, at, each, values, lambda at, values: body(rest, at, values))[1]


def _quantised_steps(
    builder: Any, weight_format: int, depth: Any, row_at: Any, offsets: list[Any], panels: list[Any], sums: list[Any]
) -> list[Any]:
    """All steps of panels of codes."""
    per_word = 32 // CODE_BITS[weight_format]

    def group(words: Any, at: list[Any], sums: list[Any]) -> list[Any]:
        scales = [_group_scale(builder, weight_format, panel) for panel in at[1:]]

        def word(at: list[Any], sums: list[Any]) -> list[Any]:
            for panel in at[1:]:
                _prefetch(builder, _at(builder, panel, PREFETCH_BYTES))
            loaded = [builder.load(panel, typ=_WORDS, align=4) for panel in at[1:]]
            for step in range(per_word):
                weights = [_decode(builder, weight_format, w, step, scale) for w, scale in zip(loaded, scales, strict=True)]
                sums = _multiply_add(builder, at[0], offsets, weights, sums, step)
            return sums

        codes = [_at(builder, panel, SCALE_BYTES[weight_format]) for panel in at[1:]]
        strides = [_int(4 * per_word), *([_int(LANE_BYTES)] * len(panels))]
        return _repeat(builder, words, [at[0], *codes], strides, sums, word)[1]

    strides = [4 * GROUP, *([group_bytes(weight_format)] * len(panels))]
    return _for_each_group(builder, weight_format, depth, [row_at, *panels], strides, sums, group)


def _write(builder: Any, sums: list[Any], rows: int, panels: int, out: Any, out_stride: Any, add: Any) -> None:
    """Store the sums, or add them to what is there."""
    places = [
        _at(builder, _at(builder, out, builder.mul(out_stride, _int(row))), panel * LANE_BYTES)
        for row in range(rows)
        for panel in range(panels)
    ]
    with builder.if_else(builder.icmp_signed("!=", add, _int(0))) as (adding, storing):
        with adding:
            for place, total in zip(places, sums, strict=True):
                builder.store(builder.fadd(builder.load(place, typ=VECTOR, align=4), total), place, align=4)
        with storing:
            for place, total in zip(places, sums, strict=True):
                builder.store(total, place, align=4)


def _function(module: Any, name: str, num_args: int, emit: Callable[..., None]) -> Any:
    """Emitted once per module and never inlined: it has all registers to itself."""
    if name not in module.globals:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * num_args), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, *function.args)
        builder.ret_void()
    return module.globals[name]


def _weights_tile(module: Any, weight_format: int, rows: int, panels: int) -> Any:
    def emit(
        builder: Any,
        row: Any,
        row_stride: Any,
        panel: Any,
        panel_stride: Any,
        depth: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        ahead: Any,
        ahead_stride: Any,
        ahead_bytes: Any,
        partial: Any,
        part: Any,
    ) -> None:
        row_at, first, out, ahead_at = (builder.inttoptr(address, POINTER) for address in (row, panel, out, ahead))
        offsets = [builder.mul(row_stride, _int(i)) for i in range(rows)]
        at = [_at(builder, first, builder.mul(panel_stride, _int(i))) for i in range(panels)]
        sums = [constant(0.0)] * (rows * panels)
        kept = [_at(builder, builder.inttoptr(partial, POINTER), i * LANE_BYTES) for i in range(rows * panels)]
        if weight_format == FLOAT32:
            sums = _continue(builder, part, kept)
        if weight_format in CODE_BITS:
            sums = _quantised_steps(builder, weight_format, depth, row_at, offsets, at, sums)
        else:
            parts = [_at(builder, ahead_at, builder.mul(ahead_stride, _int(i))) for i in range(panels)]
            sums = _steps(builder, weight_format, depth, row_at, offsets, at, sums, parts, ahead_bytes)
        if weight_format != FLOAT32:
            _write(builder, sums, rows, panels, out, out_stride, add)
            return
        with builder.if_else(_has(builder, part, LEAVE)) as (leaving, ending):
            with leaving:
                for place, total in zip(kept, sums, strict=True):
                    builder.store(total, place, align=4)
            with ending:
                _write(builder, sums, rows, panels, out, out_stride, add)

    return _function(module, f"weights_tile_{weight_format}_{rows}_{panels}", 13, emit)


def _has(builder: Any, part: Any, flag: int) -> Any:
    return builder.icmp_signed("!=", builder.and_(part, _int(flag)), _int(0))


def _continue(builder: Any, part: Any, kept: list[Any]) -> list[Any]:
    """The sums to begin with: zero, or what the tile of the depth before left."""
    before = builder.block
    with builder.if_then(_has(builder, part, CONTINUE)):
        loaded, last = [builder.load(place, typ=VECTOR, align=4) for place in kept], builder.block
    sums = []
    for value in loaded:
        phi = builder.phi(VECTOR)
        phi.add_incoming(constant(0.0), before)
        phi.add_incoming(value, last)
        sums.append(phi)
    return sums


def _pieces_tile(module: Any, rows: int, panels: int) -> Any:
    """Keys of a sequence's blocks: float32 panels whose addresses a table has. Prefetches the next ones in it."""

    def emit(builder: Any, row: Any, row_stride: Any, table: Any, depth: Any, out: Any, out_stride: Any) -> None:
        row_at, table_at, out = (builder.inttoptr(address, POINTER) for address in (row, table, out))
        offsets = [builder.mul(row_stride, _int(i)) for i in range(rows)]
        at = [builder.load(_at(builder, table_at, 8 * i), typ=POINTER, align=8) for i in range(2 * panels)]
        sums, step_bytes = [constant(0.0)] * (rows * panels), _int(STEP_BYTES[FLOAT32])
        sums = _steps(builder, FLOAT32, depth, row_at, offsets, at[:panels], sums, at[panels:], step_bytes)
        _write(builder, sums, rows, panels, out, out_stride, _int(0))

    return _function(module, f"pieces_tile_{rows}_{panels}", 6, emit)


def _blocks_tile(module: Any, rows: int, panels: int) -> Any:
    """Values of a sequence's blocks: steps of `step_bytes` in pieces of LANES steps whose addresses a table has. While it
    is at one piece, it prefetches the next."""

    def emit(
        builder: Any, row: Any, row_stride: Any, table: Any, offset: Any, step_bytes: Any, depth: Any, out: Any, out_stride: Any
    ) -> None:
        row_at, table_at, out = (builder.inttoptr(address, POINTER) for address in (row, table, out))
        offsets = [builder.mul(row_stride, _int(i)) for i in range(rows)]

        def piece(length: Any) -> _Body:
            def body(at: list[Any], sums: list[Any]) -> list[Any]:
                here, following = (
                    [
                        _at(builder, builder.load(_at(builder, at[1], entry), typ=POINTER, align=8), place)
                        for place in (builder.add(offset, _int(panel * LANE_BYTES)) for panel in range(panels))
                    ]
                    for entry in (0, 8)
                )
                return _steps(builder, FLOAT32, length, at[0], offsets, here, sums, following, step_bytes, step_bytes)

            return body

        full, rest = builder.sdiv(depth, _int(LANES)), builder.srem(depth, _int(LANES))
        strides, sums = [_int(4 * LANES), _int(8)], [constant(0.0)] * (rows * panels)
        at, sums = _repeat(builder, full, [row_at, table_at], strides, sums, piece(_int(LANES)))
        some = builder.zext(builder.icmp_signed(">", rest, _int(0)), INT64)
        sums = _repeat(builder, some, at, strides, sums, piece(rest))[1]
        _write(builder, sums, rows, panels, out, out_stride, _int(0))

    return _function(module, f"blocks_tile_{rows}_{panels}", 8, emit)


def _switch(builder: Any, value: Any, cases: dict[int, Any], args: list[Any]) -> None:
    """Call the function of the case that `value` is."""
    end = builder.append_basic_block("called")
    switch = builder.switch(value, end)
    for case, function in cases.items():
        with builder.goto_block(builder.append_basic_block()):
            switch.add_case(_int(case), builder.block)
            builder.call(function, args)
            builder.branch(end)
    builder.position_at_end(end)


# --- what kernels call ---


def _cases(most: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and panels of the tiles there are. most: panels, by rows."""
    return [(rows, panels) for rows in range(1, len(most)) for panels in range(1, most[rows] + 1)]


def _case(builder: Any, weight_format: Any, rows: Any, panels: Any) -> Any:
    return builder.add(builder.add(builder.mul(weight_format, _int(1000)), builder.mul(rows, _int(10))), panels)


@intrinsic
def multiply_tile(
    _context: Any,
    _format: Any,
    _rows: Any,
    _panels: Any,
    _row: Any,
    _row_stride: Any,
    _panel: Any,
    _panel_stride: Any,
    _depth: Any,
    _out: Any,
    _out_stride: Any,
    _add: Any,
    _ahead: Any,
    _ahead_stride: Any,
    _ahead_bytes: Any,
    _partial: Any,
    _part: Any,
) -> Any:
    """out[rows, 16 * panels] = (or +=, with add) row[rows, depth] @ the panels.

    format, rows (1 .. ROWS), panels (1 .. PANELS of the rows), or for other formats than FLOAT32 CODED_ROWS and
    CODED_PANELS; then addresses and strides in bytes, the depth in steps. ahead: where what is to be prefetched begins, how
    far apart it is for the panels, and how many bytes of it each step asks for (tiles of codes do that by themselves).
    partial: room for a float32 tile's sums where `part` has CONTINUE or LEAVE.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        cases = {
            weight_format * 1000 + rows * 10 + panels: _weights_tile(builder.module, weight_format, rows, panels)
            for weight_format in FORMATS
            for rows, panels in _cases(PANELS if weight_format == FLOAT32 else CODED_PANELS)
        }
        _switch(builder, _case(builder, *args[:3]), cases, list(args[3:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 16), codegen


@intrinsic
def multiply_pieces_tile(
    _context: Any,
    _rows: Any,
    _row: Any,
    _row_stride: Any,
    _table: Any,
    _depth: Any,
    _out: Any,
    _out_stride: Any,
) -> Any:
    """out[rows, 16 * panels] = row[rows, depth] @ the float32 panels whose addresses are in the table, KV_PANELS of the rows.

    The table has as many entries again, of what is needed next.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        cases = {rows: _pieces_tile(builder.module, rows, KV_PANELS[rows]) for rows in range(1, ROWS + 1)}
        _switch(builder, args[0], cases, list(args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


@intrinsic
def multiply_blocks_tile(
    _context: Any,
    _rows: Any,
    _panels: Any,
    _row: Any,
    _row_stride: Any,
    _table: Any,
    _offset: Any,
    _step_bytes: Any,
    _depth: Any,
    _out: Any,
    _out_stride: Any,
) -> Any:
    """out[rows, 16 * panels] = row[rows, depth] @ what lies `offset` bytes behind the addresses in the table, LANES steps
    each. The table has one more entry, of what is needed next."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        cases = {10 * rows + panels: _blocks_tile(builder.module, rows, panels) for rows, panels in _cases(KV_PANELS)}
        _switch(builder, _case(builder, _int(0), *args[:2]), cases, list(args[2:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10), codegen


@intrinsic
def expand_panel(_context: Any, _format: Any, _panel: Any, _depth: Any, _out: Any) -> Any:
    """The panel as float32 at `out`: [depth, 16]."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        cases = {weight_format: _expansion(builder.module, weight_format) for weight_format in FORMATS}
        _switch(builder, args[0], cases, list(args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _expansion(module: Any, weight_format: int) -> Any:
    def emit(builder: Any, panel: Any, depth: Any, out: Any) -> None:
        pointers = [builder.inttoptr(panel, POINTER), builder.inttoptr(out, POINTER)]

        def step(at: list[Any], _none: list[Any]) -> list[Any]:
            builder.store(_load_step(builder, weight_format, at[0]), at[1], align=4)
            return []

        def group(words: Any, at: list[Any], _none: list[Any]) -> list[Any]:
            scale = _group_scale(builder, weight_format, at[0])
            per_word = 32 // CODE_BITS[weight_format]

            def word(at: list[Any], _none: list[Any]) -> list[Any]:
                loaded = builder.load(at[0], typ=_WORDS, align=4)
                for step in range(per_word):
                    weights = _decode(builder, weight_format, loaded, step, scale)
                    builder.store(weights, _at(builder, at[1], step * LANE_BYTES), align=4)
                return []

            codes = _at(builder, at[0], SCALE_BYTES[weight_format])
            _repeat(builder, words, [codes, at[1]], [_int(LANE_BYTES), _int(per_word * LANE_BYTES)], [], word)
            return []

        if weight_format in CODE_BITS:
            strides = [group_bytes(weight_format), GROUP * LANE_BYTES]
            _for_each_group(builder, weight_format, depth, pointers, strides, [], group)
        else:
            _repeat(builder, depth, pointers, [_int(STEP_BYTES[weight_format]), _int(LANE_BYTES)], [], step)

    return _function(module, f"expand_{weight_format}", 3, emit)
