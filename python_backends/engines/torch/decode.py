"""Steps of single tokens at fixed shapes and addresses, so that a GPU replays them without Python in between.

A row is one token with its position and its sequence's block table; a stream with drafts has a row for each of them. Steps
are prepared for 1, 2, 4, 8 ... rows and filled up with rows that write to a block of nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.attention import clear_blocks
from python_backends.engines.torch.device import Device
from python_backends.engines.torch.model import Model
from python_backends.engines.torch.paged_attention import Flex, PagedAttention, Rows

_TABLE = 2  # the column of the inputs where the block table begins, behind token and position


def row_sizes(most: int) -> list[int]:
    """Numbers of rows that steps are prepared for, so that `most` fit: 1, 2, 4, 8 ..."""
    return [1 << exponent for exponent in range((most - 1).bit_length() + 1)]


def num_rows(piece: Slice) -> int:
    """How many rows compute a slice; 0: it has tokens that draw nothing, and is no matter of rows."""
    return len(piece.token_ids) if piece.draw is not None and len(piece.token_ids) == piece.drafts + 1 else 0


class DecodeSteps:
    def __init__(
        self, model: Model, architecture: Architecture, pool: torch.Tensor, device: Device, flex: Flex, most: int, width: int
    ) -> None:
        """`pool` [blocks + 1, *KVLayout.block_shape]: the last block is written by rows that stand for nothing.

        most: rows of one step. width: blocks of the longest context.
        """
        self._pool = pool
        # The largest first: what it needs of memory serves the others, too.
        sizes = reversed(row_sizes(most))
        self._steps = {size: _Step(size, model, architecture, pool, device, flex, width) for size in sizes}
        self.most = max(self._steps)

    def logits(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Of all tokens of slices that are rows, at most `most`, float32 [tokens, vocab]. Overwritten by the next step."""
        count = sum(num_rows(piece) for piece in slices)
        step = self._steps[1 << (count - 1).bit_length()]
        return step.logits(slices, count)


class _Step:
    """Of `size` rows. inputs: int32 [size, token, position, block table ...], on the host and on the device."""

    def __init__(
        self, size: int, model: Model, architecture: Architecture, pool: torch.Tensor, device: Device, flex: Flex, width: int
    ) -> None:
        self._pool = pool
        self._block_size = pool.shape[4]
        self._nobody = len(pool) - 1
        self._host = device.staging((size, _TABLE + width))
        self._values = self._host.numpy()
        self._inputs = torch.zeros(self._host.shape, dtype=torch.int32, device=pool.device)
        self._values[:, _TABLE:] = self._nobody
        self._tables: list[tuple[Sequence[int], int]] = [((), 0)] * size  # of each row: the table, entries already copied
        self._used = 0
        self._logits = torch.zeros(size, architecture.vocab_size, device=pool.device)
        self._inputs.copy_(self._host)
        self._replay: Callable[[], None] = device.captured(lambda: self._compute(model, architecture, flex))

    def _compute(self, model: Model, architecture: Architecture, flex: Flex) -> None:
        """Reads and writes memory of this step and the pool, only; its shapes never change."""
        inputs = self._inputs.to(torch.int64)
        rows = Rows(inputs[:, 0], inputs[:, 1], inputs[:, _TABLE:])
        group = architecture.num_heads // architecture.num_kv_heads
        attention = PagedAttention(rows, architecture.windows, self._pool, flex, group)
        self._logits.copy_(model.forward(rows.token_ids, rows.positions, attention))

    def logits(self, slices: Sequence[Slice], count: int) -> torch.Tensor:
        self._fill(slices, count)
        values = self._values[:count]
        positions = values[:, 1]
        begun = np.flatnonzero(positions % self._block_size == 0)
        if len(begun):
            blocks = values[begun, _TABLE + positions[begun] // self._block_size]
            clear_blocks(self._pool, torch.from_numpy(blocks.astype(np.int64)).to(self._pool.device))
        self._inputs.copy_(self._host, non_blocking=True)
        self._replay()
        return self._logits[:count]

    def _fill(self, slices: Sequence[Slice], count: int) -> None:
        """Of a table that was in the same row before only what is new is copied: tables grow, and change in no other way."""
        values = self._values
        values[:count, 0] = [token for piece in slices for token in piece.token_ids]
        values[:count, 1] = [piece.start + offset for piece in slices for offset in range(len(piece.token_ids))]
        tables = [piece.block_table for piece in slices for _ in piece.token_ids]
        for row, table in enumerate(tables):
            known, copied = self._tables[row]
            first = copied if known is table else 0
            if first < len(table):
                values[row, _TABLE + first : _TABLE + len(table)] = table[first:]
            self._tables[row] = table, len(table)
        for row in range(count, self._used):  # these stand for nothing again
            values[row, : _TABLE + 1] = 0, 0, self._nobody
            self._tables[row] = (), 0
        self._used = count
