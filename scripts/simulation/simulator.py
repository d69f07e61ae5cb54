"""One simulated run: the real router - house, policy, admission, lifecycle - over simulated workers, on a virtual clock."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import cast

import msgspec

from python_backends.core.block_hash import block_hashes
from python_backends.core.config import Deployment, EngineConfig, RouterConfig, TransferConfig, WorkerConfig
from python_backends.core.errors import BatonError
from python_backends.core.messages import Work
from python_backends.core.types import BlockHash, LeaseEnd, RequestId, Role, SamplingParams, WorkerId
from router.detokenizer import Detokenizer
from router.fleet import WorkerView
from router.house import House
from router.journal import Record
from router.run import Run
from router.seams import Snapshot
from router.serve import serve
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Outcome, Piece, Proof, Way
from scripts.simulation.clock import VirtualClock, VirtualLoop
from scripts.simulation.hardware import Rates
from scripts.simulation.scaling import ROUTER, Scaler, Scaling
from scripts.simulation.statistics import Histogram
from scripts.simulation.timeline import WATCH_S, Moment
from scripts.simulation.worker import SimulatedWorker
from scripts.simulation.workload import Arrival, Tokens, Workload

_BEAT_S = 0.5  # between two heartbeats of a worker ...
_BEATS_AT_ONCE = 32  # ... but all together send no more in that time: large fleets take turns


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet and how it is driven. `workers`: how many of each role."""

    name: str
    workers: Mapping[Role, int]
    rates: Mapping[Role, Rates]
    router: RouterConfig
    engine: EngineConfig
    transfer: TransferConfig = field(default_factory=TransferConfig)
    seed: int = 0
    scaling: Scaling | None = None  # by which prefill and decode workers come and go; `workers` has none of them then


@dataclass(slots=True)
class Result:
    """What came out. Times in ms."""

    scenario: Scenario
    workload: str
    seconds: float = 0.0  # in which requests arrived
    arrived: int = 0
    completed: int = 0
    refused: int = 0
    failed: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)  # every gap between two tokens
    tpot: Histogram = field(default_factory=Histogram)  # mean gap of each request
    queue: Histogram = field(default_factory=Histogram)
    refusal: Histogram = field(default_factory=Histogram)  # from arrival to the refusal
    ttft_by_tenant: dict[str, Histogram] = field(default_factory=dict)
    ttft_error: Histogram = field(default_factory=Histogram)  # |predicted - real| / real
    good: int = 0  # requests that kept the targets
    ways: Counter[str] = field(default_factory=Counter)
    ways_by_tokens: dict[int, Counter[str]] = field(default_factory=dict)  # by the next power of two of the prompt's tokens
    input_tokens: int = 0
    output_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens that nobody computed
    busy: dict[Role, float] = field(default_factory=dict)  # share of the time
    worker_seconds: dict[Role, float] = field(default_factory=dict)  # that workers were paid for
    errors: Counter[str] = field(default_factory=Counter)
    most_waiting: int = 0
    timeline: list[Moment] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Requests per second that kept the targets."""
        return self.good / self.seconds if self.seconds else 0.0


def simulate(scenario: Scenario, workload: Workload) -> Result:
    """Run to the last answer."""
    loop = VirtualLoop()
    collecting = gc.isenabled()
    gc.disable()  # there is much that lives long, and nothing in circles worth looking for
    try:
        return loop.run_until_complete(Simulation(scenario, workload, VirtualClock(loop)).run())
    finally:
        if collecting:
            gc.enable()
        loop.close()


class Simulation:
    """Implements router.seams.Calls and Observer. `house` and `workers` are there to be looked at afterwards."""

    def __init__(self, scenario: Scenario, workload: Workload, clock: VirtualClock) -> None:
        self._scenario = scenario
        self._workload = workload
        self._clock = clock
        self._random = Random(scenario.seed)
        self.result = Result(scenario, workload.name)
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self._hired: Counter[Role] = Counter()
        self._busy_s: defaultdict[Role, float] = defaultdict(float)  # of workers that are gone
        self._scaler: Scaler | None = None
        self._ttft = Histogram()  # ms, since the last moment of the timeline
        self.house = House(
            _deployment(scenario),
            cast(Tokenizer, _NoText()),
            self,
            self,
            clock=clock,
            hasher=_hashes_of,
            random=Random(scenario.seed + 1),
            detokenizer=_NoDetokenizer,
        )
        self._left = 0
        self._broken: BaseException | None = None
        self._done = asyncio.Event()

    async def run(self) -> Result:
        scenario, loop = self._scenario, asyncio.get_running_loop()
        for role, count in scenario.workers.items():
            for _ in range(count):
                self.hire(role)
        chores = [loop.create_task(self._beat()), loop.create_task(self._watch())]
        if scenario.scaling is not None:
            self._scaler = Scaler(scenario.scaling, self)
            chores.append(loop.create_task(self._scaler.run()))
        for chore in chores:
            chore.add_done_callback(self._broke)
        self._left = len(self._workload.arrivals)
        if self._left:
            self._come(iter(self._workload.arrivals), None)
            await self._done.wait()
        for chore in chores:
            chore.cancel()
        if self._broken is not None:
            raise self._broken
        return self._finish()

    def _come(self, arrivals: Iterator[Arrival], arrival: Arrival | None) -> None:
        """A request comes, and it is known when the next one will."""
        loop = asyncio.get_running_loop()
        if arrival is not None:
            loop.create_task(self._serve(arrival)).add_done_callback(self._ended)
        following = next(arrivals, None)
        if following is not None and self._broken is None:
            loop.call_at(following.at_s, self._come, arrivals, following)

    # --- workers: see scaling.Scaled ---

    def hire(self, role: Role) -> WorkerId:
        """A new worker under a name of its own, at work from now on."""
        scenario, number = self._scenario, self._hired[role]
        self._hired[role] += 1
        worker = SimulatedWorker(
            f"{role.value}_{number}",
            role,
            scenario.rates[role],
            scenario.engine,
            scenario.transfer,
            self._workload.block_size,
            self.result.itl,
            Random(f"{scenario.seed}/{role.value}/{number}"),
            itl_ms=0.0 if role is Role.PREFILL else scenario.router.slo.itl_ms,
        )
        self.workers[worker.id] = worker
        worker.join(self.house, self.workers)
        return worker.id

    def drain(self, worker: WorkerId) -> None:
        self.workers[worker].draining = True
        self.house.hear_heartbeat(self.workers[worker].heartbeat(), self._clock.now())

    def is_idle(self, worker: WorkerId) -> bool:
        view = self.house.fleet.get(worker)
        return self.workers[worker].is_idle and (view is None or not view.requests)

    def dismiss(self, worker: WorkerId) -> None:
        """It says that it leaves, and the router sends its requests elsewhere."""
        leaving = self.workers[worker]
        leaving.leave()
        del self.workers[worker]
        self._busy_s[leaving.role] += leaving.busy_s
        self.house.lose(worker, f"worker {worker} was stopped", died=False)
        self.house.forget(worker)

    async def _serve(self, arrival: Arrival) -> None:
        result = self.result
        result.arrived += 1
        result.input_tokens += arrival.input_length
        request = ClientRequest(
            SamplingParams(max_tokens=arrival.output_length, temperature=0, seed=0),
            input_ids=cast("list[int]", Tokens(arrival.input_length, arrival.hashes)),
            salt=arrival.tenant,
        )
        now = self._clock.now()
        await serve(Run(request, _Reply(self.result, self._clock, arrival.tenant), self.house, now))

    def _broke(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._broken = self._broken or task.exception()
            self._done.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._left -= 1
        self._broken = self._broken or task.exception()  # a bug in the router ends the simulation
        if not self._left or self._broken is not None:
            self._done.set()

    async def _beat(self) -> None:
        """Heartbeats: those of a small fleet one by one, of a large one many in one event, or it would drown in them."""
        while True:
            workers = list(self.workers.values())
            size = _BEATS_AT_ONCE if len(workers) > _BEATS_AT_ONCE else 1
            pause = _BEAT_S if size > 1 else _BEAT_S / max(len(workers), 1)
            for start in range(0, max(len(workers), 1), size):
                await asyncio.sleep(pause)
                for worker in workers[start : start + size]:
                    if worker.id in self.workers:
                        worker.tell_progress()
                        self.house.hear_heartbeat(worker.heartbeat(), self._clock.now())
                self.result.most_waiting = max(self.result.most_waiting, self.house.admission.waiting)

    async def _watch(self) -> None:
        """What is drawn over the time."""
        while True:
            await asyncio.sleep(WATCH_S)
            self.result.timeline.append(self._moment())

    def _moment(self) -> Moment:
        result = self.result
        fleet = Counter(worker.role for worker in self.workers.values())
        deployments = self._scaler.deployments if self._scaler else {}
        ttft, self._ttft = self._ttft, Histogram()
        return Moment(
            at_s=self._clock.now(),
            ready={role.value: count for role, count in fleet.items()},
            pods={name: each.pods.wanted for name, each in deployments.items()},
            arrived=result.arrived,
            completed=result.completed,
            good=result.good,
            refused=result.refused,
            failed=result.failed,
            tokens=result.itl.count + result.ttft.count,
            waiting=self.house.admission.waiting,
            ttft_p90_ms=ttft.quantile(0.9) if ttft.count else 0.0,
        )

    def _finish(self) -> Result:
        result, seconds = self.result, self._clock.now()
        result.seconds = self._workload.arrivals[-1].at_s if self._workload.arrivals else 0.0
        for worker in self.workers.values():
            self._busy_s[worker.role] += worker.busy_s
        result.worker_seconds = {role: count * seconds for role, count in self._scenario.workers.items()}
        if self._scaler is not None:
            for name, deployment in self._scaler.deployments.items():
                if name != ROUTER:
                    result.worker_seconds[Role(name)] = deployment.seconds
        for role, paid_s in result.worker_seconds.items():
            result.busy[role] = self._busy_s[role] / paid_s if paid_s else 0.0
        self.house.close()
        return result

    # --- router.seams.Calls ---

    def submit(self, worker: WorkerId, work: Work) -> None:
        found = self.workers.get(worker)
        if found is None:
            self.house.mailroom.fail([work.request.request_id], f"worker {worker} is gone")
        else:
            found.submit(work)

    def abort(self, worker: WorkerId, request_id: RequestId) -> None:
        if worker in self.workers:
            self.workers[worker].abort(request_id)

    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None:
        if worker in self.workers:
            self.workers[worker].release(lease_id)

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        """Never asked for: simulated workers don't say that they lend, ..."""

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        """... or that they have stores."""

    # --- router.seams.Observer ---

    def refresh(self, snapshot: Snapshot) -> None:
        """Nobody looks."""

    def decided(self, way: Way) -> None:
        self.result.ways[way.value] += 1

    def retried(self) -> None:
        self.result.errors["retried"] += 1

    def warmed(self, verdict: str) -> None:
        """Simulated workers need no first handoff."""

    def probed(self, worker: WorkerView, verdict: str) -> None:
        """Simulated workers get no canaries."""

    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None:
        """As above."""

    def tokens(self, count: int, gap_s: float) -> None:
        """Gaps are counted where they happen: the workers tell of several steps at once."""

    def ended(self, record: Record) -> None:
        result = self.result
        if record.outcome is Outcome.REFUSED:
            result.refused += 1
        elif record.proof is None:
            result.failed += 1
        else:
            self._completed(record, record.proof)

    def _completed(self, record: Record, proof: Proof) -> None:
        result, slo = self.result, self._scenario.router.slo
        result.completed += 1
        result.ttft.add(proof.ttft_ms)
        self._ttft.add(proof.ttft_ms)
        result.queue.add(proof.queue_ms)
        result.ttft_error.add(abs(proof.predicted_ttft_ms - proof.ttft_ms) / max(proof.ttft_ms, 1e-3))
        if proof.itl_ms:
            result.tpot.add(proof.itl_ms)
        in_time = not slo.ttft_ms or proof.ttft_ms <= slo.ttft_ms
        result.good += in_time and (not slo.itl_ms or proof.itl_ms <= slo.itl_ms)
        result.reused_tokens += proof.prefill_tokens_reused
        size = 1 << max(record.prompt_tokens - proof.prefill_tokens_reused - 1, 0).bit_length()
        result.ways_by_tokens.setdefault(size, Counter())[proof.route] += 1


class _Reply:
    """Implements router.seams.Reply."""

    def __init__(self, result: Result, clock: VirtualClock, tenant: str) -> None:
        self._result = result
        self._clock = clock
        self._tenant = tenant
        self._arrival = clock.now()

    def send(self, piece: Piece) -> None:
        self._result.output_tokens += len(piece.token_ids)
        if piece.proof is not None and self._tenant:
            self._result.ttft_by_tenant.setdefault(self._tenant, Histogram()).add(piece.proof.ttft_ms)

    def fail(self, error: BatonError) -> None:
        self._result.errors[type(error).__name__] += 1
        self._result.refusal.add((self._clock.now() - self._arrival) * 1e3)


class _NoText:
    """Stands for router.tokenizer.Tokenizer: there is nothing to read."""

    vocab_size = 2


class _NoDetokenizer(Detokenizer):
    """Answers of thousands of tokens come at once here, and none of them has text."""

    def __init__(self, *_: object) -> None:
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _hashes_of(tokens: object, block_size: int, root: BlockHash) -> list[BlockHash]:
    if isinstance(tokens, Tokens):
        return list(tokens.hashes)
    return block_hashes(cast("list[int]", tokens), block_size, root)


def _deployment(scenario: Scenario) -> Deployment:
    workers = [
        WorkerConfig(role=role, name=f"{role.value}_{i}", cpus=str(i)) for role, n in scenario.workers.items() for i in range(n)
    ]
    return Deployment(workers=tuple(workers), engine=scenario.engine, router=_unbounded(scenario.router))


def _unbounded(config: RouterConfig) -> RouterConfig:
    return msgspec.structs.replace(config, default_deadline_s=1e9)
