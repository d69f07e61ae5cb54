"""Products with weights in panels (tile.py has the inner loops and the formats)."""

from __future__ import annotations

from python_backends.engines.torch.kernels.compiler import kernel, part
from python_backends.engines.torch.kernels.tile import (
    CODED_ROWS,
    FLOAT32,
    PANELS,
    PREFETCH_BYTES,
    ROWS,
    expand_panel,
    multiply_tile,
)
from python_backends.engines.torch.kernels.vector import LANE_BYTES


@kernel
def panels_at_once(rows: int) -> int:
    """That so many rows are multiplied with."""
    return PANELS[min(rows, ROWS)]


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

    scratch: room for PANELS[ROWS] panels as float32. More rows than CODED_ROWS expand narrow panels there once.
    following: the panels that are likely needed after these.
    """
    tiles = (rows + ROWS - 1) // ROWS
    at_once = panels_at_once(rows)
    narrow = weight_format != FLOAT32
    for index in range(0, num_panels, at_once):
        at, count, stride = panel + index * panel_stride, min(at_once, num_panels - index), panel_stride
        if tiles == 1 and (rows <= CODED_ROWS or not narrow):
            multiply_tile(
                weight_format,
                rows,
                count,
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
            )
            continue
        ahead = at + count * panel_stride if index + count < num_panels else following
        if narrow:
            stride = depth * LANE_BYTES
            for i in range(count):
                expand_panel(weight_format, at + i * panel_stride, depth, scratch + i * stride)
            at = scratch
        for tile in range(tiles):
            first = rows * tile // tiles
            multiply_tile(
                FLOAT32,
                rows * (tile + 1) // tiles - first,
                count,
                row + first * row_stride,
                row_stride,
                at,
                stride,
                depth,
                out + first * out_stride + index * LANE_BYTES,
                out_stride,
                add,
                ahead + panel_stride * tile // tiles,
                panel_stride,
                (panel_stride + tiles * depth - 1) // (tiles * depth),
            )
