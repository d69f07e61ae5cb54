"""A few steps of different shapes, timed before a worker reports for duty.

They are where the router's predictions start from; what really happens replaces them soon. The steps write into blocks
of the pool that nobody uses yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from python_backends.core.config import EngineConfig
from python_backends.core.messages import StepSample
from python_backends.core.types import SamplingParams
from python_backends.engines.paged.runner import Draw, ModelRunner, Slice

_BUDGET_S = 1.5  # of all steps together
_REPEAT_S = 0.15  # a step that takes longer is not repeated
_GREEDY = SamplingParams(temperature=0, seed=0)
_TOKEN = 1  # any token of any vocabulary


@dataclass(frozen=True, slots=True)
class _Shape:
    """`prefill` tokens of one prompt after `cached` ones, or `streams` sequences of `context` tokens."""

    prefill: int = 0
    cached: int = 0
    streams: int = 0
    context: int = 64

    @property
    def computed(self) -> int:
        return self.prefill + self.streams

    def num_blocks(self, block_size: int) -> int:
        if self.prefill:
            return -(-(self.cached + self.prefill) // block_size)
        return self.streams * -(-self.context // block_size)

    def sample(self, ms: float) -> StepSample:
        pairs = self.prefill * (self.cached + self.prefill / 2)
        return StepSample(self.prefill, pairs, self.streams, self.streams * self.context, ms)


def calibrate(runner: ModelRunner, num_blocks: int, config: EngineConfig, max_context: int) -> list[StepSample]:
    """Time steps on an attached runner, a second or two of them; shapes that would take longer are left out."""
    chunk = config.step_tokens
    shapes = [
        _Shape(prefill=min(chunk, 64)),
        _Shape(streams=1),
        _Shape(streams=min(8, config.max_batch)),
        _Shape(prefill=chunk),
        _Shape(streams=min(8, config.max_batch), context=512),
        _Shape(prefill=chunk, cached=1024),
    ]
    shapes = [shape for shape in shapes if _fits(shape, num_blocks, runner.layout.block_size, max_context)]
    if not shapes:
        return []
    deadline = time.monotonic() + _BUDGET_S
    samples: list[StepSample] = []
    per_token_s = 0.0  # of what has been seen so far, the least
    _step_ms(runner, _Shape(prefill=1), num_blocks)  # warms up
    for shape in shapes:
        if samples and time.monotonic() + per_token_s * shape.computed > deadline:
            continue
        ms = _step_ms(runner, shape, num_blocks)
        if ms / 1e3 < _REPEAT_S:
            ms = min(ms, _step_ms(runner, shape, num_blocks))  # the first of its kind also pays for memory and tuning
        samples.append(shape.sample(ms))
        per_token_s = min(sample.ms / 1e3 / (sample.prefill_tokens + sample.decode_streams) for sample in samples)
    return samples


def _fits(shape: _Shape, num_blocks: int, block_size: int, max_context: int) -> bool:
    return max(shape.cached + shape.prefill, shape.context) < max_context and shape.num_blocks(block_size) <= num_blocks


def _step_ms(runner: ModelRunner, shape: _Shape, num_blocks: int) -> float:
    batch = _slices(shape, num_blocks, runner.layout.block_size)
    began = time.monotonic()
    runner.step(batch)
    return (time.monotonic() - began) * 1e3


def _slices(shape: _Shape, num_blocks: int, block_size: int) -> Sequence[Slice]:
    """In the last blocks of the pool, which are given out last."""
    blocks = range(num_blocks - shape.num_blocks(block_size), num_blocks)
    if shape.prefill:
        return [Slice([_TOKEN] * shape.prefill, shape.cached, blocks, _draw())]
    each = len(blocks) // shape.streams
    tables = [blocks[index * each : (index + 1) * each] for index in range(shape.streams)]
    return [Slice([_TOKEN], shape.context - 1, table, _draw()) for table in tables]


def _draw() -> Draw:
    return Draw(_GREEDY, [_TOKEN], [], [])
