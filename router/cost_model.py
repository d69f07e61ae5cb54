"""What work costs on a worker and its link, in milliseconds: sums of steps, whose times python_backends.core.step_model knows.

Nothing here knows workers, requests or the time.
"""

from __future__ import annotations

from python_backends.core.step_model import Steps


class LinkModel:
    """Milliseconds from asking a decode worker to fetch a prompt's KV until it has it: overhead + bytes x rate."""

    def __init__(self) -> None:
        self.overhead_ms = 2.0
        self._bytes = 1e6  # of past transfers, older ones count for less; a first guess of 1 GB/s
        self._ms = 1.0

    @property
    def bytes_per_ms(self) -> float:
        return self._bytes / self._ms

    def transfer_ms(self, num_bytes: float) -> float:
        return self.overhead_ms + num_bytes * self._ms / self._bytes

    def learn(self, num_bytes: int, transfer_ms: float, total_ms: float) -> None:
        """total_ms: from the submission to the message that the KV is there."""
        self.overhead_ms += 0.1 * (max(total_ms - transfer_ms, 0.0) - self.overhead_ms)
        if num_bytes and transfer_ms > 0:
            self._bytes = 0.95 * self._bytes + num_bytes
            self._ms = 0.95 * self._ms + transfer_ms


def prefill_ms(
    model: Steps,
    chunk: int,
    tokens: int,
    cached: int,
    ahead: float = 0.0,
    beside: float = 0.0,
    streams: int = 0,
    context: float = 0.0,
) -> float:
    """Until a prompt's first token: `tokens` uncached ones after `cached`.

    chunk: tokens of one step, shared with `streams` running streams of `context` tokens in all. Of other prompts that are
    there, `ahead` tokens are computed before, and up to `beside` in the same steps. On average half a step is under way.
    """
    room = chunk - streams if chunk > streams else 1
    total = ahead + tokens
    if total <= room and not (ahead or beside or streams):  # the common case, spelt out because it is asked for so often
        return model.step_ms(tokens, tokens * (cached + tokens / 2), 0, 0)
    per_token = (tokens * (cached + tokens / 2) + ahead * min(ahead, chunk) / 2) / total
    steps = (total - 1) // room  # before the last
    last = min(total - steps * room + beside, room)
    ms = model.step_ms(last, last * per_token, streams, context)
    if steps:
        ms += steps * model.step_ms(room, room * per_token, streams, context)
    others = min(ahead + beside, room)
    if others or streams:
        ms += model.step_ms(others, others * others / 2, streams, context) / 2
    return ms
