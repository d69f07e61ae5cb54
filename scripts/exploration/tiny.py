"""A model and a paged engine small enough for a million lives: the engine is the real one, turned by hand.

The model's KV is the token and its position, four tokens to a block, and its next token follows from what it reads there;
KV that is missing, stale or somebody else's gives another text. Every write is checked: a block that is written into
belongs to one sequence alone, can be found by nobody and is under no lease.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import numpy as np

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.layout import KVLayout, fingerprint
from python_backends.core.types import Epoch, FinishReason, RequestId, SamplingParams
from python_backends.engines.base import OnOutputs
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.paged.runner import Sampled, Slice, accepted, draws_of
from python_backends.engines.paged.speculation import StepCost
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Published, check_time, failed
from scripts.exploration.clock import VirtualTime

BLOCK_SIZE = 4
VOCABULARY = 40
EOS = 2
_CELLS = 2 * BLOCK_SIZE  # 32-bit numbers of a block: tokens, then positions

Fault = Literal["", "drop", "corrupt", "crash"]


def next_token(tokens: Sequence[int], num_prompt: int, sampling: SamplingParams) -> int:
    """What the model says after `tokens`, of which `num_prompt` are the prompt."""
    return _draw(array("I", tokens), len(tokens) - num_prompt, sampling)


def _draw(read: array[int], num_output: int, sampling: SamplingParams) -> int:
    lot = zlib.crc32(read.tobytes(), sampling.seed or 0) >> 3
    token = 3 + lot % (VOCABULARY - 3)
    return EOS if lot % 16 == 0 and num_output >= sampling.min_tokens else token


def answer_to(
    prompt: Sequence[int], sampling: SamplingParams, max_context: int, output: Sequence[int] = ()
) -> tuple[list[int], FinishReason]:
    """All tokens of an answer after `output`, at least one, and why it ends."""
    tokens = [*prompt, *output]
    while True:
        tokens.append(next_token(tokens, len(prompt), sampling))
        if tokens[-1] == EOS:
            return tokens[len(prompt) + len(output) :], FinishReason.STOP
        if len(tokens) - len(prompt) >= sampling.max_tokens or len(tokens) >= max_context:
            return tokens[len(prompt) + len(output) :], FinishReason.LENGTH


class TinyRunner:
    """Implements engines.paged.runner.ModelRunner."""

    def __init__(self, check_write: Callable[[Sequence[Slice]], None]) -> None:
        self.layout = KVLayout(1, 1, 1, BLOCK_SIZE, "float32")
        self.fingerprint = self.fingerprint_of(self.layout)
        self.max_positions = 4096
        self.eos_token_ids: tuple[int, ...] = (EOS,)
        self.vocab_size = VOCABULARY
        self.breaks = False  # the next step fails
        self._check_write = check_write

    def fingerprint_of(self, layout: KVLayout) -> str:
        return fingerprint(layout, "tiny", "tiny")

    def tokenizer_path(self) -> Path:
        raise AssertionError("no request has a grammar")

    @property
    def cores(self) -> str:
        return ""

    def start(self) -> None:
        """There is nothing to load."""

    def attach(self, memory: PoolMemory) -> None:
        self._cells = memoryview(cast(Any, memory.blocks.reshape(-1))).cast("B").cast("I")

    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        self._check_write(batch)
        if self.breaks:
            self.breaks = False
            raise RuntimeError("broken on purpose")
        cells = self._cells
        for piece in batch:
            for position, token in enumerate(piece.token_ids, start=piece.start):
                cell = piece.block_table[position // BLOCK_SIZE] * _CELLS + position % BLOCK_SIZE
                cells[cell], cells[cell + BLOCK_SIZE] = token, position
        return [self._sample(piece) for piece in batch]

    def _sample(self, piece: Slice) -> Sampled | None:
        if piece.draw is None:
            return None
        read = array("I")
        end = piece.start + len(piece.token_ids)
        for position in range(end):
            cell = piece.block_table[position // BLOCK_SIZE] * _CELLS + position % BLOCK_SIZE
            assert self._cells[cell + BLOCK_SIZE] == position, f"use after free: no KV of position {position} where it is read"
            read.append(self._cells[cell])
        draws = enumerate(draws_of(piece), start=end - piece.drafts)
        return accepted(piece, [Sampled(_draw(read[:seen], len(draw.output_ids), draw.sampling), None) for seen, draw in draws])

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def rest(self) -> None:
        """It takes no cores."""

    def are_cores_wanted(self) -> bool:
        return False

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def close(self) -> None:
        """There is nothing to free."""


class HeapMemory(PoolMemory):
    """A KV pool of this process alone. Its first bytes are no KV of any position."""

    def __init__(self, num_blocks: int, block_bytes: int, epoch: Epoch) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.epoch = epoch
        self.generations = np.zeros(num_blocks, np.uint64)
        self.blocks = np.full((num_blocks, block_bytes), 0xFF, np.uint8)
        self.locator = f"heap-{epoch}"

    def close(self) -> None:
        """Whoever reads it is told by `HeapTransport.pools`."""


class HeapTransport(CheckedTransport):
    """Copies from other workers' pools as `shm` does: block by block, and only then asks whether they were still meant.

    pools: of the workers that live. meanwhile: called between two blocks, since the source goes on while it is read.
    """

    def __init__(self, pools: dict[str, HeapMemory], meanwhile: Callable[[], None]) -> None:
        self.name = "shm"
        self.fault: Fault = ""  # of the next transfer
        self._pools = pools
        self._meanwhile = meanwhile

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        return Published(locator=memory.locator)

    def release(self, lease_id: str) -> None:
        """A reader sees by the generations when blocks are written anew."""

    def copy(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        arrived: Arrived,
        *,
        exact: bool,
    ) -> None:
        fault, self.fault = self.fault, ""
        if fault == "drop":
            raise failed("dropped on purpose")
        if fault == "crash":
            raise RuntimeError("a bug on purpose")
        source = self._pools.get(handoff.locator)
        if source is None:
            raise failed("the KV pool is gone")
        for position, block in zip(wanted, blocks, strict=True):
            check_time(deadline)
            into.blocks[block] = source.blocks[handoff.blocks[position]]
            self._meanwhile()
        if fault == "corrupt":
            into.blocks[blocks[0], 0] ^= 1
        for position in wanted:
            if source.generations[handoff.blocks[position]] != handoff.generations[position]:
                raise HandoffRefused(RefusalReason.STALE_EPOCH, "the block was reused")
        if handoff.locator not in self._pools:
            raise HandoffRefused(RefusalReason.STALE_EPOCH, "the pool was closed")

    def close(self) -> None:
        """Nothing is held."""


class Errands:
    """Stands for a thread pool: what was submitted begins, and then ends, when somebody says so."""

    def __init__(self, woken: Callable[[], None]) -> None:
        self._woken = woken
        self._waiting: list[tuple[Future[None], Callable[[], None]]] = []
        self._begun: list[tuple[Future[None], Callable[[], None]]] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._begun)

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        self._waiting.append((future, lambda: call(*arguments)))
        self._woken()
        return future

    def begin(self, rng: Random) -> None:
        """One of those that wait: it can't be cancelled any more."""
        if self._waiting:
            future, call = self._waiting.pop(rng.randrange(len(self._waiting)))
            if future.set_running_or_notify_cancel():
                self._begun.append((future, call))

    def end(self, rng: Random) -> None:
        """One of those that have begun, if there is any."""
        if self._begun:
            future, call = self._begun.pop(rng.randrange(len(self._begun)))
            call()
            future.set_result(None)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self._waiting.clear()


class _CheapGuesses(StepCost):
    """Steps take no time here: guessing always pays."""

    def marginal(self, streams: int) -> float:
        return 0.05


class TinyEngine(PagedEngine):
    """The paged engine without its threads: `turn` is one turn of its loop, `transfers` run when they are run."""

    def __init__(
        self,
        deployment: Deployment,
        worker: WorkerConfig,
        epoch: Epoch,
        key: bytes,
        *,
        num_blocks: int,
        clock: VirtualTime,
        pools: dict[str, HeapMemory],
        meanwhile: Callable[[], None] = lambda: None,
        woken: Callable[[], None] = lambda: None,
    ) -> None:
        """`woken`: called when a transfer is there to be run."""
        self.tiny = TinyRunner(self._check_write)
        super().__init__(deployment, worker, self.tiny, epoch, key)
        self._num_blocks = num_blocks
        self._clock = clock
        self._pools = pools
        self.transport = HeapTransport(pools, meanwhile)
        self._transport = self.transport
        self._step_cost = _CheapGuesses()
        self.transfers = Errands(woken)

    def start(self, on_outputs: OnOutputs) -> None:
        memory = HeapMemory(self._num_blocks, self.tiny.layout.block_bytes, self._epoch)
        self._pools[memory.locator] = memory
        self._furnish(memory, on_outputs)
        self.leases = self._publisher.leases
        self.leases._clock = self._clock.monotonic
        self._publisher._digester = None
        self._fetches._threads = cast(Any, self.transfers)

    def turn(self) -> bool:
        """Returns whether there was anything to compute."""
        return self._turn(wait=False)

    def die(self) -> None:
        """Of a sudden: no last words, nothing given back."""
        assert self._memory is not None
        self._pools.pop(self._memory.locator, None)

    def close(self) -> None:
        """In order: whoever waits is told."""
        if self._memory is not None and self._memory.locator in self._pools:
            self._end_everything()
            self.die()

    @property
    def idle(self) -> bool:
        """Nothing is asked for, nothing is under way."""
        return self._inbox.empty() and not len(self.transfers) and not any(True for _ in self._scheduler.all())

    def holds(self, request_id: RequestId) -> bool:
        """Whether a request has a lease, or is here and not only until its transfer returns."""
        sequence = self._scheduler.find(request_id)
        return request_id in self.leases._of_request or (sequence is not None and not sequence.doomed)

    # --- what must be so at any time ---

    def check(self) -> None:
        """Every reference of every block has its one owner: a sequence that is fetched or computed, or a lease."""
        pool, scheduler = self._pool, self._scheduler
        pool.check()
        owned: Counter[int] = Counter()
        for sequence in scheduler.all():
            owned.update(sequence.blocks)
        for lease in self.leases._leases.values():
            owned.update(lease.blocks)
        assert owned == pool._references, f"owners and references differ: {owned} {pool._references}"
        assert all(not sequence.blocks for sequence in scheduler.waiting), "a waiting sequence holds blocks"
        places = [sequence.id for sequence in scheduler.all()]
        assert len(places) == len(set(places)), "a request is in two places"

    def check_empty(self) -> None:
        """Nothing is held, and nothing is remembered that would be remembered for ever."""
        self.check()
        assert self._pool.held_blocks == 0, f"leak: {self._pool.held_blocks} blocks held at the end"
        assert self.leases.active == 0, "leak: a lease at the end"
        assert self.idle, "a request is still here"

    def _check_write(self, batch: Sequence[Slice]) -> None:
        fetched = {block for sequence in self._scheduler.fetching.values() for block in sequence.blocks}
        written: set[int] = set()
        for piece in batch:
            end = piece.start + len(piece.token_ids)
            blocks = piece.block_table[piece.start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
            assert len(piece.block_table) * BLOCK_SIZE >= end, "tokens without a block"
            for block in blocks:
                assert self._pool._references.get(block) == 1, f"block {block} is written and has other owners"
                assert block not in self._pool._hash_of, f"block {block} is written while it can be found"
                assert block not in fetched, f"block {block} is written while a transfer writes into it"
                assert block not in written, f"block {block} is written by two sequences"
                written.add(block)
