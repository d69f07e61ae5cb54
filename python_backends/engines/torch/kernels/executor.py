"""One worker's compiled model: its weights in panels, its threads, and each step's arrays."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from python_backends.core.layout import KVLayout
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.cores import CoreBoard
from python_backends.engines.torch.kernels.attention import KVPool, head_bytes, partial_floats
from python_backends.engines.torch.kernels.forward import (
    LAST_PHASES,
    LAYER_PHASES,
    OTHER_PHASES,
    PHASES_PER_LAYER,
    Decoder,
    Step,
    Workspace,
    forward,
    scratch_floats,
)
from python_backends.engines.torch.kernels.lending import Cores, cores_now
from python_backends.engines.torch.kernels.packing import load_decoder, padded
from python_backends.engines.torch.kernels.steps import lay_out
from python_backends.engines.torch.kernels.team import control_memory, phase_ends
from python_backends.engines.torch.kernels.tile import FLOAT16, FLOAT32, INT8
from python_backends.engines.torch.kernels.vector import LANES
from python_backends.engines.torch.rope import inverse_frequencies
from python_backends.engines.torch.weights import Checkpoint
from python_backends.kv.memory import PoolMemory

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_LONG_TOKENS = 64  # of a step in which threads whose cores others have wait for them

_KV_FORMATS = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}


class CompiledExecutor:
    """See runner.Executor. All calls come from one thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        layout: KVLayout,
        precision: str,
        board: CoreBoard,
        cache: Path,
    ) -> None:
        self._layout = layout
        self._vocab_size = architecture.vocab_size
        self._group = architecture.num_heads // architecture.num_kv_heads
        self._frequencies: Floats = inverse_frequencies(architecture.rope, architecture.head_dim).numpy()
        self._decoder, self._mapped_weights = load_decoder(checkpoint, architecture, precision, cache)
        self._board = board
        self._cores = Cores(board.rows.ctypes.data, len(board.rows), board.row)
        self._team = Team(min(board.most, len(os.sched_getaffinity(0))))
        self._buffers = _Buffers(self._decoder, self._team.threads)
        self._pool: KVPool | None = None
        self._memory: PoolMemory | None = None
        self._control: Ints = control_memory(0)  # of the last step

    def attach(self, memory: PoolMemory) -> None:
        """Compute in this memory from now on. Loads the machine code, or compiles it at the first start of all."""
        layout, kv_format = self._layout, _KV_FORMATS[self._layout.dtype]
        self._memory = memory
        self._pool = KVPool(
            address=memory.blocks.ctypes.data,
            block_bytes=layout.block_bytes,
            block_size=layout.block_size,
            head_bytes=head_bytes(kv_format, layout.block_size, layout.head_dim),
            kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            kv_format=kv_format,
        )
        self.forward([])

    def forward(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Compute the slices and write their KV; logits of the tokens that draw, float32 [draws, vocab], valid until the
        next call."""
        assert self._pool is not None, "attach() comes first"
        tables = [np.asarray(piece.block_table, np.int64) for piece in slices]  # kept alive during the step
        step = lay_out(slices, tables, self._group, self._frequencies, self._vocab_size)
        work = self._buffers.workspace(step, self._group)
        cores, decoder, pool = self._cores, self._decoder, self._pool
        threads = self._threads(len(step.tokens))
        self._control = work.control
        self._team.run(lambda thread: forward(thread, threads, cores, decoder, pool, step, work), threads)
        return torch.from_numpy(work.logits[: len(step.drawing), : self._vocab_size])

    def _threads(self, tokens: int) -> int:
        """Those that may have a core now; of a long step also those that may get one before it ends."""
        if not self._board.borrows:
            return min(self._board.share, self._team.threads)
        return self._team.threads if tokens >= _LONG_TOKENS else min(cores_now(self._cores), self._team.threads)

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def phase_cycles(self) -> dict[str, int]:
        """Of the last step: cycles (team.cycles) by kind of phase, all layers together. The embedding is not among them."""
        totals = dict.fromkeys((*LAYER_PHASES, *LAST_PHASES), 0)
        before, *ends = phase_ends(self._control).tolist()
        for name, end in zip((*LAYER_PHASES * self._decoder.num_layers, *LAST_PHASES), ends, strict=True):
            if end:
                totals[name] += end - before
                before = end
        return totals

    def close(self) -> None:
        self._team.close()


class Team:
    """The threads a worker may have. The caller's is one of them; the others sleep between runs."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._tasks: list[queue.SimpleQueue[Callable[[int], None] | None]] = [queue.SimpleQueue() for _ in range(1, threads)]
        self._helpers = [
            threading.Thread(target=self._help, args=(number, tasks), name=f"compute-{number}", daemon=True)
            for number, tasks in enumerate(self._tasks, start=1)
        ]
        for helper in self._helpers:
            helper.start()

    def run(self, task: Callable[[int], None], threads: int) -> None:
        """Call the task with 0 .. threads - 1. When it returns here all its work is done, though a thread may come late and
        find that out."""
        for tasks in self._tasks[: threads - 1]:
            tasks.put(task)
        task(0)

    def close(self) -> None:
        """Idempotent."""
        for tasks in self._tasks:
            tasks.put(None)
        for helper in self._helpers:
            helper.join(timeout=10)

    @staticmethod
    def _help(number: int, tasks: queue.SimpleQueue[Callable[[int], None] | None]) -> None:
        while (task := tasks.get()) is not None:
            if tasks.empty():  # else this one was long done without us
                task(number)


class _Buffers:
    """What steps compute in: kept from step to step, made anew when a step is larger than any before."""

    def __init__(self, decoder: Decoder, threads: int) -> None:
        self._decoder = decoder
        deepest = max(decoder.qkv.depth, decoder.attention_output.depth, decoder.down.depth)
        self._phases = PHASES_PER_LAYER * decoder.num_layers + OTHER_PHASES
        self._scratch = _aligned(threads, scratch_floats(decoder.head_dim, deepest))
        self._by_token = (_aligned(0, LANES),) * 5
        self._logits = self._partial = _aligned(0, LANES)

    def workspace(self, step: Step, group: int) -> Workspace:
        decoder = self._decoder
        tokens, draws = len(step.tokens), len(step.drawing)
        if tokens > len(self._by_token[0]) or draws > len(self._by_token[0]):
            width = padded(decoder.hidden)
            widths = (
                width,
                width,
                decoder.qkv.panels * LANES,
                decoder.heads * decoder.head_dim,
                decoder.gate_up.panels * LANES // 2,
            )
            self._by_token = tuple(_aligned(tokens, columns) for columns in widths)  # type: ignore[assignment]
        if draws > len(self._logits):
            self._logits = _aligned(draws, decoder.output.panels * LANES)
        rows = partial_floats(int(step.counts[step.short].max(initial=0)) * group, decoder.head_dim)
        parts = len(step.spans) * decoder.kv_heads
        if parts > self._partial.shape[0] or rows > self._partial.shape[1]:
            self._partial = _aligned(max(parts, self._partial.shape[0]), max(rows, self._partial.shape[1]))
        hidden, normed, qkv, attended, activated = self._by_token
        return Workspace(
            control=control_memory(self._phases),
            hidden=hidden,
            normed=normed,
            qkv=qkv,
            attended=attended,
            activated=activated,
            logits=self._logits,
            partial=self._partial,
            scratch=self._scratch,
        )


def _aligned(rows: int, columns: int) -> Floats:
    """Zeros on cache lines. Rows are an odd number of lines apart: not all in the same sets of the first-level cache."""
    stride = (-(-columns // LANES) | 1) * LANES
    memory = np.zeros(rows * stride + LANES, np.float32)
    offset = -memory.ctypes.data % 64 // 4
    return memory[offset : offset + rows * stride].reshape(rows, stride)
