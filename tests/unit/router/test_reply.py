"""Pieces gathered and merged: nothing is lost and the end keeps what only it has."""

from __future__ import annotations

from python_backends.core.types import FinishReason, TokenLogprob
from router.reply import Gathered, merged
from router.types import Piece, Sending


def _piece(text: str, token: int, finish: FinishReason | None = None) -> Piece:
    return Piece(text, [token], [TokenLogprob(token, -1.0)], -float(token), 10, finish)


def test_streaming_waits_for_text() -> None:
    gathered = Gathered(Sending.TEXT, "> ")
    assert gathered.add(_piece("", 1)) is None
    whole = gathered.add(_piece("ab", 2))
    assert whole is not None
    assert (whole.text, whole.token_ids, len(whole.logprobs)) == ("> ab", [1, 2], 2)
    last = gathered.add(_piece("", 3, FinishReason.STOP))
    assert last is not None
    assert (last.text, last.token_ids, last.finish_reason) == ("", [3], FinishReason.STOP)


def test_who_counts_tokens_has_each_at_once() -> None:
    gathered = Gathered(Sending.TOKENS)
    for token, text in enumerate(["", "ab", ""]):
        sent = gathered.add(_piece(text, token))
        assert sent is not None
        assert (sent.text, sent.token_ids) == (text, [token])
    assert gathered.add(Piece("", [], [], 0.0, 10)) is None


def test_whole_answers_wait_for_the_end() -> None:
    gathered = Gathered(Sending.WHOLE)
    assert gathered.add(_piece("a", 1)) is None
    whole = gathered.add(_piece("b", 2, FinishReason.LENGTH))
    assert whole is not None
    assert (whole.text, whole.token_ids) == ("ab", [1, 2])


def test_merging() -> None:
    assert merged([]) is None
    one = _piece("a", 1)
    assert merged([one]) is one
    both = merged([one, _piece("b", 2, FinishReason.STOP)])
    assert both is not None
    assert (both.text, both.token_ids, [entry.token_id for entry in both.logprobs]) == ("ab", [1, 2], [1, 2])
    assert (both.cumulative_logprob, both.finish_reason) == (-2.0, FinishReason.STOP)
