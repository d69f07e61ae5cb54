"""Blocks from one dtype to another, against the same written plainly."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from python_backends.core.layout import KVLayout
from python_backends.kv.cast import Cast
from tests.kv.kv_blocks import numbers_of, pack, unpack

ROWS = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="float32")
COLUMNS = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=32, dtype="float32", keys="columns")


def of(layout: KVLayout, dtype: str) -> KVLayout:
    return msgspec.structs.replace(layout, dtype=dtype)


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "float16"),
        ("float32", "int8"),
        ("float16", "float32"),
        ("float16", "int8"),
        ("int8", "float32"),
        ("int8", "float16"),
    ],
)
def test_a_block_becomes_what_the_numbers_say(layout: KVLayout, source: str, target: str) -> None:
    ours, theirs = of(layout, source), of(layout, target)
    block = pack(numbers_of(layout, layout.block_size), ours)
    into = np.full((1, theirs.block_bytes), 255, np.uint8)
    Cast(ours, theirs)(block[0], into[0])
    assert np.array_equal(into, pack(unpack(block, ours, layout.block_size), theirs))


def test_vectors_of_zeros_stay_zeros() -> None:
    into = np.full(of(ROWS, "int8").block_bytes, 255, np.uint8)
    Cast(ROWS, of(ROWS, "int8"))(np.zeros(ROWS.block_bytes, np.uint8), into)
    assert not into.any()


def test_what_a_float16_cannot_hold_is_infinite_and_no_warning() -> None:
    block = np.full(ROWS.block_bytes // 4, 70_000, np.float32).view(np.uint8)
    into = np.empty(of(ROWS, "float16").block_bytes, np.uint8)
    Cast(ROWS, of(ROWS, "float16"))(block, into)
    assert np.isinf(into.view(np.float16)).all()
