"""How many threads a worker may compute with now, from the board of cores (cores.py)."""

from __future__ import annotations

from typing import NamedTuple

from python_backends.engines.torch.cores import AT_WORK, ROW_INTS, SHARE
from python_backends.engines.torch.kernels.compiler import part
from python_backends.engines.torch.kernels.team import look


class Cores(NamedTuple):
    """The board's address, its rows, and which of them is this worker's."""

    board: int
    rows: int
    row: int


@part
def cores_now(cores: Cores) -> int:
    """The worker's share, and its part of what those without work lend. Those before it on the board get what is over."""
    share, lent, borrowers, before = 0, 0, 1, 0
    for row in range(cores.rows):
        address = cores.board + row * ROW_INTS * 8
        threads, at_work = look(address + 8 * SHARE), look(address + 8 * AT_WORK)
        if row == cores.row:
            share = threads
        elif at_work:
            borrowers += 1
            before += row < cores.row
        else:
            lent += threads
    return share + lent // borrowers + (before < lent % borrowers)
