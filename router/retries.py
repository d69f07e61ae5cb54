"""How often a request is tried, so that one that kills its workers can't walk through the fleet.

A request has two budgets, of failed attempts and of workers that died under it. Both are counted in a row: tokens that come
in between show that it can be computed, and restore them.

Who dies takes its neighbours along, and they are as suspect as the culprit. So a request that may cost no further worker
goes on alone: one such request at a time, until it has made progress. If a worker dies under it then, it is failed, and
requests with its prompt are refused for a while, since clients try again by themselves.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

import xxhash

from python_backends.core.errors import BatonError, EngineFailure

_PROGRESS_TOKENS = 8  # new ones since the last failure; one alone comes from every prefill, whatever decode does then
_REMEMBERED_S = 300.0
_MOST_REMEMBERED = 1000


class Quarantine:
    """What all requests share of it. Belongs to the event loop."""

    def __init__(self, max_attempts: int, max_deaths: int, now: Callable[[], float] = time.monotonic) -> None:
        self.max_attempts = max_attempts
        self.max_deaths = max_deaths
        self._now = now
        self._alone = asyncio.Semaphore(1)
        self._killers: OrderedDict[str, float] = OrderedDict()  # digest of the prompt -> until when it is refused

    def check(self, prompt_ids: Sequence[int], salt: str) -> None:
        """Raises EngineFailure for a prompt that has killed workers lately."""
        until = self._killers.get(_digest(prompt_ids, salt)) if self._killers else None
        if until is not None and until > self._now():
            raise EngineFailure(
                f"a request with this prompt killed {self.max_deaths} workers within {_REMEMBERED_S:.0f} s; it is not tried "
                "again now (router.max_worker_deaths)"
            )

    def remember(self, prompt_ids: Sequence[int], salt: str) -> None:
        """Refuse this prompt for a while."""
        digest = _digest(prompt_ids, salt)
        self._killers[digest] = self._now() + _REMEMBERED_S
        self._killers.move_to_end(digest)
        if len(self._killers) > _MOST_REMEMBERED:
            self._killers.popitem(last=False)

    async def enter(self) -> None:
        await self._alone.acquire()

    def leave(self) -> None:
        self._alone.release()


class RetryBudget:
    """One request's. `leave` when it has ended."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine = quarantine
        self._failures = 0
        self._deaths = 0
        self._tokens = 0  # of the output, at the last failure
        self._alone = False

    async def turn(self) -> None:
        """Before an attempt: wait until it may begin. At once, but for a request that may cost no further worker."""
        if self._deaths and self._deaths >= self._quarantine.max_deaths - 1 and not self._alone:
            await self._quarantine.enter()
            self._alone = True

    def progress(self, tokens: int) -> None:
        """The output has so many tokens now."""
        if self._failures and tokens - self._tokens >= _PROGRESS_TOKENS:
            self._failures = self._deaths = 0
            self.leave()

    def failed(self, error: BatonError, tokens: int, *, died: bool) -> None:
        """An attempt has failed after `tokens` tokens; `died`: and its worker with it. Raises when there is to be no other."""
        self._tokens = tokens
        self._failures += 1
        self._deaths += died
        if died and self._deaths >= self._quarantine.max_deaths:
            raise Poisoned(
                f"{self._deaths} workers died in a row while they computed this request; it is not tried again "
                f"(router.max_worker_deaths); the last: {error}"
            )
        if self._failures >= self._quarantine.max_attempts:
            raise error

    def leave(self) -> None:
        """Let another one go on alone. Idempotent."""
        if self._alone:
            self._alone = False
            self._quarantine.leave()


class Poisoned(EngineFailure):
    """The request kills whoever computes it."""


def _digest(prompt_ids: Sequence[int], salt: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(array("q", prompt_ids).tobytes() + salt.encode(errors="surrogatepass")))
