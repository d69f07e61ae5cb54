"""Pieces gathered into what is worth sending: every token, text as soon as there is some, or everything at the end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from python_backends.core.types import TokenLogprob
from router.types import Piece, Sending


class Gathered:
    """Of one answer. Tokens without text yet (half a character, what may become a stop string) wait for the next text,
    unless every token is to be sent."""

    def __init__(self, sending: Sending, prompt_text: str = "") -> None:
        """`prompt_text` goes before the completion."""
        self._sending = sending
        self._text = [prompt_text] if prompt_text else []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def add(self, piece: Piece) -> Piece | None:
        """What is to be sent now, all of it since the last time; None to wait."""
        self._text.append(piece.text)
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        if piece.finish_reason is None and not self._is_worth_sending(piece):
            return None
        whole = msgspec.structs.replace(piece, text="".join(self._text), token_ids=self._token_ids, logprobs=self._logprobs)
        self._text, self._token_ids, self._logprobs = [], [], []
        return whole

    def _is_worth_sending(self, piece: Piece) -> bool:
        if self._sending is Sending.TEXT:
            return bool(piece.text)
        return self._sending is Sending.TOKENS and bool(self._token_ids)


def merged(pieces: Sequence[Piece]) -> Piece | None:
    """Consecutive pieces as one; None of none."""
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[entry for piece in pieces for entry in piece.logprobs],
    )
