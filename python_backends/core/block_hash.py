"""Chained hashes of full blocks: the one name of a prefix in every cache, index, store key and ticket.

The chain starts from the fingerprint and the tenant's salt, so KV of other weights or of another tenant has other
hashes and can't be hit. BLAKE2b (not a fast non-cryptographic hash): a tenant must not be able to construct a collision.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from python_backends.core.types import BlockHash

HASH_BYTES = 16


def chain_root(fingerprint: str, salt: str) -> BlockHash:
    """The parent of a prompt's first block."""
    return BlockHash(hashlib.blake2b(f"{fingerprint}\0{salt}".encode(), digest_size=HASH_BYTES).digest())


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one full block whose predecessor's hash is `parent`."""
    tokens = array("I", token_ids).tobytes()
    return BlockHash(hashlib.blake2b(tokens, digest_size=HASH_BYTES, key=parent).digest())


def block_hashes(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """One hash per *full* block of `token_ids`, in prompt order."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def content_hash(token_ids: Sequence[int], full_hashes: Sequence[BlockHash], block_size: int, root: BlockHash) -> BlockHash:
    """Hash of all of `token_ids`, the partial last block included; `full_hashes` are its block_hashes."""
    tail = token_ids[len(full_hashes) * block_size :]
    return block_hash(full_hashes[-1] if full_hashes else root, tail)
