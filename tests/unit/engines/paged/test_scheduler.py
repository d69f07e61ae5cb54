"""What a step computes of prompts beside running streams, when that is limited by time."""

from __future__ import annotations

import numpy as np

from python_backends.core.types import BlockHash, GenerateRequest, RequestId, SamplingParams
from python_backends.engines.paged.scheduler import Scheduler
from python_backends.engines.paged.sequence import Sequence
from python_backends.kv.block_pool import BlockPool

BLOCK = 16
BLOCKS = 1000
PAIRS = 20_000  # of a prompt's token and an earlier one, that fit into a step


def _sequence(name: str, arrival: int, tokens: int, computed: int) -> Sequence:
    request = GenerateRequest(RequestId(name), [arrival + 1] * tokens, SamplingParams(), deadline=0.0)
    sequence = Sequence(request, prefill_only=False, arrival=arrival, block_size=BLOCK, root=BlockHash(b""))
    sequence.num_computed = computed
    return sequence


def _scheduler(*sequences: Sequence) -> Scheduler:
    """All of them are running."""
    scheduler = Scheduler(BlockPool(BLOCKS, np.zeros(BLOCKS, np.uint64)), BLOCK, max_batch=8, step_tokens=256)
    for sequence in sequences:
        computed = sequence.num_computed
        scheduler.add(sequence)
        scheduler.admit()
        sequence.num_computed = computed
    return scheduler


def _within(streams: int, context: int, depth: float) -> int:
    """What a limit of PAIRS leaves."""
    return next(tokens for tokens in range(256 - streams, 0, -1) if tokens == 1 or tokens * (depth + tokens / 2) <= PAIRS)


def test_a_deep_prompt_behind_a_new_one_makes_the_chunk_smaller() -> None:
    stream = _sequence("stream", 0, 40, 39)
    new, deep = _sequence("new", 1, 100, 0), _sequence("deep", 2, 4000, 3000)
    scheduler = _scheduler(stream, new, deep)
    assert sum(count for _, count in scheduler.schedule()) == 256
    scheduler.limit_steps(_within)
    chunks = {sequence.id: count for sequence, count in scheduler.schedule()}
    assert chunks[stream.id] == 1
    pairs = sum(chunks[s.id] * (s.num_computed + chunks[s.id] / 2) for s in (new, deep) if s.id in chunks)
    assert pairs <= PAIRS
    assert pairs > PAIRS / 2


def test_a_prompt_goes_on_however_tight_the_limit_is() -> None:
    stream, deep = _sequence("stream", 0, 40, 39), _sequence("deep", 1, 4000, 3900)
    scheduler = _scheduler(stream, deep)
    scheduler.limit_steps(lambda streams, context, depth: 1)
    assert {sequence.id: count for sequence, count in scheduler.schedule()} == {"stream": 1, "deep": 1}


def test_without_streams_nobody_waits_so_nothing_is_cut() -> None:
    scheduler = _scheduler(_sequence("deep", 0, 4000, 3000))
    scheduler.limit_steps(lambda streams, context, depth: 1)
    assert [count for _, count in scheduler.schedule()] == [256]


def test_where_streams_are_expected_steps_are_as_short_as_beside_them() -> None:
    scheduler = _scheduler(_sequence("deep", 0, 4000, 3000))
    assert [count for _, count in scheduler.schedule(expects_streams=True)] == [256], "there is no limit"
    scheduler.limit_steps(lambda streams, context, depth: 100 if (streams, context) == (0, 0) else 256)
    assert [count for _, count in scheduler.schedule(expects_streams=True)] == [100]
