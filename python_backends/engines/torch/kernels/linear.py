"""Products with weights in panels (tile.py has the inner loops and the formats)."""

from __future__ import annotations

from python_backends.engines.torch.kernels.compiler import part
from python_backends.engines.torch.kernels.tile import (
    FLOAT32,
    ROWS,
    expand_panel,
    multiply_tile,
)
from python_backends.engines.torch.kernels.vector import LANE_BYTES

_PANEL_STEP_BYTES = LANE_BYTES


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
) -> None:
    """out[rows, 16 * num_panels] = (or +=, with add) row[rows, depth] @ panels. Addresses and strides in bytes.

    scratch: room for one panel as float32. More rows than a tile has expand each panel there once.
    """
    if rows <= ROWS:
        at_once = 4 if rows == 1 else 2 if rows <= 3 else 1  # tile._PANELS
        done = 0
        while done < num_panels:
            count = at_once if done + at_once <= num_panels else 1
            multiply_tile(
                weight_format,
                rows,
                count,
                row,
                row_stride,
                panel + done * panel_stride,
                panel_stride,
                depth,
                out + done * LANE_BYTES,
                out_stride,
                add,
            )
            done += count
        return
    for index in range(num_panels):
        at = panel + index * panel_stride
        if weight_format != FLOAT32:
            expand_panel(weight_format, at, depth, scratch)
            at = scratch
        for first in range(0, rows, ROWS):
            multiply_tile(
                FLOAT32,
                min(ROWS, rows - first),
                1,
                row + first * row_stride,
                row_stride,
                at,
                0,
                depth,
                out + first * out_stride + index * LANE_BYTES,
                out_stride,
                add,
            )
