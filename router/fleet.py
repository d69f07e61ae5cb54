"""The workers as the router sees them: who is up, in which life, and how much it has given them to do.

Reported load is as old as the last heartbeat; what the router itself has sent is known exactly and at once, so choices
are made on the latter. Each role's workers are kept in the order of their load, so that a choice looks at a few of them
however many there are.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random

from python_backends.core.messages import Heartbeat, StepSample
from python_backends.core.step_model import StepModel, tokens_within
from python_backends.core.types import Epoch, Role, WorkerId
from router.cost_model import LinkModel
from router.kv_room import KvRoom

_FIRST_HOP_MS = 2.0  # until it is known
_HOP_RATE = 0.1
_BURST_RATE = 0.05
_WINDOW_STEPS = 2  # of prompts are given to a worker in advance, so that it never waits for more; the rest waits in the router
FOLLOWED_TOKENS = 256  # fewer are not worth the messages
_LAST = 1e6  # times its load counts that of a full worker
_NEAR = 1.05  # loads that differ less are the same ...
_NEAR_MS = 0.5  # ... and so are these


def long_prompt(step_tokens: int) -> int:
    """Tokens from which on a prompt is long: it shares a worker with short ones, but with no other long one."""
    return 4 * step_tokens


class WorkerView:
    """One life of a worker. `role`, `fingerprint`, `max_context` and the like are the heartbeat's."""

    def __init__(self, heartbeat: Heartbeat, heard: float, former: WorkerView | None = None, like: StepModel | None = None):
        """heard: monotonic, s. What the former life has taught is kept; of a new worker, what is known of another."""
        self.heartbeat = heartbeat
        self.heard = heard
        self.up = True
        self.id = heartbeat.worker
        self.role = heartbeat.role
        self.epoch = heartbeat.epoch
        self.fingerprint = heartbeat.fingerprint
        self.family = heartbeat.family
        self.max_context = heartbeat.max_context
        self.step_tokens = heartbeat.step_tokens
        self.step_ms = heartbeat.load.step_ms
        self.max_batch = heartbeat.max_batch
        self.prefill_window = _WINDOW_STEPS * heartbeat.step_tokens
        self.long_prompt = long_prompt(heartbeat.step_tokens)
        self.block_size = heartbeat.layout.block_size
        self.token_bytes = heartbeat.layout.token_bytes
        self.kv = KvRoom(heartbeat.load, heartbeat.layout.block_size)
        self.requests = 0  # routed here and not ended
        self.sent = 0  # of these, what the worker has been told of: prompts that end here may still be computed elsewhere
        self.canaries = 0  # under way to it, and no requests of anybody's
        self.streams = 0  # those whose prompt is computed
        self.prompts: dict[Charge, int] = {}  # prompts to be computed here, oldest first, with the tokens left of each
        self._crowd: tuple[int, bool] | None = None  # `crowd` and `has_long`, until the prompts change
        self.prefill_tokens = 0  # their sum
        self.context_tokens = 0  # prompts and outputs of the requests here
        self.foreign_tokens = 0  # prompt tokens that other routers wait for here, as the last heartbeat said
        self.foreign_requests = 0
        self.tells_steps = bool(heartbeat.calibration)  # or its rates are learned from the times of requests
        self.tokens_per_step = 1.0  # that a stream gets; more where it guesses ahead
        known = former is not None and former.fingerprint == heartbeat.fingerprint
        self.model: StepModel = former.model if former and known else StepModel(heartbeat.calibration, like)
        self.link: LinkModel = former.link if former and known else LinkModel()
        self.hop_ms: float = former.hop_ms if former and known else _FIRST_HOP_MS
        self.resting = ""  # why it is given no new work by this router, though it is up
        self.spoke = 0.0  # when it last produced something, on the router's clock, s
        self.load_ms = 0.0  # what the workers of a role are ordered by
        self.on_cores: list[WorkerView] = []  # this and others that lend each other cores, the fleet's; empty: there are none

    def exchanges_with(self, other: WorkerView) -> bool:
        """Whether one takes the other's KV, converted if need be."""
        return self.fingerprint == other.fingerprint or "" != self.family == other.family

    def may_follow(self, prefill: WorkerView, uncached: int) -> bool:
        """Whether it is to fetch a prompt's KV while that worker computes so many tokens (router/following.py).

        These are more than a step's; and the KV is as this worker has it, since loans aren't converted.
        """
        if uncached <= max(prefill.step_tokens, FOLLOWED_TOKENS):  # first: it is most prompts, and asked for every decision
            return False
        alike = (self.fingerprint, self.block_size) == (prefill.fingerprint, prefill.block_size)
        return alike and self.heartbeat.follows and prefill.heartbeat.lends

    @property
    def available(self) -> bool:
        """Whether it is given new work."""
        return self.up and not self.resting and not self.heartbeat.draining

    def takes_prompt(self, tokens: int = 1) -> bool:
        """Whether the worker is to be given a prompt of so many uncached tokens now."""
        if not self.prompts:
            return True
        crowd, has_long = self.crowd()
        return crowd < self.prefill_window and (tokens <= self.long_prompt or not has_long)

    def takes_stream(self, prompt_tokens: int = 1, output_tokens: int = 0) -> bool:
        """prompt_tokens: that are not in the pool. output_tokens: expected."""
        return self.requests + self.foreign_requests < self.max_batch and self.has_kv_for(prompt_tokens, output_tokens)

    def beat(self, heartbeat: Heartbeat, now: float) -> None:
        """What is there and not from here, other routers have sent; or it came back from another worker."""
        self.heartbeat, self.heard = heartbeat, now
        load = heartbeat.load
        self.step_ms = load.step_ms
        self.foreign_tokens = max(load.queued_tokens - self.prefill_tokens, 0)
        self.foreign_requests = max(load.queued_requests + load.running_requests - self.sent - self.canaries, 0)
        self.kv.beat(load, self.sent, self.foreign_requests)

    def crowd(self) -> tuple[int, bool]:
        """Prompt tokens in the way of a new prompt, and whether there is a long one.

        That leaves half of each step to others, so it counts as a step.
        """
        if self._crowd is None:
            short = [left for left in self.prompts.values() if left <= self.long_prompt]
            has_long = len(short) < len(self.prompts)
            self._crowd = sum(short) + (self.step_tokens if has_long else 0), has_long
        return self._crowd

    def tokens_before(self, tokens: int, contended: bool, may_overtake: bool = True) -> int:
        """Prompt tokens of others that are computed here before a new prompt of so many is done.

        The paged engine gives half of a step to the oldest prompt and the rest to the shortest (its scheduler.py).
        contended: shorter ones will keep coming. may_overtake: without it the new prompt is to wait for those before it.
        """
        return self.foreign_tokens + (self._own_before(tokens, contended, may_overtake) if self.prompts else 0)

    def _own_before(self, tokens: int, contended: bool, may_overtake: bool) -> int:
        crowd, has_long = self.crowd()
        if contended and tokens > self.step_tokens // 2:
            if tokens > self.long_prompt or not has_long:
                return self.prefill_tokens + tokens
            return 2 * crowd + tokens
        shorter = sum([left for left in self.prompts.values() if left <= tokens])
        overtaking = min(self.prefill_tokens, 2 * shorter + tokens)
        return overtaking if may_overtake else max(overtaking, crowd)

    def queue(self, charge: Charge, tokens: int) -> None:
        """A prompt of so many uncached tokens was sent here."""
        self.prompts[charge] = tokens
        self.prefill_tokens += tokens
        self._crowd = None

    def drop(self, charge: Charge) -> None:
        """A prompt will not be computed to its end."""
        self.prefill_tokens -= self.prompts.pop(charge)
        self._crowd = None

    def computed(self, tokens: int) -> None:
        """So many prompt tokens were computed: count down the prompts, shared among them as above.

        Until its first token is here, a prompt counts as not quite done.
        """
        if self.foreign_tokens:
            others = tokens * self.foreign_tokens // (self.foreign_tokens + self.prefill_tokens)
            self.foreign_tokens = max(self.foreign_tokens - others, 0)
            tokens -= others
        if not self.prompts:
            return
        self._crowd = None
        oldest = next(iter(self.prompts))
        shares = {oldest: min(self.prompts[oldest] - 1, -(-tokens // 2))}
        left = tokens - shares[oldest]
        for charge, remaining in sorted(self.prompts.items(), key=lambda item: item[1]):
            if charge is not oldest and left:
                shares[charge] = min(remaining - 1, left)
                left -= shares[charge]
        shares[oldest] = min(self.prompts[oldest] - 1, shares[oldest] + left)
        for charge, share in shares.items():
            self.prompts[charge] -= share
            self.prefill_tokens -= share

    def finished(self, charge: Charge) -> None:
        """A prompt is computed. What had been counted as done of others instead of it is not done."""
        self._crowd = None
        missed = self.prompts.pop(charge) - 1
        self.streams += 1
        self.prefill_tokens -= 1
        if not self.prompts:
            self.prefill_tokens = 0
        elif missed > 0:
            oldest = next(iter(self.prompts))
            self.prompts[oldest] += missed

    def has_kv_for(self, prompt_tokens: int, output_tokens: int = 0) -> bool:
        """Whether the pool will hold a request more. See takes_stream."""
        return self.kv.fits(prompt_tokens, output_tokens, self.requests, self.foreign_requests)

    def kv_share(self) -> float:
        """Of the pool, that the requests here will hold together."""
        return self.kv.share(self.requests, self.foreign_requests)

    def longest_step_ms(self, asked_ms: float) -> float:
        """Of streams alone, where it was asked for so much; 0: there is no limit.

        A worker whose steps are often late says that they are to be shorter. Where even a single stream takes longer,
        keeping others away would not help.
        """
        return min(asked_ms, self.step_ms) if self.step_ms else asked_ms

    def fill(self, longest_ms: float) -> float:
        """How much it has of the streams that it can take: of its batch, of its KV pool, or of the time of a step, whichever
        is nearest to its end. 1: all; more where the pool will not hold what it has.

        longest_ms: what a step of streams alone may take; 0: there is no limit.
        """
        requests = self.requests + self.foreign_requests
        full = max(requests / self.max_batch, self.kv_share())
        longest, least = self.longest_step_ms(longest_ms), self.model.step_ms(0, 0, 0, 0)
        if requests and longest > max(least, self.model.step_ms(0, 0, 1, self.context_tokens / requests)):
            full = max(full, (self.model.step_ms(0, 0, requests, self.context_tokens) - least) / (longest - least))
        return full

    def chunk(self, depth: float) -> int:
        """Tokens of a step that computes prompts beside the streams that are here, theirs included.

        depth: prompt tokens that are computed by then. As python_backends.engines.paged.step_limit has it.
        """
        streams = self.streams
        if not self.step_ms or not streams:
            return self.step_tokens
        most = max(self.step_tokens - streams, 1)
        return streams + tokens_within(self.model, self.step_ms, streams, self.context_tokens, depth, most)

    def prefill_rate(self) -> float:
        """Prompt tokens per ms, in full steps beside the streams that are here."""
        chunk = self.chunk(0.0)
        return chunk / max(self.model.step_ms(chunk, 0, self.streams, self.context_tokens), 1e-3)

    def learn_step(self, step: StepSample) -> None:
        """Of a worker that tells its steps."""
        self.tells_steps = True
        self.model.learn(step)
        if step.decode_tokens:
            self.tokens_per_step += _BURST_RATE * (step.decode_tokens / step.decode_streams - self.tokens_per_step)

    def learn_times(self, seen: StepSample) -> None:
        """Of one that does not: what a request of its took, as if it had been one step."""
        if not self.tells_steps:
            self.model.learn(seen)

    def learn_hop(self, ms: float) -> None:
        """ms: what a request took that found the worker idle, without the computing."""
        self.hop_ms += _HOP_RATE * (max(ms, 0.0) - self.hop_ms)

    def weigh(self) -> float:
        """Sets and returns `load_ms`: time until new work gets its turn, or what a step takes where streams run.

        Who can't have another stream comes after all who can, though its steps may be shorter, with streams that are young.
        """
        tokens = self.prefill_tokens + self.foreign_tokens
        backlog = self.model.step_ms(tokens, 0, 0, 0) if tokens else 0.0
        if self.role is Role.PREFILL:
            self.load_ms = backlog
        else:
            requests = self.requests + self.foreign_requests
            self.load_ms = self.model.step_ms(0, 0, requests, self.context_tokens) + backlog
            if requests >= self.max_batch or not self.kv.fits_another(self.requests, self.foreign_requests):
                self.load_ms *= _LAST
        return self.load_ms


class Charge:
    """One request's load on one worker. A charge to an earlier life of the worker is void."""

    def __init__(
        self, fleet: Fleet, worker: WorkerView | None, prefill_tokens: int, context: int, kv_tokens: int, output_tokens: int
    ) -> None:
        """See Fleet.charge."""
        self._fleet = fleet
        self._worker = worker
        self._context = context
        self._kv = (kv_tokens, output_tokens)
        self._grown = 0
        self._sent = False
        if worker is not None:
            worker.requests += 1
            worker.context_tokens += context
            worker.kv.take(kv_tokens, output_tokens)
            if prefill_tokens:
                worker.queue(self, prefill_tokens)
            else:
                worker.streams += 1
            fleet.reorder(worker)

    def sent(self) -> None:
        """The worker has been told of the request. Idempotent."""
        if self._worker is not None and not self._sent:
            self._sent = True
            self._worker.sent += 1
            self._worker.kv.send(self._kv[0])

    def prefilled(self) -> None:
        """The prompt is computed. Idempotent."""
        if self._worker is not None and self in self._worker.prompts:
            self._worker.finished(self)
            self._fleet.reorder(self._worker)
            self._fleet.on_room()

    def grow(self, tokens: int) -> None:
        """The request has so many more tokens."""
        if self._worker is not None:
            self._grown += tokens
            self._worker.context_tokens += tokens

    def undo(self) -> None:
        """The request has left the worker. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.requests -= 1
            worker.sent -= self._sent
            if self in worker.prompts:
                worker.drop(self)
            else:
                worker.streams -= 1
            worker.context_tokens -= self._context + self._grown
            worker.kv.give_back(*self._kv, self._grown, self._sent)
            self._fleet.reorder(worker)
            self._fleet.on_room()


class Ranking:
    """Workers that are given work, of one role, least loaded first."""

    def __init__(self) -> None:
        self._order: list[tuple[float, WorkerId]] = []
        self._views: dict[WorkerId, WorkerView] = {}
        self._loads: dict[WorkerId, float] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[WorkerView]:
        return (self._views[name] for _, name in self._order)

    def put(self, worker: WorkerView) -> None:
        """Add the worker, or move it to where its load belongs now."""
        load = worker.weigh()
        if self._views.get(worker.id) is worker and self._loads[worker.id] == load:
            return
        self.remove(worker.id)
        self._views[worker.id] = worker
        self._loads[worker.id] = load
        insort(self._order, (load, worker.id))

    def remove(self, worker: WorkerId) -> None:
        if self._views.pop(worker, None) is not None:
            del self._order[bisect_left(self._order, (self._loads.pop(worker), worker))]

    def get(self, worker: WorkerId) -> WorkerView | None:
        return self._views.get(worker)

    def first(self) -> WorkerView | None:
        return self._views[self._order[0][1]] if self._order else None

    def few(self, count: int, able: Callable[[WorkerView], bool], random: Random) -> list[WorkerView]:
        """Up to `count` able workers among the least loaded; from more that are near equals, at random."""
        order, views = self._order, self._views
        if not order:
            return []
        near = bisect_right(order, (order[0][0] * _NEAR + _NEAR_MS, "\U0010ffff"))
        start = random.randrange(near) if near > count else 0
        found: list[WorkerView] = []
        for index in range(len(order)):
            # from a random near equal on, once around, then the rest
            worker = views[order[(start + index) % near if index < near else index][1]]
            if able(worker):
                found.append(worker)
                if len(found) == count:
                    break
        return found


class Fleet:
    """Belongs to the router's event loop. `on_room` is called when a worker may have become able to take more."""

    def __init__(self, standby: Iterable[WorkerId] = ()) -> None:
        """standby: aggregated workers that are only asked for by name of the way, or when nobody else decodes."""
        self.standby = frozenset(standby)
        self.on_room: Callable[[], None] = _nothing
        self.ranked = {role: Ranking() for role in Role}
        self.version = 0  # grows when a worker comes up or goes down, rests or resumes
        self._workers: dict[WorkerId, WorkerView] = {}
        self._over: set[Epoch] = set()
        self._on_cores: dict[tuple[str, str], list[WorkerView]] = {}  # by host and Heartbeat.cores
        self._changed: asyncio.Future[None] | None = None
        self.on_probation = False  # whether the next life of a worker rests until somebody says `resume`

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def up(self) -> list[WorkerView]:
        return [worker for worker in self._workers.values() if worker.up]

    def available(self) -> list[WorkerView]:
        """Those that are given new work."""
        return [worker for worker in self._workers.values() if worker.available]

    def get(self, worker: WorkerId) -> WorkerView | None:
        return self._workers.get(worker)

    def hear(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take in a heartbeat. Returns whether the worker is up only since now: new, restarted or back again."""
        known = self._workers.get(heartbeat.worker)
        if known is not None and known.epoch == heartbeat.epoch and known.up:
            was, foreign = known.available, known.foreign_requests
            known.beat(heartbeat, now)
            self.reorder(known)
            if known.available != was:
                self._wake()
            elif known.foreign_requests < foreign:  # a stream of another router has ended
                self.on_room()
            return False
        worker = WorkerView(heartbeat, now, known, self._model_like(heartbeat))
        if known is not None and known.epoch == heartbeat.epoch:
            worker.resting = known.resting
        elif known is not None:
            self.bury(known.epoch)
            worker.resting = "it was restarted and has not passed a canary yet" if self.on_probation else ""
        self._workers[heartbeat.worker] = worker
        self._share_cores(worker, known)
        self.reorder(worker)
        self._wake()
        return True

    def lose(self, worker: WorkerId) -> bool:
        """Take a worker out. Returns whether it was up."""
        known = self._workers.get(worker)
        if known is None or not known.up:
            return False
        known.up = False
        self.ranked[known.role].remove(worker)
        self._wake()
        return True

    def spoke(self, worker: WorkerId, now: float) -> None:
        """It has produced something."""
        known = self._workers.get(worker)
        if known is not None:
            known.spoke = now

    def rest(self, worker: WorkerId, why: str) -> None:
        """Give it no new work. What it says still counts."""
        known = self._workers.get(worker)
        if known is not None:
            known.resting = why
            self.reorder(known)
            self._wake()

    def resume(self, worker: WorkerId) -> None:
        """Give it work again."""
        self.rest(worker, "")

    def forget(self, worker: WorkerId) -> None:
        """It is none of the deployment's any more. Should it be heard again it is a new one."""
        self.lose(worker)
        known = self._workers.pop(worker, None)
        if known is not None:
            self._leave_cores(known)

    def bury(self, epoch: Epoch) -> None:
        """This life of a worker is over; what is still on its way from it does not bring it back."""
        self._over.add(epoch)

    def is_over(self, epoch: Epoch) -> bool:
        return epoch in self._over

    def is_up(self, worker: WorkerId) -> bool:
        known = self._workers.get(worker)
        return known is not None and known.up

    def is_given_work(self, worker: WorkerId) -> bool:
        """Whether work that was meant for it still goes there. A worker that drains finishes what it has been promised."""
        known = self._workers.get(worker)
        return known is not None and known.up and not known.resting

    def is_current(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether a message of this life of the worker still counts."""
        known = self._workers.get(worker)
        return known is not None and known.up and known.epoch == epoch

    def silent(self, since: float) -> list[WorkerView]:
        return [worker for worker in self.up() if worker.heard < since]

    def charge(
        self, worker: WorkerId, prefill_tokens: int, context: int = 0, kv_tokens: int = 0, output_tokens: int = 0
    ) -> Charge:
        """Count a request as load of this life of a worker.

        prefill_tokens: of its prompt, to be computed there. context: all its tokens. kv_tokens: those of them that are not
        in its pool. output_tokens: that are expected to follow.
        """
        return Charge(self, self._workers.get(worker), prefill_tokens, context, kv_tokens, output_tokens)

    def stepped(self, worker: WorkerId, steps: Sequence[StepSample]) -> None:
        """A worker says what it has computed: learn from it, and count its prompts down."""
        known = self._workers.get(worker)
        if known is None:
            return
        for step in steps:
            known.learn_step(step)
        computed = sum(step.prefill_tokens for step in steps)
        if not computed:
            return
        known.computed(computed)
        self.reorder(known)
        self.on_room()

    def reorder(self, worker: WorkerView) -> None:
        """The worker's load has changed, or whether it is given work."""
        if self._workers.get(worker.id) is not worker:
            return
        if worker.available:
            self.ranked[worker.role].put(worker)
        else:
            self.ranked[worker.role].remove(worker.id)

    async def wait_for_change(self, timeout: float) -> None:
        """Until a worker comes up or goes down, rests or resumes, or the time is over."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the change.
        await asyncio.wait({self._changed}, timeout=timeout)

    def _share_cores(self, worker: WorkerView, former: WorkerView | None) -> None:
        if former is not None:
            self._leave_cores(former)
        if worker.heartbeat.cores:
            worker.on_cores = self._on_cores.setdefault((worker.heartbeat.host, worker.heartbeat.cores), [])
            worker.on_cores.append(worker)

    def _leave_cores(self, worker: WorkerView) -> None:
        if worker in worker.on_cores:
            worker.on_cores.remove(worker)
            if not worker.on_cores:
                del self._on_cores[worker.heartbeat.host, worker.heartbeat.cores]

    def _model_like(self, heartbeat: Heartbeat) -> StepModel | None:
        """Of the worker of this model that has told most."""
        alike = [worker.model for worker in self if worker.fingerprint == heartbeat.fingerprint]
        return max(alike, key=lambda model: model.samples, default=None)

    def _wake(self) -> None:
        self.version += 1
        self.on_room()
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)


def _nothing() -> None:
    """Nobody waits for room."""
