"""The paged engine: one thread that takes requests, schedules steps, runs the model, publishes and fetches KV.

All state - pool, scheduler, leases, sequences - belongs to that thread. Other threads only put calls into its inbox.
Transfers and reads from the stores run on their own small pools of threads, so that a slow or hanging one never delays a
running stream; what they write into stays owned by the sequence until they have returned.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import msgspec

from python_backends.core.block_hash import chain_root
from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import BatonError, ConfigError, EngineFailure, HandoffRefused, RefusalReason, TritonCode
from python_backends.core.handoff import KVHandoff, seal
from python_backends.core.messages import Followed, KVReady, Lent, Output, PrefillDone, RequestFailed, StepSample, TokenChunk
from python_backends.core.types import (
    BlockHash,
    Epoch,
    FinishReason,
    GenerateRequest,
    KVReport,
    LeaseEnd,
    PrefixReport,
    RequestId,
    Role,
    StoreCounts,
    WorkerId,
    WorkerLoad,
)
from python_backends.engines.base import CacheChange, EngineInfo, OnOutputs
from python_backends.engines.paged.calibration import calibrate
from python_backends.engines.paged.fetches import Fetches
from python_backends.engines.paged.guide import Guide, Guides
from python_backends.engines.paged.publishing import Publisher
from python_backends.engines.paged.runner import Draw, ModelRunner, Sampled, Slice
from python_backends.engines.paged.scheduler import Scheduler
from python_backends.engines.paged.sequence import Sequence
from python_backends.engines.paged.speculation import StepCost
from python_backends.engines.paged.step_limit import StepLimit
from python_backends.engines.paged.store_feed import StoreFeed
from python_backends.engines.paged.store_loads import StoreLoads
from python_backends.engines.paged.tickets import TicketDesk
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store import create_stores
from python_backends.kv.store.pace import Pace
from python_backends.kv.store.stores import Loaded, Stores
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.base import Fetched

log = logging.getLogger(__name__)

_REMEMBERED_ABORTS = 10_000  # aborts that overtook their request
_IDLE_WAKE_S = 0.25  # how often an idle engine looks at deadlines
_LEAST_PAUSE_S = 0.01  # between steps: others have to notice that they have the cores
_HANDED_LATELY_S = 5.0  # who was handed a stream is soon handed another
_UNTOLD_STEPS = 32  # steps kept for whoever asks how long they take


class PagedEngine:
    """Implements engines.base.Engine over any ModelRunner."""

    info: EngineInfo

    def __init__(self, deployment: Deployment, worker: WorkerConfig, runner: ModelRunner, epoch: Epoch, key: bytes) -> None:
        self._config = deployment.engine
        self._transfer = deployment.transfer
        self._store = deployment.store
        self._max_context = deployment.model.max_context
        self._pool_mib = worker.kv_pool_mib or deployment.engine.kv_pool_mib
        self._worker = WorkerId(worker.name)
        self._role = worker.role
        self._runner = runner
        self._epoch = epoch
        self._key = key
        self._transport = create_transport(deployment.transfer, key, deployment.cluster)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outputs: list[Output] = []
        self._aborted: OrderedDict[RequestId, None] = OrderedDict()
        self._step_cost = StepCost()
        self._arrivals = 0
        self._reset_events = True
        self._closing = False
        self._load = WorkerLoad()
        self._calibration: list[StepSample] = []
        self._itl_ms = 0.0 if self._role is Role.PREFILL else deployment.router.slo.itl_ms
        self._limit: StepLimit | None = None
        self._steps: deque[StepSample] = deque(maxlen=_UNTOLD_STEPS)
        self._step_s = 0.0  # that the last step took
        self._streams_since: float | None = None  # monotonic, s: end of the last step, if it had streams
        self._handed_until = 0.0  # monotonic, s: more are expected to be handed over
        self._spare_s = 0.0  # that the streams of the last step can wait for the next one
        self._busy_s = 0.0
        self._busy_since: float | None = None  # monotonic, s: end of the last step, if this one follows at once
        self._turned: float | None = None  # monotonic, s: the loop's last turn; None while it has nothing to do
        self._thread: threading.Thread | None = None
        self._guide_makers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._memory: PoolMemory | None = None
        self._compute_pace = Pace()  # prompt tokens
        self._loan_pace = Pace()  # bytes
        self._stores: Stores | None = None
        self._feed: StoreFeed | None = None
        self._loads: StoreLoads | None = None
        self._started = ExitStack()  # to be closed, of what `start` has made

    # --- the Engine contract -------------------------------------------------------------------------------------------

    def start(self, on_outputs: OnOutputs) -> None:
        self._runner.start()
        layout = self._runner.layout
        num_blocks = (self._pool_mib << 20) // layout.block_bytes
        if num_blocks < 2:
            raise ConfigError(
                f"engine.kv_pool_mib: {self._pool_mib} MiB holds {num_blocks} blocks of {layout.block_bytes} bytes; "
                f"give at least {2 * layout.block_bytes >> 20} MiB"
            )
        self._furnish(PoolMemory(num_blocks, layout.block_bytes, self._epoch), on_outputs)
        self._calibration = calibrate(self._runner, num_blocks, self._config, self.info.max_context)
        if self._itl_ms:
            self._limit = StepLimit(self._itl_ms, self._config.step_tokens, self._calibration)
            self._scheduler.limit_steps(self._limit.prompt_tokens)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _furnish(self, memory: PoolMemory, on_outputs: OnOutputs) -> None:
        """All that the engine's thread owns, on top of the started runner."""
        layout = self._runner.layout
        self._on_outputs = on_outputs
        self._memory = memory
        self._pool = BlockPool(memory.num_blocks, memory.generations)
        self._scheduler = Scheduler(self._pool, layout.block_size, self._config.max_batch, self._config.step_tokens)
        self._runner.attach(memory)
        self._transport.attach(memory, self._role)
        max_context = min(self._max_context or self._runner.max_positions, self._runner.max_positions)
        self.info = EngineInfo(
            layout=layout,
            fingerprint=self._runner.fingerprint,
            max_context=min(max_context, memory.num_blocks * layout.block_size),
            step_tokens=self._config.step_tokens,
            max_batch=self._config.max_batch,
            family=self._runner.fingerprint_of(layout.relatives(self._transfer.rounding)),
            cores=self._runner.cores,
        )
        self._guides = Guides(self._runner.tokenizer_path, self._runner.vocab_size, self._runner.eos_token_ids)
        self._open_to_others(memory)
        self._stores = create_stores(self._store, layout, self._runner.fingerprint, memory, self._key, self._compute_pace)
        if self._stores is not None:
            self._use(self._stores, memory)
        self._snapshot()

    def _open_to_others(self, memory: PoolMemory) -> None:
        """What other workers get from here, and what is taken from them."""
        layout = self.info.layout
        self._tickets = TicketDesk(self._worker, self._key, layout, self._transfer.rounding, self._runner.fingerprint_of)
        self._publisher = Publisher(
            self._worker,
            self._epoch,
            self.info,
            self._pool,
            memory,
            self._transport,
            self._runner.export_blocks,
            self._transfer.lease_s,
            call=self._inbox.put,
            ahead=self._role is Role.PREFILL,
        )
        self._started.callback(self._publisher.close)
        timeout_s = self._transfer.timeout_s
        self._fetches = Fetches(self._transport, memory, layout, timeout_s, self._inbox.put, self._end_fetch)
        self._started.callback(self._fetches.close)

    def _use(self, stores: Stores, memory: PoolMemory) -> None:
        early = self._store.fill == "publish"
        digest_of = (lambda block: None) if self._transport.on_device else self._pool.digest_of
        self._feed = StoreFeed(stores, self._pool, memory, self._runner.export_blocks, digest_of, early=early)
        self._loads = StoreLoads(stores, self._store, self._pool, self._inbox.put, self._end_load)
        self._started.callback(self._loads.close)

    def prefill(self, request: GenerateRequest) -> None:
        self._take_in(request, None, prefill_only=True)

    def decode(self, request: GenerateRequest, ticket: bytes | None) -> None:
        self._take_in(request, ticket, prefill_only=False)

    def abort(self, request_id: RequestId) -> None:
        self._inbox.put(partial(self._abort, request_id))

    def release(self, lease_id: str, end: LeaseEnd = LeaseEnd.UNWANTED) -> None:
        self._inbox.put(partial(self._release, lease_id))

    def resync(self) -> None:
        self._inbox.put(self._request_reset)

    def load(self) -> WorkerLoad:
        turned = self._turned
        standing_s = 0 if turned is None else int(time.monotonic() - turned)
        return msgspec.structs.replace(self._load, standing_s=standing_s) if standing_s else self._load

    # --- the Lender contract -------------------------------------------------------------------------------------------

    def lend(self, request_id: RequestId, hashes: Many[BlockHash]) -> None:
        self._inbox.put(partial(self._lend, request_id, hashes))

    def prefill_with(self, request: GenerateRequest, loan: bytes) -> None:
        self._take_in(request, loan, prefill_only=True)

    def follow(self, request: GenerateRequest, loan: bytes) -> None:
        self._inbox.put(partial(self._follow, request, loan))

    # --- the StoreReader contract --------------------------------------------------------------------------------------

    @property
    def node_place(self) -> str:
        return self._stores.node_place if self._stores is not None else ""

    def store_counts(self) -> dict[str, StoreCounts]:
        return self._stores.counts() if self._stores is not None else {}

    def locate(self, hashes: Many[BlockHash], on_located: Callable[[int], None]) -> None:
        if self._loads is not None:
            self._loads.locate(hashes, on_located)

    # --- the StepReporter contract -------------------------------------------------------------------------------------

    def calibration(self) -> list[StepSample]:
        return self._calibration

    def take_steps(self) -> list[StepSample]:
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._steps.popleft())
        return taken

    def close(self) -> None:
        if self._thread is not None:
            self._inbox.put(self._stop)
            self._thread.join(timeout=30)
            self._thread = None
        self._guide_makers.shutdown(wait=True, cancel_futures=True)
        self._started.close()
        self._transport.close()
        self._runner.close()
        if self._memory is not None:
            self._memory.close()

    # --- the loop ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        busy = False
        while not self._closing:
            busy = self._turn(wait=not busy)
        self._end_everything()

    def _turn(self, wait: bool) -> bool:
        """Take in what was asked for, end what is over, compute one batch. Returns whether there was anything to compute."""
        if wait:
            self._runner.rest()
        else:
            self._give_way()
        self._take_inbox(wait)
        self._end_overdue()
        joining = self._scheduler.admit()
        for sequence in joining:
            self._begin_fetch(sequence)
        if self._loads is not None:
            self._loads.prefetch(self._scheduler.waiting)
        self._deliver()  # what has ended or arrived does not wait for the step
        self._wait_for(joining)
        busy = self._step()
        self._snapshot()
        self._deliver()
        return busy

    def _give_way(self) -> None:
        """Let others have the cores as long as the streams are not late for it, or until something comes in."""
        if self._spare_s < _LEAST_PAUSE_S or not self._runner.are_cores_wanted():
            return
        self._runner.rest()
        self._busy_since = None
        with suppress(queue.Empty):
            self._inbox.get(timeout=self._spare_s)()

    def _wait_for(self, joining: Many[Sequence]) -> None:
        """Let streams wait a moment for those whose KV is on its way: mostly it takes less than the step that they would miss.

        So do prompts, if a stream is among those. They wait until they have lost as much time together as one that misses the
        step would. So the sum is at most twice what it could be if one knew how long the KV takes (Karlin et al., "Competitive
        Snoopy Caching", 1988).
        """
        waiting = len(self._scheduler.streams()) if joining else 0
        if not waiting and self._busy_since is not None:  # else the last step says nothing about the next one
            joining = [sequence for sequence in joining if sequence.was_handed]
            waiting = len(self._scheduler.running) if joining else 0
        if not waiting:
            return
        self._busy_since = None
        until = time.monotonic() + self._step_s / waiting
        while any(sequence.id in self._scheduler.fetching for sequence in joining):
            try:
                self._inbox.get(timeout=max(until - time.monotonic(), 0.0))()
            except queue.Empty:
                return
            self._deliver()

    def _take_inbox(self, wait: bool) -> None:
        """Run what other threads asked for; when there is nothing to compute, wait for it."""
        try:
            if wait:
                self._turned = None
                call = self._inbox.get(timeout=self._idle_timeout())
                self._turned = time.monotonic()
                call()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            self._turned = time.monotonic()

    def _idle_timeout(self) -> float | None:
        """Seconds until something may fall due; None (for ever) when nothing is here at all."""
        expiry = self._publisher.leases.next_expiry()
        if expiry is not None:
            return min(max(expiry - time.monotonic(), 0.0) + 0.01, _IDLE_WAKE_S)
        return _IDLE_WAKE_S if any(True for _ in self._scheduler.all()) else None

    def _step(self) -> bool:
        """Compute one batch. Returns whether there was anything to compute."""
        now = time.monotonic()
        began, self._busy_since = self._busy_since or now, None
        if self._limit is not None:
            self._limit.lost_ms = (began - self._streams_since) * 1e3 if self._streams_since is not None else 0.0
        batch = self._scheduler.schedule(expects_streams=now < self._handed_until)
        self._streams_since, self._spare_s = None, 0.0
        if not batch:
            return False
        for sequence, _ in batch:
            sequence.started = sequence.started or now
        shape = _shape(batch)
        streaming = [sequence for sequence, count in batch if sequence.num_uncomputed == count == 1]
        joined = [each for each in streaming if each.refusal == "verified" and not each.compute_ms]
        streams = len(streaming)
        marginal = self._step_cost.marginal(streams) if streams else 1.0
        most_drafts = self._most_drafts(shape)
        slices = [self._slice(sequence, count, marginal, most_drafts) for sequence, count in batch]
        try:
            results = self._runner.step(slices)
        except BatonError as error:
            self._fail_batch(batch, error)
        except Exception as error:  # the engine must outlive any one batch: torch raises RuntimeError, OOM and others
            log.exception("step failed")
            self._fail_batch(batch, error)
        else:
            prompt_tokens = sum(count for _, count in batch if count > 1)
            if prompt_tokens:
                self._compute_pace.measure(prompt_tokens, time.monotonic() - now)
            if streams == len(batch):
                self._step_cost.learn(sum(len(piece.token_ids) for piece in slices), time.monotonic() - now)
            got = sum(
                1 + len(s.following) for (each, _), s in zip(batch, results, strict=True) if s and each.num_uncomputed == 1
            )
            for (sequence, count), piece, sampled in zip(batch, slices, results, strict=True):
                self._advance(sequence, count, piece.drafts, sampled)
            self._busy_since = time.monotonic()
            self._step_s = self._busy_since - now
            self._streams_since = self._busy_since if self._scheduler.streams() else None
            self._busy_s += self._busy_since - began
            sample = StepSample(*shape, ms=(self._busy_since - began) * 1e3, decode_tokens=got)
            self._steps.append(sample)
            if self._limit is not None:
                waits = [self._joining_ms(each) for each in joined]
                self._limit.learn(sample, sum(piece.drafts for piece in slices), waits)
                if streams == len(batch) and not self._scheduler.waiting:
                    self._spare_s = self._limit.spare_ms(streams, shape[3]) / 1e3
        return True

    def _joining_ms(self, sequence: Sequence) -> float:
        """What a stream has waited that now has its first token here: for steps, and for its KV unless that took longer than
        one, and would be late whatever steps take."""
        assert self._busy_since is not None
        waited_ms = (sequence.queued_s + self._busy_since - sequence.fetched_at) * 1e3
        return waited_ms + (sequence.transfer_ms if sequence.transfer_ms < self._step_s * 1e3 else 0.0)

    def _most_drafts(self, shape: tuple[int, float, int, int]) -> int:
        """For each stream."""
        prompt_tokens, _, streams, context = shape
        most = self._config.draft_tokens
        if self._limit is not None and streams and most:
            most = min(most, self._limit.draft_tokens(streams, context, prompt_tokens) // streams)
        return most

    def _slice(self, sequence: Sequence, count: int, marginal: float, most_drafts: int) -> Slice:
        start = sequence.num_computed
        draw = self._draw(sequence) if count == sequence.num_uncomputed else None
        drafts = self._drafts(sequence, marginal, most_drafts) if draw is not None and count == 1 and _may_guess(draw) else []
        return Slice(
            token_ids=sequence.token_ids[start : start + count] + drafts,
            start=start,
            block_table=sequence.blocks,
            draw=draw,
            drafts=len(drafts),
        )

    def _drafts(self, sequence: Sequence, marginal: float, most: int) -> list[int]:
        """Guesses of the stream's next tokens but one: none that could go beyond its end, or where they don't pay."""
        left = min(sequence.request.sampling.max_tokens - sequence.num_output, self.info.max_context - len(sequence.token_ids))
        most = min(most, left - 1)
        if most <= 0 or sequence.prefill_only:
            return []
        drafts = sequence.drafts.propose(sequence.token_ids, most, marginal)
        return drafts[: self._scheduler.room_ahead(sequence, len(drafts))] if drafts else []

    def _draw(self, sequence: Sequence) -> Draw:
        sampling = sequence.request.sampling
        output_ids = sequence.output_ids
        stops: tuple[int, ...] = ()
        if len(output_ids) < sampling.min_tokens:
            stops = sampling.stop_token_ids if sampling.ignore_eos else (*self._runner.eos_token_ids, *sampling.stop_token_ids)
        allowed = None if sequence.guide is None else sequence.guide.allowed()
        return Draw(sampling, sequence.request.prompt_ids, output_ids, stops, allowed)

    def _advance(self, sequence: Sequence, count: int, drafts: int, sampled: Sampled | None) -> None:
        if sampled is None:
            self._scheduler.computed(sequence, count)
            return
        sequence.compute_ms = sequence.compute_ms or (time.monotonic() - sequence.started) * 1e3
        drawn: list[Sampled] = []
        finish: FinishReason | None = None
        for token in (sampled, *sampled.following):
            sequence.append(token.token_id)
            drawn.append(token)
            finish = sequence.finish_reason(self._runner.eos_token_ids, self.info.max_context)
            if finish:
                break
        self._scheduler.computed(sequence, count + len(drawn) - 1)
        if drafts:
            sequence.drafts.learn(drafts, len(sampled.following), len(sequence.token_ids))
        if sequence.prefill_only:
            self._finish_prefill(sequence, sampled, finish)
        else:
            report = self._report(sequence) if finish else None
            logprobs = [token.logprob for token in drawn if token.logprob] or None
            tokens = [token.token_id for token in drawn]
            start = sequence.num_output - len(drawn)
            self._outputs.append(TokenChunk(sequence.id, tokens, start, logprobs, finish, report))
            if finish:
                self._scheduler.remove(sequence)

    def _deliver(self) -> None:
        outputs, self._outputs = self._outputs, []
        change = self._cache_change()
        if outputs or change:
            self._on_outputs(outputs, change)

    def _cache_change(self) -> CacheChange | None:
        stored, removed = self._pool.take_changes()
        if self._feed is not None:
            self._feed.changed(stored, removed)
        if stored:
            self._publisher.stored(stored)
        if self._reset_events:
            self._reset_events = False
            return CacheChange(stored=list(self._pool.hashes()), removed=[], reset=True)
        if not stored and not removed:
            return None
        return CacheChange(stored=list(stored), removed=list(removed))

    def _snapshot(self) -> None:
        pool, scheduler = self._pool, self._scheduler
        self._load = WorkerLoad(
            queued_requests=len(scheduler.waiting) + len(scheduler.fetching),
            queued_tokens=sum(s.num_uncomputed for s in scheduler.all() if s.num_uncomputed > 1),
            running_requests=len(scheduler.running),
            output_tokens=sum(len(s.token_ids) - s.num_given for s in scheduler.running),
            free_blocks=pool.free_blocks,
            cached_blocks=pool.cached_blocks,
            held_blocks=pool.held_blocks,
            total_blocks=pool.total_blocks,
            active_leases=self._publisher.leases.active,
            busy_s=self._busy_s,
            step_ms=self._limit.step_ms if self._limit is not None else 0.0,
        )

    # --- arrivals and endings ------------------------------------------------------------------------------------------

    def _take_in(self, request: GenerateRequest, ticket: bytes | None, *, prefill_only: bool) -> None:
        """On the caller's thread. Reading a grammar may take long: requests that have one come in by way of a thread for it."""
        arrive = partial(self._arrive, request, ticket, prefill_only=prefill_only)
        if request.sampling.grammar is None:
            self._inbox.put(partial(arrive, None, time.monotonic()))
        else:
            self._guide_makers.submit(self._make_guide, request, arrive)

    def _make_guide(self, request: GenerateRequest, arrive: Callable[[Guide | BatonError, float], None]) -> None:
        made: Guide | BatonError
        try:
            made = self._guides.make(request.sampling.grammar or "", request.output_ids)
        except BatonError as error:
            made = error
        except Exception as error:  # a request must never be lost because a library has a bug
            log.exception("grammar failed")
            made = EngineFailure(f"worker {self._worker}: grammar: {error}")
        self._inbox.put(partial(arrive, made, time.monotonic()))

    def _arrive(
        self,
        request: GenerateRequest,
        ticket: bytes | None,
        guide: Guide | BatonError | None,
        since: float,
        *,
        prefill_only: bool,
    ) -> None:
        """since: monotonic, s, when this was put into the inbox."""
        if self._was_aborted(request.request_id):
            return
        if isinstance(guide, BatonError):
            self._outputs.append(RequestFailed(request.request_id, guide.code, str(guide), guide.retryable))
            return
        refusal = self._refusal(request)
        if refusal is not None:
            self._outputs.append(RequestFailed(request.request_id, *refusal))
            return
        sequence = self._sequence_of(request, prefill_only=prefill_only)
        sequence.guide, sequence.queued_s = guide, time.monotonic() - since
        if self._feed is not None:
            sequence.seeks_store = True
            self._feed.reused(sequence.hashes[: self._pool.match(sequence.reusable_hashes())])
        if ticket is not None and prefill_only:
            self._read_loan(sequence, ticket)
        elif ticket is not None:
            self._read_ticket(sequence, ticket)
        self._scheduler.add(sequence)

    def _was_aborted(self, request_id: RequestId) -> bool:
        """Whether an abort has overtaken the request."""
        if request_id not in self._aborted:
            return False
        del self._aborted[request_id]
        return True

    def _sequence_of(self, request: GenerateRequest, *, prefill_only: bool) -> Sequence:
        self._arrivals += 1
        root = chain_root(self.info.fingerprint, request.salt)
        return Sequence(request, prefill_only, self._arrivals, self.info.layout.block_size, root)

    def _refusal(self, request: GenerateRequest) -> tuple[TritonCode, str, bool] | None:
        """Why a request can't be taken: code, sentence, whether another worker may help."""
        if len(self._scheduler.waiting) >= self._config.max_queue:
            return TritonCode.UNAVAILABLE, f"the queue of worker {self._worker} is full; try again later", True
        if not request.prompt_ids or request.num_tokens >= self.info.max_context:
            return (
                TritonCode.INVALID_ARG,
                f"the prompt has {request.num_tokens} tokens; worker {self._worker} takes 1 to {self.info.max_context - 1}",
                False,
            )
        return None

    def _abort(self, request_id: RequestId) -> None:
        sequence = self._scheduler.find(request_id)
        if sequence is None:
            if not self._publisher.leases.release_request(request_id):
                self._aborted[request_id] = None
                if len(self._aborted) > _REMEMBERED_ABORTS:
                    self._aborted.popitem(last=False)
        elif request_id in self._scheduler.fetching:
            if sequence.transfer is not None and sequence.transfer.cancel():  # it had not begun
                self._scheduler.drop_fetching(sequence)
            else:
                sequence.doomed = True
        else:
            self._scheduler.remove(sequence)

    def _release(self, lease_id: str) -> None:
        self._publisher.leases.release(lease_id)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        self._publisher.leases.expire(now)
        for sequence in [s for s in self._scheduler.all() if s.request.deadline <= now and not s.doomed]:
            self._abort(sequence.id)
            self._outputs.append(RequestFailed(sequence.id, TritonCode.UNAVAILABLE, "the request's deadline passed", False))
        self._tickets.forget_expired(time.time())

    def _fail_batch(self, batch: list[tuple[Sequence, int]], error: Exception) -> None:
        code = error.code if isinstance(error, BatonError) else TritonCode.INTERNAL
        for sequence, _ in batch:
            self._scheduler.remove(sequence)
            self._outputs.append(RequestFailed(sequence.id, code, f"worker {self._worker}: {error}", True))

    def _request_reset(self) -> None:
        self._reset_events = True

    def _stop(self) -> None:
        self._closing = True

    def _end_everything(self) -> None:
        for sequence in [sequence for sequence in self._scheduler.all() if not sequence.doomed]:  # nobody waits for those
            self._outputs.append(
                RequestFailed(sequence.id, TritonCode.UNAVAILABLE, f"worker {self._worker} is shutting down", True)
            )
        self._publisher.leases.close()
        self._deliver()

    # --- prefill: publish ----------------------------------------------------------------------------------------------

    def _finish_prefill(self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None) -> None:
        handoff = None if finish else self._publisher.publish(sequence)
        self._scheduler.remove(sequence)
        self._outputs.append(
            PrefillDone(
                request_id=sequence.id,
                token_id=sampled.token_id,
                logprob=sampled.logprob,
                finish_reason=finish,
                ticket=seal(handoff, self._key) if handoff else None,
                lease_id=handoff.lease_id if handoff else None,
                reused_tokens=sequence.reused_tokens,
                computed_tokens=sequence.num_given - sequence.reused_tokens - sequence.prefix.tokens,
                compute_ms=(time.monotonic() - sequence.started) * 1e3,
                prefix=sequence.prefix,
            )
        )

    # --- lending and borrowing -----------------------------------------------------------------------------------------

    def _lend(self, request_id: RequestId, hashes: Many[BlockHash]) -> None:
        """Publish cached blocks for another worker."""
        loan = self._publisher.lend(request_id, hashes)
        lent = Lent(request_id, loan.num_tokens, seal(loan, self._key), loan.lease_id) if loan else Lent(request_id, 0)
        self._outputs.append(lent)

    def _read_loan(self, sequence: Sequence, ticket: bytes) -> None:
        """Check a ticket for the first blocks. Without it they are computed, as if nobody had offered them."""
        if not self._takes_loan(sequence, ticket):
            self._outputs.append(KVReady(sequence.id, sequence.lease_id, self._report(sequence)))

    def _takes_loan(self, sequence: Sequence, ticket: bytes) -> bool:
        """Whether the ticket is good for the sequence's first blocks, which are then to be fetched."""
        try:
            self._tickets.take_loan(sequence, ticket)
        except HandoffRefused as refused:
            log.warning("request %s: the loan is of no use: %s", sequence.id, refused)
            return False
        return True

    def _accept_loan(self, sequence: Sequence, loan: KVHandoff, num_blocks: int, taken_ms: float) -> None:
        if sequence.is_fresh:
            tokens = max(loan.num_tokens - sequence.num_computed, 0)
            num_bytes = num_blocks * self.info.layout.block_bytes
            sequence.prefix = PrefixReport(peer_tokens=tokens, bytes=num_bytes, ms=taken_ms)
        self._keep(sequence, loan, num_blocks)

    # --- decode: follow a prefill --------------------------------------------------------------------------------------

    def _follow(self, request: GenerateRequest, loan: bytes) -> None:
        """Fetch what a prefill worker has so far, if there is room for it. Nothing is held for it beyond the transfer."""
        if self._was_aborted(request.request_id):
            return
        sequence = self._sequence_of(request, prefill_only=True)
        sequence.follows = True
        if self._takes_loan(sequence, loan) and self._scheduler.admit_to_fetch(sequence):
            self._begin_fetch(sequence)
        else:
            self._outputs.append(Followed(sequence.id))

    def _end_follow(
        self, sequence: Sequence, loan: KVHandoff, num_blocks: int, taken_ms: float, outcome: Fetched | HandoffRefused
    ) -> None:
        followed = Followed(sequence.id)
        if isinstance(outcome, HandoffRefused):
            log.info("request %s: not fetched ahead: %s", sequence.id, outcome)
        elif num_blocks:
            self._keep(sequence, loan, num_blocks)
            tokens, num_bytes = num_blocks * sequence.block_size, num_blocks * self.info.layout.block_bytes
            followed = Followed(sequence.id, tokens, num_bytes, outcome.wire_bytes, taken_ms)
        self._scheduler.drop_fetching(sequence)
        self._outputs.append(followed)

    # --- decode: fetch -------------------------------------------------------------------------------------------------

    def _read_ticket(self, sequence: Sequence, ticket: bytes) -> None:
        """Check everything about the ticket that needs no bytes; a refused one means that the prompt is recomputed."""
        sequence.was_handed = True
        self._handed_until = time.monotonic() + _HANDED_LATELY_S
        sequence.fetched = Fetched(self._transport.name)
        try:
            self._tickets.take_handoff(sequence, ticket)
        except HandoffRefused as refused:
            self._refused(sequence, refused)
            self._outputs.append(KVReady(sequence.id, sequence.lease_id, self._report(sequence)))

    def _begin_fetch(self, sequence: Sequence) -> None:
        """Fetch the handed blocks that are not cached here."""
        handoff = sequence.handoff
        if handoff is None:
            self._load_from_stores(sequence)
            return
        wanted = range(sequence.num_published, self.info.layout.blocks_for(handoff.num_tokens))
        if not (sequence.was_handed or sequence.follows or self._loan_pays(len(wanted))):
            refused = HandoffRefused(RefusalReason.TRANSFER_FAILED, "computing is faster")
            self._fetches.end(sequence, refused)
            return
        if wanted:
            sequence.transfer = self._fetches.begin(sequence, handoff, wanted)
        else:
            self._fetches.end(sequence, Fetched(self._transport.name))

    def _end_fetch(self, sequence: Sequence, num_blocks: int, taken_ms: float, outcome: Fetched | HandoffRefused) -> None:
        handoff = sequence.handoff
        assert handoff is not None
        sequence.handoff = None
        if sequence.doomed:
            self._scheduler.drop_fetching(sequence)
            return
        if sequence.follows:
            self._end_follow(sequence, handoff, num_blocks, taken_ms, outcome)
            return
        if not sequence.was_handed:
            self._end_loan(sequence, handoff, num_blocks, taken_ms, outcome)
        elif isinstance(outcome, HandoffRefused):
            self._refused(sequence, outcome)
        else:
            sequence.fetched = outcome
            self._accept(sequence, handoff, num_blocks, taken_ms)
        self._outputs.append(KVReady(sequence.id, sequence.lease_id, self._report(sequence)))
        if sequence.may_be_stored:
            self._load_from_stores(sequence)
        else:
            self._scheduler.fetched(sequence)

    def _end_loan(
        self, sequence: Sequence, loan: KVHandoff, num_blocks: int, taken_ms: float, outcome: Fetched | HandoffRefused
    ) -> None:
        if isinstance(outcome, HandoffRefused):
            log.info("request %s: the loan is not taken: %s", sequence.id, outcome)
        else:
            self._accept_loan(sequence, loan, num_blocks, taken_ms)
        if num_blocks:
            got = 0 if isinstance(outcome, HandoffRefused) else num_blocks * self.info.layout.block_bytes
            self._loan_pace.measure(got, taken_ms / 1e3)

    def _loan_pays(self, num_blocks: int) -> bool:
        layout = self.info.layout
        return self._loan_pace.beats(num_blocks * layout.block_bytes, self._compute_pace, num_blocks * layout.block_size)

    def _accept(self, sequence: Sequence, handoff: KVHandoff, num_blocks: int, taken_ms: float) -> None:
        sequence.received_tokens = handoff.num_tokens - sequence.num_computed
        sequence.received_bytes = num_blocks * self.info.layout.block_bytes
        sequence.transfer_ms = taken_ms
        sequence.refusal = "verified"
        sequence.private = bool(sequence.fetched.rounded)
        self._keep(sequence, handoff, num_blocks)

    def _keep(self, sequence: Sequence, handoff: KVHandoff, num_blocks: int) -> None:
        """The last so many blocks of a handoff or a loan are here, verified: their digests need not be made again."""
        last = self.info.layout.blocks_for(handoff.num_tokens)
        first = last - num_blocks
        self._import_fetched(sequence.blocks[first:last])
        sequence.num_computed = max(handoff.num_tokens, sequence.num_computed)
        self._scheduler.publish_full_blocks(sequence)
        if handoff.layout == self.info.layout:
            for index in range(first, handoff.num_tokens // sequence.block_size):
                self._pool.set_digest(sequence.blocks[index], handoff.digests[index])

    def _import_fetched(self, blocks: list[int]) -> None:
        if not self._transport.on_device:
            self._runner.import_blocks(blocks)

    def _refused(self, sequence: Sequence, refused: HandoffRefused) -> None:
        log.warning("request %s: handoff refused, recomputing: %s", sequence.id, refused)
        sequence.refusal = refused.reason.value

    # --- reading from the stores ---------------------------------------------------------------------------------------

    def _load_from_stores(self, sequence: Sequence) -> None:
        assert self._loads is not None, "without stores no sequence looks for any"
        sequence.transfer = self._loads.begin(sequence)

    def _end_load(self, sequence: Sequence, loaded: Loaded) -> None:
        if sequence.doomed:
            self._scheduler.drop_fetching(sequence)
            return
        first = sequence.num_published
        self._runner.import_blocks(sequence.blocks[first : first + loaded.blocks])
        if sequence.is_fresh:
            tokens = {f"{name}_tokens": blocks * sequence.block_size for name, blocks in loaded.of_tier.items()}
            num_bytes = loaded.blocks * self.info.layout.block_bytes
            sequence.prefix = PrefixReport(**tokens, bytes=num_bytes, ms=loaded.seconds * 1e3)
        sequence.num_computed += loaded.blocks * sequence.block_size
        self._scheduler.publish_full_blocks(sequence)
        self._scheduler.fetched(sequence)

    def _report(self, sequence: Sequence) -> KVReport:
        return KVReport(
            reused_tokens=sequence.reused_tokens,
            received_tokens=sequence.received_tokens,
            recomputed_tokens=sequence.forwarded_tokens if sequence.was_handed else 0,
            computed_tokens=0 if sequence.was_handed else sequence.forwarded_tokens,
            received_bytes=sequence.received_bytes,
            transfer_ms=sequence.transfer_ms,
            compute_ms=sequence.compute_ms,
            digest=sequence.refusal,
            transport=sequence.fetched.transport if sequence.was_handed else "",
            transport_why=sequence.fetched.why,
            codec=sequence.fetched.codec if sequence.received_bytes else "",
            wire_bytes=sequence.fetched.wire_bytes if sequence.received_bytes else 0,
            rounded=sequence.fetched.rounded,
            prefix=sequence.prefix,
        )


def _shape(batch: list[tuple[Sequence, int]]) -> tuple[int, float, int, int]:
    """The first four fields of StepSample, before the batch is computed."""
    prefill_tokens, prefill_context, streams, context = 0, 0.0, 0, 0
    for sequence, count in batch:
        if sequence.num_uncomputed == 1:
            streams += 1
            context += sequence.num_computed
        else:
            prefill_tokens += count
            prefill_context += count * (sequence.num_computed + count / 2)
    return prefill_tokens, prefill_context, streams, context


def _may_guess(draw: Draw) -> bool:
    """What is banned or allowed is known for the next token only."""
    return not draw.banned_ids and draw.allowed is None
