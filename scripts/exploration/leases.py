"""Requests, leases and blocks alone: the lifecycle's table drives them, and every message comes late, twice or never.

Real: Lifecycle, LeaseTable, BlockPool. The two workers and the router around them are a few lines that keep the protocol:
what a lifecycle says to give back is told to a worker by a message, and only that. A reader copies block by block while
the owner goes on, and then asks whether the blocks' generations are those of its ticket; what it takes for good must be
what was promised to it. So small a world lives some thousand times a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from python_backends.core.types import BlockHash, RequestId
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.lease import GRACE_S, LeaseTable
from router.lifecycle import ENDED_BY_ITSELF, Event, Held, Lifecycle, State
from scripts.exploration.clock import VirtualTime
from scripts.exploration.promise import Violation, require

_NUM_BLOCKS = 4
_LEASE_S = 2.0
_PROMPTS = 4  # so few that they meet in the prefix cache, and too many for it
_TICKETED = (State.HANDING_OFF, State.DECODING)

_Words = tuple[int, int]  # what is written into a block: prompt, index of the block in it


class _Worker:
    """One life of one worker: its pool, its leases, and what is in its blocks."""

    def __init__(self, clock: VirtualTime) -> None:
        self.alive = True
        self.generations = np.zeros(_NUM_BLOCKS, np.uint64)
        self.pool = BlockPool(_NUM_BLOCKS, self.generations)
        self.leases = LeaseTable(self.pool, clock.monotonic)
        self.words: list[_Words | None] = [None] * _NUM_BLOCKS
        self.running: dict[RequestId, list[int]] = {}  # requests that are computed or fetched here, and their blocks
        self.seen: set[RequestId] = set()  # taken or aborted: a late or second order of it counts for nothing

    def take_blocks(self, prompt: int, count: int) -> list[int] | None:
        """References on what is cached of a prompt, and new blocks for the rest, which are written and can be found."""
        hashes = [BlockHash(bytes([prompt, index] * 8)) for index in range(count)]
        blocks = self.pool.reuse(hashes[: self.pool.match(hashes)])
        for index, block in enumerate(blocks):
            require(self.words[block] == (prompt, index), "use after free: another prompt's block is found")
        if not self.pool.can_allocate(count - len(blocks)):
            self.pool.release(blocks)
            return None
        fresh = self.pool.allocate(count - len(blocks))
        for block in fresh:
            index = len(blocks)
            self.words[block] = (prompt, index)
            blocks.append(block)
            self.pool.publish(block, hashes[index])
        return blocks

    def check(self) -> None:
        self.pool.check()
        owned: dict[int, int] = {}
        for blocks in (*self.running.values(), *(lease.blocks for lease in self.leases._leases.values())):
            for block in blocks:
                owned[block] = owned.get(block, 0) + 1
        if owned != self.pool._references:
            raise Violation(f"owners and references differ: {owned} {self.pool._references}")


@dataclass(frozen=True)
class _Ticket:
    worker: _Worker
    lease_id: str
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    words: tuple[_Words, ...]


@dataclass(eq=False)
class _Request:
    """The router's side of one request."""

    name: str
    prompt: int
    size: int  # blocks of the prompt
    life: Lifecycle = field(default_factory=Lifecycle)
    attempt: int = 0
    prefill: _Worker | None = None
    decode: _Worker | None = None
    ticket: _Ticket | None = None
    books: Counter[Held] = field(default_factory=Counter)  # what is held now, by what was taken and given back

    @property
    def leg(self) -> RequestId:
        return RequestId(f"{self.name}.{self.attempt}")

    def check(self) -> None:
        held = {what: count for what, count in self.books.items() if count}
        if held != dict.fromkeys(self.life.holds, 1):
            raise Violation(f"{self.name} holds {held} in state {self.life.state}")


class LeasesWorld:
    """One life of two workers and a few requests."""

    def __init__(self, clock: VirtualTime, rng: Random) -> None:
        self._clock = clock
        self._rng = rng
        self.happened: Counter[str] = Counter()
        self._workers = [_Worker(clock), _Worker(clock)]  # prefill, decode
        self._count = 0
        self._requests = [self._new_request() for _ in range(rng.randrange(1, 5))]
        self._underway: list[Callable[[], None]] = []
        self._moved: set[_Worker | _Request] = set()

    def run(self) -> None:
        rng = self._rng
        for _ in range(rng.choice([20, 40, 60])):
            lot = rng.random()
            if lot < 0.5:
                self._arrive()
            elif lot < 0.87:
                self._advance(rng.choice(self._requests))
            elif lot < 0.9:
                self._end(rng.choice(self._requests), rng.choice([Event.CANCEL, Event.FAIL]))
            elif lot < 0.93:
                self._retry(rng.choice(self._requests))
            elif lot < 0.98:
                self._pass_time(rng.choice([0.1, 0.7, _LEASE_S + GRACE_S]))
            else:
                self._crash(rng.randrange(2))
            self._check()
            for index, request in enumerate(self._requests):
                if not request.life.live:
                    self._requests[index] = self._new_request()
        self._finish()

    def _new_request(self) -> _Request:
        self._count += 1
        request = _Request(f"r{self._count}", self._rng.randrange(_PROMPTS), self._rng.randrange(1, 4))
        request.books.update(request.life.holds)
        return request

    # --- what happens ---

    def _arrive(self) -> None:
        """One of the messages under way, whichever; one in eight will come again."""
        if self._underway:
            index = self._rng.randrange(len(self._underway))
            message = self._underway[index] if self._rng.random() < 0.125 else self._underway.pop(index)
            message()

    def _advance(self, request: _Request) -> None:
        """The next step that the router takes by itself."""
        state = request.life.state
        if state is State.QUEUED:
            request.attempt += 1
            self._move(request, Event.ROUTE)
        elif state is State.ROUTED and self._rng.random() < 0.75:
            request.prefill = self._workers[0]
            self._to(request.prefill, self._compute, request, request.leg)
            self._move(request, Event.PREFILL)
        elif state is State.ROUTED:
            self._ask_decode(request, None)
        elif state is State.PREFILLING and request.ticket is not None:
            self._ask_decode(request, request.ticket)
        elif state is State.DECODING and self._rng.random() < 0.3:
            self._move(request, Event.STOP)

    def _end(self, request: _Request, event: Event) -> None:
        if request.life.live:
            self.happened[event.value] += 1
            self._move(request, event)

    def _retry(self, request: _Request) -> None:
        """The router believes that a worker is lost, rightly or not."""
        if request.life.state in (State.PREFILLING, *_TICKETED):
            self.happened["retries"] += 1
            self._move(request, Event.WORKER_LOST)
            request.ticket = None

    def _pass_time(self, seconds: float) -> None:
        self._clock.now += seconds
        self._moved.update(self._workers)
        for worker in self._workers:
            self.happened["expired"] += len(worker.leases.expire(self._clock.now))

    def _crash(self, index: int) -> None:
        """Its successor has another pool; messages to and from the dead one arrive nowhere."""
        self.happened["crashes"] += 1
        self._workers[index].alive = False
        self._workers[index] = _Worker(self._clock)

    # --- the router ---

    def _move(self, request: _Request, event: Event) -> None:
        self._moved.add(request)
        life = request.life
        before, held = life.state, life.holds
        back = life.on(event)
        request.books.subtract(back | ENDED_BY_ITSELF.get((before, event), frozenset()))
        request.books.update(life.holds - held)
        for what in sorted(back):  # sets have another order in every process
            if what is Held.PREFILL and request.prefill is not None:
                self._to(request.prefill, self._abort, request.leg)
            elif what is Held.DECODE and request.decode is not None:
                self._to(request.decode, self._abort, request.leg)
            elif what is Held.LEASE and request.ticket is not None:
                self._to(request.ticket.worker, self._release, request.ticket.lease_id)

    def _ask_decode(self, request: _Request, ticket: _Ticket | None) -> None:
        request.decode = self._workers[1]
        self._to(request.decode, self._fetch, request, request.leg, ticket)
        self._move(request, Event.DECODE if ticket is None else Event.HAND_OFF)

    def _hear_done(self, request: _Request, leg: RequestId, ticket: _Ticket) -> None:
        """PrefillDone. What comes for an attempt that is over is nobody's: its abort gives it back."""
        if request.leg == leg and request.life.state is State.PREFILLING:
            request.ticket = ticket

    def _hear_ready(self, request: _Request, leg: RequestId) -> None:
        if request.leg == leg and request.life.state is State.HANDING_OFF:
            self._move(request, Event.KV_READY)

    def _hear_last(self, request: _Request, leg: RequestId) -> None:
        if request.leg == leg and request.life.state is State.DECODING:
            self._move(request, Event.FINISH)

    # --- the workers ---

    def _to(self, worker: _Worker, call: Callable[..., None], *arguments: object) -> None:
        self._underway.append(lambda: self._tell(worker, call, arguments))

    def _tell(self, worker: _Worker, call: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if worker.alive:
            self._moved.add(worker)
            call(worker, *arguments)

    def _abort(self, worker: _Worker, leg: RequestId) -> None:
        worker.pool.release(worker.running.pop(leg, []))
        worker.leases.release_request(leg)
        worker.seen.add(leg)

    def _release(self, worker: _Worker, lease_id: str) -> None:
        self.happened["released" if worker.leases.release(lease_id) else "released again"] += 1

    def _compute(self, worker: _Worker, request: _Request, leg: RequestId) -> None:
        """Prefill begins."""
        if leg in worker.seen:
            return
        worker.seen.add(leg)
        blocks = worker.take_blocks(request.prompt, request.size)
        if blocks is not None:
            worker.running[leg] = blocks
            self._to(worker, self._computed, request, leg)

    def _computed(self, worker: _Worker, request: _Request, leg: RequestId) -> None:
        """Prefill ends: a lease takes the blocks over."""
        blocks = worker.running.pop(leg, None)
        if blocks is None:
            return
        lease_id = worker.leases.grant(leg, blocks, _LEASE_S)
        ticket = _Ticket(
            worker,
            lease_id,
            tuple(blocks),
            tuple(int(worker.generations[block]) for block in blocks),
            tuple((request.prompt, index) for index in range(request.size)),
        )
        self.happened["leases"] += 1
        self._underway.append(lambda: self._hear_done(request, leg, ticket))

    def _fetch(self, worker: _Worker, request: _Request, leg: RequestId, ticket: _Ticket | None) -> None:
        """Decode: the copying begins, or, without a ticket, the computing."""
        if leg in worker.seen:
            return
        worker.seen.add(leg)
        blocks = worker.pool.allocate(request.size) if worker.pool.can_allocate(request.size) else None
        if blocks is None:
            return
        worker.running[leg] = blocks
        if ticket is None:
            self._to(worker, self._decoded, request, leg)
        else:
            self._to(worker, self._copy, request, leg, ticket, [])

    def _copy(self, worker: _Worker, request: _Request, leg: RequestId, ticket: _Ticket, copied: list[_Words | None]) -> None:
        """One more block, or the check after the last. The destination is nobody else's until then."""
        if leg not in worker.running:
            return
        if len(copied) < len(ticket.blocks):
            more = [*copied, ticket.worker.words[ticket.blocks[len(copied)]]]
            self._to(worker, self._copy, request, leg, ticket, more)
            return
        meant = tuple(int(ticket.worker.generations[block]) for block in ticket.blocks) == ticket.generations
        if meant:
            require(tuple(copied) == ticket.words, "use after free: a reader takes what was written for another")
        self.happened["fetched" if meant else "stale"] += 1
        self._underway.append(lambda: self._hear_ready(request, leg))
        self._to(worker, self._decoded, request, leg)

    def _decoded(self, worker: _Worker, request: _Request, leg: RequestId) -> None:
        """The last token: the worker gives back by itself, and says so."""
        if leg in worker.running:
            worker.pool.release(worker.running.pop(leg))
            self._underway.append(lambda: self._hear_last(request, leg))

    # --- the promises ---

    def _check(self) -> None:
        """Of whoever has moved since the last look."""
        for who in self._moved:
            who.check()
        self._moved.clear()

    def _finish(self) -> None:
        """Whatever lives is cancelled, every message arrives, and leases nobody spoke of run out."""
        for request in self._requests:
            self._end(request, Event.CANCEL)
        while self._underway:
            self._underway.pop(self._rng.randrange(len(self._underway)))()
        self._pass_time(_LEASE_S + GRACE_S)
        self._check()
        for worker in self._workers:
            require(worker.pool.held_blocks == 0, f"leak: {worker.pool.held_blocks} blocks held at the end")
            require((worker.leases.active, worker.leases.next_expiry()) == (0, None), "leak: a lease at the end")
        require(not any(any(request.books.values()) for request in self._requests), "leak: a request holds something")


def explore_leases(clock: VirtualTime, rng: Random) -> Counter[str]:
    """One life of a world. Raises AssertionError when a promise is broken; returns what was seen."""
    world = LeasesWorld(clock, rng)
    world.run()
    return world.happened
