"""The engine loop: one thread that schedules iterations over all requests, as the real worker does.

States of a request: queued -> context (its prompt is computed) -> decoding; a context_only request ends there and pins
its blocks until they are pulled; a generation_only request is in transit until its KV has come, then decodes.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import _knobs, _transceiver
from ._arguments import LlmArgs
from ._pool import KvPool
from .disaggregated_params import DisaggregatedParams
from .executor.result import GenerationResult, Logprob, Response
from .executor.utils import RequestError
from .sampling_params import SamplingParams

_FIRST_TOKEN = 300
_NUM_TOKENS = 20_000
_STATS_KEPT = 1000


@dataclass(eq=False)
class Request:
    id: int
    prompt: list[int]
    sampling: SamplingParams
    streaming: bool
    params: Any  # DisaggregatedParams or None
    salt: str | None
    result: GenerationResult
    blocks: list[int] = field(default_factory=list)
    reused: int = 0  # blocks
    computed: int = 0  # tokens whose KV is in the blocks
    output: list[int] = field(default_factory=list)
    unsent: int = 0  # of output
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    draws: int = 0  # made here
    state: str = "queued"
    received: bytes | None = None
    announced: bool = False  # generation_only: the response with the context's token is out
    aborted: bool = False
    pinned_since: float = 0.0
    transit_since: float = 0.0

    @property
    def kind(self) -> str:
        return "context_and_generation" if self.params is None else str(self.params.request_type)

    @property
    def key(self) -> int:
        """What a pull asks for."""
        given = getattr(self.params, "disagg_request_id", None)
        return given if given is not None else self.id


class Executor:
    def __init__(self, args: LlmArgs, max_seq_len: int, eos_id: int, knobs_file: Path | None) -> None:
        self._args = args
        self._max_seq_len = max_seq_len
        self._eos_id = eos_id
        self._knobs_file = knobs_file
        self._knobs_time = 0
        self._state_file = _knobs.new_state_file(knobs_file)
        self.knobs = _knobs.read(knobs_file)
        self._lock = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._aborts: deque[int] = deque()
        self._queued: list[Request] = []
        self._active: list[Request] = []
        self._pinned: dict[int, Request] = {}
        self._pulled: set[int] = set()
        self._stopping = False
        self._draws = 0
        self._counts = {"context_only": 0, "generation_only": 0, "context_and_generation": 0}
        self._event_id = 0
        self._state = _knobs.State()
        self.events: deque[dict[str, Any]] = deque(maxlen=args.kv_cache_config.event_buffer_max_size or 1)
        self.stats: deque[dict[str, Any]] = deque(maxlen=_STATS_KEPT)
        tokens = args.kv_cache_config.max_tokens or 65_536
        size = args.kv_cache_config.tokens_per_block
        self.pool = KvPool(tokens // size, size, args.kv_cache_config.enable_block_reuse, self._emit)
        transceiver = args.cache_transceiver_config
        self._server = _transceiver.Server(self._pull, self._on_pulled) if transceiver and transceiver.backend else None
        self._thread = threading.Thread(target=self._run, name="trtllm-executor", daemon=True)
        self._thread.start()

    # --- from other threads ---

    def submit(self, request: Request) -> None:
        with self._lock:
            self._inbox.append(request)
            self._lock.notify()

    def check_alive(self) -> None:
        self._refresh_knobs()
        if self.knobs.dead:
            raise RuntimeError("the executor has failed")

    def abort(self, request_id: int) -> None:
        with self._lock:
            self._aborts.append(request_id)
            self._lock.notify()

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(5)
        if self._server:
            self._server.close()

    def _pull(self, key: int) -> bytes | None:
        """On a transceiver thread: the KV of a pinned request."""
        self._refresh_knobs()
        request = self._pinned.get(key)
        if request is None or self.knobs.silent_sender or self.knobs.wedged:
            return None
        time.sleep(self.knobs.transfer_ms / 1000)
        seen = self.pool.read(request.blocks, len(request.prompt))
        if self.knobs.spoiled_kv:
            seen[0, 0] += 1
        return bytes(seen.tobytes())

    def _on_pulled(self, key: int) -> None:
        with self._lock:
            self._pulled.add(key)
            self._lock.notify()

    def _receive(self, request: Request) -> None:
        """On a thread of its own: wait for the KV. If it never comes, neither does an error."""
        key = getattr(request.params, "disagg_request_id", None) or request.params.ctx_request_id
        request.received = _transceiver.pull(request.params.opaque_state, key)
        with self._lock:
            self._lock.notify()

    # --- the loop ---

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not self._has_work():
                    self._publish_state()
                    self._lock.wait(0.05 if self._active or self._queued else None)
                if self._stopping:
                    return
                self._queued += self._inbox
                self._inbox.clear()
                aborts, self._aborts = list(self._aborts), deque()
                pulled, self._pulled = self._pulled, set()
            self._refresh_knobs()
            while self.knobs.wedged and not self._stopping:
                time.sleep(0.01)
                self._refresh_knobs()
            for key in pulled:
                self._unpin(key)
            for request_id in aborts:
                self._cancel(request_id)
            self._end_late_transfers()
            self._admit()
            self._iterate()
            self._publish_state()

    def _has_work(self) -> bool:
        if self._inbox or self._aborts or self._pulled:
            return True
        arrived = any(request.state == "transit" and request.received is not None for request in self._active)
        arrived = arrived or bool(self._late())
        computing = any(request.state in ("context", "decoding") for request in self._active)
        return arrived or computing or any(self._fits(request) for request in self._queued[:1])

    def _fits(self, request: Request) -> bool:
        return len(self._active) < self._args.max_batch_size and self.pool.can_take(self._reserve(request))

    def _reserve(self, request: Request) -> int:
        """Tokens that the request may need in all: it is only begun when they fit."""
        return len(request.prompt) + request.sampling.max_tokens

    def _admit(self) -> None:
        while self._queued and self._fits(self._queued[0]):
            request = self._queued.pop(0)
            self._counts[request.kind] += 1
            problem = self._problem(request)
            if problem is not None:
                request.result.put(Response(error=problem))
                continue
            generation = request.kind == "generation_only"
            request.blocks, request.reused = self.pool.take(
                request.prompt, self._reserve(request), request.salt, match=not generation
            )
            self._active.append(request)
            if generation:
                request.state, request.transit_since = "transit", time.monotonic()
                threading.Thread(target=self._receive, args=(request,), daemon=True).start()
            else:
                request.state = "context"
                request.computed = request.reused * self.pool.size
                self._end_orphans()

    def _problem(self, request: Request) -> Exception | None:
        if self.knobs.fail_on_token in request.prompt:
            return RequestError("the request has failed")
        if self.knobs.crash_on_token in request.prompt:
            return RuntimeError("CUDA error: an illegal memory access was encountered")
        if request.kind == "context_and_generation":
            return None
        if self._server is None:
            return RequestError("kv_cache_transceiver is disabled, please set cache_transceiver_config: backend")
        if request.kind == "generation_only" and self._args.speculative_config and request.params.draft_tokens is None:
            return RequestError("the draft tokens of the context are missing")
        overlap = not self._args.disable_overlap_scheduler
        if request.kind == "context_only" and overlap and _knobs.release() < (1, 3):
            return RequestError("Context only requests are not supported in pytorch backend when overlap is enabled")
        return None

    def _iterate(self) -> None:
        """One iteration: a token for every stream, and prompts in order as far as max_num_tokens reaches."""
        streams = [request for request in self._active if request.state == "decoding"]
        budget = self._args.max_num_tokens - len(streams)
        chunks: list[tuple[Request, int]] = []
        for request in [request for request in self._active if request.state == "context"]:
            left = len(request.prompt) - request.computed
            count = min(left, budget) if self._args.enable_chunked_prefill else left
            if count <= 0 or (count > budget and chunks):
                break
            chunks.append((request, count))
            budget -= count
        arrived = [request for request in self._active if request.state == "transit" and request.received is not None]
        if not streams and not chunks and not arrived:
            return
        tokens = sum(count for _, count in chunks)
        time.sleep((self.knobs.step_ms + tokens * self.knobs.prefill_us_per_token / 1000) / 1000)
        for request, count in chunks:
            self._compute(request, count)
        for request in streams:
            self._decode(request)
        for request in arrived:
            self._take_over(request)
        if self.knobs.updates:
            self.pool.update()
        self._record_stats()

    def _compute(self, request: Request, count: int) -> None:
        chunk = request.prompt[request.computed : request.computed + count]
        self.pool.write(request.blocks, request.computed, chunk)
        request.computed += count
        if request.computed < len(request.prompt):
            return
        self.pool.store(request.prompt, request.blocks, request.salt)
        request.state = "decoding"
        self._sample(request)
        self._deliver(request, self._finish(request))

    def _decode(self, request: Request) -> None:
        """One token, and as many more as drafts are accepted: some."""
        speculative = self._args.speculative_config
        accepted = request.output[-1] % (speculative.drafts + 1) if speculative else 0
        for _ in range(1 + accepted):
            self.pool.write(request.blocks, request.computed, request.output[-1:])
            request.computed += 1
            self._sample(request)
            finish = self._finish(request)
            if finish[0] is not None:
                break
        self._deliver(request, finish)

    def _take_over(self, request: Request) -> None:
        """The KV has come. The first response holds the context's token and nothing else."""
        assert request.received is not None
        seen = np.frombuffer(request.received, np.uint32).reshape(2, -1)
        positions = np.arange(seen.shape[1])
        table = np.asarray(request.blocks)[positions // self.pool.size]
        self.pool.kv[table, 0, positions % self.pool.size] = seen[0]
        self.pool.kv[table, 1, positions % self.pool.size] = seen[1]
        request.computed = len(request.prompt)
        self.pool.store(request.prompt, request.blocks, request.salt)
        request.state = "decoding"
        request.output = list(request.params.first_gen_tokens)
        first = getattr(request.params, "first_gen_log_probs", None)
        request.logprobs = list(first) if first else []
        request.unsent = len(request.output)
        self._deliver(request, self._finish(request))

    def _sample(self, request: Request) -> None:
        token = self._next_token(request)
        request.output.append(token)
        request.unsent += 1
        if request.sampling.logprobs:
            likeliest = [token, *(300 + (token + i) % _NUM_TOKENS for i in range(1, request.sampling.logprobs))]
            request.logprobs.append({t: Logprob(-0.5 * (rank + 1), rank + 1) for rank, t in enumerate(likeliest)})

    def _next_token(self, request: Request) -> int:
        sampling = request.sampling
        seen = self.pool.read(request.blocks, request.computed)
        draw = "greedy" if sampling.greedy else self._draw(request)
        if _knobs.release() >= (1, 3):  # earlier releases take penalties and ignore them
            draw += f"{sampling.repetition_penalty}{sampling.presence_penalty}{sampling.frequency_penalty}"
        digest = int.from_bytes(hashlib.blake2b(seen.tobytes() + draw.encode(), digest_size=8).digest(), "big")
        banned = len(request.output) < (sampling.min_tokens or 0)
        if self.knobs.eos_every and not banned and digest % self.knobs.eos_every == 0:
            return self._eos_id
        return _FIRST_TOKEN + digest % _NUM_TOKENS

    def _draw(self, request: Request) -> str:
        """Random numbers by seed and how many this engine has drawn for the request; before 1.3 by neither."""
        request.draws += 1
        self._draws += 1
        return f"{request.sampling.seed}/{request.draws}" if _knobs.release() >= (1, 3) else f"engine/{self._draws}"

    def _finish(self, request: Request) -> tuple[str | None, int | None]:
        """(finish_reason, the stop token that was hit)."""
        sampling, last = request.sampling, request.output[-1]
        if last == self._eos_id and not sampling.ignore_eos:
            return "stop", None
        if last in (sampling.stop_token_ids or ()):
            return "stop", last
        over = len(request.prompt) + len(request.output) >= self._max_seq_len
        return ("length" if len(request.output) >= sampling.max_tokens or over else None), None

    def _deliver(self, request: Request, finish: tuple[str | None, int | None]) -> None:
        reason, stop_token = finish
        if request.kind == "context_only":
            self._end_context(request, reason, stop_token)
            return
        due = request.unsent >= self._args.stream_interval or not request.announced
        if reason is None and not (request.streaming and due):
            return
        request.announced = True
        request.result.put(self._response(request, reason, stop_token))
        request.unsent = 0
        if reason is not None:
            self._release(request)

    def _end_context(self, request: Request, reason: str | None, stop_token: int | None) -> None:
        assert self._server is not None
        params = DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=request.output[:1],
            ctx_request_id=request.id,
            opaque_state=self._server.opaque_state,
        )
        if self._args.speculative_config:
            params.draft_tokens = request.output[:1] * self._args.speculative_config.drafts
        if _knobs.release() >= (1, 3):
            params.disagg_request_id = request.params.disagg_request_id
            params.ctx_dp_rank = 0
            params.ctx_info_endpoint = "tcp://127.0.0.1:0"
            params.schedule_style = request.params.schedule_style
            params.first_gen_log_probs = list(request.logprobs) or None
        self._active.remove(request)
        if request.aborted:
            self.pool.give_back(request.blocks)
        else:
            request.pinned_since = time.monotonic()
            self._pinned[request.key] = request
        request.result.put(self._response(request, reason, stop_token, params))

    def _response(self, request: Request, reason: str | None, stop_token: int | None, params: Any = None) -> Response:
        metrics = None
        if request.sampling.return_perf_metrics:
            metrics = SimpleNamespace(kv_cache_metrics=SimpleNamespace(num_reused_blocks=request.reused))
        return Response(
            token_ids=request.output[len(request.output) - request.unsent :],
            logprobs=list(request.logprobs) if request.sampling.logprobs else None,
            finish_reason=reason,
            stop_token=stop_token,
            disaggregated_params=params,
            perf_metrics=metrics,
        )

    def _release(self, request: Request) -> None:
        self._active.remove(request)
        whole = (request.prompt + request.output)[: request.computed]
        self.pool.store(whole, request.blocks, request.salt)
        self.pool.tell_partial(whole, request.salt)
        self.pool.give_back(request.blocks)

    # --- the ways a request ends early ---

    def _cancel(self, request_id: int) -> None:
        """In transit the blocks are lost: the transfer may still write into them, and nobody takes them back."""
        for request in self._queued:
            if request.id == request_id:
                self._queued.remove(request)
                self._answer_cancelled(request)
                return
        for request in self._active:
            if request.id == request_id:
                request.aborted = True
                self._active.remove(request)
                (self.pool.leak if request.state == "transit" else self.pool.give_back)(request.blocks)
                self._answer_cancelled(request)
                return

    def _answer_cancelled(self, request: Request) -> None:
        if not self.knobs.deaf_to_abort:
            request.result.put(Response(finish_reason="cancelled"))

    def _unpin(self, key: int) -> None:
        request = self._pinned.pop(key, None)
        if request is not None:
            self.pool.give_back(request.blocks)

    def _late(self) -> list[Request]:
        if not self.knobs.gives_up_ms:
            return []
        end = time.monotonic() - self.knobs.gives_up_ms / 1000
        return [request for request in self._active if request.state == "transit" and request.transit_since < end]

    def _end_late_transfers(self) -> None:
        for request in self._late():
            self._active.remove(request)
            self.pool.give_back(request.blocks)
            request.result.put(Response(finish_reason="timeout"))

    def _end_orphans(self) -> None:
        """KV that nobody pulled in time. Reached only when new work is scheduled, as in 1.2."""
        transceiver = self._args.cache_transceiver_config
        timeout_ms = transceiver.kv_transfer_timeout_ms if transceiver else None
        if timeout_ms is None:
            return
        for key, request in list(self._pinned.items()):
            if time.monotonic() - request.pinned_since > timeout_ms / 1000:
                self._unpin(key)

    # --- what can be asked ---

    def _emit(self, data: dict[str, Any]) -> None:
        event = {"event_id": self._event_id, "window_size": self._max_seq_len, "data": data}
        self._event_id += 1
        lost = self.knobs.lose_event and self._event_id % self.knobs.lose_event == 0
        if self._args.kv_cache_config.event_buffer_max_size and not self.knobs.no_events and not lost:
            self.events.append(json.loads(json.dumps(event)))

    def _record_stats(self) -> None:
        if self._args.enable_iter_perf_stats:
            pool = self.pool
            blocks = {"usedNumBlocks": pool.used, "maxNumBlocks": pool.total, "freeNumBlocks": pool.total - pool.used}
            self.stats.append(
                {"numActiveRequests": len(self._active), "numQueuedRequests": len(self._queued), "kvCacheStats": blocks}
            )

    def _refresh_knobs(self) -> None:
        if self._knobs_file is not None and self._knobs_file.exists():
            changed = self._knobs_file.stat().st_mtime_ns
            if changed != self._knobs_time:
                self._knobs_time = changed
                self.knobs = _knobs.read(self._knobs_file)

    def state(self) -> _knobs.State:
        pool = self.pool
        return _knobs.State(
            total_blocks=pool.total,
            used_blocks=pool.used,
            cached_blocks=pool.cached,
            pinned_requests=len(self._pinned),
            leaked_blocks=pool.leaked,
            active_requests=len(self._active) + len(self._queued) + len(self._inbox),
            context_requests=self._counts["context_only"],
            generation_requests=self._counts["generation_only"],
            plain_requests=self._counts["context_and_generation"],
        )

    def _publish_state(self) -> None:
        state = self.state()
        if state != self._state and self._state_file is not None:
            self._state = state
            _knobs.write_state(self._state_file, state)
