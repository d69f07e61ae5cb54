"""What a worker's KV pool will have to hold, as far as a router can foresee it.

Streams grow until they end, and what those that end leave is there for the others. So the most that they hold together is
what they will hold when the first of them ends. How far that is, their mean progress says: with what is left to each spread
evenly between the least and a whole answer, n streams of `expected` output tokens in all, of which `made` are made, have

    expected - 2 made

tokens to grow until then - all of them when they have just begun, none when they are half through on average, as streams
are that come and go. (The rule is that of Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS
2025, who sort the streams of one engine by what is left of each; a router hears only of their sum.)

Answers differ in length, so the pool keeps room for the case that fewer end than should: a deviation that grows with the
root of their number.
"""

from __future__ import annotations

import math

from python_backends.core.types import WorkerLoad

_DEVIATIONS = 1.0  # an answer's length for one stream: with less, engines take back blocks of a stream in ten and more


class KvRoom:
    """Of one life of a worker; belongs to its WorkerView. All in tokens."""

    def __init__(self, load: WorkerLoad, block_size: int) -> None:
        self.pool_tokens = load.total_blocks * block_size  # 0: not known
        self._block_size = block_size
        self._prompts = 0  # of requests from here: what was not cached there
        self._sent = 0  # of these prompts: those of requests that the worker has been sent
        self._expected = 0  # of their output
        self._made = load.output_tokens  # by all that run there
        self._others = load.held_blocks * block_size  # held there, and not by requests from here

    def beat(self, load: WorkerLoad, own: int, others: int) -> None:
        """own, others: requests there, those sent from here and from elsewhere.

        What was promised room and is still computed elsewhere holds nothing yet, or others would seem to hold less.
        """
        self._made = load.output_tokens
        held = load.held_blocks * self._block_size
        self._others = max(held - self._sent - (self._made * own // (own + others) if own else 0), 0)

    def take(self, prompt: int, output: int) -> None:
        """A request will go there. prompt: tokens not cached there. output: expected tokens."""
        self._prompts += prompt
        self._expected += output

    def send(self, prompt: int) -> None:
        """It has gone there."""
        self._sent += prompt

    def give_back(self, prompt: int, output: int, made: int, sent: bool) -> None:
        """It has left, after so many tokens of output; or will not go there after all."""
        self._prompts -= prompt
        self._sent -= prompt if sent else 0
        self._expected -= output
        self._made = max(self._made - made, 0)

    def fits(self, prompt: int, output: int, own: int, others: int) -> bool:
        """Whether the pool will hold one more, as far as its size is known. A request always fits where there is no other."""
        if not self.pool_tokens or not (own or others):
            return True
        if not own:  # of how far those of others have yet to grow nothing is known here
            return self._others + prompt + output <= self.pool_tokens
        prompts, expected = self._prompts + prompt, self._expected + output
        whole = expected * (own + 1 + others) // (own + 1) + 1
        if prompts + self._others + max(whole, self._made + output) <= self.pool_tokens:
            return True  # if nobody left before the end. It is so nearly everywhere, and asked several times per decision
        return self._most(prompts, expected, own + 1, others, output) <= self.pool_tokens

    def fits_another(self, own: int, others: int) -> bool:
        """Whether it will hold one more of those that are there, as these are on average."""
        if own:
            return self.fits(self._prompts // own, self._expected // own, own, others)
        held = self._others // max(others, 1)  # half through, as they are on average
        return self.fits(held, self._made // max(others, 1), 0, others)

    def share(self, own: int, others: int) -> float:
        """Of the pool, that those there will hold together."""
        if not self.pool_tokens:
            return 0.0
        most = self._most(self._prompts, self._expected, own, others) if own else self._others
        return most / self.pool_tokens

    def _most(self, prompts: int, expected: int, own: int, others: int, new: int = 0) -> float:
        """new: output of one that has not begun. What requests from elsewhere will grow by is taken to be as with one's own."""
        everybody = own + others
        output, made = expected * everybody / own, self._made
        now = prompts + self._others + made * own / everybody
        ahead = max(output - 2 * made, 0.0) + _DEVIATIONS * output / math.sqrt(everybody)
        return now + min(ahead, max(output - made, new))
