"""One request on its way: its tokens, its lifecycle, what it holds, and the account of what happened to it.

`serve.py` tells the story; this file does the single steps. Whatever the lifecycle says to give back is given back in one
place, `_move`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

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
    WorkerLost,
)
from python_backends.core.messages import DecodeWork, KVReady, Output, PrefillDone, PrefillWork, RequestFailed, TokenChunk
from python_backends.core.types import FinishReason, GenerateRequest, KVReport, LeaseEnd, RequestId, SamplingParams, WorkerId
from router.account import Account
from router.admission import Place
from router.detokenizer import Detokenizer
from router.fleet import Charge
from router.house import House
from router.journal import Entry
from router.lifecycle import Event, Held, Lifecycle, State
from router.mailroom import Box
from router.seams import Reply
from router.types import ClientRequest, Outcome, Piece, RouteDecision, Wish

log = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.05  # doubled with every attempt, when there is no other worker to try


class Run:
    """Belongs to the event loop. `interrupt` ends it from outside, `serve` drives it."""

    def __init__(self, request: ClientRequest, reply: Reply, house: House, arrival: float) -> None:
        """arrival: monotonic, s."""
        self._request = request
        self._reply = reply
        self._house = house
        self._id = house.new_request_id()
        self._life = Lifecycle()
        self._attempts = 0
        self._avoid: set[WorkerId] = set()
        self._prompt_ids: list[int] = []
        self._output_ids: list[int] = [*request.output_ids]
        self._cumulative_logprob = 0.0
        self._sampling = request.sampling
        self._account = Account(arrival)
        self._entry = Entry(self._id, request, arrival)
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
        self._place.queue(len(self._prompt_ids))
        self._text = Detokenizer(self._house.tokenizer, self._sampling.stop, self._sampling.min_tokens, self._prompt_ids)
        self._text.push(self._output_ids)  # the client has this text

    async def route(self) -> RouteDecision:
        """Choose where this attempt goes. Raises Unavailable, or InvalidRequest when the prompt is too long for all."""
        self._attempts += 1
        wish = self._request.wish or Wish(self._house.config.mode)
        tokens = self._prompt_ids + self._output_ids
        decision = await self._house.decide(tokens, self._request.salt, wish, self._avoid)
        if not self._avoid.isdisjoint({decision.prefill, decision.decode}):
            # There is only the worker that failed just now: one that is being loaded or restarted needs a moment.
            await asyncio.sleep(_RETRY_PAUSE_S * 2**self._attempts)
            decision = await self._house.decide(tokens, self._request.salt, wish, self._avoid)
        self._account.routed(decision, self._attempts)
        self._entry.routed(decision)
        fleet = self._house.fleet
        self._decode_charge = fleet.charge(decision.decode, 0 if decision.prefill else decision.prefill_tokens)
        self._prefill_charge = fleet.charge(decision.prefill, decision.prefill_tokens) if decision.prefill else None
        self._move(Event.ROUTE)
        return decision

    async def borrow(self, lender: WorkerId) -> bytes | None:
        """Have another worker lend what it has cached of the prompt. Returns the ticket, if it does so in time."""
        lent = await self._house.borrow(lender, self._prompt_ids + self._output_ids, self._request.salt)
        if lent is None or lent.lease_id is None:
            return None
        self._loan = (lender, lent.lease_id)
        return lent.ticket

    async def prefill(self, worker: WorkerId, loan: bytes | None = None) -> bytes | None:
        """Have the prompt computed, send the first token to the client. Returns the ticket for the KV."""
        request = self._generate_request("p")
        with self._house.mailroom.box(request.request_id, worker) as box:
            self._prefill_leg = (worker, request.request_id)
            self._house.calls.submit(worker, PrefillWork(request, loan))
            self._move(Event.PREFILL)
            while not isinstance(done := await self._next(box), PrefillDone):
                self._give_back(Held.LOAN)  # KVReady: the lender's blocks are fetched
        if self._prefill_charge is not None:
            self._prefill_charge.undo()
        self._lease = (worker, done.lease_id) if done.lease_id is not None else None
        self._lease_end = LeaseEnd.UNWANTED
        self._account.prefilled(done)
        logprobs = [done.logprob] if done.logprob else None
        self._take(TokenChunk(done.request_id, [done.token_id], len(self._output_ids), logprobs, done.finish_reason))
        return done.ticket

    async def decode(self, worker: WorkerId, ticket: bytes | None) -> None:
        """Hand over, if there is a ticket, and relay tokens to the client until the last one."""
        if not self._house.fleet.is_up(worker):  # since the route was chosen; nobody would tell the box
            raise WorkerLost(f"worker {worker} was lost before its turn")
        request = self._generate_request("d")
        with self._house.mailroom.box(request.request_id, worker) as box:
            self._decode_leg = (worker, request.request_id)
            self._house.calls.submit(worker, DecodeWork(request, ticket))
            self._move(Event.DECODE if ticket is None else Event.HAND_OFF)
            while not self.ended:
                output = await self._next(box)
                if isinstance(output, KVReady):
                    self._kv_ready(output.report)
                elif isinstance(output, TokenChunk) and self._is_next(output):
                    self._take(output)

    def retry(self, error: BatonError) -> None:
        """After a failed attempt: another one. Raises the error when the attempts are used up."""
        self._entry.failed_attempt(str(error))
        if self._attempts >= self._house.config.max_attempts:
            raise error
        log.warning("request %s: attempt %d failed (%s); trying again", self._id, self._attempts, error)
        self._house.observer.retried()
        self._move(Event.WORKER_LOST)

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
        self._output_ids += chunk.token_ids
        self._account.tokens(len(self._output_ids), chunk.report)
        gap_s = self._entry.tokens(len(chunk.token_ids))
        if gap_s:
            self._house.observer.tokens(len(chunk.token_ids), gap_s)
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

    def _kv_ready(self, report: KVReport) -> None:
        self._account.kv_ready(report)
        self._lease_end = lease_end(report)
        if self.state is State.HANDING_OFF:
            self._move(Event.KV_READY)

    # --- workers ---

    def _generate_request(self, leg: str) -> GenerateRequest:
        """What this attempt asks of a worker: to continue after the tokens already sent, under an id never used before."""
        return GenerateRequest(
            request_id=RequestId(f"{self._id}.{self._attempts}{leg}"),
            prompt_ids=self._prompt_ids,
            output_ids=list(self._output_ids),
            sampling=self._sampling,
            deadline=time.time() + self.deadline - time.monotonic(),
            salt=self._request.salt,
            priority=self._request.priority,
        )

    async def _next(self, box: Box) -> Output:
        """The next output. A failure is raised: WorkerLost or EngineFailure where another attempt may help."""
        output = await box.get()
        if not isinstance(output, RequestFailed):
            return output
        self._avoid.add(box.worker)
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
            "stop_token_ids": sampling.stop_token_ids,
        }
        for field, ids in named.items():
            outside = next((token for token in ids if not 0 <= token < size), None)
            if outside is not None:
                raise InvalidRequest(f"{field}: token id {outside} is not in the vocabulary of {size} tokens")
        return sampling if sampling.seed is not None else msgspec.structs.replace(sampling, seed=secrets.randbits(64))

    # --- giving back ---

    def _move(self, event: Event) -> None:
        """Advance the lifecycle and give back what the new state does not hold."""
        for held in self._life.on(event):
            self._give_back(held)
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
