"""Guessing a stream's next tokens from its own text, so that one step can produce several.

Prompt lookup (Saxena, 2023): where the last tokens of a sequence occurred before, what followed then is likely to follow
again - in summaries, code, translations, repeated names. The guesses ride along in the step; the model says at every
position what it draws there, and guesses count as far as they are what was drawn. Draws depend on seed and position
only, so the text is the same token for token, greedy or sampled.

A guess costs time whether it is right or not. What it costs is learnt from the steps themselves (StepCost), how often a
sequence's guesses are right from its own (Drafts), and a token is guessed only if that pays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_LONGEST_MATCH = 3  # tokens; shorter ones are tried after longer ones
_SHORTEST_MATCH = 2
_FIRST_GUESS = 0.6  # how often a sequence's guesses are taken to be right before any was made
_NEW_GUESS = 0.15  # weight of one more guess in that
_RETRY_TOKENS = 64  # a sequence whose guesses fail tries again after so many tokens
_FIRST_MARGINAL = 0.15  # what one more token adds to a step of one, before anything is measured
_NEW_STEP = 0.05  # weight of one more step in what is known about steps
_ITEM = array("i").itemsize


class Drafts:
    """The guesses for one sequence."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._right = _FIRST_GUESS
        self._retry_at = 0  # length of the sequence

    def propose(self, token_ids: Sequence[int], most: int, marginal: float) -> list[int]:
        """Tokens that may follow, as many as pay. marginal: what one more token costs, in steps."""
        count = self._worthwhile(len(token_ids), most, marginal)
        if not count:
            return []
        self._tokens.extend(token_ids[len(self._tokens) :])
        return lookup(self._tokens, count)

    def _worthwhile(self, length: int, most: int, marginal: float) -> int:
        right = self._right
        if length >= self._retry_at + _RETRY_TOKENS:
            right = max(right, _FIRST_GUESS)
        count, all_right = 0, right
        while count < most and all_right > marginal:
            count += 1
            all_right *= right
        return count

    def learn(self, guessed: int, right: int, length: int) -> None:
        """So many tokens were guessed at this length, and so many of the first were drawn. Later ones say nothing."""
        for index in range(min(guessed, right + 1)):
            self._right += _NEW_GUESS * ((index < right) - self._right)
        self._retry_at = length


def lookup(tokens: array[int], most: int) -> list[int]:
    """What followed the last occurrence of the last tokens; from where that reaches the end, all over again."""
    data = tokens.tobytes()
    for size in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
        if len(tokens) <= size:
            continue
        pattern, end = data[-size * _ITEM :], len(data) - _ITEM
        while (found := data.rfind(pattern, 0, end)) >= 0:
            if found % _ITEM == 0:
                period = len(tokens) - size - found // _ITEM
                return [tokens[len(tokens) - period + index % period] for index in range(most)]
            end = found + len(pattern) - 1
    return []


class StepCost:
    """What one more token adds to a step, learnt from the streams' steps: seconds = fixed + each * tokens."""

    def __init__(self) -> None:
        self._steps = 0
        self._tokens = self._seconds = self._square = self._product = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        self._steps += 1
        weight = max(_NEW_STEP, 1 / self._steps)
        self._tokens += weight * (tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)
        self._square += weight * (tokens * tokens - self._square)
        self._product += weight * (tokens * seconds - self._product)

    def marginal(self, streams: int) -> float:
        """What a token must gain to pay, beside so many streams: the share of a step that it adds to each of them."""
        variance = self._square - self._tokens * self._tokens
        if self._steps < 2 or variance < 0.01 * max(self._tokens, 1.0):
            each, fixed = _FIRST_MARGINAL, 1 - _FIRST_MARGINAL
        else:
            each = max(0.0, (self._product - self._tokens * self._seconds) / variance)
            fixed = max(0.0, self._seconds - each * self._tokens)
        step = fixed + each * streams
        return each * streams / step if step > 0 else 1.0
