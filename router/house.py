"""All that requests share: the fleet, the index, the queue at the door, the mailroom, the tokenizer.

One owner per piece of state, all on the router's event loop. What workers say comes in through `hear_*`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random

import msgspec

from python_backends.core.block_hash import block_hashes
from python_backends.core.config import Deployment
from python_backends.core.errors import InvalidRequest
from python_backends.core.messages import (
    BlockEvents,
    Followed,
    FollowWork,
    Heartbeat,
    Lent,
    Located,
    Output,
    Outputs,
    PrefillDone,
    RequestFailed,
)
from python_backends.core.step_model import longest_step_ms
from python_backends.core.types import GenerateRequest, LeaseEnd, RequestId, Role, WorkerId
from router.admission import SHUTTING_DOWN, Admission
from router.censored_mean import CensoredMean
from router.clock import Clock
from router.detokenizer import Detokenizer
from router.fleet import Fleet, WorkerView, long_prompt
from router.journal import Journal
from router.lifecycle import State
from router.mailroom import Mailroom
from router.node_memory import NodeMemory
from router.policy import Choice, Query, Room, choose, has_room
from router.prefix_index import Match, PrefixIndex
from router.prompt import Hasher, Prompt
from router.retries import Quarantine
from router.seams import Calls, Destination, Observer, Snapshot
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Slo, Wish

log = logging.getLogger(__name__)

_LEND_S = 0.25  # that a worker may take to lend; it answers between two steps
_LONG_PROMPT_BYTES = 4_000  # from here on a prompt is tokenised off the event loop
_HITS = 2  # workers of each role that have most of a prompt and are looked at
_OUTPUT_RATE = 0.02  # how fast the expected length of outputs learns
_CAPACITY_AGE_S = 1.0
_GONE_REMEMBERED = 256  # workers that have left, and may still compute for requests of this router

_WISHES = {
    "adaptive": Wish.AUTO,
    "always-remote": Wish.REMOTE,
    "always-local": Wish.LOCAL,
    "always-aggregated": Wish.AGGREGATED,
}


class House:
    def __init__(
        self,
        deployment: Deployment,
        tokenizer: Tokenizer,
        calls: Calls,
        observer: Observer,
        *,
        clock: Clock | None = None,
        hasher: Hasher = block_hashes,
        random: Random | None = None,
        detokenizer: type[Detokenizer] = Detokenizer,
    ) -> None:
        """clock, hasher, random and detokenizer are the simulator's to give."""
        self.name = secrets.token_hex(8)  # of this life of the router
        self.config = deployment.router
        self._locate_s = deployment.store.locate_timeout_s
        self.tokenizer = tokenizer
        self.calls = calls
        self.observer = observer
        self.clock = clock or Clock()
        self.fleet = Fleet(_standby(deployment))
        self.index = PrefixIndex()
        self.mailroom = Mailroom()
        self.node_memory = NodeMemory()
        self.journal = Journal()
        self.quarantine = Quarantine(self.config.max_attempts, self.config.max_worker_deaths, self.clock.now)
        self.admission = Admission(self.config, self.clock, self._tokens_per_ms, long_prompt(deployment.engine.step_tokens))
        self.fleet.on_room = self.admission.room_changed
        self.output_tokens = CensoredMean(_OUTPUT_RATE, self.config.default_max_tokens)  # of a request
        self.longest_step_ms = longest_step_ms(self.config.slo.itl_ms)  # of streams alone; 0: there is no target
        self.lost_at = 0.0  # monotonic s, when a worker was lost last
        self.detokenizer = detokenizer
        self._hasher = hasher
        self._random = random or Random(secrets.randbits(64))
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._requests = 0
        self._questions = 0
        self._orphans: dict[WorkerId, set[RequestId]] = {}  # what lost workers may still compute, should they come back
        self._seen_version = -1  # of the fleet, for the four below
        self._members: list[int] = []  # of each role that has any workers
        self._models: list[tuple[str, int]] = []  # fingerprint, block size
        self._longest = 0  # tokens that a worker takes that decodes, whether it is up or not; 0: none is known
        self._has_stores = False
        self._capacity = (0.0, -_CAPACITY_AGE_S)  # tokens per ms, and when that was

    def close(self) -> None:
        self.node_memory.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def snapshot(self, states: Mapping[State, int]) -> Snapshot:
        """`states`: how many live requests are in each."""
        door, workers = self.admission, list(self.fleet)
        return Snapshot(states, door.requests, door.waiting, door.queued_tokens, len(self.index), workers, self.longest_step_ms)

    @property
    def trouble(self) -> str:
        """Why requests can't be served now; empty when they can."""
        if self.admission.closed:
            return SHUTTING_DOWN
        if self.fleet.ranked[Role.DECODE] or self.fleet.ranked[Role.AGGREGATED]:
            return ""
        up = [f"{worker.id}{_remark(worker)}" for worker in self.fleet.up()]
        return f"no decode or aggregated worker is up (up: {', '.join(up) or 'none'})"

    def destination(self, worker: WorkerId) -> Destination | None:
        """Where a worker is, up or not; None when it was never heard of."""
        known = self.fleet.get(worker)
        return None if known is None else Destination(worker, known.heartbeat.model, known.heartbeat.server, known.epoch)

    # --- for a request ---

    def new_request_id(self) -> RequestId:
        """Begins with the router's name, so that nothing an earlier router left with workers is taken for it."""
        self._requests += 1
        return RequestId(f"{self.name}.{self._requests}")

    async def tokenize(self, request: ClientRequest) -> list[int]:
        """Prompt token ids. Raises InvalidRequest. Long prompts don't hold up the other streams."""
        if request.input_ids is not None:
            return request.input_ids
        encode, name = (self._encode_text, "text_input") if request.text is not None else (self._encode_chat, "messages")
        num_bytes = _num_bytes(request)
        if num_bytes > self.config.max_prompt_bytes:
            raise InvalidRequest(
                f"{name} has {num_bytes} bytes; at most {self.config.max_prompt_bytes} are accepted (router.max_prompt_bytes)"
            )
        if num_bytes < _LONG_PROMPT_BYTES:
            return encode(request)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, encode, request)

    def _encode_text(self, request: ClientRequest) -> list[int]:
        return self.tokenizer.encode(request.text or "")

    def _encode_chat(self, request: ClientRequest) -> list[int]:
        return self.tokenizer.encode_chat(request.messages or [])

    def prompt(self, token_ids: list[int], salt: str) -> Prompt:
        return Prompt(token_ids, salt, self._hasher)

    def wish_of(self, request: ClientRequest) -> Wish:
        return request.wish or _WISHES[self.config.mode]

    def slo_of(self, request: ClientRequest) -> Slo:
        given, ours = (request.slo_ttft_ms, request.slo_itl_ms), (self.config.slo.ttft_ms, self.config.slo.itl_ms)
        return Slo(*(mine if asked is None else asked for asked, mine in zip(given, ours, strict=True)))

    def match(self, prompt: Prompt) -> Match:
        """How much of it the workers that are up are believed to have."""
        if self._seen_version != self.fleet.version:
            self._look_at_fleet()
        return self.index.match([(size, prompt.hashes(model, size)) for model, size in self._models])

    def choose(
        self,
        prompt: Prompt,
        wish: Wish,
        slo: Slo,
        max_tokens: int,
        avoid: Collection[WorkerId],
        stored: Mapping[WorkerId, int] | None = None,
    ) -> Choice | None:
        """Where the request would go now; None when nobody is up to serve it. Raises InvalidRequest if it fits nowhere.

        stored: what `look_in_stores` has found.
        """
        match = self.match(prompt)
        if len(prompt) >= (self._longest or len(prompt) + 1):
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; with at least one new token it must fit into {self._longest} "
                "(the model's context, or engine.kv_pool_mib)"
            )
        hits = [worker for members in self._members for worker in match.deepest(members, _HITS)]
        hits += [worker for worker in stored or () if worker not in hits][: _HITS * len(Role)]
        output = min(max_tokens, int(self.output_tokens.value))
        contended = self.admission.waiting > 0
        query = Query(len(prompt), match, hits, wish, slo, output, contended, avoid, stored or {}, self.longest_step_ms)
        return choose(query, self.fleet, self._random)

    # --- what takes a question to a worker ---

    @property
    def has_stores(self) -> bool:
        """Whether a worker that is up and decodes has any."""
        if self._seen_version != self.fleet.version:
            self._look_at_fleet()
        return self._has_stores

    async def look_in_stores(self, prompt: Prompt, worker: WorkerId) -> dict[WorkerId, int]:
        """Leading tokens that workers have in their pools or find in their stores, as this one says of its own.

        Empty when that is no more than what they have anyway.
        """
        view = self.fleet.get(worker)
        if view is None or not view.heartbeat.stores:
            return {}
        match, size = self.match(prompt), view.block_size
        pooled = match.get(worker)
        hashes = prompt.hashes(view.fingerprint, size)[pooled // size :]
        if not hashes:
            return {}
        answer = await self._ask(worker, lambda question: self.calls.locate(worker, question, hashes), self._locate_s)
        stored = pooled + size * (answer.blocks if isinstance(answer, Located) else 0)
        if stored == pooled:
            return {}
        # Others with the same stores can use the blocks, too, if they have those before them.
        sharing = [other for other in self.fleet.up() if _has_stores_of(view.heartbeat, other.heartbeat)]
        return {other.id: stored for other in sharing if match.get(other.id) >= pooled}

    async def borrow(self, lender: WorkerId, prompt: Prompt, within_s: float = _LEND_S) -> Lent | None:
        """A ticket for the leading tokens that the worker has cached. None when it does not say in time."""
        view = self.fleet.get(lender)
        if view is None:
            return None
        hashes = prompt.hashes(view.fingerprint, view.block_size)
        answer = await self._ask(lender, lambda question: self.calls.lend(lender, question, hashes), within_s)
        return answer if isinstance(answer, Lent) and answer.ticket is not None else None

    async def follow(self, worker: WorkerId, request: GenerateRequest, loan: bytes) -> Followed | None:
        """Have a worker fetch what another one lends, within the deadline. None when it does not."""
        within_s = request.deadline - self.clock.now()

        def ask(question: RequestId) -> None:
            self.calls.submit(worker, FollowWork(msgspec.structs.replace(request, request_id=question), loan))

        answer = await self._ask(worker, ask, within_s, abort=True)
        return answer if isinstance(answer, Followed) and answer.tokens else None

    async def _ask(
        self, worker: WorkerId, ask: Callable[[RequestId], None], within_s: float, *, abort: bool = False
    ) -> Output | None:
        """One question to a worker, and its answer if that comes in time. `abort`: else the worker is to stop what it does."""
        self._questions += 1
        question = RequestId(f"{self.name}.q{self._questions}")
        with self.mailroom.box(question, worker) as box:
            ask(question)
            answering, answer = asyncio.ensure_future(box.get()), None
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
                await asyncio.wait({answering}, timeout=within_s)
                answer = answering.result() if answering.done() else None
                return answer
            finally:
                if answer is None:  # it did not come in time, or came together with a cancellation
                    if abort:
                        self.calls.abort(worker, question)
                    self._return(worker, [answering.result()] if answering.done() else [])
                    answering.cancel()
                    self._return(worker, box.rest())

    def _return(self, worker: WorkerId, outputs: Iterable[Output]) -> None:
        """Nobody waits for these any more: give back what they offer."""
        for output in outputs:
            if isinstance(output, PrefillDone | Lent) and output.lease_id is not None:
                self.calls.release(worker, output.lease_id, LeaseEnd.UNWANTED)

    # --- the state of things ---

    def has_room(self, lacked: Room) -> bool:
        """Whether `choose` may now say something else to a request that lacked this."""
        return has_room(lacked, self.fleet)

    def serves(self, num_tokens: int) -> bool:
        """Whether a worker is up that can take a prompt of so many tokens to its end."""
        ranked = self.fleet.ranked
        return any(num_tokens < worker.max_context for role in (Role.DECODE, Role.AGGREGATED) for worker in ranked[role])

    def _look_at_fleet(self) -> None:
        """Once whenever a worker comes or goes."""
        self._seen_version = self.fleet.version
        self._members = [self.index.members([w.id for w in ranked]) for ranked in self.fleet.ranked.values() if ranked]
        self._models = sorted({(worker.fingerprint, worker.block_size) for worker in self.fleet.up()})
        self._longest = max((worker.max_context for worker in self.fleet if worker.role is not Role.PREFILL), default=0)
        decoding = (worker for role in (Role.DECODE, Role.AGGREGATED) for worker in self.fleet.ranked[role])
        self._has_stores = any(worker.heartbeat.stores for worker in decoding)

    def _tokens_per_ms(self) -> float:
        """Prompt tokens that the prefill workers - without any, those that decode - compute in a millisecond."""
        rate, when = self._capacity
        now = self.clock.now()
        if now - when >= _CAPACITY_AGE_S:
            ranked = self.fleet.ranked
            workers = ranked[Role.PREFILL] or ranked[Role.DECODE] or ranked[Role.AGGREGATED]
            rate = sum(w.prefill_rate() for w in workers)
            self._capacity = (rate, now)
        return rate

    # --- from the channel ---

    def hear_heartbeat(self, heartbeat: Heartbeat, now: float) -> bool:
        """Returns whether the worker's blocks must be asked for again."""
        known = self.fleet.get(heartbeat.worker)
        if known is not None and known.up and known.epoch != heartbeat.epoch:
            self.lose(heartbeat.worker, f"worker {heartbeat.worker} was restarted")
        told = known is None or known.epoch != heartbeat.epoch or known.heartbeat.load.tells_blocks
        self.fleet.hear(heartbeat, now)
        if heartbeat.node_place:
            self.node_memory.named(heartbeat.node_place, now)
        self.admission.room_changed()  # it may have KV blocks again
        if told and not heartbeat.load.tells_blocks:
            log.warning("worker %s does not tell what its prefix cache holds: prefixes are not routed to it", heartbeat.worker)
        for request_id in self._orphans.pop(heartbeat.worker, ()):  # of a life that was only cut off or held up
            self.calls.abort(heartbeat.worker, request_id)
        return self.index.is_behind(heartbeat.worker, heartbeat.epoch, heartbeat.events_sequence)

    def hear_outputs(self, outputs: Outputs) -> None:
        if not self.fleet.is_current(outputs.worker, outputs.epoch):
            return
        if not all(isinstance(output, RequestFailed) for output in outputs.outputs):
            self.fleet.spoke(outputs.worker, self.clock.now())
        self.fleet.stepped(outputs.worker, outputs.steps)
        self._return(outputs.worker, self.mailroom.deliver(outputs.outputs))

    def hear_events(self, events: BlockEvents) -> bool:
        """Returns whether the worker's blocks must be asked for again."""
        return not self.index.apply(events)

    def lose(self, worker: WorkerId, why: str, *, died: bool = True) -> bool:
        """A worker is dead, wedged, or (not `died`) unloaded. Returns whether it was up."""
        was_up = self.fleet.lose(worker)
        self.lost_at = self.clock.now()
        self.index.forget(worker)
        self._orphans.setdefault(worker, set()).update(self.mailroom.lose(worker, why, died=died))
        return was_up

    def rest(self, worker: WorkerId, why: str) -> None:
        """A worker that is up does not work: it is given nothing new, and what it has goes on elsewhere."""
        self.fleet.rest(worker, why)
        self.lost_at = self.clock.now()
        for request_id in self.mailroom.lose(worker, f"worker {worker} is not used: {why}", died=True):
            self.calls.abort(worker, request_id)

    def forget(self, worker: WorkerId) -> None:
        """A worker that is lost has left the deployment: where servers come and go each has a name of its own, for once."""
        self.fleet.forget(worker)
        self.index.leave(worker)
        if not self._orphans.get(worker):  # else it may come back, and still compute
            self._orphans.pop(worker, None)
        gone = [other for other in self._orphans if self.fleet.get(other) is None]
        for other in gone[:-_GONE_REMEMBERED]:
            del self._orphans[other]


def _remark(worker: WorkerView) -> str:
    why = worker.resting or ("it is drained" if worker.heartbeat.draining else "")
    return f", which rests: {why}" if why else ""


def _standby(deployment: Deployment) -> list[WorkerId]:
    """Aggregated workers that have no cores of their own: if they worked too, prefill and decode workers would slow down."""
    others = any(worker.role is not Role.AGGREGATED for worker in deployment.workers)
    shared = [w.id for w in deployment.workers if w.role is Role.AGGREGATED and w.device == "cpu" and not w.cpus]
    return shared if others else []


def _has_stores_of(one: Heartbeat, other: Heartbeat) -> bool:
    """Whether what `one` finds in its stores is there for the other, too: a node store is of its host alone."""
    same_model = other.fingerprint == one.fingerprint and set(one.stores) <= set(other.stores)
    return same_model and (not one.node_place or (one.host, one.node_place) == (other.host, other.node_place))


def _num_bytes(request: ClientRequest) -> int:
    if request.text is not None:
        return len(request.text.encode(errors="surrogatepass"))
    return sum(len(str(message.get("content")).encode(errors="surrogatepass")) for message in request.messages or [])
