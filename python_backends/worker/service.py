"""A worker: one engine joined to the channels of its routers. Knows neither Triton nor which engine runs."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import InvalidRequest, TritonCode, Unavailable
from python_backends.core.host import host_id
from python_backends.core.messages import (
    Abort,
    BlockEvents,
    Condition,
    DecodeWork,
    Drain,
    Followed,
    FollowWork,
    Heartbeat,
    Leaving,
    Lend,
    Locate,
    Located,
    Output,
    Outputs,
    PrefillDone,
    PrefillWork,
    ReleaseLease,
    RequestFailed,
    Resume,
    Resync,
    StepSample,
    TokenChunk,
    ToWorker,
)
from python_backends.core.orders import OrderReader
from python_backends.core.place import place_of
from python_backends.core.types import BlockHash, Epoch, GenerateRequest, RequestId, Role
from python_backends.engines.base import CacheChange, EngineFactory, Lender, StepReporter, StoreReader, create_engine
from python_backends.worker.channel import ChannelFactory, WorkerChannel
from python_backends.worker.drain import DrainState
from python_backends.worker.registration import Registration

log = logging.getLogger(__name__)

_ROUTER_WAIT_S = 3.0  # the router may be loading, too


def new_epoch() -> Epoch:
    """Unlike that of any other life of any worker: milliseconds since 1970 and 20 random bits, below 2**63."""
    return Epoch(int(time.time() * 1000) << 20 | secrets.randbits(20))


class Worker:
    """Start it, submit signed work, close it."""

    def __init__(
        self,
        deployment: Deployment,
        config: WorkerConfig,
        channel_address: str,
        key: bytes,
        *,
        engine_of: EngineFactory = create_engine,
        channel_of: ChannelFactory = WorkerChannel,
    ) -> None:
        """`channel_address`: where routers of this host find it. Raises ConfigError when it can't listen there, or the
        engine can't be made from the deployment.
        """
        self._config = config
        self._place = place_of(deployment, config)
        self._epoch = new_epoch()
        self._orders = OrderReader(key, self._place.worker, self._epoch)
        self._engine = engine_of(deployment, config, self._epoch, key)
        cluster = deployment.cluster
        self._registration = Registration(cluster, self._place.channel, key) if cluster.registry and cluster.listen else None
        self._reader = self._engine if isinstance(self._engine, StoreReader) else None
        self._sequence = 0
        self._drain = DrainState()
        self._live: dict[str, dict[RequestId, float]] = {}  # requests and their deadlines, by router that is known now
        self._live_lock = threading.Lock()
        health = deployment.health
        self._channel = channel_of(
            channel_address,
            self._place.listen,
            CurveKeys.derive(key),
            health.heartbeat_s,
            health.silent_s,
            self,
        )

    def start(self) -> None:
        """Load the model and report for duty. Raises ConfigError.

        Returns when the router knows of it, so that a server that is ready has all its workers; but it does not insist.
        """
        self._engine.start(self._deliver)
        self._channel.start()
        if self._registration is not None:
            self._registration.start()
        if not self._channel.wait_for_router(_ROUTER_WAIT_S):
            log.warning("worker %s: no router has answered yet; going on without", self._config.name)

    def submit(self, sealed: bytes) -> int:
        """Hand work to the engine; returns how many pieces. Raises InvalidRequest for work that no router meant for it now.

        Raises Unavailable when this worker has been drained.
        """
        work = self._orders.take(sealed)
        if self._drain.over:
            raise Unavailable(f"worker {self._config.name} is drained")
        role = self._config.role
        for piece in work:
            if isinstance(piece, PrefillWork) is not (role is Role.PREFILL):
                raise InvalidRequest(f"{type(piece).__name__} was sent to the {role.value} worker {self._config.name}")
        self._enter(piece.request for piece in work)
        for piece in work:
            if isinstance(piece, FollowWork):
                self._follow(piece)
            elif isinstance(piece, DecodeWork):
                self._engine.decode(piece.request, piece.ticket)
            elif piece.loan is not None and isinstance(self._engine, Lender):
                self._engine.prefill_with(piece.request, piece.loan)
            else:
                self._engine.prefill(piece.request)
        self._channel.stir()  # other routers learn of it
        return len(work)

    def _follow(self, work: FollowWork) -> None:
        if isinstance(self._engine, Lender):
            self._engine.follow(work.request, work.loan)
        else:
            self._deliver([Followed(work.request.request_id)], None)

    def close(self) -> None:
        """Engine first, so that its last words still reach the router. Idempotent."""
        if self._registration is not None:
            self._registration.close()
        self._engine.close()
        self._channel.send(Leaving(self._place.worker, self._epoch))
        self._channel.close()

    # --- on the engine's thread ---

    def _deliver(self, outputs: Sequence[Output], change: CacheChange | None) -> None:
        by_router: dict[str, list[Output]] = defaultdict(list)
        for output in outputs:
            by_router[router_of(output.request_id)].append(output)
        steps = self._take_steps()
        if steps:
            with self._live_lock:
                for router in self._live:  # whoever gets no outputs from this step learns from it all the same
                    by_router[router]
        for router, own in by_router.items():
            self._strike_off([output.request_id for output in own if _is_last(output)])
            self._channel.send(Outputs(self._place.worker, self._epoch, own, steps), router)
        if change is not None:
            sequence = self._sequence + 1
            self._channel.send(
                BlockEvents(self._place.worker, self._epoch, sequence, change.stored, change.removed, change.reset)
            )
            self._sequence = sequence  # heartbeats count only what was sent

    def _take_steps(self) -> list[StepSample]:
        return self._engine.take_steps() if isinstance(self._engine, StepReporter) else []

    # --- on the channel's thread ---

    def heartbeat(self) -> Heartbeat:
        if self._drain.is_time_to_leave():
            self._hand_back()
        self._forget_overdue()
        info = self._engine.info
        return Heartbeat(
            worker=self._place.worker,
            model=self._config.name,
            server=self._place.server,
            role=self._config.role,
            epoch=self._epoch,
            pid=os.getpid(),
            host=host_id(),
            load=self._engine.load(),
            layout=info.layout,
            fingerprint=info.fingerprint,
            max_context=info.max_context,
            step_tokens=info.step_tokens,
            max_batch=info.max_batch,
            events_sequence=self._sequence,
            calibration=list(self._engine.calibration()) if isinstance(self._engine, StepReporter) else [],
            stores=self._reader.store_counts() if self._reader else {},
            lends=isinstance(self._engine, Lender),
            follows=isinstance(self._engine, Lender),
            node_place=self._reader.node_place if self._reader else "",
            warm_up=info.warm_up,
            draining=self._drain.draining,
            family=info.family,
            cores=info.cores,
        )

    def condition(self, used: bool, promised: int) -> Condition:
        """`promised`: requests that routers will hand over to it."""
        load = self._engine.load()
        with self._live_lock:
            has_requests = any(self._live.values())  # also those that the engine has not looked at yet
        idle = not (has_requests or promised or load.queued_requests or load.running_requests or load.active_leases)
        return Condition(self._epoch, os.getpid(), self._drain.draining, idle, used, load.standing_s, load.fault)

    def told(self, message: ToWorker) -> None:
        if isinstance(message, Abort):
            for request_id in message.request_ids:
                self._engine.abort(request_id)
            self._strike_off(message.request_ids)
        elif isinstance(message, ReleaseLease):
            for lease_id in message.lease_ids:
                self._engine.release(lease_id, message.end)
        elif isinstance(message, Resync):
            self._engine.resync()
        elif isinstance(message, Drain):
            self._drain.begin(message.grace_s)
        elif isinstance(message, Resume):
            self._drain.end()
        elif isinstance(message, Locate):
            self._locate(message)
        elif isinstance(message, Lend) and isinstance(self._engine, Lender):
            self._engine.lend(message.request_id, [BlockHash(hash_) for hash_ in message.hashes])

    def _locate(self, asked: Locate) -> None:
        def located(blocks: int) -> None:
            answer = Outputs(self._place.worker, self._epoch, [Located(asked.request_id, blocks)])
            self._channel.send(answer, router_of(asked.request_id))

        if self._reader is not None:
            self._reader.locate([BlockHash(hash_) for hash_ in asked.hashes], located)

    def router_found(self, router: str) -> None:
        with self._live_lock:
            self._live.setdefault(router, {})

    def router_lost(self, router: str) -> Outputs | None:
        with self._live_lock:
            orphans = self._live.pop(router, {})
        if not orphans:
            return None
        log.warning("worker %s: aborting %d requests of router %s", self._config.name, len(orphans), router)
        return self._give_up(orphans, f"worker {self._config.name} heard nothing from its router")

    def _hand_back(self) -> None:
        """Have the routers continue elsewhere what is not finished."""
        with self._live_lock:
            live = {router: list(requests) for router, requests in self._live.items() if requests}
            for requests in self._live.values():
                requests.clear()
        for router, orphans in live.items():
            log.info("worker %s: handing back %d requests of router %s", self._config.name, len(orphans), router)
            self._channel.send(self._give_up(orphans, f"worker {self._config.name} is drained"), router)

    def _give_up(self, request_ids: Collection[RequestId], why: str) -> Outputs:
        """Abort them; returns what to tell their router."""
        for request_id in request_ids:
            self._engine.abort(request_id)
        failed: list[Output] = [RequestFailed(id, TritonCode.UNAVAILABLE, why, retryable=True) for id in request_ids]
        return Outputs(self._place.worker, self._epoch, failed)

    # --- which requests are whose ---

    def _enter(self, requests: Iterable[GenerateRequest]) -> None:
        """Raises InvalidRequest when their router is gone: nobody would ever abort them."""
        with self._live_lock:
            for request in requests:
                router = router_of(request.request_id)
                if router not in self._live:
                    raise InvalidRequest(f"work: worker {self._config.name} hears nothing from router {router}")
                self._live[router][request.request_id] = request.deadline

    def _strike_off(self, request_ids: Iterable[RequestId]) -> None:
        with self._live_lock:
            for request_id in request_ids:
                self._live.get(router_of(request_id), {}).pop(request_id, None)

    def _forget_overdue(self) -> None:
        """A request whose abort came before it ends in silence: nothing else strikes it off."""
        now = time.monotonic()
        with self._live_lock:
            for requests in self._live.values():
                for request_id in [request_id for request_id, deadline in requests.items() if deadline < now]:
                    del requests[request_id]


def router_of(request_id: RequestId) -> str:
    """Request ids begin with their router's name and a dot."""
    return request_id.partition(".")[0]


def _is_last(output: Output) -> bool:
    if isinstance(output, TokenChunk):
        return output.finish_reason is not None
    return isinstance(output, PrefillDone | RequestFailed | Followed)
