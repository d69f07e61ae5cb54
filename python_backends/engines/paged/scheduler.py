"""Which sequences compute which tokens in the next step: continuous batching with chunked prefill over a block pool.

There is no prefill phase and no decode phase in here, only sequences whose computed tokens catch up with their known
tokens. A step first takes every sequence that is one token behind (a running stream), then fills the rest of its token
budget with chunks of prompts. Half of that rest belongs to the oldest prompt and half to the shortest, so a long prompt
neither blocks short ones nor starves.

Every sequence is in exactly one place: `waiting` (holds no blocks), `fetching` (a transfer or a store writes into its
blocks) or `running` (computes). All methods run on the engine's thread; nothing here does I/O, sleeps or knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from python_backends.core.types import RequestId
from python_backends.engines.paged.sequence import Sequence
from python_backends.kv.block_pool import BlockPool

PromptTokens = Callable[[int, int, float], int]
"""step_limit.StepLimit.prompt_tokens."""
Chunks = list[tuple[Sequence, int]]
"""Sequences, each with how many of its tokens a step computes."""


class Scheduler:
    def __init__(self, pool: BlockPool, block_size: int, max_batch: int, step_tokens: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._beside_streams: PromptTokens | None = None
        self.waiting: list[Sequence] = []
        self.fetching: dict[RequestId, Sequence] = {}
        self.running: list[Sequence] = []

    def streams(self) -> list[Sequence]:
        """Those that compute one token in the next step, the oldest first."""
        return sorted((s for s in self.running if s.num_uncomputed == 1), key=lambda s: s.order)

    def limit_steps(self, beside_streams: PromptTokens) -> None:
        """From now on steps with running streams, or where some are expected, compute at most so many prompt tokens."""
        self._beside_streams = beside_streams

    # --- moves between the three places ---

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.order)

    def admit(self) -> list[Sequence]:
        """Give blocks to waiting sequences, in order, as far as they go. Returns those whose KV is now to be fetched.

        Room for one more block of every running sequence is kept, so that admitting does not cause preempting.
        """
        to_fetch = []
        while self.waiting and len(self.running) + len(self.fetching) < self._max_batch:
            sequence = self.waiting[0]
            if not self._take_blocks(sequence):
                break
            del self.waiting[0]
            if sequence.handoff is not None or sequence.may_be_stored:
                self.fetching[sequence.id] = sequence
                to_fetch.append(sequence)
            else:
                self.running.append(sequence)
        return to_fetch

    def admit_to_fetch(self, sequence: Sequence) -> bool:
        """Give blocks to a sequence whose KV is to be fetched now or never. Whoever waits goes first: then it is never."""
        if self.waiting or len(self.running) + len(self.fetching) >= self._max_batch or not self._take_blocks(sequence):
            return False
        self.fetching[sequence.id] = sequence
        return True

    def fetched(self, sequence: Sequence) -> None:
        """The transfer into the sequence's blocks has ended, well or badly."""
        del self.fetching[sequence.id]
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out and give back its blocks. Not for one that is being fetched."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def drop_fetching(self, sequence: Sequence) -> None:
        """Give back the blocks of a sequence whose transfer has ended and that nobody wants any more."""
        del self.fetching[sequence.id]
        self.remove(sequence)

    def find(self, request_id: RequestId) -> Sequence | None:
        if request_id in self.fetching:
            return self.fetching[request_id]
        return next((s for s in self.all() if s.id == request_id), None)

    def all(self) -> Iterable[Sequence]:
        yield from self.waiting
        yield from self.fetching.values()
        yield from self.running

    # --- one step ---

    def schedule(self, *, expects_streams: bool = False) -> list[tuple[Sequence, int]]:
        """Sequences to compute now, each with its number of tokens. Empty when nobody can compute.

        expects_streams: steps are limited as beside streams, since one that came in the middle would wait for the end.
        """
        batch = [(sequence, 1) for sequence in self._with_room(self.streams())]
        budget = self._step_tokens - len(batch)
        prompts = sorted((s for s in self.running if s.num_uncomputed > 1), key=lambda s: s.order)
        chunks = _chunks(prompts, budget)
        if (batch or expects_streams) and chunks and self._beside_streams is not None:
            chunks = self._cut(chunks, prompts, len(batch), sum(sequence.num_computed for sequence, _ in batch))
        return batch + chunks

    def _cut(self, chunks: Chunks, prompts: list[Sequence], streams: int, context: int) -> Chunks:
        """Fewer prompt tokens, as the step limit has it: what they cost depends on whose they are, and that on how many."""
        assert self._beside_streams is not None
        while True:
            tokens = sum(count for _, count in chunks)
            depth = sum(count * (sequence.num_computed + count / 2) for sequence, count in chunks) / tokens - tokens / 2
            fitting = self._beside_streams(streams, context, depth)
            if fitting >= tokens:
                return chunks
            chunks = _chunks(prompts, fitting)

    def room_ahead(self, sequence: Sequence, most: int) -> int:
        """Tokens beyond the next one, at most so many, whose KV has room in the sequence's blocks. Takes blocks that nobody
        else waits for."""
        needed = -(-(sequence.num_computed + 1 + most) // self._block_size) - len(sequence.blocks)
        if needed > 0 and not self.waiting and self._pool.can_allocate(needed + len(self.running)):
            sequence.blocks += self._pool.allocate(needed)
        return min(most, len(sequence.blocks) * self._block_size - sequence.num_computed - 1)

    def computed(self, sequence: Sequence, count: int) -> None:
        """The KV of the next `count` tokens is in the sequence's blocks; full blocks become findable."""
        given_now = min(sequence.num_computed + count, sequence.num_given - 1) - sequence.num_computed
        sequence.forwarded_tokens += max(given_now, 0)
        sequence.num_computed += count
        self.publish_full_blocks(sequence)

    def publish_full_blocks(self, sequence: Sequence) -> None:
        if sequence.private:
            return
        for index in range(sequence.num_published, sequence.num_computed // self._block_size):
            self._pool.publish(sequence.blocks[index], sequence.hashes[index])
            sequence.num_published = index + 1

    # --- blocks ---

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Reuse cached prefix blocks and allocate the rest for all known tokens, or change nothing."""
        hashes = sequence.reusable_hashes()
        matched = self._pool.match(hashes)
        needed = -(-len(sequence.token_ids) // self._block_size) - matched
        reused = self._pool.reuse(hashes[:matched])
        reserve = len(self.running) + len(self.fetching)
        if not self._pool.can_allocate(needed + reserve) and not (reserve == 0 and self._pool.can_allocate(needed)):
            self._pool.release(reused)
            return False
        sequence.blocks = reused + self._pool.allocate(needed)
        sequence.num_published = matched
        sequence.num_computed = matched * self._block_size
        if sequence.is_fresh:
            sequence.reused_tokens = sequence.num_computed
        return True

    def _with_room(self, streams: list[Sequence]) -> list[Sequence]:
        """The streams that have a block for their next token; the youngest are preempted when blocks run out."""
        ready: list[Sequence] = []
        for sequence in streams:
            if sequence not in self.running:
                continue  # preempted for an older one
            while sequence.num_computed >= len(sequence.blocks) * self._block_size:
                if self._pool.can_allocate(1):
                    sequence.blocks += self._pool.allocate(1)
                    continue
                victim = max(self.running, key=lambda s: s.order)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                ready.append(sequence)
        return ready

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting; its full blocks stay cached as long as nobody needs them."""
        self.remove(sequence)
        sequence.restart()
        self.add(sequence)


def _chunks(prompts: list[Sequence], budget: int) -> Chunks:
    """Share `budget` tokens: the oldest prompt is sure of half of it, the shortest are served from the rest first."""
    if not prompts or budget <= 0:
        return []
    oldest = prompts[0]
    reserved = min(oldest.num_uncomputed, -(-budget // 2))
    left = budget - reserved
    chunks = []
    for sequence in sorted(prompts[1:], key=lambda s: s.num_uncomputed):
        count = min(sequence.num_uncomputed, left)
        if count:
            chunks.append((sequence, count))
            left -= count
    return [(oldest, min(oldest.num_uncomputed, reserved + left)), *chunks]
