"""What the KV of one block looks like, and what must be equal for KV to be exchangeable."""

from __future__ import annotations

import hashlib

import msgspec

LAYOUT_VERSION = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
ROUNDINGS = ("none", "float16", "int8")
"""What `transfer.rounding` may be: how far KV may be rounded on its way, the next one always further."""

_SCALE_BYTES = 4  # int8: one float32 per token and head, for keys and for values
_EXACT_AT = {"float32": "none", "float16": "float16", "int8": "int8"}  # dtype -> the rounding that leaves its numbers alone
_LANES = 16  # tokens that columns of keys are made of


class KVLayout(msgspec.Struct, frozen=True):
    """Shape of one KV block: `[layers, 2 (K, V), kv_heads, block_size, head_dim]`, contiguous, so a block is one piece.

    keys: rows, as above; or columns: each sixteen tokens' keys of a head are `[head_dim, 16]` instead. int8: the numbers of
    each head are followed by its scales, float32 `[block_size]`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # float32 | bfloat16 | float16 | int8 | fp8
    tp: int = 1
    version: int = LAYOUT_VERSION
    keys: str = "rows"  # rows | columns

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.vector_bytes

    @property
    def vector_bytes(self) -> int:
        """Of the keys, or the values, of one token and head."""
        return self.head_dim * DTYPE_BYTES[self.dtype] + (_SCALE_BYTES if self.dtype == "int8" else 0)

    def differences(self, other: KVLayout) -> str:
        """`dtype float16 and float32, block_size 32 and 16`: what is not equal, this one's first. Empty: nothing."""
        ours, theirs = msgspec.to_builtins(self), msgspec.to_builtins(other)
        return ", ".join(f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name])

    def obstacle(self, other: KVLayout, rounding: str) -> str:
        """Why KV of this layout can't become KV of the other: the end of a sentence. Empty: it can, or they are equal.

        Block sizes are converted bit for bit, dtypes only as far as `rounding` (of ROUNDINGS) allows.
        """
        rest = msgspec.structs.replace(other, dtype=self.dtype, block_size=self.block_size)
        if self != rest:
            return f"{self.differences(rest)}, which is not converted"
        if self.keys == "columns" and (self.block_size % _LANES or other.block_size % _LANES):
            return f"{self.differences(other)}, and of columns only multiples of {_LANES} tokens are converted"
        if self.dtype == other.dtype:
            return ""
        if not {self.dtype, other.dtype} <= _EXACT_AT.keys():
            return f"dtype {self.dtype} and {other.dtype}, which is not converted"
        needed = max(_EXACT_AT[self.dtype], _EXACT_AT[other.dtype], key=ROUNDINGS.index)
        if ROUNDINGS.index(needed) > ROUNDINGS.index(rounding):
            return f"dtype {self.dtype} and {other.dtype}, which is converted with transfer.rounding: {needed}"
        return ""

    def relatives(self, rounding: str) -> KVLayout:
        """A layout that stands for all that are converted into each other with this rounding; only to be compared."""
        exact_at = _EXACT_AT.get(self.dtype)
        known = exact_at is not None and ROUNDINGS.index(exact_at) <= ROUNDINGS.index(rounding)
        return msgspec.structs.replace(self, dtype=f"up to {rounding}" if known else self.dtype, block_size=0)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens`, the last one perhaps partial."""
        return -(-num_tokens // self.block_size)


def fingerprint(layout: KVLayout, config_digest: str, weights_digest: str) -> str:
    """32 hex digits that differ whenever KV computed by one model must not be used by the other.

    A reload with other weights changes `weights_digest`, hence the fingerprint, hence every block hash and ticket.
    """
    material = msgspec.json.encode([msgspec.to_builtins(layout), config_digest, weights_digest])
    return hashlib.blake2b(material, digest_size=16).hexdigest()
