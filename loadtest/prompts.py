"""Prompts out of block ids: equal ids give equal tokens, in any request, so prefixes are shared as the plan says.

As token ids, or as text. Text is made of common short words with a space before each: tokenizers split at spaces first, so
a word is the same token whatever stands around it, and nearly every vocabulary has each of these words as one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loadtest.workload import Planned

_COMMON = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so some
her would make like him into time has look two more write go see number no way could people my than first water been call
who its now find long down day did get come made may part over new sound take only little work know place year live me back
give most very after thing our just name good man think say great where help through much before line right too mean old any
same tell boy follow came want show also around form three small set put end does another well large must big even such
because turn here why ask went men read need land different home us move try kind hand picture again change off play spell
air away animal house point page letter mother answer found study still learn should world
"""
WORDS = tuple(_COMMON.split())
_KEPT_BLOCKS = 8192


class Prompts(Protocol):
    """Makes the prompt of a planned request; the same one every time."""

    def build(self, planned: Planned) -> list[int] | str: ...


class TokenPrompts:
    """Token ids from `low` to below `high`. `nonce`: another one, other tokens."""

    def __init__(self, nonce: int, low: int, high: int) -> None:
        self._blocks = _Blocks(nonce, low, high)

    def build(self, planned: Planned) -> list[int]:
        ids: list[int] = self._blocks.of(planned).tolist()
        return ids


class TextPrompts:
    """Words of WORDS, one token each."""

    def __init__(self, nonce: int) -> None:
        self._words = [f" {word}" for word in WORDS]
        self._blocks = _Blocks(nonce, 0, len(WORDS))

    def build(self, planned: Planned) -> str:
        return "".join(map(self._words.__getitem__, self._blocks.of(planned).tolist()))


class _Blocks:
    """int32 numbers of each block, drawn from (nonce, block id) alone; recent ones are kept."""

    def __init__(self, nonce: int, low: int, high: int) -> None:
        self._nonce, self._low, self._high = nonce, low, high
        self._numbers = lru_cache(_KEPT_BLOCKS)(self._draw)

    def of(self, planned: Planned) -> npt.NDArray[np.int32]:
        """[planned.input_tokens]"""
        parts: Sequence[npt.NDArray[np.int32]] = [self._numbers(block, planned.block_tokens) for block in planned.blocks]
        return np.concatenate(parts)[: planned.input_tokens]

    def _draw(self, block: int, num_tokens: int) -> npt.NDArray[np.int32]:
        generator = np.random.Generator(np.random.Philox(key=np.array([self._nonce, block], np.uint64)))
        return generator.integers(self._low, self._high, num_tokens, np.int32)
