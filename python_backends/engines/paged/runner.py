"""What a paged engine needs of a model: compute slices of sequences over a paged KV pool, and sample.

The paged engine (engine.py, scheduler.py) owns blocks, queues and leases and knows no torch; a ModelRunner owns weights
and arithmetic and knows no queues. All calls come from the engine's one thread, `start` included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from python_backends.core.layout import KVLayout
from python_backends.core.types import SamplingParams, TokenLogprob
from python_backends.kv.memory import PoolMemory


@dataclass(slots=True)
class Draw:
    """What sampling one token needs. `len(output_ids)` is the position that seeds the random draw."""

    sampling: SamplingParams  # seed is not None
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    banned_ids: Sequence[int]  # must not be drawn now (stops before min_tokens)
    allowed: npt.NDArray[np.bool_] | None = None  # [vocab_size]: what a grammar allows now; at least one token


@dataclass(slots=True)
class Slice:
    """Consecutive tokens of one sequence to compute in this step.

    token_ids: the tokens at positions start .. start + len - 1; the KV of positions < start is already in the blocks.
    block_table: the sequence's block numbers in prompt order, covering start + len tokens; KV is written there.
    draw: sample the next token from the last position's logits, or None in the middle of a prompt.
    drafts: so many of the last token_ids are guesses of what will be drawn. `draw` is for the position of the first.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    draw: Draw | None
    drafts: int = 0


@dataclass(slots=True)
class Sampled:
    """A token drawn; `following`: the next ones, as far as the drafts were what was drawn before each."""

    token_id: int
    logprob: TokenLogprob | None  # when sampling.logprobs is not None
    following: tuple[Sampled, ...] = ()


def draws_of(piece: Slice) -> list[Draw]:
    """One for the token after the known ones, and one after each draft, as if those before it were right."""
    first = piece.draw
    if first is None:
        return []
    if not piece.drafts:
        return [first]
    drafts = list(piece.token_ids[-piece.drafts :])
    return [replace(first, output_ids=[*first.output_ids, *drafts[:count]]) for count in range(piece.drafts + 1)]


def accepted(piece: Slice, sampled: Sequence[Sampled]) -> Sampled:
    """The first token drawn, with those after it as far as the drafts are what was drawn. `sampled` as draws_of."""
    right = 0
    while right < piece.drafts and sampled[right].token_id == piece.token_ids[right - piece.drafts]:
        right += 1
    first = sampled[0]
    return Sampled(first.token_id, first.logprob, tuple(sampled[1 : right + 1]))


class ModelRunner(Protocol):
    """A model that computes in blocks of `layout`. Attributes are known once `start` has returned."""

    layout: KVLayout
    fingerprint: str
    max_positions: int  # tokens of context the model was made for
    eos_token_ids: tuple[int, ...]
    vocab_size: int  # length of a row of logits

    @property
    def cores(self) -> str:
        """The same in workers of one host that lend each other cores; empty: this one's are its own."""

    def tokenizer_path(self) -> Path:
        """The model's tokenizer.json; asked for when the first grammar comes. Raises ConfigError when there is none."""

    def fingerprint_of(self, layout: KVLayout) -> str:
        """What `fingerprint` would be with another layout: of a worker that has the same model, and KV that is converted."""

    def start(self) -> None:
        """Load weights. Raises ConfigError that says what is wrong with the model directory."""

    def attach(self, memory: PoolMemory) -> None:
        """Compute in (CPU) or mirror (GPU) this pool from now on. The runner doesn't own it."""

    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """Compute all slices and write their KV; one entry per slice, None where draw is None.

        Sequences in one batch never share a block that is written in this step.
        """

    def rest(self) -> None:
        """There is nothing to compute for now: others may have the cores. The next step wants them back."""

    def are_cores_wanted(self) -> bool:
        """Whether others have long prompts to compute with the cores that `rest` gives them."""

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """Make the pool memory hold these blocks' KV (GPU: copy to the host mirror; CPU: nothing to do)."""

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """Take these blocks' KV from the pool memory (GPU: copy to the device; CPU: nothing to do)."""

    def close(self) -> None:
        """Free weights. Idempotent; called also after a failed start."""
