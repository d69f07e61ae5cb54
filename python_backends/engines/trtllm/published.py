"""KV that a prefill worker computed and TensorRT-LLM keeps until the other side fetches it or its time-out passes.

It can't be taken back: released but not fetched it is an orphan and stays until the time-out. So an entry ends when its
KV was fetched, or when TensorRT-LLM must have dropped it.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.core.types import RequestId


@dataclass(slots=True)
class _Entry:
    request_id: RequestId
    num_blocks: int
    since: float  # monotonic, s


class Published:
    def __init__(self, keep_s: float) -> None:
        """`keep_s`: TensorRT-LLM's time-out."""
        self._keep_s = keep_s
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_blocks(self) -> int:
        return sum(entry.num_blocks for entry in self._entries.values())

    def add(self, lease_id: str, request_id: RequestId, num_blocks: int, now: float) -> None:
        self._entries[lease_id] = _Entry(request_id, num_blocks, now)

    def since(self, lease_id: str) -> float:
        """When it was added; 0 when it is gone."""
        entry = self._entries.get(lease_id)
        return entry.since if entry is not None else 0.0

    def fetched(self, lease_id: str) -> None:
        """The KV is on the other side. Unknown ids are a no-op."""
        self._entries.pop(lease_id, None)

    def is_of(self, request_id: RequestId) -> bool:
        return any(entry.request_id == request_id for entry in self._entries.values())

    def overdue(self, now: float) -> list[str]:
        """Leases whose KV nobody fetched in time: TensorRT-LLM drops it with the next work it schedules."""
        return [lease_id for lease_id, entry in self._entries.items() if entry.since + self._keep_s < now]

    def drop(self, lease_ids: list[str]) -> None:
        for lease_id in lease_ids:
            self._entries.pop(lease_id, None)
