"""Prefill and decode workers whose messages come in any order, twice, late or never, and which die at any moment.

Real: Worker with its order book, PagedEngine, Scheduler, Sequence, BlockPool, LeaseTable, tickets. Pretended: time, the
channel, the copying of bytes, the model. `WorkersWorld.do` takes one action; after each of them every reference of every
block must have its one owner, and what is said about a request must be the truth and said once. `finish` lets all of it
come to rest: then nothing may be held.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import cast

import msgspec

from python_backends.core.config import Deployment, EngineConfig, HealthConfig, TransferConfig, WorkerConfig
from python_backends.core.errors import InvalidRequest, TritonCode
from python_backends.core.handoff import KVHandoff, seal, unseal
from python_backends.core.messages import (
    Abort,
    BlockEvents,
    DecodeWork,
    FromWorker,
    KVReady,
    Output,
    Outputs,
    PrefillDone,
    PrefillWork,
    ReleaseLease,
    RequestFailed,
    Resync,
    TokenChunk,
    ToWorker,
    Work,
    encode,
    from_worker_decoder,
)
from python_backends.core.orders import OrderBook
from python_backends.core.types import Epoch, FinishReason, GenerateRequest, RequestId, Role, SamplingParams, WorkerId
from python_backends.engines.base import Engine
from python_backends.worker.channel import ChannelListener
from python_backends.worker.service import Worker
from scripts.exploration.clock import VirtualTime
from scripts.exploration.promise import Violation, require
from scripts.exploration.tiny import HeapMemory, TinyEngine, answer_to

KEY = b"exploration key of thirty-two by"
LEASE_S = 2.0
TRANSFER_S = 0.5
_LONG_S = 60.0
_DEPLOYMENT = Deployment(
    workers=(
        WorkerConfig(Role.PREFILL, "prefill_0"),
        WorkerConfig(Role.PREFILL, "prefill_1"),
        WorkerConfig(Role.DECODE, "decode_0"),
        WorkerConfig(Role.DECODE, "decode_1"),
        WorkerConfig(Role.AGGREGATED, "aggregated_0"),
    ),
    engine=EngineConfig(block_size=4, max_batch=4, step_tokens=8, max_queue=5),
    transfer=TransferConfig(lease_s=LEASE_S, timeout_s=TRANSFER_S),
    health=HealthConfig(heartbeat_s=1.0, silent_s=5.0),
)
_LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("prefill_0", "decode_0"),
    ("prefill_0", "decode_0"),
    ("prefill_0", "prefill_1", "decode_0"),
    ("prefill_0", "decode_0", "decode_1"),
    ("aggregated_0",),
)
_REFUSED_WORK = "work:"


class WorldChannel:
    """Stands for WorkerChannel: what the worker says is kept until somebody listens."""

    def __init__(self, listener: ChannelListener) -> None:
        self.listener = listener
        self.said: list[FromWorker] = []

    def start(self) -> None:
        """Nothing to open."""

    def stir(self) -> None: ...

    def wait_for_router(self, timeout_s: float) -> bool:
        return True

    def send(self, message: FromWorker, router: str | None = None) -> None:
        self.said.append(from_worker_decoder.decode(encode(message)))

    def close(self) -> None:
        """Nothing to close."""


@dataclass(eq=False)
class Asked:
    """One piece of work that a worker took, and what it has said about it."""

    request: GenerateRequest
    node: Node
    prefill: bool
    ticketed: bool
    aborted: bool = False  # told to stop
    silent: bool = False  # has been told, and has had its turn since: nothing may come any more
    ends: int = 0
    ready: int = 0  # KVReady
    tokens: list[int] = field(default_factory=list)

    @cached_property
    def answer(self) -> tuple[list[int], FinishReason]:
        """All tokens after those that came with the request, and why the answer ends."""
        request = self.request
        return answer_to(request.prompt_ids, request.sampling, self.node.engine.info.max_context, request.output_ids)


@dataclass(eq=False)
class Node:
    """One life of one worker."""

    name: str
    worker: Worker
    engine: TinyEngine
    channel: WorldChannel
    epoch: Epoch
    told: list[Asked] = field(default_factory=list)  # aborted, and no turn since
    early: set[RequestId] = field(default_factory=set)  # aborted before they came
    verified: set[str | None] = field(default_factory=set)  # leases whose KV was taken


@dataclass(frozen=True)
class Given:
    """A ticket that came back, and what it was for."""

    request: GenerateRequest
    token: int
    ticket: bytes
    lease_id: str
    node: Node


class WorkersWorld:
    """One world. `rng` decides everything that is left to chance; `happened` counts what has been seen."""

    def __init__(self, clock: VirtualTime, rng: Random) -> None:
        self._clock = clock
        self.happened: Counter[str] = Counter()
        self._pools: dict[str, HeapMemory] = {}
        self._nodes: dict[str, Node] = {}
        self._asked: dict[RequestId, Asked] = {}
        self._given: list[Given] = []
        self._used: set[bytes] = set()
        self._sealed: list[bytes] = []  # everything that was ever sent
        self._routers = ["r0"]
        self._orders = OrderBook(KEY)
        self._count = 0
        self._copying: Node | None = None
        self._moved: set[Node] = set()  # may have changed since they were looked at
        self._rng = rng
        self._num_blocks = rng.choice([6, 9, 14, 24])
        self._prefixes = [[rng.randrange(3, 40) for _ in range(12)] for _ in range(2)]
        for name in rng.choice(_LAYOUTS):
            self._open(name)

    # --- actions -------------------------------------------------------------------------------------------------------

    def do(self, action: str, rng: Random) -> None:
        """One of ACTIONS, then look whether all is well."""
        self._rng = rng
        getattr(self, f"_{action}")()
        for node in self._moved:
            node.engine.check()
        self._moved.clear()

    def finish(self) -> None:
        """Let everything come to rest, without further mishaps."""
        for node in self._nodes.values():
            node.engine.transport.fault, node.engine.tiny.breaks = "", False
        for _ in range(2_000):
            busy = False
            for node in self._nodes.values():
                while len(node.engine.transfers):
                    node.engine.transfers.begin(self._rng)
                    node.engine.transfers.end(self._rng)
                busy |= self._turn_of(node) or not node.engine.idle
            if not busy:
                break
            if self._rng.random() < 0.1:
                self._clock.now += 0.2
        self._clock.now += LEASE_S + _LONG_S + 1.0
        for node in self._nodes.values():
            for _ in range(2):
                self._turn_of(node)
            node.engine.check_empty()
            node.worker.heartbeat()
            require(not any(node.worker._live.values()), "leak: a worker remembers a request that is over")
        for asked in self._asked.values():
            if self._nodes.get(asked.node.name) is asked.node and not asked.aborted:
                require(asked.ends == 1, f"request {asked.request.request_id} has {asked.ends} ends")

    def _prefill(self) -> None:
        node = self._one(Role.PREFILL)
        if node is not None:
            self._order(node, PrefillWork(self._new_request()))

    def _decode(self) -> None:
        """With the ticket that belongs to it, mostly; or with a wrong, spoilt or late one, or with none."""
        node = self._one(Role.DECODE) or self._one(Role.AGGREGATED)
        if node is None:
            return
        lot = self._rng.random()
        given = self._some_given(fresh=lot < 0.7)
        if given is None or lot > 0.85:
            self._order(node, DecodeWork(self._new_request()))
            return
        request = self._continuation(given) if lot < 0.8 else self._lookalike(given)
        self._used.add(given.ticket)
        ticket = self._spoilt(given) if self._rng.random() < 0.15 else given.ticket
        self._order(node, DecodeWork(request, ticket))

    def _resubmit(self) -> None:
        """An order that was sent before, anywhere."""
        node = self._any_node()
        if node is None or not self._sealed:
            return
        try:
            node.worker.submit(self._rng.choice(self._sealed))
        except InvalidRequest as error:
            self.happened["replayed work refused"] += 1
            require(str(error).startswith(_REFUSED_WORK), str(error))
        else:
            raise Violation("an order was taken twice")

    def _turn(self) -> None:
        node = self._any_node()
        if node is not None:
            self._turn_of(node)

    def _transfer(self) -> None:
        """One begins or, with or without a mishap, ends; the source goes on meanwhile."""
        nodes = [node for node in self._nodes.values() if len(node.engine.transfers)]
        if not nodes:
            return
        node = self._rng.choice(nodes)
        node.engine.transfers.begin(self._rng)
        if self._rng.random() < 0.3:
            return
        if self._rng.random() < 0.25:
            node.engine.transport.fault = self._rng.choice(["drop", "corrupt", "crash"])
        self._copying = node
        self._moved.add(node)
        node.engine.transfers.end(self._rng)
        self._copying = None
        node.engine.transport.fault = ""

    def _abort(self) -> None:
        """Of any request, at its worker or at another, also before it comes or when it is over."""
        node = self._any_node()
        if node is None:
            return
        if self._asked and self._rng.random() < 0.8:
            asked = self._rng.choice(list(self._asked.values())[-6:])
            request_id = asked.request.request_id
            node = self._nodes.get(asked.node.name, node)
        else:
            request_id = RequestId(f"{self._routers[-1]}.{self._count + 1}.x")  # the next one
        self.happened["aborts"] += 1
        self._tell(node, Abort([request_id] * self._rng.choice([1, 1, 2])))
        told = self._asked.get(request_id)
        if told is None:
            node.early.add(request_id)
        elif told.node is node:
            told.aborted = True
            node.told.append(told)

    def _release(self) -> None:
        given = self._some_given(fresh=self._rng.random() < 0.3)
        node = self._any_node()
        if given is None or node is None:
            return
        self.happened["releases"] += 1
        home = self._nodes.get(given.node.name, node)
        self._tell(home if self._rng.random() < 0.9 else node, ReleaseLease([given.lease_id] * self._rng.choice([1, 2])))

    def _pass_time(self) -> None:
        self._clock.now += self._rng.choice([0.01, 0.05, 0.1, 0.4, 1.0, 2.6])

    def _crash(self) -> None:
        node = self._any_node()
        if node is not None:
            self.happened["crashes"] += 1
            node.engine.die()
            self._open(node.name)

    def _close(self) -> None:
        node = self._any_node()
        if node is not None:
            self.happened["orderly ends"] += 1
            node.worker.close()
            self._listen(node)
            for asked in self._asked.values():
                if asked.node is node and not asked.aborted:
                    queued = not asked.ends and not asked.tokens  # it never got out of the inbox
                    require(asked.ends == 1 or queued, "a worker that closes leaves somebody without an answer")
            self._open(node.name)

    def _break_step(self) -> None:
        node = self._any_node()
        if node is not None:
            node.engine.tiny.breaks = True

    def _resync(self) -> None:
        node = self._any_node()
        if node is not None:
            self._tell(node, Resync())

    def _lose_router(self) -> None:
        """It dies, another comes; what the old one had sent may still arrive."""
        if self._rng.random() < 0.5:
            return
        self.happened["routers lost"] += 1
        old, new = self._routers[-1], f"r{len(self._routers)}"
        self._routers.append(new)
        for node in self._nodes.values():
            node.channel.listener.router_lost(old)
            node.channel.listener.router_found(new)
        for asked in self._asked.values():
            if not asked.ends and asked.request.request_id.startswith(f"{old}."):
                asked.aborted = True
                asked.node.told.append(asked)
        late = DecodeWork(self._new_request(router=old))
        for node in self._nodes.values():
            if not node.name.startswith("prefill"):
                try:
                    node.worker.submit(self._seal(node, late))
                except InvalidRequest:
                    self.happened["work of a lost router refused"] += 1
                else:
                    raise Violation("work of a router that is gone was taken")

    # --- steps ---------------------------------------------------------------------------------------------------------

    def _open(self, name: str) -> None:
        engine: TinyEngine | None = None

        def engine_of(deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> Engine:
            nonlocal engine
            engine = TinyEngine(
                deployment,
                worker,
                epoch,
                key,
                num_blocks=self._num_blocks,
                clock=self._clock,
                pools=self._pools,
                meanwhile=self._meanwhile,
            )
            return engine

        channel: WorldChannel | None = None

        def channel_of(_: str, __: str, ___: object, ____: float, _____: float, listener: ChannelListener) -> WorldChannel:
            nonlocal channel
            channel = WorldChannel(listener)
            return channel

        worker = Worker(_DEPLOYMENT, _DEPLOYMENT.worker(name), "", KEY, engine_of=engine_of, channel_of=channel_of)
        worker.start()
        made, line = cast(TinyEngine, engine), cast(WorldChannel, channel)
        self._nodes[name] = Node(name, worker, made, line, worker.heartbeat().epoch)
        line.listener.router_found(self._routers[-1])

    def _one(self, role: Role) -> Node | None:
        nodes = [node for node in self._nodes.values() if node.name.startswith(role.value)]
        return self._rng.choice(nodes) if nodes else None

    def _any_node(self) -> Node | None:
        return self._rng.choice(list(self._nodes.values())) if self._nodes else None

    def _some_given(self, *, fresh: bool) -> Given | None:
        """A ticket, one that nobody has used yet if there is one."""
        if not self._given:
            return None
        unused = [given for given in self._given if given.ticket not in self._used] if fresh else []
        return unused[-1] if unused else self._rng.choice(self._given)

    def _new_request(self, router: str | None = None) -> GenerateRequest:
        rng = self._rng
        prompt = rng.choice(self._prefixes)[: rng.randrange(1, 13)] + [rng.randrange(3, 40) for _ in range(rng.randrange(0, 4))]
        sampling = SamplingParams(max_tokens=rng.randrange(1, 7), min_tokens=rng.choice([0, 0, 1]), seed=rng.randrange(4))
        if sampling.min_tokens > sampling.max_tokens:
            sampling = msgspec.structs.replace(sampling, min_tokens=0)
        return self._request(prompt, sampling, [], rng.choice(["", "", "tenant"]), router)

    def _continuation(self, given: Given) -> GenerateRequest:
        request = given.request
        return self._request(request.prompt_ids, request.sampling, [*request.output_ids, given.token], request.salt, None)

    def _lookalike(self, given: Given) -> GenerateRequest:
        """Another prompt, or another tenant's, of the same length."""
        request = self._continuation(given)
        if self._rng.random() < 0.5:
            return msgspec.structs.replace(request, salt=f"not {request.salt}")
        prompt = list(request.prompt_ids)
        prompt[self._rng.randrange(len(prompt))] += 1
        return msgspec.structs.replace(request, prompt_ids=prompt)

    def _request(
        self, prompt: list[int], sampling: SamplingParams, output: list[int], salt: str, router: str | None
    ) -> GenerateRequest:
        self._count += 1
        seconds = self._rng.choice([_LONG_S, _LONG_S, _LONG_S, 0.3, -1.0])
        return GenerateRequest(
            RequestId(f"{router or self._routers[-1]}.{self._count}.x"),
            prompt,
            sampling,
            self._clock.monotonic() + seconds,
            output,
            salt,
            self._rng.choice([0, 0, 1]),
        )

    def _seal(self, node: Node, work: Work) -> bytes:
        return self._orders.seal(WorkerId(node.name), node.epoch, [work])

    def _order(self, node: Node, work: Work) -> None:
        sealed = self._seal(node, work)
        self._sealed.append(sealed)
        require(node.worker.submit(sealed) == 1, "work was not taken")
        ticketed = isinstance(work, DecodeWork) and work.ticket is not None
        early = work.request.request_id in node.early
        asked = Asked(work.request, node, isinstance(work, PrefillWork), ticketed, aborted=early, silent=early)
        self._asked[work.request.request_id] = asked

    def _spoilt(self, given: Given) -> bytes:
        """A ticket that no worker may use, or one that says what is not so."""
        lot = self._rng.randrange(4)
        if lot == 0:
            spoilt = bytearray(given.ticket)
            spoilt[self._rng.randrange(len(spoilt))] ^= 1 << self._rng.randrange(8)
            return bytes(spoilt)
        if lot == 1:
            return given.ticket[: self._rng.randrange(len(given.ticket))]
        try:
            handoff: KVHandoff = unseal(given.ticket, KEY, 0.0)
        except Exception as error:
            raise Violation("a ticket that a worker made can't be read") from error
        if lot == 2:
            return seal(msgspec.structs.replace(handoff, fingerprint="other"), KEY)
        return seal(msgspec.structs.replace(handoff, generations=[g + 1 for g in handoff.generations]), KEY)

    def _tell(self, node: Node, message: ToWorker) -> None:
        node.worker.told(message)

    def _meanwhile(self) -> None:
        """Between two blocks of a copy: others go on, time passes, the source may die."""
        lot = self._rng.random()
        others = [node for node in self._nodes.values() if node is not self._copying]
        if lot < 0.3 and others:
            self._turn_of(self._rng.choice(others))
        elif lot < 0.35:
            self._clock.now += self._rng.choice([0.1, 0.6])
        elif lot < 0.37 and others:
            node = self._rng.choice(others)
            self.happened["crashes"] += 1
            node.engine.die()
            self._open(node.name)
        elif lot < 0.42 and self._given:
            given = self._given[-1]
            home = self._nodes.get(given.node.name)
            if home is not None and home is not self._copying:
                self._tell(home, ReleaseLease([given.lease_id]))

    def _turn_of(self, node: Node) -> bool:
        busy = node.engine.turn()
        self._moved.add(node)
        told, node.told = node.told, []
        self._listen(node)
        for asked in told:
            asked.silent = True
            require(not node.engine.holds(asked.request.request_id), "an aborted request still holds blocks")
        return busy

    # --- what is said --------------------------------------------------------------------------------------------------

    def _listen(self, node: Node) -> None:
        said, node.channel.said = node.channel.said, []
        for message in said:
            if isinstance(message, Outputs):
                require((message.worker, message.epoch) == (node.name, node.epoch), "said in another's name")
                for output in message.outputs:
                    self._hear(node, output)
            elif isinstance(message, BlockEvents):
                self.happened["events"] += 1

    def _hear(self, node: Node, output: Output) -> None:
        asked = self._asked.get(output.request_id)
        if asked is None:
            raise Violation(f"something is said about a request that was never made: {output}")
        require(asked.node is node, "a worker speaks of another's request")
        if not output.request_id.startswith(f"{self._routers[-1]}."):
            return  # its router is gone: the channel drops what is meant for it
        require(not asked.ends, f"said after the end: {output}")
        require(not asked.silent, f"said after the abort was heeded: {output}")
        if isinstance(output, PrefillDone):
            self._hear_prefill(asked, output)
        elif isinstance(output, KVReady):
            asked.ready += 1
            require(asked.ticketed and asked.ready == 1 and not asked.tokens, "KVReady at the wrong time")
            self.happened[f"handoff {output.report.digest}"] += 1
            if output.report.digest == "verified":
                require(output.lease_id not in node.verified, "a ticket was used twice")
                node.verified.add(output.lease_id)
        elif isinstance(output, TokenChunk):
            self._hear_tokens(asked, output)
        elif isinstance(output, RequestFailed):
            self._hear_failure(asked, output)
        else:
            raise Violation(f"an answer that nobody asked for: {output}")

    def _hear_prefill(self, asked: Asked, done: PrefillDone) -> None:
        require(asked.prefill, "a decode worker says PrefillDone")
        asked.ends += 1
        tokens, why = asked.answer
        require(done.token_id == tokens[0], f"wrong text: {done.token_id} instead of {tokens[0]}")
        last = len(tokens) == 1
        require(done.finish_reason == (why if last else None), "the first token ends the request, or does not")
        require((done.ticket is None) == last, "a ticket that nobody needs, or none that is needed")
        if done.ticket is not None:
            assert done.lease_id is not None
            self._given.append(Given(asked.request, done.token_id, done.ticket, done.lease_id, asked.node))
        self.happened["prefilled"] += 1

    def _hear_tokens(self, asked: Asked, chunk: TokenChunk) -> None:
        require(not asked.prefill, "a prefill worker says tokens")
        require(asked.ready == asked.ticketed, "tokens before KVReady")
        asked.tokens += chunk.token_ids
        tokens, why = asked.answer
        require(asked.tokens == tokens[: len(asked.tokens)], f"wrong text: {asked.tokens} instead of {tokens}")
        last = len(asked.tokens) == len(tokens)
        require(chunk.finish_reason == (why if last else None), "the last token is not told as such, or another one is")
        asked.ends += last
        self.happened["decoded"] += last

    def _hear_failure(self, asked: Asked, failure: RequestFailed) -> None:
        asked.ends += 1
        overdue = asked.request.deadline <= self._clock.monotonic()
        allowed = {
            "deadline passed": overdue,
            "is shutting down": True,
            "queue of worker": True,
            "broken on purpose": True,
            "the prompt has": failure.code is TritonCode.INVALID_ARG,
        }
        found = [allowed[words] for words in allowed if words in failure.message]
        require(found == [True], f"a request fails for no reason: {failure}")
        self.happened["failed"] += 1


ACTIONS: dict[str, int] = {
    "prefill": 16,
    "decode": 16,
    "turn": 50,
    "transfer": 16,
    "abort": 7,
    "release": 6,
    "pass_time": 8,
    "resubmit": 3,
    "crash": 1,
    "close": 1,
    "break_step": 1,
    "resync": 1,
    "lose_router": 1,
}
"""What may happen, and how often compared with the rest."""


def explore_workers(clock: VirtualTime, rng: Random) -> Counter[str]:
    """One life of a world. Raises AssertionError when a promise is broken; returns what was seen."""
    logging.disable(logging.CRITICAL)
    world = WorkersWorld(clock, rng)
    actions = rng.choices(list(ACTIONS), list(ACTIONS.values()), k=rng.choice([20, 40, 80]))
    for action in actions:
        world.do(action, rng)
    world.finish()
    world.happened["actions"] += len(actions)
    return world.happened
