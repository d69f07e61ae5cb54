from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import pytest

from python_backends.core.layout import KVLayout, fingerprint

SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32")


def test_sizes_of_a_known_model() -> None:
    assert SMOLLM2.token_bytes == 45 * 1024  # 11,520 elements of 4 bytes
    assert SMOLLM2.block_bytes == 16 * 45 * 1024
    assert SMOLLM2.block_shape == (30, 2, 3, 16, 64)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_block_bytes_are_the_bytes_of_the_shape(dtype: str, size: int) -> None:
    layout = msgspec.structs.replace(SMOLLM2, dtype=dtype)
    assert layout.block_bytes == int(np.prod(layout.block_shape)) * size


def test_int8_keeps_a_scale_per_token_and_head() -> None:
    layout = msgspec.structs.replace(SMOLLM2, dtype="int8")
    assert layout.token_bytes == 30 * 2 * 3 * (64 + 4)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert SMOLLM2.blocks_for(tokens) == blocks


def test_what_differs_is_named_with_both_values() -> None:
    other = msgspec.structs.replace(SMOLLM2, dtype="float16", block_size=32)
    assert SMOLLM2.differences(other) == "block_size 16 and 32, dtype float32 and float16"
    assert SMOLLM2.differences(SMOLLM2) == ""


COLUMNS = msgspec.structs.replace(SMOLLM2, keys="columns")


@pytest.mark.parametrize(
    ("ours", "theirs", "rounding", "obstacle"),
    [
        (SMOLLM2, {}, "none", ""),
        (SMOLLM2, {"block_size": 24}, "none", ""),
        (COLUMNS, {"block_size": 32}, "none", ""),
        (COLUMNS, {"block_size": 24}, "none", "block_size 16 and 24, and of columns only multiples of 16 tokens are converted"),
        (
            SMOLLM2,
            {"dtype": "float16"},
            "none",
            "dtype float32 and float16, which is converted with transfer.rounding: float16",
        ),
        (SMOLLM2, {"dtype": "float16", "block_size": 32}, "float16", ""),
        (SMOLLM2, {"dtype": "int8"}, "float16", "dtype float32 and int8, which is converted with transfer.rounding: int8"),
        (SMOLLM2, {"dtype": "int8"}, "int8", ""),
        (SMOLLM2, {"dtype": "bfloat16"}, "int8", "dtype float32 and bfloat16, which is not converted"),
        (SMOLLM2, {"keys": "columns"}, "int8", "keys rows and columns, which is not converted"),
        (SMOLLM2, {"tp": 2, "block_size": 32}, "int8", "tp 1 and 2, which is not converted"),
    ],
)
def test_what_is_not_converted_is_named(ours: KVLayout, theirs: dict[str, Any], rounding: str, obstacle: str) -> None:
    other = msgspec.structs.replace(ours, **theirs)
    assert ours.obstacle(other, rounding) == obstacle
    assert bool(other.obstacle(ours, rounding)) == bool(obstacle)
    if not obstacle:
        assert ours.relatives(rounding) == other.relatives(rounding)


@pytest.mark.parametrize("rounding", ["none", "float16", "int8"])
def test_dtypes_are_related_as_far_as_rounding_goes(rounding: str) -> None:
    families = {
        dtype: msgspec.structs.replace(SMOLLM2, dtype=dtype).relatives(rounding)
        for dtype in ("float32", "float16", "int8", "bfloat16")
    }
    assert (families["float16"] == families["float32"]) is (rounding != "none")
    assert (families["int8"] == families["float32"]) is (rounding == "int8")
    assert families["bfloat16"] not in [families[dtype] for dtype in ("float32", "float16", "int8")]


def test_fingerprint_is_a_stable_name() -> None:
    one, again = fingerprint(SMOLLM2, "config", "weights"), fingerprint(SMOLLM2, "config", "weights")
    assert one == again
    assert re.fullmatch("[0-9a-f]{32}", one)


@pytest.mark.parametrize(
    "field",
    [
        {"num_layers": 31},
        {"num_kv_heads": 4},
        {"head_dim": 32},
        {"block_size": 8},
        {"dtype": "float16"},
        {"tp": 2},
        {"version": 2},
        {"keys": "columns"},
    ],
)
def test_every_part_of_the_layout_changes_the_fingerprint(field: dict[str, Any]) -> None:
    changed = msgspec.structs.replace(SMOLLM2, **field)
    assert fingerprint(changed, "config", "weights") != fingerprint(SMOLLM2, "config", "weights")


def test_every_field_of_the_layout_is_tried_above() -> None:
    assert len(KVLayout.__struct_fields__) == 8


def test_config_and_weights_change_the_fingerprint() -> None:
    prints = {fingerprint(SMOLLM2, c, w) for c, w in [("a", "b"), ("a", "c"), ("b", "b"), ("ab", ""), ("", "ab")]}
    assert len(prints) == 5
