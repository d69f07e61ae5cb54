"""How much a worker gives TensorRT-LLM at once."""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.core.types import WorkerId

_HANDOFF_SHARE = 0.75  # of the pool may hold KV for others; the rest is headroom for prompts being computed
_LOST_SHARE = 0.5  # of slots or pool held by requests that will never end is the end of a worker


@dataclass(frozen=True, slots=True)
class Limits:
    worker: WorkerId
    max_queue: int
    max_batch: int
    max_handoffs: int
    first_output_s: float
    keep_s: float  # TensorRT-LLM drops published KV after it
    total_blocks: int  # of TensorRT-LLM's pool; 0: it didn't say

    def fits(self, needed: int, held: int) -> bool:
        """Whether a request of `needed` blocks can begin at once beside those that hold `held`. One may always try."""
        return not held or not self.total_blocks or needed + held <= self.total_blocks

    def allows_handoff(self, count: int, held: int, needed: int) -> bool:
        """Whether one more prompt may be computed for others, beside `count` whose KV is kept or in the making."""
        if count >= self.max_handoffs:
            return False
        return not held or not self.total_blocks or needed + held <= self.total_blocks * _HANDOFF_SHARE

    def too_much_is_lost(self, legs: int, blocks: int) -> bool:
        """Whether requests that wait for KV that will not come have taken too much of the worker."""
        many = legs >= max(1, self.max_batch * _LOST_SHARE)
        return many or bool(self.total_blocks and blocks > self.total_blocks * _LOST_SHARE)
