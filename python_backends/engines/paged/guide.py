"""Guided decoding: which tokens a grammar allows next. llguidance does the work.

A guide is a function of the grammar and the tokens so far, so nothing of it travels: whoever continues a request replays
its output and is where the other worker was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from python_backends.core.errors import InvalidRequest


class Guide:
    """One request's way through its grammar. Belongs to the engine's thread once it is made."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocab_size]: what may come next; the end-of-text token where the grammar may end. About 0.1 ms."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def take(self, token_id: int) -> None:
        """The token that was drawn. Only one that is allowed comes here, and end-of-text ends the request."""
        self._matcher.consume_token(token_id)


class Guides:
    """Makes guides for one model. Thread-safe: nothing changes but the tokenizer, which is read once."""

    def __init__(self, tokenizer_path: Callable[[], Path], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None

    def make(self, grammar: str, output_ids: Sequence[int]) -> Guide:
        """A guide that has gone through `output_ids`. May take a second for a large grammar.

        Raises InvalidRequest for a grammar that can't be read or does not lead to these tokens, ConfigError without a
        tokenizer.
        """
        if self._tokenizer is None:
            eos = self._eos_token_ids or None
            self._tokenizer = LLTokenizer(str(self._tokenizer_path()), n_vocab=self._vocab_size, eos_token=eos)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        matcher.consume_tokens(list(output_ids))
        if matcher.is_error():
            raise InvalidRequest(f"grammar: {' '.join(matcher.get_error().split())}")
        return Guide(matcher, self._vocab_size)
