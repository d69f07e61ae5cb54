"""Token ids to text while they arrive: whole characters only, and nothing past a stop string.

Two layers. `_Stream` turns tokens into settled text. Its window holds a few tokens before the new ones, because the text of
a token depends on its neighbours:

    window   [ tokens whose text is out, kept as context | tokens not settled yet ]
                                                         ^ _fresh
    text     [ _seen: given out already                  | new ............ U+FFFD ]   the unfinished character waits

`Detokenizer` looks for stop strings in the settled text and holds back what may still become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"  # what decoders put for bytes that are no character, yet or ever
_MAX_CHAR_TOKENS = 4  # a character has at most 4 bytes, a token at least one
_CONTEXT = 6  # prompt tokens that the output's first token is read after
_MAX_UNSETTLED = 16  # tokens in the window; a window that never settles (noise, misaligned bytes) is cut beyond it
_CUT_TO = 12  # ... to so many, enough to hold the unfinished end


class TextDecoder(Protocol):
    """What is needed of router.tokenizer.Tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def is_silent(self, token_id: int) -> bool: ...


class Detokenizer:
    """The text of one request's output. Not thread-safe.

    The results of all `push` calls and of `finish` together are decode(prompt + output) without decode(prompt), cut
    before the stop string that begins first. They don't depend on how the tokens are divided among the calls. Cost is
    linear in the number of tokens. (One exception: byte-fallback decoders turn a whole run of byte tokens into U+FFFD
    when it ends broken; characters of the run that were shown before it broke stay.)

    stopped: a stop string was found; from then on `push` returns "".
    num_consumed: tokens pushed, up to and with the one that made the stop certain.
    """

    def __init__(self, tokenizer: TextDecoder, stop: Sequence[str], min_tokens: int, prompt_ids: Sequence[int] = ()) -> None:
        """`min_tokens`: text of the first so many tokens is not searched for stop strings."""
        self.stopped = False
        self.num_consumed = 0
        self._stream = _Stream(tokenizer, prompt_ids)
        self._stop = tuple(stop)
        self._first_characters = frozenset(text[0] for text in stop)
        self._min_tokens = min_tokens
        self._unsent = ""
        self._clear = 0  # no stop string begins in the first `_clear` characters of `_unsent`

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that can be shown now. It never ends in U+FFFD unless a stop follows."""
        if not self._stop:  # nothing to look for
            self.num_consumed += len(token_ids)
            self._unsent += "".join([self._stream.push(token_id) for token_id in token_ids])
            self._clear = len(self._unsent)
        for token_id in token_ids if self._stop else ():
            if self.stopped:
                break
            self.num_consumed += 1
            self._unsent += self._stream.push(token_id)
            if self.num_consumed <= self._min_tokens:
                self._clear = len(self._unsent)
            else:
                self._search(final=False)
        if self.stopped:
            return self._release(self._clear)
        return self._release(len(self._unsent[: self._clear].rstrip(_BROKEN)))

    def finish(self) -> str:
        """No token follows: return what was held back, up to a stop string if there is a whole one in it."""
        if self.stopped:
            return ""  # what is left is the stop string
        self._unsent += self._stream.finish()
        if self.num_consumed <= self._min_tokens:
            self._clear = len(self._unsent)
        self._search(final=True)
        return self._release(self._clear)

    def _search(self, final: bool) -> None:
        """Advance `_clear` to the first place where a stop string begins, or may begin unless `final`.

        A whole match waits for an earlier beginning to be decided, so that the outcome is that of searching the whole
        text at once.
        """
        text = self._unsent
        for start in range(self._clear, len(text)):
            if text[start] in self._first_characters:
                self.stopped = any(text.startswith(stop, start) for stop in self._stop)
                rest = text[start:]
                if self.stopped or (not final and any(stop.startswith(rest) for stop in self._stop)):
                    self._clear = start
                    return
        self._clear = len(text)

    def _release(self, count: int) -> str:
        released, self._unsent = self._unsent[:count], self._unsent[count:]
        self._clear -= count
        return released


class _Stream:
    """Settled text of a growing list of tokens, decoding a window of bounded length for each."""

    def __init__(self, tokenizer: TextDecoder, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = _tail(tokenizer, prompt_ids)
        self._fresh = len(self._window)
        self._seen = tokenizer.decode(self._window)

    def push(self, token_id: int) -> str:
        """Return the text that this token settles."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(_BROKEN):
            return self._settle(text)
        if len(self._window) > _MAX_UNSETTLED:
            return self._cut(text)
        return self._give(text.rstrip(_BROKEN))

    def finish(self) -> str:
        """Return what was waiting for the rest of a character."""
        return self._settle(self._tokenizer.decode(self._window)) if self._fresh < len(self._window) else ""

    def _settle(self, text: str) -> str:
        """All of the window is final: give the rest of it out and keep the newest tokens as context."""
        fresh = self._window[self._fresh :]
        fresh_text = self._tokenizer.decode(fresh)
        # Byte-fallback decoders call a whole run of bytes broken when its end is: what was given out stays given out.
        new = text[len(self._seen) :] if text.startswith(self._seen) else fresh_text
        self._window, self._fresh, self._seen = fresh, len(fresh), fresh_text
        return new

    def _give(self, text: str) -> str:
        """`text`, which will not change any more, without what was given out before."""
        if not text.startswith(self._seen):
            return ""
        new = text[len(self._seen) :]
        self._seen = text
        return new

    def _cut(self, text: str) -> str:
        """Give out all that more bytes can't complete, and forget the tokens of it."""
        unfinished = min(len(text) - len(text.rstrip(_BROKEN)), _MAX_CHAR_TOKENS - 1)
        new = self._give(text[: len(text) - unfinished])
        self._window = self._window[-_CUT_TO:]
        self._fresh = len(self._window) - unfinished
        rest = self._tokenizer.decode(self._window)
        self._seen = rest[: len(rest) - unfinished] if rest.endswith(_BROKEN * unfinished) else rest
        return new


def _tail(tokenizer: TextDecoder, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt's last tokens that have text, beginning with a whole character if there is such a place."""
    tail: list[int] = []
    for token_id in reversed(prompt_ids):
        if len(tail) >= _CONTEXT + _MAX_CHAR_TOKENS or (len(tail) >= _CONTEXT and _BROKEN not in tokenizer.decode(tail)):
            break
        if not tokenizer.is_silent(token_id):
            tail.insert(0, token_id)
    return tail
