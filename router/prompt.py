"""A prompt on its way through the router: its tokens, and the hashes of its blocks, which are made once per model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.types import BlockHash

Hasher = Callable[[Sequence[int], int, BlockHash], list[BlockHash]]
"""core.block_hash.block_hashes: token ids, block size, parent of the first block -> one hash per full block."""


class Prompt:
    """Tokens that a worker is to go on after: the client's prompt and, after a lost worker, what was already sent."""

    def __init__(self, token_ids: Sequence[int], salt: str, hasher: Hasher = block_hashes) -> None:
        self.token_ids = token_ids
        self._salt = salt
        self._hasher = hasher
        self._hashes: dict[tuple[str, int], list[BlockHash]] = {}

    def __len__(self) -> int:
        return len(self.token_ids)

    def hashes(self, fingerprint: str, block_size: int) -> list[BlockHash]:
        """Of the full blocks, as workers of that model name them; never the last token's, whose logits are wanted."""
        known = self._hashes.get((fingerprint, block_size))
        if known is None:
            known = self._hasher(self.token_ids, block_size, chain_root(fingerprint, self._salt))
            known = known[: (len(self.token_ids) - 1) // block_size]
            self._hashes[fingerprint, block_size] = known
        return known
