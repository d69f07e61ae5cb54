"""One request on its way: its tokens, its lifecycle, what it holds, and the account of what happened to it.

`serve.py` tells the story; this file does the single steps. Whatever the lifecycle says to give back is given back in one
place, `_move`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from python_backends.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    QueueFull,
    RefusalReason,
    TritonCode,
    Unavailable,
    WorkerLost,
)
from python_backends.core.messages import (
    DecodeWork,
    KVReady,
    Output,
    PrefillDone,
    PrefillWork,
    RequestFailed,
    TokenChunk,
)
from python_backends.core.types import (
    Epoch,
    FinishReason,
    GenerateRequest,
    KVReport,
    LeaseEnd,
    RequestId,
    SamplingParams,
    WorkerId,
)
from router.account import Account
from router.admission import Forecast, Place
from router.fleet import Charge
from router.following import Following
from router.house import House
from router.journal import Entry
from router.lessons import Lessons
from router.lifecycle import Event, Held, Lifecycle, State
from router.mailroom import Box
from router.policy import Choice, Room
from router.prompt import Prompt
from router.retries import Poisoned, RetryBudget
from router.seams import Reply
from router.types import ClientRequest, Outcome, Piece, RouteDecision, Wish

log = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.05  # doubled with every attempt, when there is no other worker to try ...
_DEATH_TOLD_S = 0.05  # after work could not be handed over it is known whether the worker died
_DOUBLINGS = 5  # ... but not beyond 1.6 s


class Run:
    """Belongs to the event loop. `interrupt` ends it from outside, `serve` drives it. At the door it is a Guest."""

    def __init__(self, request: ClientRequest, reply: Reply, house: House, arrival: float) -> None:
        """arrival: monotonic, s."""
        self._request = request
        self._reply = reply
        self._house = house
        self._clock = house.clock
        self._id = house.new_request_id()
        self.slo = house.slo_of(request)
        self._wish = house.wish_of(request)
        self._life = Lifecycle()
        self._attempts = 0
        self._lives: dict[WorkerId, Epoch] = {}  # to which work was sent
        self._failed: dict[WorkerId, Epoch] = {}  # of these, which failed: another life of the worker may do better
        self._budget = RetryBudget(house.quarantine)
        self._worker_died = False  # in this attempt
        self._never_tried = False  # nor was this attempt one: its worker stood still before
        self._prompt_ids: list[int] = []
        self._output_ids: list[int] = [*request.output_ids]
        self._cumulative_logprob = 0.0
        self._sampling = request.sampling
        self._account = Account(arrival, house.clock, len(request.output_ids))
        self._entry = Entry(self._id, request, arrival, house.clock.now)
        self._decision: RouteDecision | None = None
        self._waiting_since = arrival
        self._lessons = Lessons(house.fleet, house.clock)
        self._forecast: Forecast | None = None
        self._stored: Mapping[WorkerId, int] = {}  # see House.look_in_stores
        self._lacks: Room | None = None  # when it was last decided
        self.lacks_stream = False  # what it lacked then was a place for its stream
        self.deadline = arrival + (request.timeout_s or house.config.default_deadline_s)
        self.interruption: BatonError = Cancelled("the request was cancelled")
        # held, and given back when the lifecycle says so
        self._place: Place | None = None
        self._decode_charge: Charge | None = None
        self._prefill_charge: Charge | None = None
        self._prefill_leg: tuple[WorkerId, RequestId] | None = None
        self._decode_leg: tuple[WorkerId, RequestId] | None = None
        self._loan: tuple[WorkerId, str] | None = None
        self._lease: tuple[WorkerId, str] | None = None
        self._lease_end = LeaseEnd.UNWANTED

    @property
    def state(self) -> State:
        return self._life.state

    @property
    def ended(self) -> bool:
        return not self._life.live

    # --- the steps, in the order of the story ---

    async def enter(self) -> None:
        """Take a place, tokenise, validate. Raises InvalidRequest or QueueFull."""
        self._house.journal.begin(self._entry)
        self._request.check_sizes()
        self._place = self._house.admission.enter()
        self._prompt_ids = await self._house.tokenize(self._request)
        self._sampling = self._check_tokens(self._request.sampling)
        self._entry.tokenized(self._prompt_ids)
        self._house.quarantine.check(self._prompt_ids, self._request.salt)
        self._prompt = self._known_tokens()
        self._place.queue(len(self._prompt_ids), self._request.salt, self._request.priority, self._wish)
        sampling, house = self._sampling, self._house
        self._text = house.detokenizer(house.tokenizer, sampling.stop, sampling.min_tokens, self._prompt_ids)
        self._text.push(self._output_ids)  # the client has this text

    async def route(self) -> RouteDecision:
        """Wait for a worker that has room, and go there. Raises QueueFull, Unavailable, InvalidRequest, DeadlineExceeded."""
        await self._budget.turn()
        self._attempts += 1
        self._worker_died = self._never_tried = False
        self._lacks = None
        again = self._attempts > 1
        if again:
            self._prompt = self._known_tokens()
            await self._pause_if_nobody_else()
        self._waiting_since = self._clock.now()
        self._stored = await self._look_in_stores() if self._house.has_stores else {}
        assert self._place is not None
        await self._place.turn(self, again=again)
        assert self._decision is not None
        return self._decision

    def _known_tokens(self) -> Prompt:
        """The prompt, and what the client has already got after it."""
        token_ids = self._prompt_ids + self._output_ids if self._output_ids else self._prompt_ids
        return self._house.prompt(token_ids, self._request.salt)

    async def _pause_if_nobody_else(self) -> None:
        """If there is only the worker that failed just now: one that is being loaded or restarted needs a moment."""
        choice = self._choose()
        if choice is not None and not self._avoid().isdisjoint({choice.decision.prefill, choice.decision.decode}):
            await asyncio.sleep(_RETRY_PAUSE_S * 2 ** min(self._attempts, _DOUBLINGS))

    async def _look_in_stores(self) -> Mapping[WorkerId, int]:
        """What the decode worker that would be taken finds in its stores, where a prompt is left to be computed."""
        self._stored = {}
        choice = self._choose() if self._wish is Wish.AUTO else None
        return await self._house.look_in_stores(self._prompt, choice.decision.decode) if choice else {}

    # --- at the door: see admission.Guest ---

    def start(self) -> bool:
        if self._lacks is not None and not self._house.has_room(self._lacks):
            return False
        choice = self._choose()
        self._lacks = choice.lacks if choice else None
        self.lacks_stream = choice is not None and choice.full
        if choice is None or self._lacks is not None:
            return False
        self._decision = decision = choice.decision
        self._house.observer.decided(decision.way)
        self._account.routed(decision, self._attempts)
        self._entry.routed(decision)
        fleet, num_tokens = self._house.fleet, len(self._prompt)
        here = 0 if decision.prefill else decision.prefill_tokens
        self._decode_charge = fleet.charge(decision.decode, here, num_tokens, choice.missing, choice.output_tokens)
        self._prefill_charge = None
        if decision.prefill:
            tokens = decision.prefill_tokens
            self._prefill_charge = fleet.charge(decision.prefill, tokens, num_tokens, tokens)
        self._move(Event.ROUTE)
        return True

    def forecast(self) -> Forecast | None:
        if self._forecast is None:
            self._choose()
        return self._forecast

    def give_up(self) -> BatonError | float:
        now, patience_s = self._clock.now(), self._house.config.worker_wait_s
        latest = self.deadline - (self._forecast.alone_ms if self._forecast else 0.0) / 1e3
        if now >= latest:
            return DeadlineExceeded(
                "the request waited for a worker until its deadline can't be kept; give a longer timeout or try again later"
            )
        if not self._house.serves(len(self._prompt)):
            patience_s -= now - max(self._waiting_since, self._house.lost_at)
            if patience_s <= 0:
                why = self._house.trouble or "no worker that is up can take the request"
                return Unavailable(f"{why}; try again in a moment")
        return min(patience_s, latest - now)

    def _choose(self) -> Choice | None:
        """Where to go now. Raises InvalidRequest when the prompt is too long for all."""
        left = self._sampling.max_tokens - len(self._output_ids)
        choice = self._house.choose(self._prompt, self._wish, self.slo, left, self._avoid(), self._stored)
        self._forecast = Forecast(choice.decision.ttft_ms, choice.alone_ms) if choice else None
        return choice

    def _avoid(self) -> set[WorkerId]:
        """Workers that failed this request in the life that they are in."""
        fleet = self._house.fleet
        return {worker for worker, epoch in self._failed.items() if fleet.is_current(worker, epoch)} if self._failed else set()

    # --- at the workers ---

    async def borrow(self, lender: WorkerId) -> bytes | None:
        """Have another worker lend what it has cached of the prompt. Returns the ticket, if it does so in time."""
        lent = await self._house.borrow(lender, self._prompt)
        if lent is None or lent.lease_id is None:
            return None
        self._loan = (lender, lent.lease_id)
        return lent.ticket

    async def prefill(self, worker: WorkerId, loan: bytes | None = None) -> bytes | None:
        """Have the prompt computed, send the first token to the client. Returns the ticket for the KV."""
        self._check_given(worker)
        request = self._generate_request("p")
        with self._following(worker) as following, self._house.mailroom.box(request.request_id, worker) as box:
            self._prefill_leg = (worker, request.request_id)
            self._submit(worker, PrefillWork(request, loan))
            if self._prefill_charge is not None:
                self._prefill_charge.sent()
            if following is not None and self._decode_charge is not None:
                self._decode_charge.sent()  # it is about to ask for blocks
            self._move(Event.PREFILL)
            while not isinstance(done := await self._next(box), PrefillDone):
                self._give_back(Held.LOAN)  # KVReady: the lender's blocks are fetched
            self._lessons.prefilled(worker, done)
            if self._prefill_charge is not None:
                self._prefill_charge.undo()
            self._lease = (worker, done.lease_id) if done.lease_id is not None else None
            self._lease_end = LeaseEnd.UNWANTED
            self._account.prefilled(done)
            logprobs = [done.logprob] if done.logprob else None
            self._take(TokenChunk(done.request_id, [done.token_id], len(self._output_ids), logprobs, done.finish_reason))
            if following is not None and not self.ended:
                await following.settle()
        return done.ticket

    @contextmanager
    def _following(self, prefill: WorkerId) -> Iterator[Following | None]:
        """While the prompt is computed, the decode worker fetches what there is of it."""
        fleet, decision = self._house.fleet, self._decision
        assert decision is not None
        source, target = fleet.get(prefill), fleet.get(decision.decode)
        if source is None or target is None or not target.may_follow(source, decision.prefill_tokens):
            yield None
            return
        request = self._generate_request("f")
        following = Following(self._house, self._prompt, request, source, target, self._account.followed)
        try:
            yield following
        finally:
            following.cancel()

    async def decode(self, worker: WorkerId, ticket: bytes | None) -> None:
        """Hand over, if there is a ticket, and relay tokens to the client until the last one."""
        self._check_given(worker)
        request = self._generate_request("d")
        with self._house.mailroom.box(request.request_id, worker) as box:
            self._decode_leg = (worker, request.request_id)
            self._submit(worker, DecodeWork(request, ticket))
            if self._decode_charge is not None:
                self._decode_charge.sent()
            self._move(Event.DECODE if ticket is None else Event.HAND_OFF)
            computes, uncached = ticket is None, self._decision.prefill_tokens if self._decision else 0
            while not self.ended:
                output = await self._next(box)
                if isinstance(output, KVReady):
                    self._kv_ready(worker, output.report)
                elif isinstance(output, TokenChunk) and self._is_next(output):
                    if computes:
                        self._lessons.first_token(worker, len(self._prompt) - uncached, uncached)
                    computes = False
                    self._take(output)

    def retry(self, error: BatonError) -> None:
        """After a failed attempt: another one. Raises an error when the budget of attempts or of workers is used up."""
        self._entry.failed_attempt(str(error))
        if not self._never_tried:
            self._count_failure(error)
        log.warning("request %s: attempt %d failed (%s); trying again", self._id, self._attempts, error)
        self._house.observer.retried()
        self._move(Event.WORKER_LOST)

    def _count_failure(self, error: BatonError) -> None:
        try:
            self._budget.failed(error, len(self._output_ids), died=self._worker_died)
        except Poisoned:
            self._house.quarantine.remember(self._prompt_ids, self._request.salt)
            raise

    def fail(self, error: BatonError) -> None:
        """Answer with the error and give back all that is held."""
        if self.ended:
            return
        self._move(Event.CANCEL if isinstance(error, Cancelled) else Event.FAIL)
        self._reply.fail(error)
        self._house.observer.ended(self._house.journal.end(self._entry, _outcome(error), str(error)))

    def interrupt(self, task: asyncio.Task[None], why: BatonError) -> None:
        """End the request from outside, wherever it is."""
        self.interruption = why
        task.cancel()

    # --- tokens to the client ---

    def _is_next(self, chunk: TokenChunk) -> bool:
        """False for tokens that have come before. Raises WorkerLost when some before them were lost, with a connection."""
        if chunk.start > len(self._output_ids):
            raise WorkerLost(f"tokens {len(self._output_ids)} to {chunk.start - 1} were lost on the way")
        return chunk.start == len(self._output_ids)

    def _take(self, chunk: TokenChunk) -> None:
        """Account for new tokens, turn them into text, send it, and end the request with the last one."""
        if self.state is State.HANDING_OFF:  # the KVReady before them was lost
            self._move(Event.KV_READY)
        self._first_token()
        if self._decode_charge is not None:
            self._decode_charge.grow(len(chunk.token_ids))
        self._output_ids += chunk.token_ids
        self._house.output_tokens.add(len(chunk.token_ids))
        self._budget.progress(len(self._output_ids))
        self._account.tokens(len(self._output_ids), chunk.report)
        gap_s = self._entry.tokens(len(chunk.token_ids))
        if gap_s:
            self._house.observer.tokens(len(chunk.token_ids), gap_s)
            if self.state is State.DECODING and self._decision is not None:
                self._lessons.gap(self._decision.decode, len(self._output_ids), len(chunk.token_ids), gap_s)
        logprobs = chunk.logprobs or []
        self._cumulative_logprob += sum(entry.logprob for entry in logprobs)
        # The token that stopped the engine is not text.
        text = self._text.push(chunk.token_ids[:-1] if chunk.finish_reason is FinishReason.STOP else chunk.token_ids)
        finish = chunk.finish_reason
        if finish is not None:
            text += self._text.finish()
        if finish is not None or self._text.stopped:
            self._move(Event.STOP if finish is None else Event.FINISH)
            finish = FinishReason.STOP if self._text.stopped else finish
        elif self.state is State.DECODING:
            self._move(Event.TOKENS)
        self._send(Piece(text, chunk.token_ids, logprobs, self._cumulative_logprob, len(self._prompt_ids), finish))

    def _first_token(self) -> None:
        if self._place is not None:
            self._place.first_token()
        if self._decode_charge is not None:
            self._decode_charge.prefilled()

    def _send(self, piece: Piece) -> None:
        if piece.finish_reason is None:
            self._reply.send(piece)
            return
        proof = msgspec.structs.replace(self._account.proof(), request_id=self._id, trace_id=self._entry.trace_id)
        self._reply.send(msgspec.structs.replace(piece, proof=proof))
        self._house.observer.ended(self._house.journal.end(self._entry, Outcome.OK, proof=proof))

    def _kv_ready(self, worker: WorkerId, report: KVReport) -> None:
        self._account.kv_ready(report)
        self._lease_end = lease_end(report)
        self._lessons.kv_ready(worker, report)
        if self.state is State.HANDING_OFF:
            self._move(Event.KV_READY)

    # --- workers ---

    def _check_given(self, worker: WorkerId) -> None:
        """Raises WorkerLost when it was lost, or put to rest, since the route was chosen: nobody would tell the box."""
        if not self._house.fleet.is_given_work(worker):
            raise WorkerLost(f"worker {worker} was lost, or put to rest, before its turn")

    def _submit(self, worker: WorkerId, work: PrefillWork | DecodeWork) -> None:
        assert self._decision is not None
        view = self._house.fleet.get(worker)
        assert view is not None
        self._lives[worker] = view.epoch
        computes = isinstance(work, PrefillWork) or work.ticket is None
        self._lessons.submitted(worker, self._decision.prefill_tokens if computes else 0)
        self._house.calls.submit(worker, work)

    def _generate_request(self, leg: str) -> GenerateRequest:
        """What this attempt asks of a worker: to continue after the tokens already sent, under an id never used before."""
        return GenerateRequest(
            request_id=RequestId(f"{self._id}.{self._attempts}{leg}"),
            prompt_ids=self._prompt_ids,
            output_ids=list(self._output_ids),
            sampling=self._sampling,
            deadline=self.deadline,
            salt=self._request.salt,
            priority=self._request.priority,
        )

    async def _next(self, box: Box) -> Output:
        """The next output. A failure is raised: WorkerLost or EngineFailure where another attempt may help."""
        output = await box.get()
        if not isinstance(output, RequestFailed):
            return output
        self._failed[box.worker] = self._lives[box.worker]
        self._never_tried = box.never_tried
        if box.not_taken and not box.worker_died and not box.never_tried:
            await asyncio.sleep(_DEATH_TOLD_S)
        self._worker_died = box.worker_died
        if output.code is TritonCode.INVALID_ARG:
            raise InvalidRequest(output.message)
        if not output.retryable:  # the one thing that another worker doesn't help against
            raise DeadlineExceeded(output.message)
        raise (EngineFailure if output.code is TritonCode.INTERNAL else WorkerLost)(output.message)

    def _check_tokens(self, sampling: SamplingParams) -> SamplingParams:
        """Token ids within the vocabulary, at least one token, and a seed. Raises InvalidRequest."""
        size = self._house.tokenizer.vocab_size
        if not self._prompt_ids:
            raise InvalidRequest("the prompt is empty: give text_input, messages or input_ids with at least one token")
        named = {
            "input_ids": self._prompt_ids,
            "output_ids": self._output_ids,
            "logit_bias": sampling.logit_bias,
        }
        for field, ids in named.items():
            if ids and not (min(ids) >= 0 and max(ids) < size):
                outside = next(token for token in ids if not 0 <= token < size)
                raise InvalidRequest(f"{field}: token id {outside} is not in the vocabulary of {size} tokens")
        # A stop token outside the vocabulary never comes. Triton clients send the end_id of their own default model.
        stops = tuple(token for token in sampling.stop_token_ids if token < size)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return msgspec.structs.replace(sampling, seed=seed, stop_token_ids=stops)

    # --- giving back ---

    def _move(self, event: Event) -> None:
        """Advance the lifecycle and give back what the new state does not hold."""
        for held in self._life.on(event):
            self._give_back(held)
        if self.ended:
            self._budget.leave()
            if self._decode_charge is not None:
                self._house.output_tokens.end()
        self._entry.state = self.state

    def _give_back(self, held: Held) -> None:
        calls = self._house.calls
        if held is Held.ADMISSION and self._place is not None:
            self._place.leave()
        elif held is Held.CHARGE:
            for charge in (self._decode_charge, self._prefill_charge):
                if charge is not None:
                    charge.undo()
        elif held is Held.PREFILL and self._prefill_leg is not None:
            calls.abort(*self._prefill_leg)
        elif held is Held.LOAN and self._loan is not None:
            calls.release(*self._loan, LeaseEnd.FETCHED)
            self._loan = None
        elif held is Held.LEASE and self._lease is not None:
            calls.release(*self._lease, self._lease_end)
        elif held is Held.DECODE and self._decode_leg is not None:
            calls.abort(*self._decode_leg)


def lease_end(report: KVReport) -> LeaseEnd:
    """What a decode worker's report means for the lease of the KV it was handed."""
    if report.received_tokens + report.reused_tokens:
        return LeaseEnd.FETCHED
    return LeaseEnd.LOST if report.digest == RefusalReason.TRANSFER_TIMEOUT.value else LeaseEnd.UNWANTED


def _outcome(error: BatonError) -> Outcome:
    if isinstance(error, Cancelled):
        return Outcome.CANCELLED
    return Outcome.REFUSED if isinstance(error, InvalidRequest | QueueFull) else Outcome.FAILED
