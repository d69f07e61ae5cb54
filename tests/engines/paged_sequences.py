"""Sequences that a ModelRunner computes in blocks of random order, without an engine around it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from python_backends.core.types import Epoch, SamplingParams
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.runner import TorchRunner
from python_backends.kv.memory import PoolMemory


@dataclass
class PagedSequence:
    """Tokens, and how many of them have their KV in `blocks`."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class SequencePool:
    """A started runner and its KV pool."""

    def __init__(self, runner: TorchRunner, num_blocks: int) -> None:
        self.runner = runner
        runner.start()
        self.memory = PoolMemory(num_blocks, runner.layout.block_bytes, Epoch(1))
        self.memory.blocks.fill(0xFF)  # NaN in every dtype: what a sequence did not write must never count
        runner.attach(self.memory)
        self.free = list(range(num_blocks))
        random.Random(1).shuffle(self.free)

    def slice(self, sequence: PagedSequence, count: int, *, draw: bool) -> Slice:
        """The sequence's next `count` tokens."""
        start, end = sequence.computed, sequence.computed + count
        while len(sequence.blocks) * self.runner.layout.block_size < end:
            sequence.blocks.append(self.free.pop())
        sequence.computed = end
        return Slice(sequence.tokens[start:end], start, sequence.blocks, greedy_draw() if draw else None)

    def greedy(self, sequence: PagedSequence, count: int, chunk: int) -> list[int]:
        """Compute what is left of the sequence in chunks, then append `count` more tokens and return them."""
        produced: list[int] = []
        while len(produced) < count:
            left = len(sequence.tokens) - sequence.computed
            (sampled,) = self.runner.step([self.slice(sequence, min(left, chunk), draw=left <= chunk)])
            if sampled is not None:
                sequence.tokens.append(sampled.token_id)
                produced.append(sampled.token_id)
        return produced

    def close(self) -> None:
        self.runner.close()
        self.memory.close()


def greedy_draw() -> Draw:
    return Draw(SamplingParams(temperature=0, seed=0), [], [], [])


def memory_of(engine: object) -> PoolMemory:
    """The pool memory of a started paged engine."""
    assert isinstance(engine, PagedEngine)
    assert engine._memory is not None
    return engine._memory
