"""A worker as the router sees it, whose steps take virtual time instead of computing.

Batching, chunking, prefix cache and KV room are those of the paged engine (engines/paged/scheduler.py), and the block pool
is the very same. Steps in which only streams run are taken many at once, up to the next event that changes anything: that
is what lets thousands of workers run in minutes. Times between tokens are counted here, by step; of a stream's tokens the
router hears the first at once and the others with the last, of long answers also some between.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from bisect import insort
from collections.abc import Sequence
from random import Random

import numpy as np

from python_backends.core.config import EngineConfig, TransferConfig
from python_backends.core.errors import RefusalReason
from python_backends.core.layout import KVLayout
from python_backends.core.messages import (
    BlockEvents,
    DecodeWork,
    Heartbeat,
    KVReady,
    Output,
    Outputs,
    PrefillDone,
    PrefillWork,
    StepSample,
    TokenChunk,
    Work,
)
from python_backends.core.step_model import tokens_within
from python_backends.core.types import BlockHash, Epoch, FinishReason, KVReport, RequestId, Role, WorkerId, WorkerLoad
from python_backends.engines.paged.step_limit import StepAllowance
from python_backends.kv.block_pool import BlockPool
from router.house import House
from scripts.simulation.hardware import Rates
from scripts.simulation.statistics import Histogram
from scripts.simulation.workload import SILENT, Tokens

_FINGERPRINT = "simulated"
_MOST_STEPS_AT_ONCE = 1024  # so that growing contexts are seen
_MOST_SAMPLES = 4  # told at once
_TOLD_STEPS = 1024  # at least, between two times that the router is told how far streams are ...
_TOLD_SHARE = 8  # ... and so large a part of what they have made
_MOMENT_S = 1e-6  # what happens at the same time has happened then


class _Sequence:
    """One request in the worker. `given`: tokens it came with. `length`: those known; the KV of `computed` is here."""

    def __init__(self, work: Work, arrival: int, now: float) -> None:
        request = work.request
        self.id: RequestId = request.request_id
        self.prefill_only = isinstance(work, PrefillWork)
        self.ticket = work.ticket if isinstance(work, DecodeWork) else None
        self.order = (request.priority, arrival)
        prompt: object = request.prompt_ids
        self.hashes: Sequence[BlockHash] = prompt.hashes if isinstance(prompt, Tokens) else []
        self.length = self.given = request.num_tokens
        self.output = request.sampling.max_tokens - len(request.output_ids)  # tokens yet to be made
        self.computed = 0
        self.published = 0  # blocks that are findable
        self.blocks: list[int] = []
        self.reused = 0  # tokens
        self.report = KVReport()
        self.began: float | None = None  # s, of its first chunk
        self.told = len(request.output_ids)  # tokens of the output that the router knows
        self.has_tokens = bool(request.output_ids)  # the client got some, here or elsewhere
        self.last_token = now  # s; when that was: of a handed-over stream the arrival
        self.queued_s = 0.0  # for the end of the step that was under way when it came
        self.fetched_at = 0.0  # s
        self.joined_at = -1  # the count of steps when it became a stream
        self.gone = False

    def __lt__(self, other: _Sequence) -> bool:
        return self.order < other.order

    @property
    def left(self) -> int:
        return self.length - self.computed


class SimulatedWorker:
    """Lives on the virtual loop. `busy_s`: how long it has computed. `draining`: it wants no more work."""

    def __init__(
        self,
        name: str,
        role: Role,
        rates: Rates,
        engine: EngineConfig,
        transfer: TransferConfig,
        block_size: int,
        itl: Histogram,
        random: Random,
        itl_ms: float = 0.0,
    ) -> None:
        """block_size: of the workload's hashes. itl: milliseconds between tokens, of all workers together.

        itl_ms: the target between tokens; 0: none.
        """
        self.id = WorkerId(name)
        self.role = role
        self.busy_s = 0.0
        self.draining = False
        self._rates = rates
        self._engine = engine
        self._transfer = transfer
        self._size = block_size
        self._calibration = rates.calibration()
        self._itl = itl
        self._random = random
        self._layout = KVLayout(1, 1, max(rates.token_bytes // 8, 1), block_size, "float32")  # any of this size
        self._allowance = StepAllowance(itl_ms) if itl_ms else None
        num_blocks = max(rates.pool_tokens // block_size, 2)
        self._pool = BlockPool(num_blocks, np.zeros(num_blocks, np.uint64))
        self._epoch = Epoch(1)
        self._events = 0
        self._arrivals = 0
        self._live: dict[RequestId, _Sequence] = {}
        # a sequence is in one of: waiting, (fetching, then ready, or) prompts, streams
        self._waiting: list[_Sequence] = []
        self._fetching = 0
        self._ready: list[_Sequence] = []
        self._prompts: list[_Sequence] = []
        self._streams = 0
        self._last_steps: list[tuple[int, _Sequence]] = []  # heap: at which count of steps a stream has its last token
        self._new: list[_Sequence] = []  # streams that have not made a step yet
        self._context = 0  # tokens of the streams
        self._given = 0  # ... that they came with
        self._grown = 0  # ... beyond what their blocks hold; negative when there is room left in them
        self._steps = 0  # that streams have made
        self._told = 0  # ... when the router was told of them all
        self._leases: dict[str, tuple[float, list[int]]] = {}  # expiry in s, blocks
        self._link_free = 0.0
        self._outputs: list[Output] = []
        self._samples: list[StepSample] = []
        self._pause: asyncio.TimerHandle | None = None  # until which streams wait for who joins them
        self._came_in_pause = False  # somebody who has to wait for one step, and not for more
        self._lost_ms = 0.0  # by such a pause before the step under way
        # the step under way, or several of streams alone
        self._timer: asyncio.TimerHandle | None = None
        self._has_left = False
        self._since = 0.0
        self._count = 0
        self._chunks: list[tuple[_Sequence, int]] = []
        self._shape = (0, 0.0)  # of the chunks: tokens, and tokens x context
        self._slowness = 1.0

    def join(self, house: House, peers: dict[WorkerId, SimulatedWorker]) -> None:
        """Report for duty."""
        self._house, self._peers = house, peers
        self._loop = asyncio.get_running_loop()
        house.hear_heartbeat(self.heartbeat(), self._loop.time())
        house.hear_events(BlockEvents(self.id, self._epoch, 0, [], [], reset=True))

    @property
    def held_blocks(self) -> int:
        """With those that streams have grown into."""
        return self._pool.held_blocks + max(self._grown, 0) // self._size

    @property
    def is_idle(self) -> bool:
        """It has no request, and nothing that others may still fetch."""
        return not (self._live or self._leases)

    def load(self) -> WorkerLoad:
        pool = self._pool
        return WorkerLoad(
            queued_requests=len(self._waiting) + self._fetching,
            queued_tokens=sum(sequence.left for sequence in (*self._waiting, *self._prompts)),
            running_requests=len(self._prompts) + self._streams,
            output_tokens=self._context - self._given,
            free_blocks=pool.free_blocks,
            cached_blocks=pool.cached_blocks,
            held_blocks=self.held_blocks,
            total_blocks=pool.total_blocks,
            active_leases=len(self._leases),
            busy_s=self.busy_s,
            step_ms=self._allowance.step_ms if self._allowance else 0.0,
        )

    def heartbeat(self) -> Heartbeat:
        pool = self._pool
        return Heartbeat(
            worker=self.id,
            model=self.id,
            server="",
            role=self.role,
            epoch=self._epoch,
            pid=0,
            host="simulated",
            load=self.load(),
            layout=self._layout,
            fingerprint=_FINGERPRINT,
            max_context=pool.total_blocks * self._size,
            step_tokens=self._engine.step_tokens,
            max_batch=self._engine.max_batch,
            events_sequence=self._events,
            calibration=self._calibration,
            draining=self.draining,
        )

    def tell_progress(self) -> None:
        """Of long answers now and then, since the router learns from it how long they get. Each telling costs an event."""
        steps = self._steps - self._told
        if steps < _TOLD_STEPS or steps * self._streams * _TOLD_SHARE < self._context - self._given:
            return
        self._told = self._steps
        for _, sequence in self._last_steps:
            if not sequence.gone and self._steps > sequence.joined_at:
                self._say_tokens(sequence, None)
        self._tell()

    def leave(self) -> None:
        """End as a worker does whose server is stopped: what it has made so far is said, and nothing more."""
        if self._pause is not None:
            self._pause.cancel()
        if self._timer is not None:
            self._timer.cancel()
            ms = (self._loop.time() - self._since) * 1e3
            self.busy_s += ms / 1e3
            if self._streams and not self._chunks and (done := self._steps_in(ms) - 1) > 0:
                self._advance_streams(done, ms / (done + 1))
        for _, sequence in self._last_steps:
            if not sequence.gone and self._steps > sequence.joined_at:
                self._say_tokens(sequence, None)
        self._tell()
        self._has_left = True

    # --- what the router says ---

    def submit(self, work: Work) -> None:
        self._loop.call_later(self._rates.hop_ms / 1e3, self._arrive, work, self._loop.time())

    def abort(self, request_id: RequestId) -> None:
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            self.release(request_id)
            return
        sequence.gone = True
        if sequence.joined_at >= 0:
            sequence.length += self._steps - sequence.joined_at
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def release(self, lease_id: str) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._pool.release(lease[1])
            self._tell()

    # --- steps ---

    def _arrive(self, work: Work, sent: float) -> None:
        if self._has_left:
            return
        self._arrivals += 1
        sequence = _Sequence(work, self._arrivals, sent)
        self._live[sequence.id] = sequence
        insort(self._waiting, sequence)
        was_busy = self._timer is not None
        self._interrupt()
        if was_busy and self._timer is not None:
            sequence.queued_s = self._timer.when() - self._loop.time()

    def _interrupt(self) -> None:
        """There is something for the next step: of several steps under way, the present one is to be the last."""
        if self._pause is not None:
            self._came_in_pause = True
        elif self._timer is None:
            self._begin()
        elif self._count > 1:
            passed_ms = (self._loop.time() - self._since) * 1e3
            count = max(self._steps_in(passed_ms), 1)
            if count < self._count:
                self._timer.cancel()
                self._count = count
                self._timer = self._loop.call_at(self._since + self._streams_ms(count) / 1e3, self._end)

    def _begin(self) -> None:
        """Start the next step, if there is anything to compute."""
        self._timer = None
        coming = self._admit()
        if not coming or not self._streams:
            self._compute_step(0.0)
            return
        # As the paged engine's streams do: until they have lost as much together as one that misses the step would.
        now, step_ms = self._loop.time(), self._rates.step_ms(0, 0, self._streams, self._context)
        until = min(max(coming) + _MOMENT_S, now + step_ms / 1e3 / self._streams)
        self._pause = self._loop.call_at(until, self._compute_step, (until - now) * 1e3)

    def _compute_step(self, lost_ms: float) -> None:
        """lost_ms: how long streams have waited for who joins them."""
        self._pause, self._lost_ms = None, lost_ms
        came_in_pause, self._came_in_pause = self._came_in_pause, False
        for sequence in self._ready:
            self._join(sequence)
        self._ready = []
        if not self._prompts and not self._streams:
            if came_in_pause:
                self._begin()
            return
        noise = self._rates.noise
        self._slowness = math.exp(self._random.gauss(0, noise)) if noise else 1.0
        self._since = self._loop.time()
        self._chunks = self._prompts_of_step()
        if self._chunks:
            self._shape = _prompt_shape(self._chunks)
            self._count = 1
            ms = self._slowness * self._rates.step_ms(*self._shape, self._streams, self._context)
        else:
            self._shape = 0, 0.0
            count = min(self._last_steps[0][0] - self._steps, _MOST_STEPS_AT_ONCE)
            if self._streams > 1:  # one alone is not preempted, however long it gets
                count = min(count, self._room() // self._streams)
            self._count = 1 if came_in_pause else max(count, 1)
            ms = self._streams_ms(self._count)
        self._timer = self._loop.call_at(self._since + ms / 1e3, self._end)

    def _prompts_of_step(self) -> list[tuple[_Sequence, int]]:
        """What the next step computes of prompts, as engines/paged/scheduler.py has it."""
        most = max(self._engine.step_tokens - self._streams, 1)
        chunks = _chunks(self._prompts, most)
        while chunks and self._allowance and self._streams:
            tokens, pairs = _prompt_shape(chunks)
            depth = pairs / tokens - tokens / 2
            fitting = tokens_within(
                self._rates, self._allowance.step_ms - self._lost_ms, self._streams, self._context, depth, most
            )
            if fitting >= tokens:
                break
            chunks = _chunks(self._prompts, fitting)
        return chunks

    def _end(self) -> None:
        """The step, or the steps, under way are done."""
        ms = (self._loop.time() - self._since) * 1e3
        self.busy_s += ms / 1e3
        if self._streams or self._chunks:
            middle = self._context + self._streams * (self._count - 1) // 2
            sample = StepSample(*self._shape, self._streams, middle, ms / self._count)
            self._samples = [*self._samples[1 - _MOST_SAMPLES :], sample]
        if self._streams:
            self._advance_streams(self._count, ms / self._count)
        for sequence, count in self._chunks:
            self._advance_prompt(sequence, count)
        self._tell(stepped=bool(self._chunks))
        self._begin()

    def _advance_streams(self, count: int, ms: float) -> None:
        streams = self._streams
        new = [sequence for sequence in self._new if not sequence.gone]
        gap_ms, running = self._lost_ms + ms, streams - len(new)
        self._itl.add(gap_ms, running)
        self._itl.add(ms, (count - 1) * streams)
        for sequence in new:  # their token before came from another worker, or with the end of the prompt
            self._itl.add((self._since - sequence.last_token) * 1e3 + ms, 1)
        self._new = []
        if self._allowance:
            waits = [self._joining_ms(sequence, ms) for sequence in new if sequence.report.digest == "verified"]
            self._learn(self._allowance, count, ms, waits)
        self._steps += count
        self._context += count * streams
        self._grown += count * streams
        while self._last_steps and self._last_steps[0][0] <= self._steps:
            _, sequence = heapq.heappop(self._last_steps)
            if not sequence.gone:
                self._say_tokens(sequence, FinishReason.LENGTH)
                self._leave(sequence)
                del self._live[sequence.id]
        while self._grown > 0 and self._room() < 0 and self._streams > 1:
            self._preempt()

    def _joining_ms(self, sequence: _Sequence, ms: float) -> float:
        """What a stream has waited that has its first token here by a step of `ms`; see PagedEngine._joining_ms."""
        moved_ms = sequence.report.transfer_ms
        return (sequence.queued_s + self._since - sequence.fetched_at) * 1e3 + ms + (moved_ms if moved_ms < ms else 0.0)

    def _learn(self, allowance: StepAllowance, count: int, ms: float, joined_ms: Sequence[float]) -> None:
        """So many steps of streams, each of so many ms, have been made. joined_ms: see StepAllowance.learn."""
        expected_ms = ms / self._slowness
        allowance.learn(self._lost_ms + expected_ms, self._lost_ms + ms, self._streams, joined_ms)
        for _ in range(count - 1):
            before = allowance.step_ms
            allowance.learn(expected_ms, ms, self._streams, ())
            if allowance.step_ms == before:  # as it will be by all the others
                return

    def _advance_prompt(self, sequence: _Sequence, count: int) -> None:
        sequence.computed += count
        self._publish(sequence)
        if sequence.left and not sequence.gone:
            return
        self._prompts.remove(sequence)
        if sequence.gone:
            self._pool.release(sequence.blocks)
        elif sequence.prefill_only:
            self._finish_prefill(sequence)
        else:
            self._finish_local(sequence)

    def _finish_prefill(self, sequence: _Sequence) -> None:
        now = self._loop.time()
        finish = FinishReason.LENGTH if sequence.output == 1 else None
        if finish:
            self._pool.release(sequence.blocks)
        else:
            self._leases[sequence.id] = (now + self._transfer.lease_s, sequence.blocks)
        del self._live[sequence.id]
        self._outputs.append(
            PrefillDone(
                request_id=sequence.id,
                token_id=SILENT,
                logprob=None,
                finish_reason=finish,
                ticket=None if finish else f"{self.id} {sequence.id}".encode(),
                lease_id=None if finish else sequence.id,
                reused_tokens=sequence.reused,
                computed_tokens=sequence.length - sequence.reused,
                compute_ms=(now - (sequence.began or now)) * 1e3,
            )
        )

    def _finish_local(self, sequence: _Sequence) -> None:
        """The prompt is computed, and the first token after it is there."""
        now = self._loop.time()
        if sequence.has_tokens:
            self._itl.add((now - sequence.last_token) * 1e3, 1)
        else:
            compute_ms = (now - (sequence.began or now)) * 1e3
            computed = sequence.length - sequence.reused
            sequence.report = KVReport(sequence.reused, computed_tokens=computed, compute_ms=compute_ms)
        sequence.has_tokens = True
        sequence.last_token = now
        sequence.output -= 1
        sequence.length += 1
        sequence.computed += 1
        finish = None if sequence.output else FinishReason.LENGTH
        self._outputs.append(_chunk(sequence, 1, finish))
        if finish:
            self._pool.release(sequence.blocks)
            del self._live[sequence.id]
        else:
            self._join(sequence)

    def _tell(self, stepped: bool = False) -> None:
        """Say to the router what there is to say; stepped: also that prompts have come further."""
        if self._outputs or stepped:
            outputs, self._outputs = self._outputs, []
            samples, self._samples = self._samples, []
            self._house.hear_outputs(Outputs(self.id, self._epoch, outputs, samples))
        stored, removed = self._pool.take_changes()
        if stored or removed:
            self._events += 1
            self._house.hear_events(BlockEvents(self.id, self._epoch, self._events, list(stored), list(removed)))

    def _streams_ms(self, count: int) -> float:
        """Of so many steps from the present state, each a token longer per stream."""
        first = self._rates.step_ms(0, 0, self._streams, self._context)
        longer = self._rates.coefficients[4] * self._streams
        return self._slowness / self._rates.tokens_per_step * (count * first + longer * count * (count - 1) / 2)

    def _steps_in(self, ms: float) -> int:
        """The number of the step that is under way after so long: `_streams_ms` inverted."""
        slowness = self._slowness / self._rates.tokens_per_step
        first = self._rates.step_ms(0, 0, self._streams, self._context) * slowness
        half = self._rates.coefficients[4] * self._streams * slowness / 2
        if half * ms < 1e-9 * first * first:
            return math.ceil(ms / first)
        linear = first - half
        return math.ceil((math.sqrt(linear * linear + 4 * half * ms) - linear) / (2 * half))

    # --- who computes ---

    def _admit(self) -> list[float]:
        """Give blocks to what waits, in order, as far as they go. Returns when the KV comes that is fetched from now on, s."""
        coming = []
        while self._waiting and self._occupied() < self._engine.max_batch:
            sequence = self._waiting[0]
            if not self._take_blocks(sequence):
                break
            del self._waiting[0]
            if sequence.ticket is None:
                self._compute(sequence)
            elif (arrival := self._fetch(sequence, sequence.ticket)) is not None:
                coming.append(arrival)
        return coming

    def _compute(self, sequence: _Sequence) -> None:
        sequence.began = sequence.began or self._loop.time()
        self._prompts.append(sequence)

    def _occupied(self) -> int:
        return len(self._prompts) + self._streams + self._fetching + len(self._ready)

    def _take_blocks(self, sequence: _Sequence) -> bool:
        hashes = sequence.hashes[: (sequence.length - 1) // self._size]
        matched = self._pool.match(hashes)
        needed = -(-sequence.length // self._size) - matched
        reserve = self._occupied() and max(self._grown, 0) // self._size + 1
        possible = self._pool.can_allocate(needed + reserve)
        reused = self._pool.reuse(hashes[:matched]) if possible else []  # these can't be evicted then
        if not possible or not self._pool.can_allocate(needed + reserve):
            self._expire()
            self._pool.release(reused)
            return False
        sequence.blocks = reused + self._pool.allocate(needed)
        sequence.computed = sequence.reused = matched * self._size
        sequence.published = matched
        return True

    def _expire(self) -> None:
        now = self._loop.time()
        for lease_id in [lease_id for lease_id, (expiry, _) in self._leases.items() if expiry < now]:
            self._pool.release(self._leases.pop(lease_id)[1])

    def _fetch(self, sequence: _Sequence, ticket: bytes) -> float | None:
        """Begin a transfer; when the KV is not there any more, or would come too late, the prompt is computed here.

        Returns when the transfer ends or is given up, s; None if it does not begin.
        """
        sequence.ticket = None
        source, _, lease_id = ticket.decode().partition(" ")
        peer = self._peers.get(WorkerId(source))
        lease = peer._leases.get(lease_id) if peer is not None else None
        now = self._loop.time()
        if lease is None or lease[0] < now:
            self._refuse(sequence, RefusalReason.EXPIRED)
            self._compute(sequence)
            return None
        num_bytes = (sequence.left - 1) * self._rates.token_bytes
        latest = now + self._transfer.timeout_s
        arrival = max(self._link_free, now) + num_bytes / self._rates.link_bytes_per_ms / 1e3 + self._rates.link_ms / 1e3
        self._link_free = min(arrival - self._rates.link_ms / 1e3, max(latest, self._link_free))
        self._fetching += 1
        if arrival > latest:
            self._loop.call_at(latest, self._missed, sequence)
        else:
            self._loop.call_at(arrival, self._fetched, sequence, num_bytes, (arrival - now) * 1e3)
        return min(arrival, latest)

    def _refuse(self, sequence: _Sequence, reason: RefusalReason) -> None:
        sequence.report = KVReport(sequence.reused, 0, sequence.left - 1, digest=reason.value, transport="simulated")
        self._outputs.append(KVReady(sequence.id, None, sequence.report))

    def _missed(self, sequence: _Sequence) -> None:
        """A transfer took too long."""
        if self._has_left:
            return
        self._fetching -= 1
        if sequence.gone:
            self._pool.release(sequence.blocks)
            return
        self._refuse(sequence, RefusalReason.TRANSFER_TIMEOUT)
        self._tell()
        self._compute(sequence)
        self._interrupt()

    def _fetched(self, sequence: _Sequence, num_bytes: int, ms: float) -> None:
        if self._has_left:
            return
        self._fetching -= 1
        if sequence.gone:
            self._pool.release(sequence.blocks)
            return
        sequence.report = KVReport(sequence.reused, sequence.left - 1, 0, 0, num_bytes, ms, 0.0, "verified", "simulated")
        sequence.computed = sequence.length - 1
        sequence.fetched_at = self._loop.time()
        self._publish(sequence)
        sequence.computed += 1
        self._outputs.append(KVReady(sequence.id, None, sequence.report))
        self._tell()
        self._ready.append(sequence)
        self._interrupt()

    def _publish(self, sequence: _Sequence) -> None:
        full = min(sequence.computed // self._size, len(sequence.hashes))
        for index in range(sequence.published, full):
            self._pool.publish(sequence.blocks[index], sequence.hashes[index])
        sequence.published = max(full, sequence.published)

    # --- streams ---

    def _join(self, sequence: _Sequence) -> None:
        """A stream from the next step on."""
        if sequence.gone:
            self._pool.release(sequence.blocks)
            return
        sequence.joined_at = self._steps
        self._streams += 1
        self._context += sequence.length
        self._given += sequence.given
        self._grown += sequence.length - len(sequence.blocks) * self._size
        self._new.append(sequence)
        heapq.heappush(self._last_steps, (self._steps + sequence.output, sequence))

    def _say_tokens(self, sequence: _Sequence, finish: FinishReason | None) -> None:
        """Tell the router of all tokens made since the sequence joined."""
        made = self._steps - sequence.joined_at
        sequence.joined_at = self._steps
        sequence.length += made
        sequence.output -= made
        self._outputs.append(_chunk(sequence, made, finish))

    def _leave(self, sequence: _Sequence) -> None:
        self._streams -= 1
        self._context -= sequence.length
        self._given -= sequence.given
        self._grown -= sequence.length - len(sequence.blocks) * self._size
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def _room(self) -> int:
        """Tokens that streams can still grow by."""
        return (self._pool.free_blocks + self._pool.cached_blocks) * self._size - self._grown

    def _preempt(self) -> None:
        """The stream that came last goes back to waiting; what it has cached may be found again."""
        last = max(self._last_steps, key=lambda entry: (not entry[1].gone, entry[1].order))
        self._last_steps.remove(last)
        heapq.heapify(self._last_steps)
        sequence = last[1]
        self._say_tokens(sequence, None)
        self._leave(sequence)
        sequence.computed = sequence.published = 0
        sequence.joined_at = -1
        sequence.last_token = self._loop.time()
        insort(self._waiting, sequence)


def _chunk(sequence: _Sequence, count: int, finish: FinishReason | None) -> TokenChunk:
    """So many tokens more."""
    start, sequence.told = sequence.told, sequence.told + count
    report = sequence.report if finish else None
    return TokenChunk(sequence.id, [SILENT] * count, start, finish_reason=finish, report=report)


def _prompt_shape(chunks: Sequence[tuple[_Sequence, int]]) -> tuple[int, float]:
    """Tokens, and tokens x context."""
    return sum(count for _, count in chunks), sum(count * (sequence.computed + count / 2) for sequence, count in chunks)


def _chunks(prompts: list[_Sequence], budget: int) -> list[tuple[_Sequence, int]]:
    """As engines/paged/scheduler.py shares a step's tokens: half for the oldest, the rest to the shortest."""
    if not prompts:
        return []
    budget = max(budget, 1)
    oldest = min(prompts) if len(prompts) > 1 else prompts[0]
    reserved = min(oldest.left, -(-budget // 2))
    rest = budget - reserved
    chunks = []
    if len(prompts) > 1:
        for sequence in sorted(prompts, key=lambda each: each.left):
            count = min(sequence.left, rest)
            if count and sequence is not oldest:
                chunks.append((sequence, count))
                rest -= count
    return [(oldest, min(oldest.left, reserved + rest)), *chunks]
