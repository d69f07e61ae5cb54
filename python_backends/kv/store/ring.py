"""Consistent hashing: which server has a block, such that adding one to n servers moves about 1/(n+1) of the blocks.

Every server owns many points of a circle; a block belongs to the owner of the next point (Karger et al., 1997).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

from python_backends.core.types import BlockHash

_POINTS = 256  # per server: shares then differ by a few percent


class Ring:
    def __init__(self, names: Sequence[str]) -> None:
        """`names` of the servers, the same on every worker; their order does not matter."""
        points = sorted((_point(f"{name}#{i}"), name) for name in names for i in range(_POINTS))
        self._points = [point for point, _ in points]
        self._owners = [name for _, name in points]

    def owner(self, hash_: BlockHash) -> str:
        """Name of the server that the block belongs to."""
        place = bisect_right(self._points, int.from_bytes(hash_[:8], "big"))
        return self._owners[place % len(self._owners)]


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
