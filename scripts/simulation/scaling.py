"""A fleet that grows and shrinks by the rules of its HorizontalPodAutoscalers, in a simulation.

The metrics are those that configs/kubernetes/prometheus-adapter.yaml makes of what routers export, and as old as they are
when they have gone through scraping and the adapter. A pod takes its time to start; one that is to go sleeps or is drained as
its preStop hook says and then ends as a worker does: the requests that it still has go on elsewhere. Routers are counted and
not simulated: there is one that decides, and what several would have to do is computed from what it does (docs/scaling.md,
"Unit costs").
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from python_backends.core.errors import ConfigError
from python_backends.core.types import Role, WorkerId
from router.house import House
from scripts.simulation.autoscaler import SYNC_S, Autoscaler, Pods, Spec
from scripts.simulation.manifests import PreStop
from scripts.simulation.worker import SimulatedWorker

ROUTER = "router"
SCALED = (ROUTER, Role.PREFILL.value, Role.DECODE.value)
_LOOK_S = 1.0  # after which a pod that is drained is looked at again
_RATE_S = 120.0  # the window of rate() in the adapter's rules


@dataclass(frozen=True, slots=True)
class Scaling:
    """specs: by `SCALED`. start_s: from a pod's creation to its first heartbeat: node, image, model."""

    specs: Mapping[str, Spec]
    begin: Mapping[str, int]  # replicas at the beginning
    start_s: float = 120.0
    metrics_age_s: float = 30.0  # how old metrics are when the autoscaler sees them
    pre_stop: Mapping[str, PreStop] = field(default_factory=dict)


class Scaled(Protocol):
    """What is scaled: simulator.Simulation."""

    house: House
    workers: dict[WorkerId, SimulatedWorker]

    def hire(self, role: Role) -> WorkerId:
        """A new worker, which reports for duty."""

    def drain(self, worker: WorkerId) -> None:
        """It is given no more work from now on."""

    def is_idle(self, worker: WorkerId) -> bool:
        """It has no requests, and none is on its way to it."""

    def dismiss(self, worker: WorkerId) -> None:
        """It ends, as it does when its pod gets SIGTERM."""


class _Pod:
    """`worker` once it is ready; `starting` until then."""

    __slots__ = ("starting", "worker")

    def __init__(self) -> None:
        self.starting: asyncio.TimerHandle | None = None
        self.worker: WorkerId | None = None


class Deployment:
    """The pods of one Deployment. `seconds`: of all its pods together, from creation to end."""

    def __init__(self, name: str, autoscaler: Autoscaler, scaling: Scaling, fleet: Scaled) -> None:
        self.name = name
        self.autoscaler = autoscaler
        self._role = None if name == ROUTER else Role(name)
        self._start_s = scaling.start_s
        self._pre_stop = scaling.pre_stop.get(name, PreStop())
        self._fleet = fleet
        self._pods: list[_Pod] = []  # oldest first
        self._ending = 0
        self._loop = asyncio.get_running_loop()
        self._seconds = 0.0
        self._since = self._loop.time()
        self.least = self.most = scaling.begin[name]
        for _ in range(scaling.begin[name]):
            pod = _Pod()
            self._pods.append(pod)
            self._started(pod)

    @property
    def pods(self) -> Pods:
        ready = sum(pod.starting is None for pod in self._pods)
        return Pods(len(self._pods), ready, len(self._pods) - ready)

    @property
    def seconds(self) -> float:
        self._account()
        return self._seconds

    def scale(self, replicas: int) -> None:
        """Newest pods go first, those before all that are not ready yet, as a ReplicaSet does it."""
        self._account()
        while len(self._pods) < replicas:
            pod = _Pod()
            self._pods.append(pod)
            pod.starting = self._loop.call_later(self._start_s, self._started, pod)
        if len(self._pods) > replicas:
            newest = self._pods[::-1]
            going = dict.fromkeys(sorted(newest, key=lambda pod: pod.starting is None)[: len(self._pods) - replicas])
            self._pods = [pod for pod in self._pods if pod not in going]
            for pod in going:
                self._end(pod)
        self.least, self.most = min(self.least, replicas), max(self.most, replicas)

    def _started(self, pod: _Pod) -> None:
        pod.starting = None
        if self._role is not None:
            pod.worker = self._fleet.hire(self._role)

    def _end(self, pod: _Pod) -> None:
        if pod.starting is not None:
            pod.starting.cancel()
            return
        self._ending += 1
        if self._pre_stop.drains and pod.worker is not None:
            self._fleet.drain(pod.worker)
            self._end_when_idle(pod, pod.worker, self._loop.time() + self._pre_stop.seconds)
        else:
            self._loop.call_later(self._pre_stop.seconds, self._ended, pod)

    def _end_when_idle(self, pod: _Pod, worker: WorkerId, latest: float) -> None:
        now = self._loop.time()
        if now >= latest or self._fleet.is_idle(worker):
            self._ended(pod)
        else:
            self._loop.call_later(min(_LOOK_S, latest - now), self._end_when_idle, pod, worker, latest)

    def _ended(self, pod: _Pod) -> None:
        self._account()
        self._ending -= 1
        if pod.worker is not None:
            self._fleet.dismiss(pod.worker)

    def _account(self) -> None:
        now = self._loop.time()
        self._seconds += (len(self._pods) + self._ending) * (now - self._since)
        self._since = now


class Scaler:
    """All Deployments of the fleet; `run` until it is cancelled."""

    def __init__(self, scaling: Scaling, fleet: Scaled) -> None:
        """Raises ConfigError for a metric that is none of Baton's."""
        check_metrics(scaling.specs)
        self.deployments = {name: Deployment(name, Autoscaler(spec), scaling, fleet) for name, spec in scaling.specs.items()}
        self._asked = {metric.name for spec in scaling.specs.values() for metric in spec.metrics}
        self._fleet = fleet
        self._age_s = scaling.metrics_age_s
        self._loop = asyncio.get_running_loop()
        self._seen: deque[tuple[float, dict[str, float | None]]] = deque()  # as Prometheus has it
        self._busy: deque[tuple[float, dict[WorkerId, float]]] = deque()  # seconds computed, of the last _RATE_S

    async def run(self) -> None:
        sync = 0
        while True:
            self._scrape()
            self._sync()
            sync += 1
            await asyncio.sleep(sync * SYNC_S - self._loop.time())

    def _sync(self) -> None:
        now = self._loop.time()
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._age_s:
            self._seen.popleft()
        when, values = self._seen[0]
        if when > now - self._age_s:
            values = {}  # nothing has come through yet
        for deployment in self.deployments.values():
            replicas = deployment.autoscaler.decide(now, deployment.pods, values)
            if replicas != deployment.pods.wanted:
                deployment.scale(replicas)

    def _scrape(self) -> None:
        now = self._loop.time()
        prefill = {worker.id: worker.busy_s for worker in self._of(Role.PREFILL)}
        self._busy.append((now, prefill))
        while len(self._busy) > 1 and self._busy[1][0] <= now - _RATE_S:
            self._busy.popleft()
        self._seen.append((now, {name: METRICS[name](self) for name in self._asked}))

    # --- the adapter's rules ---

    def _of(self, role: Role) -> list[SimulatedWorker]:
        return [worker for worker in self._fleet.workers.values() if worker.role is role]

    def prefill_queued_tokens(self) -> float | None:
        return float(sum(worker.load().queued_tokens for worker in self._of(Role.PREFILL)))

    def prefill_busy_ratio(self) -> float | None:
        (since, before), (now, current) = self._busy[0], self._busy[-1]
        if now == since or not current:
            return None
        return sum(busy - before.get(worker, 0.0) for worker, busy in current.items()) / (now - since) / len(current)

    def waiting_tokens(self) -> float | None:
        return float(self._fleet.house.admission.queued_tokens)

    def decode_full_workers(self) -> float | None:
        house = self._fleet.house
        return sum(view.fill(house.longest_step_ms) for view in house.fleet.up() if view.role is Role.DECODE)

    def router_requests(self) -> float | None:
        return float(self._fleet.house.admission.requests)


METRICS: Mapping[str, Callable[[Scaler], float | None]] = {
    "baton_prefill_queued_tokens": Scaler.prefill_queued_tokens,
    "baton_prefill_busy_ratio": Scaler.prefill_busy_ratio,
    "baton_waiting_prompt_tokens": Scaler.waiting_tokens,
    "baton_decode_full_workers": Scaler.decode_full_workers,
    "baton_router_requests": Scaler.router_requests,
    "baton_router_queued_tokens": Scaler.waiting_tokens,
}
"""What manifests may ask for: external metrics, and of those of pods the sum over the routers."""


def check_metrics(specs: Mapping[str, Spec]) -> None:
    """Raises ConfigError."""
    for spec in specs.values():
        for metric in spec.metrics:
            if metric.name not in METRICS:
                raise ConfigError(f"{spec.target}: no metric {metric.name!r} is simulated; there are {', '.join(METRICS)}")
