"""The door: who comes in, who waits, in which order, and who is refused at once.

The bounds are requests in the house; prompt tokens that wait for their first token, of which one tenant may take only a
share of what the others leave (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Trans. Networking 6(2), 1998); and, where
there is a target for it, the predicted time to first token. What is accepted waits here and not in the workers, so that
priorities, fairness and deadlines hold until the last moment; it leaves when a worker has room.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Protocol

import msgspec

from python_backends.core.config import RouterConfig
from python_backends.core.errors import BatonError, QueueFull, Unavailable
from router.censored_mean import CensoredMean
from router.clock import Clock
from router.fair_queue import FairQueue
from router.types import Slo, Wish

SHUTTING_DOWN = "the server is shutting down; send the request again elsewhere or later"

_TENANT_SHARE = 4.0  # a tenant may queue so many times what is still free: alone, 4/5 of the bound
_AT_FRONT = -(2**63)  # the priority of requests that were at a worker already, and lost it
_HOPELESS_SHARE = 0.1  # a prompt that can't keep its target even alone may wait for so much of the target
_LEAST_RETRY_S = 0.1
_LEAST_RATE = 1e-3  # tokens per ms
_RATE_MEMORY_MS = 10_000.0  # how far back the measured rate goes
_RATE_PRIOR_MS = 2_000.0  # so long it is the predicted one
_STAY_RATE = 0.05  # of the mean stay, per request that leaves
_ON_TIME = 0.98  # share of the accepted requests that are to be on time
_MARGIN_STEP = 0.05
_MARGIN_RANGE = (0.7, 4.0)
_FIRST_MARGIN = 1.25  # the first lateness is known only when a whole queue has been accepted


class Forecast(msgspec.Struct, frozen=True):
    """Milliseconds to the first token if the request started now, and if the workers had nothing else to do."""

    now_ms: float
    alone_ms: float


class Guest(Protocol):
    """A request, as the door sees it."""

    def start(self) -> bool:
        """Go to a worker if one has room. Raises BatonError when that will never be."""

    @property
    def lacks_stream(self) -> bool:
        """Whether it could not start because workers have all the streams they can take, and not for their prompts."""

    def forecast(self) -> Forecast | None:
        """Of the time to first token. None when nobody is there to serve it."""

    def give_up(self) -> BatonError | float:
        """Why waiting any longer is in vain, or in how many seconds to ask again."""

    @property
    def slo(self) -> Slo: ...


class Admission:
    """Belongs to the router's event loop. `room_changed` is to be called when a worker may be able to take more."""

    def __init__(self, config: RouterConfig, clock: Clock, capacity: Callable[[], float], long_prompt: int) -> None:
        """capacity: prompt tokens per ms that the workers can compute, as far as is predicted.

        long_prompt: tokens from which on prompts have a queue of their own: a worker that has one takes no other, and
        short ones are not to wait for that.
        """
        self._long_prompt = long_prompt
        self._config = config
        self._clock = clock
        self._queue: FairQueue[Place] = FairQueue()
        self._pumping = False
        self._rate = _Rate(clock, capacity)
        self._full = False  # who waits does so until streams end
        self._stay_s = CensoredMean(_STAY_RATE)  # how long requests are at workers
        self._at_workers = 0
        self._seen_at = clock.now()  # the time until which `_stay_s` knows of them
        self._margin = _FIRST_MARGIN
        self._margins: defaultdict[int, float] = defaultdict(lambda: 1.0)  # beyond that, by size of prompt in powers of two
        self._tenants: Counter[str] = Counter()  # their part of queued_tokens
        self.closed = False
        self.requests = 0
        self.queued_tokens = 0  # of prompts without a first token, wherever they are

    @property
    def waiting(self) -> int:
        """Requests that are not at a worker yet."""
        return len(self._queue)

    def close(self) -> None:
        """Refuse everybody from now on."""
        self.closed = True

    def enter(self) -> Place:
        """Take a place. Raises QueueFull, or Unavailable when closed."""
        if self.closed:
            raise Unavailable(SHUTTING_DOWN)
        if self.requests >= self._config.max_requests:
            raise QueueFull(
                f"{self.requests} requests are being served (router.max_requests); try again in a moment", self._retry_s(0)
            )
        self.requests += 1
        return Place(self)

    def room_changed(self) -> None:
        """Soon, offer what waits to the workers."""
        if self._queue and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        self._queue.serve(Place._offer, Place._kind)
        self._rate.waiting(bool(self._queue))

    # --- what a place asks of the whole ---

    def _count(self, tokens: int, tenant: str) -> None:
        """Raises QueueFull. One prompt may always wait, however long."""
        limit, mine = self._config.max_queued_tokens, self._tenants[tenant]
        over: float = self.queued_tokens + tokens - limit
        if over <= 0:
            over = mine + tokens - _TENANT_SHARE * (limit - self.queued_tokens)
        if self.queued_tokens and over > 0:
            retry_s = self._retry_s(over)
            raise QueueFull(
                f"{self.queued_tokens} prompt tokens are waiting, {mine} of them of this tenant (router.max_queued_tokens is "
                f"{limit}); try again in {retry_s:.1f} s",
                retry_s,
            )
        self.queued_tokens += tokens
        self._tenants[tenant] += tokens

    def _uncount(self, tokens: int, tenant: str) -> None:
        self.queued_tokens -= tokens
        self._tenants[tenant] -= tokens
        if not self._tenants[tenant]:
            del self._tenants[tenant]

    def _check_wait(self, place: Place, forecast: Forecast, slo: Slo) -> float | None:
        """Raises QueueFull when waiting would make the first token late. Returns when it is due, ms; None: at no time."""
        wait_ms = self._wait_ms(place) if slo.ttft_ms else 0.0
        if not wait_ms:
            return None
        margin = self._margin_of(place.tokens)
        hopeless = forecast.alone_ms > slo.ttft_ms
        allowed_ms = slo.ttft_ms * _HOPELESS_SHARE if hopeless else slo.ttft_ms - forecast.now_ms * margin
        late_ms = wait_ms * margin - allowed_ms
        if late_ms > 0:
            retry_s = max(late_ms / 1e3, _LEAST_RETRY_S)
            raise QueueFull(
                f"the first token would come in {(wait_ms + forecast.now_ms) * margin:.0f} ms, and the target is "
                f"{slo.ttft_ms:.0f} ms (router.slo.ttft_ms); try again in {retry_s:.1f} s",
                retry_s,
            )
        return None if hopeless else slo.ttft_ms

    def _wait_ms(self, place: Place) -> float:
        """Until it is the place's turn and there is room; as long as nobody waits there is room for prompts at once.

        Where streams have to end first, they do so as often as by Little's law: as many in the time that one stays as there
        are.
        """
        ahead = self._queue.ahead(place.tokens, place.flow, place.priority)
        if self._full and self._at_workers:
            self._count_stay()
            share = ahead / self._queue.cost if self._queue else 0.0
            return (share * self.waiting + 1) * self._stay_s.value / self._at_workers * 1e3
        return ahead / self._rate.tokens_per_ms()

    def _went(self) -> None:
        """A request is at a worker from now on."""
        self._count_stay()
        self._at_workers += 1

    def _left(self) -> None:
        self._count_stay()
        self._at_workers -= 1
        self._stay_s.end()

    def _count_stay(self) -> None:
        now = self._clock.now()
        self._stay_s.add(self._at_workers * (now - self._seen_at))
        self._seen_at = now

    def _margin_of(self, tokens: int) -> float:
        return _within(self._margin * self._margins[tokens.bit_length()], _MARGIN_RANGE)

    def _learn_margin(self, tokens: int, late: bool) -> None:
        """More care after an accepted request was late, a little less after each that was not: with all prompts, and those
        of this size once more.

        Settles where the wanted share is on time: a quantile by stochastic approximation (Robbins and Monro, "A Stochastic
        Approximation Method", 1951), in logarithms.
        """
        size, step = tokens.bit_length(), math.exp(_MARGIN_STEP * (_ON_TIME if late else _ON_TIME - 1))
        self._margin = _within(self._margin * step, _MARGIN_RANGE)
        self._margins[size] = _within(self._margins[size] * step, _MARGIN_RANGE)

    def _retry_s(self, tokens: float) -> float:
        """When so many tokens more will have left the queue."""
        return max(tokens / self._rate.tokens_per_ms() / 1e3, _LEAST_RETRY_S)


class Place:
    """One request's place in the house. Everything but `queue` and `turn` may be called twice."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._left = False
        self._counted = 0
        self._since = admission._clock.now()
        self._due_ms: float | None = None  # after arrival, when the first token is to be there
        self._is_at_worker = False
        self._guest: Guest | None = None
        self._turn: asyncio.Future[None] | None = None
        self._wish = Wish.AUTO
        self.tokens = 0
        self.tenant = ""
        self.priority = 0

    @property
    def flow(self) -> tuple[str, tuple[Wish, bool]]:
        """Who shares fairly with whom. What waits for other workers than the rest does not hold up the rest."""
        return self.tenant, self._kind()

    def queue(self, tokens: int, tenant: str = "", priority: int = 0, wish: Wish = Wish.AUTO) -> None:
        """The prompt waits for its first token from now on. Raises QueueFull."""
        self._admission._count(tokens, tenant)
        self._counted = self.tokens = tokens
        self.tenant, self.priority, self._wish = tenant, priority, wish

    async def turn(self, guest: Guest, *, again: bool = False) -> None:
        """Returns when the guest has started: at once, or when it is its turn and there is room.

        again: it had started before and lost its worker; it waits before all others and is not refused. Raises QueueFull at
        once, what `start` raises, and the reason to give up.
        """
        admission = self._admission
        if again:
            self.priority = _AT_FRONT
        if not admission._queue.has(self.priority) and self._start(guest):
            return
        forecast = guest.forecast()
        if forecast is not None and not again:
            self._due_ms = admission._check_wait(self, forecast, guest.slo)
        await self._wait(guest)

    async def _wait(self, guest: Guest) -> None:
        admission = self._admission
        self._guest = guest
        self._turn = asyncio.get_running_loop().create_future()
        admission._queue.push(self, self.tokens, self.flow, self.priority)
        admission._rate.waiting(True)
        admission.room_changed()
        try:
            while not self._turn.done():
                verdict = guest.give_up()
                if isinstance(verdict, BatonError):
                    raise verdict
                await asyncio.wait({self._turn}, timeout=verdict)
            self._turn.result()
        finally:
            admission._queue.discard(self)
            if self._turn.done():
                self._turn.exception()  # seen, also when the request was cancelled in the same moment

    def _offer(self) -> bool:
        """It is this request's turn. Returns whether it has left the queue."""
        assert self._guest is not None
        assert self._turn is not None
        if self._turn.done():
            return True
        try:
            if not self._start(self._guest):
                return False
        except BatonError as error:
            self._turn.set_exception(error)
            return True
        self._admission._rate.released(self.tokens)
        self._turn.set_result(None)
        return True

    def _start(self, guest: Guest) -> bool:
        """Whether it has gone to a worker."""
        if guest.start():
            if not self._is_at_worker:
                self._is_at_worker = True
                self._admission._went()
            return True
        self._admission._full = guest.lacks_stream
        return False

    def _kind(self) -> tuple[Wish, bool]:
        return self._wish, self.tokens > self._admission._long_prompt

    def first_token(self) -> None:
        """The prompt waits no more."""
        if self._counted:
            self._admission._uncount(self._counted, self.tenant)
            self._counted = 0
            if self._due_ms is not None:
                passed_ms = (self._admission._clock.now() - self._since) * 1e3
                self._admission._learn_margin(self.tokens, late=passed_ms > self._due_ms)

    def leave(self) -> None:
        if self._counted:
            self._admission._uncount(self._counted, self.tenant)
            self._counted = 0
        if not self._left:
            self._left = True
            self._admission.requests -= 1
            if self._is_at_worker:
                self._admission._left()


class _Rate:
    """Prompt tokens per ms that leave the queue while somebody waits: first as predicted, then as measured."""

    def __init__(self, clock: Clock, predicted: Callable[[], float]) -> None:
        self._clock = clock
        self._predicted = predicted
        self._tokens = 0.0
        self._ms = 0.0
        self._since: float | None = None  # s, when somebody waits

    def waiting(self, anybody: bool) -> None:
        self._advance()
        self._since = self._clock.now() if anybody else None

    def released(self, tokens: int) -> None:
        self._advance()
        self._tokens += tokens

    def tokens_per_ms(self) -> float:
        self._advance()
        rate = (self._tokens + self._predicted() * _RATE_PRIOR_MS) / (self._ms + _RATE_PRIOR_MS)
        return max(rate, _LEAST_RATE)

    def _advance(self) -> None:
        if self._since is None:
            return
        now = self._clock.now()
        passed, self._since = (now - self._since) * 1e3, now
        fade = math.exp(-passed / _RATE_MEMORY_MS)
        self._tokens *= fade
        self._ms = self._ms * fade + passed


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
