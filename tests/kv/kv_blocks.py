"""KV as numbers of tokens, and as blocks of any layout: written plainly, to compare what is fast with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from python_backends.core.layout import KVLayout

Numbers = npt.NDArray[np.float32]  # [layers, 2 (K, V), kv_heads, tokens, head_dim]
Blocks = npt.NDArray[np.uint8]  # [blocks, block_bytes]

_FLOATS = {"float32": np.float32, "float16": np.float16}


def numbers_of(layout: KVLayout, tokens: int, seed: int = 0) -> Numbers:
    shape = (layout.num_layers, 2, layout.num_kv_heads, tokens, layout.head_dim)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pack(numbers: Numbers, layout: KVLayout) -> Blocks:
    """The last block's rest is ones."""
    count = layout.blocks_for(numbers.shape[3])
    padded = np.ones((*numbers.shape[:3], count * layout.block_size, layout.head_dim), np.float32)
    padded[:, :, :, : numbers.shape[3]] = numbers
    blocks = np.zeros((count, layout.block_bytes), np.uint8)
    for block in range(count):
        part = padded[:, :, :, block * layout.block_size : (block + 1) * layout.block_size]
        heads = blocks[block].reshape(*numbers.shape[:3], -1)
        for place in np.ndindex(numbers.shape[:3]):
            heads[place] = np.frombuffer(_pack_head(part[place], layout, is_key=place[1] == 0), np.uint8)
    return blocks


def unpack(blocks: Blocks, layout: KVLayout, tokens: int) -> Numbers:
    shape = (layout.num_layers, 2, layout.num_kv_heads, len(blocks) * layout.block_size, layout.head_dim)
    numbers = np.zeros(shape, np.float32)
    for block, data in enumerate(blocks):
        heads = data.reshape(*shape[:3], -1)
        for place in np.ndindex(shape[:3]):
            span = slice(block * layout.block_size, (block + 1) * layout.block_size)
            numbers[place][span] = _unpack_head(heads[place], layout, is_key=place[1] == 0)
    return numbers[:, :, :, :tokens]


def _pack_head(vectors: Numbers, layout: KVLayout, *, is_key: bool) -> bytes:
    scales = b""
    kept: Any = vectors
    if layout.dtype == "int8":
        largest = np.abs(vectors).max(axis=1)
        scale = (largest / np.float32(127)).astype(np.float32)
        inverse = np.array([np.float32(1) / each if each > 0 else np.float32(0) for each in scale], np.float32)
        kept = np.rint(vectors * inverse[:, None]).astype(np.int8)
        scales = scale.tobytes()
    else:
        kept = vectors.astype(_FLOATS[layout.dtype])
    if is_key and layout.keys == "columns":
        kept = np.concatenate([kept[at : at + 16].T.reshape(-1) for at in range(0, len(kept), 16)])
    return bytes(kept.tobytes() + scales)


def _unpack_head(data: npt.NDArray[np.uint8], layout: KVLayout, *, is_key: bool) -> Any:
    size, dim = layout.block_size, layout.head_dim
    if layout.dtype == "int8":
        kept: Any = data[: size * dim].view(np.int8).astype(np.float32)
        scales = np.ascontiguousarray(data[size * dim :]).view(np.float32)
    else:
        kept, scales = np.ascontiguousarray(data).view(_FLOATS[layout.dtype]).astype(np.float32), np.ones(size, np.float32)
    if is_key and layout.keys == "columns":
        kept = np.concatenate([piece.reshape(dim, 16).T for piece in np.split(kept, size // 16)])
    return kept.reshape(size, dim) * scales[:, None]
