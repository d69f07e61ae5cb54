"""A router and its workers while everything goes wrong: deaths, freezes, cut lines, cancels, late and double messages.

Real: RouterService with its house, Run, Mailroom, Fleet, Admission, PrefixIndex, RouterChannel's ears, Supervisor; Worker
and PagedEngine with all that is theirs. Pretended: time, sockets, processes, Triton's calls, the copying of bytes, the
model. Every client must hear the right text or one error that has a reason, once and in time; at the end nobody may hold
anything.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import msgspec

from python_backends.core.config import Deployment, EngineConfig, HealthConfig, RouterConfig, TransferConfig, WorkerConfig
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    QueueFull,
    Unavailable,
)
from python_backends.core.messages import (
    FromWorker,
    Heartbeat,
    RouterHeartbeat,
    ToWorker,
    Work,
    encode,
    from_worker_decoder,
    to_worker_decoder,
)
from python_backends.core.orders import OrderBook
from python_backends.core.types import Epoch, FinishReason, Role, SamplingParams, WorkerId
from python_backends.engines.base import Engine
from python_backends.worker.channel import ChannelListener
from python_backends.worker.service import Worker
from router.channel import RouterChannel
from router.fleet import WorkerView
from router.journal import Record
from router.run import Run
from router.seams import Destination, Snapshot
from router.service import Channels, RouterService
from router.supervisor import Supervisor
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Piece, Way, Wish
from scripts.exploration.clock import VirtualLoop, VirtualTime
from scripts.exploration.promise import Violation, require
from scripts.exploration.tiny import VOCABULARY, HeapMemory, TinyEngine, answer_to
from scripts.exploration.workers import KEY

_SILENT_S = 3.0
_LEASE_S = 2.0
_LONG_S = 60.0
_SETTLE_S = 8.0  # beyond every lease, silence and restart
_MAX_REQUESTS = 5
_KEYS = CurveKeys.derive(KEY)
_LAYOUTS: tuple[tuple[Role, ...], ...] = (
    (Role.PREFILL, Role.DECODE),
    (Role.PREFILL, Role.DECODE),
    (Role.PREFILL, Role.DECODE, Role.DECODE),
    (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE),
    (Role.PREFILL, Role.DECODE, Role.AGGREGATED),
    (Role.AGGREGATED, Role.AGGREGATED),
)


def _deployment(roles: Sequence[Role]) -> Deployment:
    return Deployment(
        workers=tuple(WorkerConfig(role, f"{role.value}_{index}") for index, role in enumerate(roles)),
        engine=EngineConfig(block_size=4, max_batch=4, step_tokens=8, max_queue=5),
        transfer=TransferConfig(lease_s=_LEASE_S, timeout_s=0.5),
        router=RouterConfig(max_requests=_MAX_REQUESTS, worker_wait_s=10.0, default_deadline_s=_LONG_S),
        health=HealthConfig(heartbeat_s=1.0, silent_s=_SILENT_S, canary_s=0),
    )


_DEPLOYMENTS = [_deployment(roles) for roles in _LAYOUTS]


class _Tokenizer:
    """Text is token ids in angle brackets. Stands for router.tokenizer.Tokenizer."""

    vocab_size = VOCABULARY

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    def is_silent(self, token_id: int) -> bool:
        return False


class _Observer:
    """Implements router.seams.Observer."""

    def __init__(self, happened: Counter[str]) -> None:
        self._happened = happened

    def refresh(self, snapshot: Snapshot) -> None:
        """Nothing to show."""

    def decided(self, way: Way) -> None:
        self._happened[f"routed {way.value}"] += 1

    def retried(self) -> None:
        self._happened["retries"] += 1

    def warmed(self, verdict: str) -> None:
        """No engine here asks for it."""

    def probed(self, worker: WorkerView, verdict: str) -> None:
        """There are no canaries here: they would fill the histories with themselves."""

    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None:
        """As above."""

    def tokens(self, count: int, gap_s: float) -> None:
        """Time is not real."""

    def ended(self, record: Record) -> None:
        assert record.outcome is not None
        self._happened[f"ended {record.outcome.value}"] += 1


class _Inbox(queue.SimpleQueue[Callable[[], None]]):
    """Tells whoever turns the engine that there is something."""

    def __init__(self, woken: Callable[[], None]) -> None:
        super().__init__()
        self._woken = woken

    def put(self, item: Callable[[], None], block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._woken()


class _Client:
    """One client: what it asked, and what it has heard. Implements router.seams.Reply."""

    def __init__(self, world: RouterWorld, request: ClientRequest, arrival: float) -> None:
        self._world = world
        self.request = request
        self.arrival = arrival
        self.run: Run | None = None
        self.cancelled = False
        self.abandoned = False  # its router is dead
        self.ended = False
        self.text = ""
        self.tokens: list[int] = []

    @property
    def name(self) -> str:
        return f"request of {self.arrival:.3f}"

    def send(self, piece: Piece) -> None:
        try:
            self._take(piece)
        except AssertionError as error:  # the router would take it for its own mistake
            self._world.broken(error)
            self.ended = True
            raise

    def _take(self, piece: Piece) -> None:
        require(not self.ended, f"{self.name} is told something after its end: {piece}")
        self.text += piece.text
        self.tokens += piece.token_ids
        answer, why, text = self._expected()
        require(self.tokens == answer[: len(self.tokens)], f"{self.name}: wrong text: {self.tokens} instead of {answer}")
        if piece.finish_reason is None:
            require(len(self.tokens) < len(answer), f"{self.name}: the last token is not told as such")
            return
        self.ended = True
        require(piece.finish_reason is why, f"{self.name}: {piece.finish_reason} instead of {why}")
        require(self.tokens == answer, f"{self.name}: tokens are missing: {self.tokens} instead of {answer}")
        require(self.text == text, f"{self.name}: text {self.text} instead of {text}")
        require(piece.proof is not None, f"{self.name}: no proof")

    def fail(self, error: BatonError) -> None:
        if self.ended:
            self._world.broken(AssertionError(f"{self.name} fails after its end: {error}"))
        self.ended = True
        self._world.failed(self, error)

    def _expected(self) -> tuple[list[int], FinishReason, str]:
        """(tokens, why it ends, text) as they are if all goes well."""
        request = self.request
        assert request.input_ids is not None
        tokens, why = answer_to(request.input_ids, request.sampling, self._world.max_context)
        shown = tokens[:-1] if why is FinishReason.STOP else tokens
        for count, token in enumerate(shown, start=1):
            if f"<{token}>" in request.sampling.stop and count > request.sampling.min_tokens:
                return tokens[:count], FinishReason.STOP, "".join(f"<{t}>" for t in tokens[: count - 1])
        return tokens, why, "".join(f"<{t}>" for t in shown)


class _Node:
    """One life of one worker's process, and its line to the router."""

    def __init__(self, world: RouterWorld, config: WorkerConfig, deployment: Deployment) -> None:
        self._world = world
        self._loop = world.loop
        self._rng = world.rng
        self.name = config.name
        self.alive = True
        self.frozen = False
        self._held_up: list[Callable[[], None]] = []  # what comes while it is frozen
        self._turn_due: asyncio.TimerHandle | None = None
        self._routers: dict[str, float] = {}  # heard when
        self._place = ""
        self.worker = Worker(deployment, config, "", KEY, engine_of=self._engine_of, channel_of=self._channel_of)
        self.worker.start()
        self.epoch: Epoch = self.worker.heartbeat().epoch
        self._beat()

    def _engine_of(self, deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> Engine:
        world = self._world
        self.engine = TinyEngine(
            deployment,
            worker,
            epoch,
            key,
            num_blocks=world.num_blocks,
            clock=world.clock,
            pools=world.pools,
            woken=self._transfer_waits,
        )
        self.engine._inbox = _Inbox(self._wake)
        return self.engine

    def _channel_of(self, _: str, __: str, ___: object, ____: float, _____: float, listener: ChannelListener) -> _Node:
        self._listener = listener
        return self

    # --- the engine's thread and its transfers ---

    def _wake(self) -> None:
        if self._turn_due is None or self._turn_due.when() > self._loop.time() + 0.05:
            self._schedule_turn(self._rng.choice(self._world.step_s))

    def _schedule_turn(self, after_s: float) -> None:
        if self._turn_due is not None:
            self._turn_due.cancel()
        self._turn_due = self._later(after_s, self._turn)

    def _turn(self) -> None:
        self._turn_due = None
        busy = self.engine.turn()
        self.engine.check()
        wait_s = self.engine._idle_timeout()
        if busy or not self.engine._inbox.empty():
            self._wake()
        elif wait_s is not None:
            self._schedule_turn(wait_s)

    def _transfer_waits(self) -> None:
        self._later(0.002, self._begin_transfer)

    def _begin_transfer(self) -> None:
        self.engine.transfers.begin(self._rng)
        self._later(self._rng.choice([0.001, 0.01, 0.3]), self._end_transfer)

    def _end_transfer(self) -> None:
        if self._rng.random() < self._world.trouble * 0.2:
            self.engine.transport.fault = self._rng.choice(["drop", "corrupt", "crash"])
        self.engine.transfers.end(self._rng)
        self.engine.transport.fault = ""

    def _later(self, after_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(after_s, self.when_able, call)

    def when_able(self, call: Callable[[], None]) -> None:
        """Now; after the thaw; or never."""
        if self.frozen:
            self._held_up.append(call)
        elif self.alive:
            call()

    # --- its end of the channel: what WorkerChannel does ---

    def start(self) -> None:
        """Nothing to open."""

    def stir(self) -> None: ...

    def wait_for_router(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing to close."""

    def send(self, message: FromWorker, router: str | None = None) -> None:
        if isinstance(message, Heartbeat):  # of another host: there is no process to watch
            message = msgspec.structs.replace(message, host="elsewhere")
        for name in list(self._routers):
            if router in (None, name):
                self._world.to_router(self, name, encode(message))

    def hear(self, payload: bytes) -> None:
        message = to_worker_decoder.decode(payload)
        if isinstance(message, RouterHeartbeat):
            self._hear_router(message)
        elif self._routers:
            self.worker.told(message)

    def _hear_router(self, message: RouterHeartbeat) -> None:
        new = message.router not in self._routers
        for other in [name for name in self._routers if new and name != message.router]:
            self.lose_router(other)  # all routers here have one place
        self._routers[message.router] = self._loop.time()
        if new:
            self._listener.router_found(message.router)
            self.send(self._listener.heartbeat(), message.router)

    def lose_router(self, name: str) -> None:
        if name not in self._routers:
            return
        last_words = self._listener.router_lost(name)
        if last_words is not None:
            self.send(last_words, name)
        del self._routers[name]

    def _beat(self) -> None:
        self.send(self._listener.heartbeat())
        for name, heard in list(self._routers.items()):
            if self._loop.time() - heard > _SILENT_S:
                self.lose_router(name)
        self._later(1.0, self._beat)

    # --- what happens to it ---

    def die(self) -> None:
        self.alive = False
        self._held_up.clear()
        self.engine.die()

    def leave(self) -> None:
        """The server unloads it."""
        self.worker.close()
        self.alive = False

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        held_up, self._held_up = self._held_up, []
        self._rng.shuffle(held_up)  # sockets and timers: nobody says in which order
        for call in held_up:
            self.when_able(call)


@dataclass
class _Line:
    """Between one router and whoever is at one worker's address: two directions, each in order.

    Stands for a connection of RouterChannel.
    """

    world: RouterWorld
    address: str
    router: str
    worker: WorkerId | None = None
    epoch: Epoch | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    cut: bool = False
    latest: dict[str, float] = field(default_factory=dict)  # when the last message of each direction arrives

    def send(self, message: ToWorker) -> None:
        node = self.world.nodes.get(self.address)
        if node is not None:
            payload = encode(message)
            self.carry("out", lambda: node.when_able(lambda: node.hear(payload)))

    def carry(self, direction: str, arrive: Callable[[], None]) -> None:
        world = self.world
        if self.cut:
            return
        lot = world.rng.random()
        slow = lot < 0.05 * world.trouble
        at = max(self.latest.get(direction, 0.0), world.clock.now + (world.rng.choice([0.05, 0.4]) if slow else 0.001))
        self.latest[direction] = at
        for _ in range(2 if lot > 1 - 0.03 * world.trouble else 1):
            world.loop.call_at(at, self._arrive, arrive)

    def _arrive(self, arrive: Callable[[], None]) -> None:
        if not self.cut:
            arrive()

    def close(self) -> None:
        self.cut = True


class RouterWorld:
    """One world, from the first request to the rest after the last."""

    def __init__(self, clock: VirtualTime, rng: Random) -> None:
        self.clock = clock
        self.rng = rng
        self.happened: Counter[str] = Counter()
        self.mishaps = 0
        self.trouble = rng.choice([0.0, 1.0, 1.0, 2.0])
        self.loop = VirtualLoop(clock)
        self.loop.set_exception_handler(self._unhandled)
        self.num_blocks = rng.choice([8, 12, 24])
        self.step_s = rng.choice([(0.0, 0.001, 0.004, 0.02)] * 4 + [(0.1, 0.2)])
        self.max_context = self.num_blocks * 4
        self.pools: dict[str, HeapMemory] = {}
        self.nodes: dict[str, _Node] = {}
        self._deployment = rng.choice(_DEPLOYMENTS)
        self._orders = OrderBook(KEY)
        self._lines: dict[str, _Line] = {}
        self._clients: list[_Client] = []
        self._prefixes = [[rng.randrange(3, VOCABULARY) for _ in range(12)] for _ in range(2)]
        self._broken: list[BaseException] = []

    def run(self) -> None:
        try:
            self.loop.run_until_complete(self._live())
        except AssertionError:
            if not self._broken:
                raise
        finally:
            self._shut_router()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.close()
        if self._broken:
            raise Violation("a promise was broken, or an error was not handled") from self._broken[0]

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.broken(context.get("exception") or RuntimeError(context["message"]))

    def broken(self, error: BaseException) -> None:
        """A promise, or the world itself; the first one counts."""
        self._broken.append(error)

    # --- the story of a world ---

    async def _live(self) -> None:
        for config in self._deployment.workers:
            self.nodes[config.name] = _Node(self, config, self._deployment)
        self._open_router()
        rng = self.rng
        if rng.random() < 0.8:
            await asyncio.sleep(0.1)  # until they know each other
        span_s = rng.choice([0.02, 0.3, 2.0])
        for _ in range(rng.randrange(1, 7)):
            self.loop.call_later(rng.random() * span_s, self._ask)
        if self.trouble:
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                mishap = rng.choices(list(_MISHAPS), list(_MISHAPS.values()))[0]
                self.loop.call_later(rng.random() * (span_s + 0.2), getattr(self, f"_{mishap}"))
        await asyncio.sleep(span_s + 0.3)
        limit = self.clock.now + _LONG_S + 5.0
        while any(not (client.ended or client.abandoned) for client in self._clients):
            require(self.clock.now < limit, "a request never ends")
            await asyncio.sleep(0.2)
        for node in self.nodes.values():
            node.thaw()
        await asyncio.sleep(_SETTLE_S)
        self._check_rest()
        self.happened["seconds"] += int(self.clock.now - 1000)

    def _check_rest(self) -> None:
        """Nobody holds anything, and every worker that lives is known."""
        house = self.service.house
        require(house.admission.requests == 0, "leak: a place in the house")
        require(house.admission.queued_tokens == 0, "leak: waiting tokens")
        require(not house.mailroom._boxes, "leak: a box in the mailroom")
        require(not self.service._tasks, "leak: a task")
        for view in house.fleet:
            require((view.requests, view.prefill_tokens) == (0, 0), f"leak: a charge on {view.id}")
        for node in self.nodes.values():
            require(node.alive and house.fleet.is_current(WorkerId(node.name), node.epoch), f"{node.name} is not known")
            node.engine.check_empty()
            known = house.fleet.get(WorkerId(node.name))
            require(known is not None and known.heartbeat.load.held_blocks == 0, "the last heartbeat tells of held blocks")
        require(all(client.ended or client.abandoned for client in self._clients), "a request has no end")
        self.clock.now += _LONG_S  # whose abort came first is remembered to its deadline
        for node in self.nodes.values():
            node.worker.heartbeat()
            require(not any(node.worker._live.values()), "leak: a worker remembers a request that is over")

    # --- routers ---

    def _open_router(self) -> None:
        channels = Channels("place", _KEYS, [])
        tokenizer = cast(Tokenizer, _Tokenizer())
        self.service = service = RouterService(
            self._deployment, channels, tokenizer, self._submit, None, _Observer(self.happened)
        )
        service._loop.close()
        service._loop = self.loop
        health = self._deployment.health
        service._supervisor = Supervisor(service.house, health, None)
        service._channel = RouterChannel(service.house, service._supervisor, "place", _KEYS, health)
        self._lines = {name: _Line(self, name, service.house.name) for name in self.nodes}
        service._channel._connections = cast(Any, self._lines)
        chores = (service._channel.beat(), service._supervisor.watch(), service._refresh())
        service._chores = [self.loop.create_task(chore) for chore in chores]

    def _shut_router(self) -> None:
        service = self.service
        for task in [*service._chores, *service._tasks.values()]:
            task.cancel()
        service._supervisor.close()
        service._channel.close()
        service.house.close()

    # --- between router and workers ---

    def to_router(self, node: _Node, router: str, payload: bytes) -> None:
        line = self._lines[node.name]
        if line.router != router:
            return  # that one is dead
        message = from_worker_decoder.decode(payload)
        line.carry("in", lambda: self.service._channel._hear(cast(Any, line), message))

    def _submit(self, worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        """Triton's call: short, and sometimes slow, lost, said to have failed though it has not, or made twice."""
        sealed = self._orders.seal(worker.worker, worker.epoch, [work])
        node = self.nodes.get(worker.model)
        line = self._lines[worker.model]

        taken = 0

        def deliver(*, again: bool = False) -> None:
            nonlocal taken
            assert node is not None
            try:
                taken += node.worker.submit(sealed)
                require(taken == 1, "an order was taken twice")
            except InvalidRequest as error:
                if not again:
                    fail(str(error))

        def fail(why: str) -> None:
            if not line.cut:
                failed(why)

        rng, loop = self.rng, self.loop
        lot = rng.random()
        if node is None or not node.alive:
            loop.call_later(rng.choice([0.1, 1.0]), fail, "the stub is not healthy")
        elif lot < 0.02 * self.trouble:
            self.happened["calls lost"] += 1
            self.mishaps += 1
            loop.call_later(0.5, fail, "the call was lost")
        else:
            loop.call_later(0.4 if lot < 0.05 * self.trouble else 0.001, self._arrive, node, deliver, fail)
            if lot > 1 - 0.02 * self.trouble:
                self.happened["calls said to have failed"] += 1
                self.mishaps += 1
                loop.call_later(rng.choice([0.0005, 0.01, 0.5]), fail, "the call timed out")
            if lot < 0.03 * self.trouble:
                loop.call_later(0.5, self._arrive, node, lambda: deliver(again=True), fail)

    def _arrive(self, node: _Node, deliver: Callable[[], None], fail: Callable[[str], None]) -> None:
        if node.alive:
            node.when_able(deliver)
        else:
            fail("the stub is not healthy")

    # --- clients ---

    def _ask(self) -> None:
        rng = self.rng
        prompt = rng.choice(self._prefixes)[: rng.randrange(1, 13)] + [
            rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(0, 4))
        ]
        endless = bool(self.trouble) and rng.random() < 0.15  # until it is cancelled
        max_tokens = 100 if endless else rng.randrange(1, 8)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=max_tokens if endless else rng.choice([0, 0, 0, min(2, max_tokens)]),
            seed=rng.randrange(4),
            stop=tuple(f"<{rng.randrange(3, VOCABULARY)}>" for _ in range(rng.choice([0, 0, 5]))),
        )
        wish = rng.choice([None, None, Wish.REMOTE, Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED])
        timeout_s = rng.choice([None, None, None, 0.02, 1.5]) if self.trouble else None
        request = ClientRequest(
            sampling,
            input_ids=prompt,
            wish=wish,
            salt=rng.choice(["", "tenant"]),
            priority=rng.choice([0, 1]),
            timeout_s=timeout_s,
        )
        client = _Client(self, request, self.clock.now)
        self._clients.append(client)
        client.run = self.service.accept(request, client)
        if endless or (self.trouble and rng.random() < 0.25):
            self.loop.call_later(rng.choice([0.0, 0.002, 0.01, 0.05, 0.3, 1.5]) * rng.random(), self._cancel, client)

    def _cancel(self, client: _Client) -> None:
        if client.run is not None and not client.abandoned:
            client.cancelled = True
            for _ in range(self.rng.choice([1, 1, 2])):
                self.service.cancel(client.run)

    def failed(self, client: _Client, error: BatonError) -> None:
        """Whether a client may be told this."""
        if client.abandoned:
            return
        deadline = client.arrival + (client.request.timeout_s or _LONG_S)
        self.happened[f"failed {type(error).__name__}"] += 1
        require("internal error" not in str(error), f"{client.name}: {error}")
        if isinstance(error, Cancelled):
            require(client.cancelled, f"{client.name} was not cancelled")
        elif isinstance(error, DeadlineExceeded):
            require(self.clock.now >= deadline - 0.01, f"{client.name} fails before its deadline: {error}")
            require(self.clock.now <= deadline + 0.01, f"{client.name} fails {self.clock.now - deadline:.2f} s late")
        elif isinstance(error, QueueFull):
            require(self.service.house.admission.requests >= _MAX_REQUESTS, f"{client.name}: {error}")
        elif isinstance(error, Unavailable | EngineFailure):
            require(self.mishaps >= 2, f"{client.name} fails after {self.mishaps} mishaps: {error}")
        else:
            require(False, f"{client.name} fails for no reason: {error!r}")

    # --- mishaps ---

    def _any_node(self) -> _Node | None:
        able = [node for node in self.nodes.values() if node.alive and not node.frozen]
        self.mishaps += bool(able)
        return self.rng.choice(able) if able else None

    def _crash(self) -> None:
        node = self._any_node()
        if node is not None:
            self.happened["crashes"] += 1
            node.die()
            self._notice_death(node)
            self.loop.call_later(self.rng.choice([0.1, 1.0, 2.0]), self._restart, node.name)

    def _notice_death(self, node: _Node) -> None:
        supervisor, line = self.service._supervisor, self._lines[node.name]
        if self.rng.random() < 0.5:
            self.loop.call_later(self.rng.choice([0.0, 0.01]), supervisor._died, WorkerId(node.name), node.epoch)
        else:
            self.loop.call_later(self.rng.choice([0.0, 0.05]), self._hear_of_cut, line)

    def _hear_of_cut(self, line: _Line) -> None:
        if line.worker is not None and self._lines.get(line.address) is line:
            self.service._supervisor.cut_off(line.worker)

    def _restart(self, name: str) -> None:
        self.nodes[name] = _Node(self, self._deployment.worker(name), self._deployment)

    def _unload(self) -> None:
        node = self._any_node()
        if node is not None:
            self.happened["unloads"] += 1
            node.leave()
            self.loop.call_later(self.rng.choice([0.1, 1.0]), self._restart, node.name)

    def _freeze(self) -> None:
        """SIGSTOP and SIGCONT; what is silent for long is killed by its supervisor, which is then a crash."""
        node = self._any_node()
        if node is None:
            return
        self.happened["freezes"] += 1
        node.freeze()
        self.loop.call_later(self.rng.choice([0.05, 0.5, 2.0, 6.0, 10.0]), node.thaw)

    def _cut(self) -> None:
        """The line breaks: what is on it is lost; it is there again soon, and the router hears of it sooner or later."""
        name = self.rng.choice(list(self._lines))
        old = self._lines[name]
        self.happened["cuts"] += 1
        self.mishaps += 1
        old.cut = True
        self.loop.call_later(self.rng.choice([0.0, 0.02, 0.3]), self._mend, name, old)
        self.loop.call_later(self.rng.choice([0.0, 0.02, 0.5]), self._hear_of_cut, old)

    def _mend(self, name: str, old: _Line) -> None:
        if self._lines.get(name) is old:
            old.cut = False

    def _break_step(self) -> None:
        node = self._any_node()
        if node is not None:
            node.engine.tiny.breaks = True

    def _replace_router(self) -> None:
        """It dies without a word, and its clients with it; another comes."""
        if self.rng.random() < 0.5:
            return
        self.happened["routers replaced"] += 1
        self.mishaps += 1
        for client in self._clients:
            client.abandoned |= not client.ended
        name = self.service.house.name
        for line in self._lines.values():
            line.close()
        self._shut_router()
        for node in self.nodes.values():
            if self.rng.random() < 0.7:  # by pidfd; else by the newcomer, or by silence
                self.loop.call_soon(node.when_able, lambda node=node: node.lose_router(name))
        self._open_router()


_MISHAPS: dict[str, int] = {
    "crash": 4,
    "freeze": 3,
    "cut": 3,
    "unload": 1,
    "break_step": 1,
    "replace_router": 1,
}
"""What may happen to a world, and how often compared with the rest."""


def explore_router(clock: VirtualTime, rng: Random) -> Counter[str]:
    """One life of a world. Raises AssertionError when a promise is broken; returns what was seen."""
    logging.disable(logging.CRITICAL)
    world = RouterWorld(clock, rng)
    world.run()
    return world.happened
