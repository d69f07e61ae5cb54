from __future__ import annotations

import torch

from python_backends.core.layout import KVLayout
from python_backends.core.types import SamplingParams
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.batch import Batch, execution_order, prepare

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
DRAW = Draw(SamplingParams(seed=0), [], [], [])


def _decoding(context: int, first_block: int) -> Slice:
    """A sequence of `context` tokens whose last is computed now."""
    return Slice([1], context - 1, range(first_block, first_block + LAYOUT.blocks_for(context)), DRAW)


def _prepare(slices: list[Slice], window: int | None = None) -> Batch:
    return prepare([slices[i] for i in execution_order(slices)], [window], LAYOUT, torch.float32, torch.device("cpu"))


def test_decoding_sequences_come_first_and_shorter_ones_before_longer() -> None:
    slices = [Slice([1, 2, 3], 0, [0], None), _decoding(9, 1), _decoding(2, 4), Slice([1, 2], 5, [5, 6], None)]
    assert execution_order(slices) == [2, 1, 0, 3]


def test_places_of_tokens() -> None:
    batch = _prepare([Slice([11, 12, 13], 3, [7, 2], None), Slice([14], 4, [5, 9], DRAW)])
    assert batch.token_ids.tolist() == [14, 11, 12, 13]
    assert batch.positions.tolist() == [4, 3, 4, 5]
    assert batch.blocks.tolist() == [9, 7, 2, 2]
    assert batch.slots.tolist() == [0, 3, 0, 1]
    assert batch.new_blocks.tolist() == [9, 2]
    assert batch.last_tokens.tolist() == [0]


def test_one_long_context_does_not_widen_the_short_ones() -> None:
    slices = [_decoding(800, 100), *(_decoding(6, 2 * i) for i in range(20))]
    groups = _prepare(slices).groups[None]
    gathered = sum(len(group.rows) for group in groups)
    held = sum(len(piece.block_table) for piece in slices) * 2 * LAYOUT.num_kv_heads
    assert held <= gathered <= 2 * held
    assert [(group.begin, group.end) for group in groups] == [(0, 20), (20, 21)]


def test_padding_reads_blocks_of_the_same_sequence_only() -> None:
    slices = [_decoding(9, 10), _decoding(5, 20), Slice([1, 2], 7, [30, 31, 32], None)]
    for group, owned in zip(_prepare(slices).groups[None], ([range(20, 22), range(10, 13)], [range(30, 33)]), strict=True):
        blocks = (group.rows // (LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads)).view(2, group.num_sequences, -1)
        for index, own in enumerate(owned):
            assert set(blocks[:, index].flatten().tolist()) == set(own)


def test_blocks_before_the_window_are_not_gathered() -> None:
    (group,) = _prepare([Slice([1, 2], 30, range(8), DRAW)], window=6).groups[6]
    blocks = group.rows // (LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads)
    assert set(blocks.tolist()) == {6, 7}  # positions 25 .. 31 are seen, from block 6 (24 .. 27) on
    visible = (group.mask[0, 0] == 0).nonzero().tolist()
    assert visible == [[0, key - 24] for key in range(25, 31)] + [[1, key - 24] for key in range(26, 32)]
