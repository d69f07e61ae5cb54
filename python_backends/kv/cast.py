"""Blocks of KV from one dtype to another: float32, float16 and int8, as the engine itself keeps them.

int8 has one scale per token and head, so that the largest of its numbers becomes 127 (engines/torch/kernels/attention.py
rounds in the same way). What is beyond 65,504 becomes infinite as a float16, there and here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from python_backends.core.layout import KVLayout

Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

_FLOATS = {"float32": np.float32, "float16": np.float16}
_LANES = 16  # tokens side by side in columns of keys
_VECTOR_AXIS = 3
_LARGEST = np.float32(127.0)
_SCALE_BYTES = 4


class Cast:
    """From `source` to `target`, which differ in dtype only. Used by one thread at a time."""

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        self._source = source
        self._target = target
        heads = (source.num_layers, 2, source.num_kv_heads, source.block_size * source.head_dim)
        self._numbers = np.empty(heads, np.float32)  # a block, where one of the two is int8
        self._scratch = np.empty(heads, np.float32)

    def __call__(self, block: Bytes, into: Bytes) -> None:
        """`block`: uint8 [source.block_bytes]; `into`: uint8 [target.block_bytes]."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self._target.dtype == "int8":
                self._quantize(self._floats_of(block), into)
            elif self._source.dtype == "int8":
                self._expand(block, into)
            else:
                ours, theirs = block.view(_FLOATS[self._source.dtype]), into.view(_FLOATS[self._target.dtype])
                np.copyto(theirs, ours, casting="same_kind")

    def _floats_of(self, block: Bytes) -> _Floats:
        if self._source.dtype == "float32":
            return block.view(np.float32).reshape(self._numbers.shape)
        np.copyto(self._numbers, block.view(np.float16).reshape(self._numbers.shape))
        return self._numbers

    def _quantize(self, numbers: _Floats, into: Bytes) -> None:
        codes, scales = _int8_parts(into, self._target)
        np.abs(numbers, out=self._scratch)
        for what, columns in enumerate((self._source.keys == "columns", False)):
            vectors = _vectors(self._scratch[:, what], self._source, columns=columns)
            largest = vectors.max(axis=_VECTOR_AXIS, keepdims=True)
            scale = largest / _LARGEST
            scales[:, what] = scale.reshape(scales[:, what].shape)
            inverse = np.divide(np.float32(1.0), scale, out=np.zeros_like(scale), where=scale > 0)
            np.multiply(_vectors(numbers[:, what], self._source, columns=columns), inverse, out=vectors)
        np.rint(self._scratch, out=self._scratch)
        np.copyto(codes, self._scratch, casting="unsafe")

    def _expand(self, block: Bytes, into: Bytes) -> None:
        codes, scales = _int8_parts(block, self._source)
        floats = into.view(_FLOATS[self._target.dtype]).reshape(self._numbers.shape)
        for what, columns in enumerate((self._source.keys == "columns", False)):
            vectors = _vectors(codes[:, what], self._source, columns=columns)
            factor = scales[:, what].reshape(*vectors.shape[:_VECTOR_AXIS], 1, *vectors.shape[_VECTOR_AXIS + 1 :])
            out = _vectors(floats[:, what], self._source, columns=columns)
            np.multiply(vectors, factor, out=out, casting="same_kind")


def _vectors(numbers: Any, layout: KVLayout, *, columns: bool) -> Any:
    """Keys or values [layers, heads, block_size * head_dim], with each token's vector along _VECTOR_AXIS."""
    layers, heads, _ = numbers.shape
    if columns:
        return numbers.reshape(layers, heads, -1, layout.head_dim, _LANES)
    return numbers.reshape(layers, heads, layout.block_size, layout.head_dim)


def _int8_parts(block: Bytes, layout: KVLayout) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes [layers, 2, heads, block_size * head_dim] and scales [layers, 2, heads, block_size], views of a block."""
    count = layout.block_size * layout.head_dim
    rows = block.reshape(layout.num_layers, 2, layout.num_kv_heads, count + layout.block_size * _SCALE_BYTES)
    return rows[..., :count].view(np.int8), rows[..., count:].view(np.float32)
