"""Cores that the workers of one host lend each other while they have nothing to compute.

A worker has a share of the host's cores. While it has work it also uses the shares of workers that have none, divided
among those that have; when an owner has work again, the borrower's threads leave at the next layer of its model, or wait
there for a core if its step is a long one.

Who has work stands on a board, shared memory with a row per worker: int64 [rows, 8]: cores of its share, has work, has a
prompt that takes more steps than one.
A row belongs to its worker. One that dies at work lends nothing until its successor is up.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from python_backends.core.paths import run_base
from python_backends.core.shared_memory import Membership, create_memory, join, sweep
from python_backends.core.signing import Domain, mac

ROW_INTS = 8  # a cache line each
SHARE, AT_WORK, HAS_LONG_PROMPT = 0, 1, 2
_MEMORY = "baton-cores"


class CoreBoard:
    """One worker's view of the board. It belongs to the engine, which closes it."""

    def __init__(
        self, rows: npt.NDArray[np.int64], row: int, share: int, membership: Membership | None = None, name: str = ""
    ) -> None:
        """rows: the board, [workers, ROW_INTS]; `row` of it is this worker's. `membership` keeps it, and is closed with it.

        name: the same for all that share these cores, on this host; empty: nobody else does.
        """
        self.name = name
        self.rows = rows
        self.row = row
        self.borrows = False  # from the first rest on: what is measured while loading is what the share alone can do
        self._membership = membership
        rows[row, SHARE] = share
        rows[row, AT_WORK] = rows[row, HAS_LONG_PROMPT] = 0

    @property
    def most(self) -> int:
        """Threads that this worker may ever compute with."""
        others = sum(int(share) for number, share in enumerate(self.rows[:, SHARE]) if number != self.row)
        unknown = int((self.rows[:, SHARE] == 0).sum())  # not started yet; shares are even
        return self.share + others + unknown * self.share

    @property
    def share(self) -> int:
        return int(self.rows[self.row, SHARE])

    @property
    def is_wanted(self) -> bool:
        """Whether others compute long prompts, which are done the sooner the more cores they have."""
        return bool(self.rows[:, HAS_LONG_PROMPT].sum() - self.rows[self.row, HAS_LONG_PROMPT])

    def work(self, *, long_prompt: bool = False) -> None:
        """There is something to compute: cores lent to others are wanted back. long_prompt: it goes on in the next step."""
        self.rows[self.row, AT_WORK] = 1
        self.rows[self.row, HAS_LONG_PROMPT] = long_prompt

    def rest(self) -> None:
        """There is nothing to compute: others may use the cores."""
        self.borrows = True
        self.rows[self.row, AT_WORK] = self.rows[self.row, HAS_LONG_PROMPT] = 0

    def close(self) -> None:
        """Idempotent."""
        self.rest()
        if self._membership is not None:
            self._membership.close()


def own_cores(share: int) -> CoreBoard:
    """Of a worker that neither lends nor borrows."""
    return CoreBoard(np.zeros((1, ROW_INTS), np.int64), 0, share)


def shared_cores(names: Sequence[str], name: str, share: int, key: bytes, base: Path | None = None) -> CoreBoard:
    """The board of the workers `names` of the deployment with this key on this host; `name` is one of them.

    `base`: where its members meet; run_base() if None. Raises ConfigError when the memory can't be had.
    """
    base = base or run_base()
    for place in base.glob("cores-*"):
        sweep(place, _MEMORY)
    size = len(names) * ROW_INTS * 8
    place = base / f"cores-{mac(Domain.CORES, ' '.join(names).encode(), key)[:8].hex()}"
    membership = join(place, _MEMORY, lambda: _create(size), lambda fd: os.fstat(fd).st_size == size)
    rows = np.frombuffer(mmap.mmap(membership.fd, size), np.int64).reshape(len(names), ROW_INTS)
    return CoreBoard(rows, names.index(name), share, membership, place.name)


def _create(size: int) -> int:
    fd, memory = create_memory(_MEMORY, size, "the board of cores", "engine.elastic_cores")
    memory.close()
    return fd
