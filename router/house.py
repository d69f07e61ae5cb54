"""All that requests share: the fleet, the index, the queue at the door, the mailroom, the tokenizer.

One owner per piece of state, all on the router's event loop. What workers say comes in through `hear_*`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import Deployment
from python_backends.core.errors import InvalidRequest, Unavailable
from python_backends.core.messages import BlockEvents, Heartbeat, Lent, Located, Output, Outputs, PrefillDone
from python_backends.core.types import BlockHash, LeaseEnd, RequestId, Role, WorkerId
from router.admission import Admission
from router.fleet import Fleet
from router.journal import Journal
from router.lifecycle import State
from router.mailroom import Mailroom
from router.node_memory import NodeMemory
from router.policy import Query, choose
from router.prefix_index import PrefixIndex
from router.seams import Calls, Destination, Observer, Snapshot
from router.tokenizer import Tokenizer
from router.types import ClientRequest, RouteDecision, Way, Wish

log = logging.getLogger(__name__)

_LEND_S = 0.25  # that a worker may take to lend; it answers between two steps
_LONG_PROMPT_BYTES = 4_000  # from here on a prompt is tokenised off the event loop


class House:
    def __init__(self, deployment: Deployment, tokenizer: Tokenizer, calls: Calls, observer: Observer) -> None:
        self.name = secrets.token_hex(8)  # of this life of the router
        self.config = deployment.router
        self._locate_s = deployment.store.locate_timeout_s
        self.tokenizer = tokenizer
        self.calls = calls
        self.observer = observer
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.mailroom = Mailroom()
        self.node_memory = NodeMemory()
        self.journal = Journal()
        self.admission = Admission(self.config.max_requests, self.config.max_queued_tokens)
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._requests = 0
        self._questions = 0
        self._orphans: dict[WorkerId, set[RequestId]] = {}  # what lost workers may still compute, should they come back

    def close(self) -> None:
        self.node_memory.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def snapshot(self, states: Mapping[State, int]) -> Snapshot:
        """`states`: how many live requests are in each."""
        return Snapshot(states, self.admission.requests, self.admission.queued_tokens, len(self.index), list(self.fleet))

    def destination(self, worker: WorkerId) -> Destination | None:
        """Where a worker is, up or not; None when it was never heard of."""
        known = self.fleet.get(worker)
        return None if known is None else Destination(worker, known.heartbeat.model, known.heartbeat.server, known.epoch)

    @property
    def trouble(self) -> str:
        """Why requests can't be served now; empty when they can."""
        if any(worker.role is not Role.PREFILL for worker in self.fleet.up()):
            return ""
        up = ", ".join(worker.id for worker in self.fleet.up()) or "none"
        return f"no decode or aggregated worker is up (up: {up})"

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

    async def decide(self, tokens: list[int], salt: str, wish: Wish, avoid: set[WorkerId]) -> RouteDecision:
        """Choose a route, waiting for a worker if need be. Raises InvalidRequest if the prompt fits none, Unavailable."""
        give_up = time.monotonic() + self.config.worker_wait_s
        while True:
            workers = self.fleet.up()
            self._check_length(len(tokens))
            query = Query(len(tokens), self._matches(tokens, salt), wish, self.config.local_prefill_tokens, avoid=avoid)
            decision = choose(query, workers)
            if decision is not None and decision.way is Way.REMOTE and wish is Wish.AUTO:
                decision = await self._ask_stores(query, decision, tokens, salt) or decision
            if decision is not None:
                self.observer.decided(decision.way)
                return decision
            if time.monotonic() >= give_up:
                raise Unavailable(f"{self.trouble or 'no worker that is up can take the request'}; try again in a moment")
            await self.fleet.wait_for_change(give_up - time.monotonic())

    async def _ask_stores(self, query: Query, decision: RouteDecision, tokens: list[int], salt: str) -> RouteDecision | None:
        """The decision, now that the chosen decode worker has said what its stores have. None when they change nothing."""
        worker = self.fleet.get(decision.decode)
        if worker is None or not worker.heartbeat.stores:
            return None
        size, fingerprint = worker.heartbeat.layout.block_size, worker.heartbeat.fingerprint
        matched = query.matched.get(worker.id, 0)
        hashes = block_hashes(tokens[:-1], size, chain_root(fingerprint, salt))[matched // size :]
        stored = matched + size * await self._locate(worker.id, hashes)
        if stored == matched:
            return None
        # Others with the same stores can use the blocks, too, if they have those before them.
        sharing = [other for other in self.fleet.up() if _has_stores_of(worker.heartbeat, other.heartbeat)]
        able = {other.id: stored for other in sharing if query.matched.get(other.id, 0) >= matched}
        return choose(replace(query, stored=able), self.fleet.up())

    async def _locate(self, worker: WorkerId, hashes: list[BlockHash]) -> int:
        """Leading blocks that the worker finds in its stores; 0 when it does not say in time."""
        answer = await self._ask(worker, lambda question: self.calls.locate(worker, question, hashes), self._locate_s)
        return answer.blocks if isinstance(answer, Located) else 0

    async def borrow(self, lender: WorkerId, tokens: list[int], salt: str) -> Lent | None:
        """A ticket for the leading tokens that the worker has cached. None when it does not say in time."""
        view = self.fleet.get(lender)
        if view is None:
            return None
        root = chain_root(view.heartbeat.fingerprint, salt)
        hashes = block_hashes(tokens[:-1], view.heartbeat.layout.block_size, root)
        answer = await self._ask(lender, lambda question: self.calls.lend(lender, question, hashes), _LEND_S)
        return answer if isinstance(answer, Lent) and answer.ticket is not None else None

    async def _ask(self, worker: WorkerId, ask: Callable[[RequestId], None], within_s: float) -> Output | None:
        """One question to a worker, and its answer if that comes in time."""
        self._questions += 1
        question = RequestId(f"{self.name}.q{self._questions}")
        with self.mailroom.box(question, worker) as box:
            ask(question)
            answering = asyncio.ensure_future(box.get())
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
                await asyncio.wait({answering}, timeout=within_s)
                return answering.result() if answering.done() else None
            finally:
                answering.cancel()

    def _check_length(self, num_tokens: int) -> None:
        known = [worker for worker in self.fleet if worker.role is not Role.PREFILL]
        longest = max((worker.heartbeat.max_context for worker in known), default=num_tokens + 1)
        if num_tokens >= longest:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens; with at least one new token it must fit into {longest} "
                "(the model's context, or engine.kv_pool_mib)"
            )

    def _matches(self, tokens: list[int], salt: str) -> dict[WorkerId, int]:
        """Leading tokens that each worker is believed to have; the last token never counts, its logits are wanted."""
        matched: dict[WorkerId, int] = {}
        models = {(worker.heartbeat.fingerprint, worker.heartbeat.layout.block_size) for worker in self.fleet.up()}
        for fingerprint, size in models:
            hashes = block_hashes(tokens[:-1], size, chain_root(fingerprint, salt))
            for worker, blocks in self.index.match(hashes).items():
                matched[worker] = blocks * size
        return matched

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
        if told and not heartbeat.load.tells_blocks:
            log.warning("worker %s does not tell what its prefix cache holds: prefixes are not routed to it", heartbeat.worker)
        for request_id in self._orphans.pop(heartbeat.worker, ()):  # of a life that was only cut off or held up
            self.calls.abort(heartbeat.worker, request_id)
        return self.index.is_behind(heartbeat.worker, heartbeat.epoch, heartbeat.events_sequence)

    def hear_outputs(self, outputs: Outputs) -> None:
        if not self.fleet.is_current(outputs.worker, outputs.epoch):
            return
        for output in self.mailroom.deliver(outputs.outputs):
            if isinstance(output, PrefillDone | Lent) and output.lease_id is not None:
                self.calls.release(outputs.worker, output.lease_id, LeaseEnd.UNWANTED)  # its request is gone

    def hear_events(self, events: BlockEvents) -> bool:
        """Returns whether the worker's blocks must be asked for again."""
        return not self.index.apply(events)

    def lose(self, worker: WorkerId, why: str) -> bool:
        """A worker is dead, wedged or restarted. Returns whether it was up."""
        was_up = self.fleet.lose(worker)
        self.index.forget(worker)
        self._orphans.setdefault(worker, set()).update(self.mailroom.lose(worker, why))
        return was_up


def _has_stores_of(one: Heartbeat, other: Heartbeat) -> bool:
    """Whether what `one` finds in its stores is there for the other, too: a node store is of its host alone."""
    same_model = other.fingerprint == one.fingerprint and set(one.stores) <= set(other.stores)
    return same_model and (not one.node_place or (one.host, one.node_place) == (other.host, other.node_place))


def _num_bytes(request: ClientRequest) -> int:
    if request.text is not None:
        return len(request.text.encode(errors="surrogatepass"))
    return sum(len(str(message.get("content")).encode(errors="surrogatepass")) for message in request.messages or [])
