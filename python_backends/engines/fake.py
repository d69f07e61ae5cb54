"""An engine without weights: real scheduling, real KV movement, arithmetic instead of a model.

For load, failure and scale tests. Its "KV" is the token and its position, written into the blocks; its next token is
computed from what it *reads* there, so KV that is missing, stale or another prompt's gives another text, as in a model.
It sleeps as configured in `engine.fake`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.layout import KVLayout, fingerprint
from python_backends.core.paths import resolve_model
from python_backends.core.types import Epoch, TokenLogprob
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.paged.runner import Draw, Sampled, Slice, accepted, draws_of
from python_backends.kv.memory import PoolMemory

_FIRST_TOKEN = 300  # below are special tokens and bytes in common vocabularies
_NUM_TOKENS = 20_000
_VOCAB_SIZE = 49_152  # of the demo model, whose tokenizer this engine borrows
_EOS = 2  # never drawn, unless a grammar leaves nothing else
_MAX_POSITIONS = 131_072
_HEAD_DIM = 128  # 1 KiB of KV per token
_LOOK_EVERY_S = 0.02  # whether it is to hang any longer


class FakeRunner:
    """Implements engines.paged.runner.ModelRunner."""

    def __init__(self, deployment: Deployment) -> None:
        self._fake = deployment.engine.fake
        self._hang = Path(self._fake.hang_dir) / str(os.getpid()) if self._fake.hang_dir else None
        self.layout = KVLayout(1, 1, _HEAD_DIM, deployment.engine.block_size, "float32")
        self.fingerprint = self.fingerprint_of(self.layout)
        self.max_positions = _MAX_POSITIONS
        self.eos_token_ids: tuple[int, ...] = (_EOS,)
        self.vocab_size = _VOCAB_SIZE
        self._model_path = deployment.model.path

    def fingerprint_of(self, layout: KVLayout) -> str:
        return fingerprint(layout, "fake", "fake")

    @property
    def cores(self) -> str:
        """See ModelRunner."""
        return ""

    def start(self) -> None:
        """There is nothing to load."""

    def tokenizer_path(self) -> Path:
        return resolve_model(self._model_path) / "tokenizer.json"

    def attach(self, memory: PoolMemory) -> None:
        size = self.layout.block_size
        self._keys = memory.blocks.view(np.uint32).reshape(memory.num_blocks, 2, size, _HEAD_DIM)[..., 0]

    def step(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        while self._hang is not None and self._hang.exists():
            time.sleep(_LOOK_EVERY_S)
        prompt_tokens = sum(len(piece.token_ids) for piece in batch if len(piece.token_ids) > 1)
        time.sleep((self._fake.step_us + prompt_tokens * self._fake.prefill_us_per_token) * 1e-6)
        for piece in batch:
            positions = np.arange(piece.start, piece.start + len(piece.token_ids))
            table = np.asarray(piece.block_table)[positions // self.layout.block_size]
            self._keys[table, 0, positions % self.layout.block_size] = piece.token_ids
            self._keys[table, 1, positions % self.layout.block_size] = positions
        return [self._sample(piece) for piece in batch]

    def _sample(self, piece: Slice) -> Sampled | None:
        draws = draws_of(piece)
        end = piece.start + len(piece.token_ids) - piece.drafts
        sampled = [self._draw(piece, end + index, draw) for index, draw in enumerate(draws)]
        return accepted(piece, sampled) if sampled else None

    def _draw(self, piece: Slice, end: int, draw: Draw) -> Sampled:
        """From the KV of the first `end` tokens."""
        blocks = self._keys[np.asarray(piece.block_table[: self.layout.blocks_for(end)])]
        seen = np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(2, -1)[:, :end]
        sampling = draw.sampling
        seed = f"{sampling.seed}/{len(draw.output_ids)}" if sampling.temperature else "greedy"
        digest = hashlib.blake2b(seen.tobytes() + seed.encode(), digest_size=8).digest()
        lot = int.from_bytes(digest, "big")
        if draw.allowed is None:
            token_id = _FIRST_TOKEN + lot % _NUM_TOKENS
        else:
            choice = np.flatnonzero(draw.allowed)
            token_id = int(choice[lot % len(choice)])
        logprob = TokenLogprob(token_id, 0.0) if sampling.logprobs is not None else None
        return Sampled(token_id, logprob)

    def rest(self) -> None:
        """It takes no cores."""

    def are_cores_wanted(self) -> bool:
        """It has none."""
        return False

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """The pool memory is where it computes."""

    def close(self) -> None:
        """There is nothing to free."""


def create(deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> PagedEngine:
    return PagedEngine(deployment, worker, FakeRunner(deployment), epoch, key)
