"""Requests that benchmarks send: many at once, and what their tokens and proofs say."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from router.types import Proof
from scripts.client import Client
from scripts.proof_text import read_proof

_TIMEOUT_S = 300.0
_ALL_TOKENS = '{"ignore_eos": true}'
_TOKEN_IDS = (1_000, 40_000)  # ordinary ones of the demo model


@dataclass(frozen=True, slots=True)
class Answer:
    """sent, first, last: monotonic seconds of the request, its first token and its last."""

    sent: float
    first: float
    last: float
    tokens: int
    proof: Proof

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.sent) * 1e3


def prompt(rng: random.Random, tokens: int) -> list[int]:
    """A prompt that nobody has sent before."""
    return rng.choices(range(*_TOKEN_IDS), k=tokens)


def ask(client: Client, input_ids: Sequence[int], max_tokens: int, **fields: object) -> Answer:
    """One greedy answer of exactly so many tokens. Raises BatonError."""
    sent = time.monotonic()
    arrivals: list[float] = []
    tokens, proof = 0, None
    wanted = {"input_ids": list(input_ids), "max_tokens": max_tokens, "sampling_parameters": _ALL_TOKENS, **fields}
    with client.stream(None, timeout_s=_TIMEOUT_S, **wanted) as stream:
        for chunk in stream:
            tokens += chunk.num_tokens
            if chunk.num_tokens:
                arrivals.append(chunk.time)
            proof = chunk.proof or proof
    assert proof is not None, "the last chunk has the proof"
    return Answer(sent, arrivals[0], arrivals[-1], tokens, read_proof(proof))


def ask_together(client: Client, prompts: Iterable[Sequence[int]], max_tokens: int, **fields: object) -> list[Answer]:
    """All at once; in the order of the prompts. Raises the first error."""
    prompts = list(prompts)
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda ids: ask(client, ids, max_tokens, **fields), prompts))


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Of all answers together, from the first request to the last token."""
    return sum(answer.tokens for answer in answers) / (
        max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    )
