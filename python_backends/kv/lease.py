"""Leases: blocks kept alive for a reader in another process, until it is done or too late.

A lease owns its blocks' references, alone: exactly one of release, release_request, expire and close gives them back,
and every later attempt is a no-op. So however a reader, a router or a message is lost, the blocks return.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from python_backends.core.types import RequestId
from python_backends.kv.block_pool import BlockPool

GRACE_S = 0.5
"""Seconds that blocks are kept beyond the promised time: a reader that starts just before the end, by a wall clock not
quite ours, still finds them. Part of the promise that orphaned KV is back within the lease and 1 s."""


@dataclass(frozen=True, slots=True)
class _Lease:
    request_id: RequestId
    blocks: Sequence[int]


class LeaseTable:
    """The active leases on one pool. Owned by the pool's thread."""

    def __init__(
        self,
        pool: BlockPool,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[str], None] = lambda lease_id: None,
    ) -> None:
        """`clock` gives monotonic seconds, on the same scale as `now` in `expire`; `on_end` is told of every lease that
        has ended, before its blocks can be reused.
        """
        self._pool = pool
        self._on_end = on_end
        self._clock = clock
        self._leases: dict[str, _Lease] = {}
        self._of_request: dict[RequestId, list[str]] = {}
        self._expiries: list[tuple[float, str]] = []  # heap; may still list leases that ended early

    @property
    def active(self) -> int:
        return len(self._leases)

    def grant(self, request_id: RequestId, blocks: Sequence[int], ttl_s: float) -> str:
        """Take over one reference on each block for `ttl_s` seconds (and GRACE_S). Returns the lease's id, 16 hex digits."""
        lease_id = secrets.token_hex(8)
        self._leases[lease_id] = _Lease(request_id, tuple(blocks))
        self._of_request.setdefault(request_id, []).append(lease_id)
        heapq.heappush(self._expiries, (self._clock() + ttl_s + GRACE_S, lease_id))
        return lease_id

    def release(self, lease_id: str) -> bool:
        """End a lease and give its blocks back to the pool. False, and nothing happens, when it has ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        siblings = self._of_request[lease.request_id]
        siblings.remove(lease_id)
        if not siblings:
            del self._of_request[lease.request_id]
        self._on_end(lease_id)
        self._pool.release(lease.blocks)
        return True

    def release_request(self, request_id: RequestId) -> bool:
        """End all leases of a request. False, and nothing happens, when it has none."""
        leases = list(self._of_request.get(request_id, ()))
        for lease_id in leases:
            self.release(lease_id)
        return bool(leases)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do, in the clock's seconds; None without leases."""
        while self._expiries and self._expiries[0][1] not in self._leases:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def expire(self, now: float) -> list[str]:
        """End every lease whose time is over at `now`; returns their ids."""
        ended: list[str] = []
        while (due := self.next_expiry()) is not None and due <= now:
            _, lease_id = heapq.heappop(self._expiries)
            self.release(lease_id)
            ended.append(lease_id)
        return ended

    def close(self) -> None:
        """End all leases. Idempotent."""
        for lease_id in list(self._leases):
            self.release(lease_id)
