"""Jobs through TensorRT-LLM: who is let in, what is asked of it, and what its answers mean.

Everything here runs on the engine's event loop; nothing waits but the task that follows each leg. Rules that keep a
worker alive, all learnt from what is known to go wrong in TensorRT-LLM 1.1 and 1.2:

- A leg is let in only when its blocks fit beside all others', so that what then stays silent is stuck and not queueing.
- A prefill worker holds so many handoffs and no more; further prompts wait here, where aborts and deadlines reach them.
- A generation leg is never aborted before its first output: the abort waits until its KV has landed.
- The first output of a handoff has a deadline; after it, or after any refusal, the prompt is computed here.
- KV that nobody fetched is dropped by TensorRT-LLM only when it schedules something: so it is given something.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from python_backends.core.errors import HandoffRefused, InvalidRequest, RefusalReason, TritonCode
from python_backends.core.messages import KVReady, Output, PrefillDone, RequestFailed, TokenChunk
from python_backends.core.types import (
    FinishReason,
    GenerateRequest,
    KVReport,
    LeaseEnd,
    RequestId,
    SamplingParams,
    WorkerLoad,
)
from python_backends.engines.trtllm import answers
from python_backends.engines.trtllm.block_events import BlockEvents
from python_backends.engines.trtllm.jobs import Job, Kind, Leg
from python_backends.engines.trtllm.limits import Limits
from python_backends.engines.trtllm.loaded import Loaded
from python_backends.engines.trtllm.published import Published
from python_backends.engines.trtllm.sampling import check_sampling, sampling_arguments
from python_backends.engines.trtllm.tickets import Tickets
from python_backends.engines.trtllm.watchdog import Watchdog

log = logging.getLogger(__name__)

_REMEMBERED_ABORTS = 10_000  # aborts that overtook their request
_ABORT_GRACE_S = 2.0  # an aborted leg that does not end in this time is no longer followed
_NUDGE = SamplingParams(max_tokens=1, temperature=0, seed=0)
_NUDGE_SALT = "baton nudge"
_NUDGE_TOKENS = [1]


class Dispatcher:
    def __init__(
        self,
        loaded: Loaded,
        limits: Limits,
        tickets: Tickets,
        events: BlockEvents,
        watchdog: Watchdog,
        output: Callable[[Output], None],
    ) -> None:
        self._llm = loaded.llm
        self._library = loaded.library
        self._info = loaded.info
        self._eos_token_ids = loaded.eos_token_ids
        self._limits = limits
        self._tickets = tickets
        self._events = events
        self._watchdog = watchdog
        self._output = output
        self._waiting: list[Job] = []
        self._jobs: dict[RequestId, Job] = {}  # all that are not ended, waiting ones too
        self._legs: set[Leg] = set()
        self._published = Published(limits.keep_s)
        self._aborted: OrderedDict[RequestId, None] = OrderedDict()
        self._arrivals = 0
        self._nudged: list[str] = []  # overdue leases that the running nudge makes TensorRT-LLM drop
        self._busy_s = 0.0
        self._computing_since: float | None = None  # monotonic, s: the last look at it, if it computed then

    @property
    def busy(self) -> bool:
        """Whether there is anything to look after."""
        return bool(self._jobs or self._legs or len(self._published))

    @property
    def computing(self) -> bool:
        return bool(self._legs)

    def load(self) -> WorkerLoad:
        """Blocks are counted as this worker gives them out: TensorRT-LLM doesn't tell which of its own are free."""
        computing = [leg.job for leg in self._legs if leg.job is not None and not leg.heard and not leg.in_transit]
        decoding = [leg.job for leg in self._legs if leg.job is not None and not leg.job.prefill_only]
        held = self._held_blocks()
        total = max(self._limits.total_blocks, held)
        return WorkerLoad(
            queued_requests=len(self._waiting),
            queued_tokens=sum(len(job.token_ids) for job in (*self._waiting, *computing)),
            running_requests=len(self._jobs) - len(self._waiting),
            output_tokens=sum(job.max_new for job in decoding),
            free_blocks=total - held,
            held_blocks=held,
            total_blocks=total,
            active_leases=len(self._published),
            busy_s=self._look_busy(),
        )

    def _look_busy(self) -> float:
        """Seconds in which it has computed. TensorRT-LLM tells no steps: what is so at one look is so until the next."""
        now = time.monotonic()
        if self._computing_since is not None:
            self._busy_s += now - self._computing_since
        self._computing_since = now if any(not leg.in_transit for leg in self._legs) else None
        return self._busy_s

    # --- what the router asks ---

    def arrive(self, request: GenerateRequest, ticket: bytes | None, *, prefill_only: bool) -> None:
        if request.request_id in self._aborted:
            del self._aborted[request.request_id]
            return
        refusal = self._refusal(request)
        if refusal is not None:
            self._output(RequestFailed(request.request_id, *refusal))
            return
        self._arrivals += 1
        left = request.sampling.max_tokens - len(request.output_ids)
        max_new = min(left, self._info.max_context - request.num_tokens)
        job = Job(request, prefill_only, self._arrivals, time.monotonic(), max_new)
        self._jobs[job.id] = job
        if ticket is not None:
            self._read_ticket(job, ticket)
        self._wait(job)
        self.admit()

    def abort(self, request_id: RequestId) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)
            self.admit()
        elif not self._published.is_of(request_id):  # published KV is dropped by TensorRT-LLM in its time
            self._aborted[request_id] = None
            if len(self._aborted) > _REMEMBERED_ABORTS:
                self._aborted.popitem(last=False)

    def release(self, lease_id: str, end: LeaseEnd) -> None:
        if end is LeaseEnd.FETCHED:
            self._published.fetched(lease_id)
            self._watchdog.handoff_arrived()
            self.admit()
        elif end is LeaseEnd.LOST:
            self._watchdog.handoff_failed(self._published.since(lease_id))

    def fail_all(self, code: TritonCode, why: str) -> None:
        """Answer every job; another worker may help."""
        for job in list(self._jobs.values()):
            self._fail(job, code, why)

    def tick(self) -> None:
        """Called a few times a second while busy."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.request.deadline <= now]:
            self._end(job)
            self._output(RequestFailed(job.id, TritonCode.UNAVAILABLE, "the request's deadline passed", False))
        self._nudge()
        self.admit()

    # --- arriving ---

    def _refusal(self, request: GenerateRequest) -> tuple[TritonCode, str, bool] | None:
        """Why a request can't be taken: code, sentence, whether another worker may help."""
        name, fault = self._limits.worker, self._watchdog.fault()
        if fault:
            return TritonCode.UNAVAILABLE, f"worker {name} can't go on: {fault}", True
        if len(self._waiting) >= self._limits.max_queue:
            return TritonCode.UNAVAILABLE, f"the queue of worker {name} is full; try again later", True
        if not request.prompt_ids or request.num_tokens >= self._info.max_context:
            takes = f"worker {name} takes 1 to {self._info.max_context - 1}"
            return TritonCode.INVALID_ARG, f"the prompt has {request.num_tokens} tokens; {takes}", False
        try:
            check_sampling(request.sampling, self._eos_token_ids, self._library)
        except InvalidRequest as error:
            return TritonCode.INVALID_ARG, str(error), False
        return None

    def _read_ticket(self, job: Job, ticket: bytes) -> None:
        job.was_handed = True
        try:
            self._tickets.read(job, ticket)
        except HandoffRefused as refused:
            self._refused(job, refused)

    def _refused(self, job: Job, refused: HandoffRefused) -> None:
        """No KV comes: the prompt is computed here. The lease can end."""
        log.warning("request %s: handoff refused, recomputing: %s", job.id, refused)
        job.handoff = job.params = None
        job.verdict = refused.reason.value
        self._output(KVReady(job.id, job.lease_id, self._report(job)))

    def _wait(self, job: Job) -> None:
        self._waiting.append(job)
        self._waiting.sort(key=lambda waiting: waiting.order)

    # --- letting in ---

    def admit(self) -> None:
        """Give jobs to TensorRT-LLM, in order, as far as it has room for them."""
        while self._waiting and self._has_room(self._waiting[0]):
            job = self._waiting.pop(0)
            if job.handoff is not None and time.time() >= job.handoff.expires_at:
                self._refused(job, HandoffRefused(RefusalReason.EXPIRED, "the lease ended while the request waited"))
            self._begin(job)
        self._watch()

    def _has_room(self, job: Job) -> bool:
        needed, held = self._blocks(job), self._held_blocks()
        if self._kind(job) is Kind.CONTEXT:
            making = [leg.num_blocks for leg in self._legs if leg.kind is Kind.CONTEXT]
            count, blocks = len(making) + len(self._published), sum(making) + self._published.num_blocks
            if not self._limits.allows_handoff(count, blocks, needed):
                return False
        return len(self._legs) < self._limits.max_batch and self._limits.fits(needed, held)

    def _kind(self, job: Job) -> Kind:
        if not job.prefill_only:
            return Kind.GENERATION if job.handoff is not None else Kind.PLAIN
        # Whoever wants one token gets no decode worker: its KV would wait for nobody.
        wanted = job.request.sampling.logprobs is None or self._tickets.carry_logprobs
        return Kind.CONTEXT if job.max_new > 1 and wanted else Kind.PLAIN

    def _blocks(self, job: Job) -> int:
        """Of TensorRT-LLM's pool, at most."""
        return self._info.layout.blocks_for(len(job.token_ids) + (1 if job.prefill_only else job.max_new))

    def _held_blocks(self) -> int:
        return sum(leg.num_blocks for leg in self._legs) + self._published.num_blocks

    # --- legs ---

    def _begin(self, job: Job) -> None:
        kind = self._kind(job)
        generation = kind is Kind.GENERATION
        leg = Leg(kind, job, not job.prefill_only, self._blocks(job), time.monotonic(), num_skipped=int(generation))
        job.leg = leg
        tokens = job.token_ids[:-1] if generation else job.token_ids  # the last one is the context's first output
        done = len(job.request.output_ids) - (1 if generation else 0)
        max_new = 1 if job.prefill_only else job.max_new + (1 if generation else 0)
        sampling = sampling_arguments(job.request.sampling, self._eos_token_ids, done, max_new, perf_metrics=not generation)
        self._submit(leg, tokens, sampling, self._params(job, kind), job.request.salt)
        if generation and leg in self._legs:
            asyncio.get_running_loop().call_later(self._limits.first_output_s, self._first_output_due, leg)

    def _params(self, job: Job, kind: Kind) -> Any:
        return {Kind.PLAIN: lambda: None, Kind.GENERATION: lambda: job.params, Kind.CONTEXT: self._tickets.context_params}[
            kind
        ]()

    def _submit(self, leg: Leg, token_ids: list[int], sampling: dict[str, Any], params: Any, salt: str) -> None:
        """What generate_async raises concerns this request: nothing was begun yet. A dead LLM raises for each."""
        self._events.expect(token_ids, salt)
        try:
            leg.result = self._llm.generate_async(
                token_ids,
                sampling_params=self._library.sampling_params(**sampling),
                streaming=leg.streaming,
                disaggregated_params=params,
                **({"cache_salt": salt} if salt else {}),
            )
        except Exception as error:  # NVIDIA lists none; the first three are about what was asked
            if not isinstance(error, (ValueError, TypeError, self._library.request_error)):
                self._watchdog.rejected(f"{type(error).__name__}: {error}")
            self._leg_failed(leg, error)
            return
        self._legs.add(leg)
        leg.task = asyncio.get_running_loop().create_task(self._follow(leg))

    async def _follow(self, leg: Leg) -> None:
        """Until TensorRT-LLM is done with the leg. Whoever waited for it and has heard no end is told of the failure."""
        try:
            if leg.streaming:
                async for _ in leg.result:
                    self._hear(leg)
            else:
                await leg.result
                self._hear(leg)
        except self._library.request_error as error:
            self._leg_failed(leg, error)
        except Exception as error:  # anything that isn't one request's failure: the engine is not to be trusted any more
            log.exception("TensorRT-LLM failed")
            self._watchdog.broken(f"TensorRT-LLM failed: {type(error).__name__}: {error}")
            self.fail_all(TritonCode.INTERNAL, f"worker {self._limits.worker}: TensorRT-LLM failed")
        finally:
            self._leg_ended(leg)

    def _leg_ended(self, leg: Leg) -> None:
        self._legs.discard(leg)
        if leg.job is not None and leg.job.leg is leg:
            self._fail(leg.job, TritonCode.INTERNAL, f"worker {self._limits.worker}: the request ended without a reason")
        self.admit()

    def _leg_failed(self, leg: Leg, error: Exception) -> None:
        job = leg.job
        if job is None:
            return
        if leg.in_transit:
            self._recompute(leg, job, HandoffRefused(RefusalReason.TRANSFER_FAILED, str(error)))
        else:
            self._fail(job, TritonCode.INTERNAL, f"worker {self._limits.worker}: {error}")

    def _first_output_due(self, leg: Leg) -> None:
        if leg.heard or leg.job is None or leg not in self._legs:
            return
        seconds = f"{self._limits.first_output_s:g} s (engine.trtllm.first_output_s)"
        self._lost(leg, leg.job, f"no output within {seconds}")

    def _lost(self, leg: Leg, job: Job, why: str) -> None:
        """Its KV did not arrive in time."""
        self._watchdog.handoff_failed(job.arrived)
        self._recompute(leg, job, HandoffRefused(RefusalReason.TRANSFER_TIMEOUT, why))

    def _recompute(self, leg: Leg, job: Job, refused: HandoffRefused) -> None:
        """The leg is left to itself; the job goes on in another, first in line."""
        self._leave(leg)
        job.leg = None
        self._refused(job, refused)
        self._waiting.insert(0, job)
        self.admit()

    def _leave(self, leg: Leg) -> None:
        """Nobody waits for the leg any more. It is aborted as soon as that is safe."""
        leg.job = None
        if not leg.in_transit:
            self._abort_leg(leg)

    def _abort_leg(self, leg: Leg) -> None:
        if not leg.aborted and leg in self._legs:
            leg.aborted = True
            try:
                leg.result.abort()
            except Exception as error:  # of an engine that is going down
                log.warning("abort failed: %s", error)
            if leg.task is not None:
                asyncio.get_running_loop().call_later(_ABORT_GRACE_S, leg.task.cancel)

    # --- what TensorRT-LLM says ---

    def _hear(self, leg: Leg) -> None:
        self._watchdog.heard()
        first, leg.heard = not leg.heard, True
        output = leg.result.outputs[0]
        if leg.kind is Kind.GENERATION and first and output.finish_reason not in answers.GIVEN_UP:
            self._watchdog.handoff_arrived()
        if leg.job is None:
            self._hear_unwanted(leg, output)
            return
        try:
            if leg.job.prefill_only:
                self._prefilled(leg, leg.job, output)
            else:
                self._produced(leg, leg.job, output, first)
        except Exception as error:  # a surprise in one answer must not take the others down
            log.exception("request %s: an answer of TensorRT-LLM is not understood", leg.job and leg.job.id)
            if leg.job is not None:
                self._fail(leg.job, TritonCode.INTERNAL, f"worker {self._limits.worker}: {type(error).__name__}: {error}")

    def _hear_unwanted(self, leg: Leg, output: Any) -> None:
        """Its KV has landed (generation) or is being kept for nobody (context)."""
        if leg.kind is Kind.CONTEXT and output.disaggregated_params is not None:
            self._keep_for_nobody(leg)
        elif not leg.result.finished:
            self._abort_leg(leg)

    def _prefilled(self, leg: Leg, job: Job, output: Any) -> None:
        if output.finish_reason in answers.GIVEN_UP:
            self._fail(job, TritonCode.INTERNAL, f"worker {self._limits.worker}: prefill ended: {output.finish_reason}")
            return
        finish = FinishReason.STOP if output.finish_reason == "stop" else FinishReason.LENGTH if job.max_new == 1 else None
        token_ids = answers.tokens(output, finish, self._eos_token_ids)[:1]
        logprobs = answers.logprobs(output, 0, token_ids, job.request.sampling.logprobs)
        ticket = lease_id = None
        if finish is None:
            ticket, lease_id = self._publish(leg, job, output.disaggregated_params)
        elif output.disaggregated_params is not None:
            self._keep_for_nobody(leg)
        reused = self._reused(job, output)
        self._output(
            PrefillDone(
                request_id=job.id,
                token_id=token_ids[0],
                logprob=logprobs[0] if logprobs else None,
                finish_reason=finish,
                ticket=ticket,
                lease_id=lease_id,
                reused_tokens=reused,
                computed_tokens=len(job.token_ids) - reused,
                compute_ms=(time.monotonic() - leg.began) * 1e3,
            )
        )
        self._end(job)

    def _reused(self, job: Job, output: Any) -> int:
        """Prefix hit of a prompt that was computed here, tokens."""
        reused = answers.reused_tokens(output, len(job.token_ids), self._info.layout.block_size)
        self._events.found(job.token_ids[:reused], job.request.salt)
        return reused

    def _publish(self, leg: Leg, job: Job, params: Any) -> tuple[bytes, str | None]:
        """(ticket, lease id). Without KV to hand over there is a ticket that says so, and no lease."""
        if leg.kind is Kind.PLAIN:
            return self._tickets.make(job, None)[0], None
        ticket, lease_id = self._tickets.make(job, params)
        self._published.add(lease_id, job.id, leg.num_blocks, time.monotonic())
        return ticket, lease_id

    def _keep_for_nobody(self, leg: Leg) -> None:
        self._published.add(f"orphan {id(leg)} {leg.began}", RequestId(""), leg.num_blocks, time.monotonic())

    def _produced(self, leg: Leg, job: Job, output: Any, first: bool) -> None:
        """A piece of a stream. `output` is cumulative."""
        finished = bool(leg.result.finished)
        if finished and output.finish_reason in answers.GIVEN_UP:
            self._ended_early(leg, job, output.finish_reason, first)
            return
        if first:
            self._first_output(leg, job)
        finish = answers.finish_reason(output) if finished else None
        if finished and leg.kind is Kind.PLAIN:
            job.reused_tokens = self._reused(job, output)
        start = leg.num_skipped + leg.num_sent
        new = answers.tokens(output, finish, self._eos_token_ids)[start:]
        told = len(job.request.output_ids) + leg.num_sent
        leg.num_sent += len(new)
        if new or finish:
            logprobs = answers.logprobs(output, start, new, job.request.sampling.logprobs)
            self._output(TokenChunk(job.id, new, told, logprobs, finish, self._report(job) if finish else None))
        if finish:
            self._end(job)

    def _first_output(self, leg: Leg, job: Job) -> None:
        passed_ms = (time.monotonic() - leg.began) * 1e3
        if leg.kind is Kind.GENERATION:
            job.received_tokens, job.transfer_ms, job.verdict = len(job.token_ids) - 1, passed_ms, "unchecked"
            self._output(KVReady(job.id, job.lease_id, self._report(job)))
        else:
            job.compute_ms = passed_ms

    def _ended_early(self, leg: Leg, job: Job, reason: str, first: bool) -> None:
        """TensorRT-LLM gave the request up by itself: a transfer that took too long, for example."""
        if leg.kind is Kind.GENERATION and first:
            self._lost(leg, job, f"TensorRT-LLM says: {reason}")
        else:
            self._fail(job, TritonCode.INTERNAL, f"worker {self._limits.worker}: TensorRT-LLM ended the request: {reason}")

    def _report(self, job: Job) -> KVReport:
        """TensorRT-LLM tells neither bytes nor digests of what it moves."""
        computed = 0 if job.received_tokens else len(job.token_ids) - 1 - job.reused_tokens
        return KVReport(
            reused_tokens=job.reused_tokens,
            received_tokens=job.received_tokens,
            recomputed_tokens=computed if job.was_handed else 0,
            computed_tokens=0 if job.was_handed else computed,
            transfer_ms=job.transfer_ms,
            compute_ms=job.compute_ms,
            digest=job.verdict,
            transport=self._tickets.backend if job.was_handed else "",
        )

    # --- ending ---

    def _fail(self, job: Job, code: TritonCode, why: str) -> None:
        self._end(job)
        self._output(RequestFailed(job.id, code, why, True))

    def _end(self, job: Job) -> None:
        """Forget the job; its leg is left behind."""
        self._jobs.pop(job.id, None)
        if job in self._waiting:
            self._waiting.remove(job)
        if job.leg is not None:
            leg, job.leg = job.leg, None
            finished = leg.result is not None and leg.result.finished
            leg.job = None
            if not finished and leg.result is not None:
                self._leave(leg)

    def _nudge(self) -> None:
        """Give TensorRT-LLM one token of work when it has KV to drop that nobody fetched."""
        overdue = self._published.overdue(time.monotonic())
        if not overdue or self._nudged:
            return
        self._nudged = overdue
        leg = Leg(Kind.PLAIN, None, False, 1, time.monotonic())
        self._submit(leg, _NUDGE_TOKENS, sampling_arguments(_NUDGE, (), 0, 1, perf_metrics=False), None, _NUDGE_SALT)
        if leg.task is None:
            self._nudge_ended()
        else:
            leg.task.add_done_callback(lambda _: self._nudge_ended())

    def _nudge_ended(self) -> None:
        self._published.drop(self._nudged)
        self._nudged = []
        self.admit()

    # --- watching ---

    def _watch(self) -> None:
        """Tell the watchdog what runs. Legs that were left in transit are not expected to say anything any more."""
        expected = [leg for leg in self._legs if leg.job is not None]
        streams = sum(leg.heard for leg in expected)
        self._watchdog.running(streams, len(expected) - streams)
        now = time.monotonic()
        lost = [
            leg for leg in self._legs if leg.job is None and leg.in_transit and now - leg.began > self._limits.first_output_s
        ]
        if lost and self._limits.too_much_is_lost(len(lost), sum(leg.num_blocks for leg in lost)):
            self._watchdog.broken(f"{len(lost)} requests whose KV never arrived hold too much of it")
