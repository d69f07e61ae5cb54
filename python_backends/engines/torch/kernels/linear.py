"""Products with weights in panels (tile.py has the inner loops and the formats)."""

from __future__ import annotations

from python_backends.engines.torch.kernels.compiler import kernel, part
from python_backends.engines.torch.kernels.tile import (
    CODED_PANELS,
    CODED_ROWS,
    CONTINUE,
    FLOAT32,
    FORMATS,
    GROUP,
    LEAVE,
    PANELS,
    PREFETCH_BYTES,
    ROWS,
    expand_panel,
    group_bytes,
    multiply_tile,
)
from python_backends.engines.torch.kernels.vector import LANE_BYTES, LANES

PIECE = 8 * GROUP  # steps of depth that are expanded at once: they stay in the first-level cache
PIECE_TILES = 4  # up to which a panel is expanded in pieces; with more, keeping their sums costs more than it saves
_GROUP_BYTES = tuple(group_bytes(weight_format) for weight_format in FORMATS)


@kernel
def panels_at_once(rows: int) -> int:
    """That so many rows are multiplied with at most."""
    return PANELS[min(rows, ROWS)]


def multiply_floats(deepest: int) -> int:
    """Room that `multiply` needs: expanded panels, where codes of the last word may go on beyond the depth, and sums."""
    return PANELS[ROWS] * LANES * (deepest + 8 + PIECE_TILES * ROWS)


@part
def multiply(
    weight_format: int,
    rows: int,
    row: int,
    row_stride: int,
    panel: int,
    panel_stride: int,
    num_panels: int,
    depth: int,
    out: int,
    out_stride: int,
    add: int,
    scratch: int,
    following: int,
) -> None:
    """out[rows, 16 * num_panels] = (or +=, with add) row[rows, depth] @ panels. Addresses and strides in bytes.

    scratch: `multiply_floats`. More rows than CODED_ROWS expand narrow panels there once. following: the panels that are
    likely needed after these.
    """
    coded = weight_format != FLOAT32 and rows <= CODED_ROWS
    if coded or rows <= ROWS:
        at_once = CODED_PANELS[rows] if coded else PANELS[rows]
        for index in range(0, num_panels, at_once):
            at = panel + index * panel_stride
            multiply_tile(
                weight_format,
                rows,
                min(at_once, num_panels - index),
                row,
                row_stride,
                at,
                panel_stride,
                depth,
                out + index * LANE_BYTES,
                out_stride,
                add,
                at + PREFETCH_BYTES,
                panel_stride,
                panel_stride // depth,
                0,
                0,
            )
        return
    tiles = (rows + ROWS - 1) // ROWS
    narrow = weight_format != FLOAT32
    piece = PIECE if narrow and tiles <= PIECE_TILES else depth
    partial = scratch + PANELS[ROWS] * (depth + 8) * LANE_BYTES
    for index in range(0, num_panels, PANELS[ROWS]):
        here, count = panel + index * panel_stride, min(PANELS[ROWS], num_panels - index)
        ahead = here + count * panel_stride if index + count < num_panels else following
        for start in range(0, depth, piece):
            steps, at, stride = min(piece, depth - start), here, panel_stride
            if narrow:
                at, stride = scratch, steps * LANE_BYTES
                for i in range(count):
                    codes = here + i * panel_stride + start // GROUP * _GROUP_BYTES[weight_format]
                    expand_panel(weight_format, codes, steps, at + i * stride)
            for tile in range(tiles):
                first = rows * tile // tiles
                multiply_tile(
                    FLOAT32,
                    rows * (tile + 1) // tiles - first,
                    count,
                    row + first * row_stride + 4 * start,
                    row_stride,
                    at,
                    stride,
                    steps,
                    out + first * out_stride + index * LANE_BYTES,
                    out_stride,
                    add,
                    ahead + panel_stride * (start * tiles + tile * steps) // (depth * tiles),
                    panel_stride,
                    (panel_stride + tiles * depth - 1) // (tiles * depth),
                    partial + first * PANELS[ROWS] * LANE_BYTES,
                    (CONTINUE if start > 0 else 0) | (LEAVE if start + steps < depth else 0),
                )
