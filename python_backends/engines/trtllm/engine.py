"""The TensorRT-LLM engine: one LLM per worker process, on an asyncio loop that has a thread of its own.

Implements engines.base.Engine. Every request, and every read of events, is made on that loop, as the LLM API wants it.
Outputs are delivered in one batch per turn of the loop. What happens to requests is in dispatcher.py; this file loads,
delivers, polls events and closes.

What it keeps of the contract's sampling promise: the same request greedy gives the same tokens, up to what the batch
changes in rounding; see sampling.py for seeds. A request that continues (`output_ids`) is a new prompt, prompt_ids +
output_ids: exact when greedy, new draws otherwise; penalties then count the earlier output as prompt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from python_backends.core.block_hash import chain_root
from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import ConfigError, TritonCode
from python_backends.core.messages import Output
from python_backends.core.paths import resolve_model
from python_backends.core.place import place_of
from python_backends.core.trtllm import DEFAULT_MAX_NUM_TOKENS, check_trtllm, kv_timeout_ms
from python_backends.core.types import Epoch, GenerateRequest, LeaseEnd, RequestId, Role, WorkerLoad
from python_backends.engines.base import CacheChange, EngineInfo, OnOutputs
from python_backends.engines.trtllm.arguments import llm_arguments, max_batch
from python_backends.engines.trtllm.block_events import BlockEvents
from python_backends.engines.trtllm.dispatcher import Dispatcher
from python_backends.engines.trtllm.environment import prepare
from python_backends.engines.trtllm.library import Library, load_library
from python_backends.engines.trtllm.limits import Limits
from python_backends.engines.trtllm.loaded import Loaded
from python_backends.engines.trtllm.model_dir import ModelDir, read_model_dir
from python_backends.engines.trtllm.tickets import Issuer, Tickets
from python_backends.engines.trtllm.watchdog import Watchdog

log = logging.getLogger(__name__)

_TICK_S = 0.1
_EVENT_ROUND_S = 0.2  # silence that ends one round of reading events
_RESYNC_S = 1.0  # a busy engine is never silent: then everything is told after this time
_BLIND_AFTER_S = 5.0  # after the first request: events that have not come by then are not coming
_STATS_S = 2.0
_STILL_LOADING_S = 30.0  # between two lines in the log
_CLOSE_S = 10.0
_DROP_GRACE_S = 0.2  # TensorRT-LLM's clock for published KV starts a little after ours
_LONGEST_REASON = 500  # characters of an exception in our own message
_SALT = "baton start-up"


class TrtllmEngine:
    info: EngineInfo

    def __init__(self, deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes, model_path: Path) -> None:
        self._deployment = deployment
        self._worker = worker
        self._epoch = epoch
        self._key = key
        self._model_path = model_path
        config = deployment.engine.trtllm
        cache = config.of(worker.role).kv_cache_config
        self._has_prefix_cache = cache.enable_block_reuse
        self._has_events = cache.enable_block_reuse and cache.event_buffer_max_size > 0
        self._tells_blocks = self._has_events or not self._has_prefix_cache
        self._watchdog = Watchdog(config.stall_s, config.prompt_stall_s)
        self._thread: threading.Thread | None = None
        self._llm: Any = None
        self._dispatcher: Dispatcher | None = None
        self._outputs: list[Output] = []
        self._flushing = False
        self._reset_by = 0.0  # monotonic: when everything is told at the latest; 0: nobody asked
        self._load = WorkerLoad()
        self._chores: list[asyncio.Task[None]] = []

    # --- the Engine contract -------------------------------------------------------------------------------------------

    def start(self, on_outputs: OnOutputs) -> None:
        self._on_outputs = on_outputs
        config = self._deployment.engine.trtllm
        llm = config.of(self._worker.role)
        prepare(os.environ, self._worker.gpus, llm.num_gpus, config.environment)
        library = load_library()
        log.info("worker %s: TensorRT-LLM %s, GPUs %s", self._worker.name, library.version, self._worker.gpus)
        model = self._deployment.model
        directory = read_model_dir(
            self._model_path,
            dtype=model.dtype,
            kv_dtype=llm.kv_cache_config.dtype,
            block_size=self._deployment.engine.block_size,
            max_context=model.max_context,
            library_version=library.version,
        )
        self.info = EngineInfo(
            layout=directory.layout,
            fingerprint=directory.fingerprint,
            max_context=model.max_context,
            step_tokens=llm.max_num_tokens or DEFAULT_MAX_NUM_TOKENS,
            max_batch=max_batch(self._deployment, self._worker),
            warm_up=self._hands_over,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trtllm", daemon=True)
        self._thread.start()
        self._await_loading(asyncio.run_coroutine_threadsafe(self._open(directory, library), self._loop), library.version)

    def prefill(self, request: GenerateRequest) -> None:
        self._post(lambda dispatcher: dispatcher.arrive(request, None, prefill_only=True))

    def decode(self, request: GenerateRequest, ticket: bytes | None) -> None:
        self._post(lambda dispatcher: dispatcher.arrive(request, ticket, prefill_only=False))

    def abort(self, request_id: RequestId) -> None:
        self._post(lambda dispatcher: dispatcher.abort(request_id))

    def release(self, lease_id: str, end: LeaseEnd = LeaseEnd.UNWANTED) -> None:
        self._post(lambda dispatcher: dispatcher.release(lease_id, end))

    def resync(self) -> None:
        self._post(lambda _: self._request_reset())

    def load(self) -> WorkerLoad:
        if self._load.running_requests:
            self._on_loop(self._watchdog.turned)  # see whether it still turns
        return msgspec.structs.replace(self._load, fault=self._watchdog.fault(), tells_blocks=self._tells_blocks)

    def close(self) -> None:
        """A loop or an LLM that is stuck is left to the end of the process."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        _await_shut(asyncio.run_coroutine_threadsafe(self._shut(), self._loop))
        if self._llm is not None:
            closer = threading.Thread(target=self._llm.shutdown, name="trtllm-shutdown", daemon=True)
            closer.start()
            closer.join(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join(_CLOSE_S)
        if not thread.is_alive():
            self._loop.close()

    # --- loading -------------------------------------------------------------------------------------------------------

    @property
    def _hands_over(self) -> bool:
        return bool(self._deployment.engine.trtllm.cache_transceiver_config.backend)

    def _await_loading(self, opening: Future[None], version: str) -> None:
        """Raises ConfigError: whatever its constructor raises - pydantic, CUDA, MPI ... - the model can't be served so."""
        began, timeout_s = time.monotonic(), self._deployment.engine.trtllm.load_timeout_s
        where = f"worker {self._worker.name}: TensorRT-LLM {version}"
        while not wait([opening], min(_STILL_LOADING_S, timeout_s)).done:
            passed = time.monotonic() - began
            if passed >= timeout_s:
                raise ConfigError(
                    f"{where} has not loaded the model within {timeout_s:g} s (engine.trtllm.load_timeout_s); if it hangs in "
                    'MPI, set TLLM_WORKER_USE_SINGLE_PROCESS: "1" in engine.trtllm.environment'
                )
            log.info("%s is still loading the model after %.0f s", where, passed)
        error = opening.exception()
        if error is not None:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ConfigError(f"{where} does not load the model: {type(error).__name__}: {reason}") from error

    async def _open(self, directory: ModelDir, library: Library) -> None:
        await self._make_llm(library)
        loaded = Loaded(self._llm, library, self.info, directory.eos_token_ids)
        await self._first_request(loaded)
        self._events = BlockEvents(self.info.layout.block_size, partial(chain_root, self.info.fingerprint))
        limits = self._limits(await self._pool_blocks())
        self._dispatcher = Dispatcher(loaded, limits, Tickets(self._issuer(), loaded), self._events, self._watchdog, self._put)
        self._awake = asyncio.Event()
        self._events_wanted = asyncio.Event()
        self._on_outputs([], CacheChange(stored=[], removed=[], reset=True))
        self._chores.append(self._loop.create_task(self._tick()))
        if self._has_events:
            self._chores.append(self._loop.create_task(self._poll_events()))

    async def _make_llm(self, library: Library) -> None:
        """Minutes, on a thread of its own as in NVIDIA's Triton model: a constructor may not find a loop running around it.

        A daemon, unlike the threads of an executor: one that hangs must not keep a process that gave up from ending.
        """
        arguments = llm_arguments(self._deployment, self._worker, self._model_path)
        loading: Future[Any] = Future()
        loading.set_running_or_notify_cancel()  # nobody can cancel a constructor

        def make() -> None:
            try:
                loading.set_result(library.llm(**library.typed(arguments)))
            except Exception as error:  # whatever it is, _await_loading tells it
                loading.set_exception(error)

        threading.Thread(target=make, name="trtllm-load", daemon=True).start()
        self._llm = await asyncio.wrap_future(loading)

    async def _first_request(self, loaded: Loaded) -> None:
        """Before any client's: it compiles what is compiled on first use, and events and statistics flow only after it."""
        sampling = loaded.library.sampling_params(max_tokens=2, top_k=1, ignore_eos=True, detokenize=False)
        tokens = list(range(1, min(self.info.layout.block_size + 2, self.info.max_context - 2)))
        await loaded.llm.generate_async(tokens, sampling_params=sampling, streaming=False, cache_salt=_SALT)

    async def _pool_blocks(self) -> int:
        """Blocks of TensorRT-LLM's pool; 0 when it doesn't say."""
        async for stats in self._llm.get_stats_async(timeout=_STATS_S):
            blocks = int(stats.get("kvCacheStats", {}).get("maxNumBlocks", 0))
            if blocks:
                return blocks
        log.warning("worker %s: TensorRT-LLM does not tell the size of its KV cache", self._worker.name)
        return 0

    def _limits(self, pool_blocks: int) -> Limits:
        config = self._deployment.engine.trtllm
        return Limits(
            worker=self._worker.id,
            max_queue=self._deployment.engine.max_queue,
            max_batch=max_batch(self._deployment, self._worker),
            max_handoffs=config.max_handoffs,
            first_output_s=config.first_output_s,
            keep_s=kv_timeout_ms(self._deployment) / 1000 + _DROP_GRACE_S,
            total_blocks=pool_blocks,
        )

    def _issuer(self) -> Issuer:
        """A ticket is good for the lease without the time of a transfer, or half of it: KV must not go in mid-fetch."""
        transfer, place = self._deployment.transfer, place_of(self._deployment, self._worker)
        return Issuer(
            worker=place.worker,
            number=[worker.name for worker in self._deployment.workers].index(self._worker.name) + crc32(place.server.encode()),
            epoch=self._epoch,
            key=self._key,
            backend=self._deployment.engine.trtllm.cache_transceiver_config.backend,
            good_for_s=max(transfer.lease_s - transfer.timeout_s, transfer.lease_s / 2),
        )

    # --- calls from other threads --------------------------------------------------------------------------------------

    def _post(self, call: Callable[[Dispatcher], None]) -> None:
        self._on_loop(self._take, call)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        self._watchdog.posted()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _take(self, call: Callable[[Dispatcher], None]) -> None:
        self._watchdog.turned()
        if self._dispatcher is None:
            return
        call(self._dispatcher)
        self._awake.set()
        self._events_wanted.set()
        self._flush_soon()

    # --- deliveries, one per turn of the loop --------------------------------------------------------------------------

    def _put(self, output: Output) -> None:
        self._outputs.append(output)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._dispatcher is not None:
            self._load = self._dispatcher.load()
        outputs, self._outputs = self._outputs, []
        change = self._events.take_change()
        if outputs:
            self._events_wanted.set()
        if outputs or change:
            self._on_outputs(outputs, change)

    # --- chores on the loop --------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Deadlines and overdue KV; asleep while there is nothing to look after."""
        assert self._dispatcher is not None
        while True:
            if not self._dispatcher.busy:
                self._awake.clear()
                await self._awake.wait()
            await asyncio.sleep(_TICK_S)
            self._dispatcher.tick()
            self._flush_soon()

    async def _poll_events(self) -> None:
        """Read the events of the prefix cache while something is computed, and once more after it."""
        assert self._dispatcher is not None
        began = time.monotonic()
        while True:
            self._events_wanted.clear()
            try:
                async for event in self._llm.get_kv_cache_events_async(timeout=_EVENT_ROUND_S):
                    self._events.take(event)
                    self._flush_soon()
                    if 0 < self._reset_by <= time.monotonic():
                        self._tell_everything()
            except Exception as error:  # an API in beta: without it the worker still serves
                log.warning("worker %s: KV cache events can't be read: %s", self._worker.name, error)
                self._tells_blocks = False
                return
            self._end_of_round(time.monotonic() - began)
            undecided = not self._events.heard and self._tells_blocks
            if not self._dispatcher.computing and not undecided:
                await self._events_wanted.wait()

    def _end_of_round(self, passed_s: float) -> None:
        if self._events.heard:
            self._tells_blocks = True
        elif self._tells_blocks and passed_s > _BLIND_AFTER_S:
            log.warning("worker %s: TensorRT-LLM sends no KV cache events; prefixes can't be routed to it", self._worker.name)
            self._tells_blocks = False
        if self._reset_by:
            self._tell_everything()

    def _request_reset(self) -> None:
        """After the events that are on their way; at once where none come."""
        if self._has_events and self._tells_blocks:
            self._reset_by = self._reset_by or time.monotonic() + _RESYNC_S
        else:
            self._tell_everything()

    def _tell_everything(self) -> None:
        self._reset_by = 0.0
        self._flush()
        self._on_outputs([], self._events.everything())

    async def _shut(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.fail_all(TritonCode.UNAVAILABLE, f"worker {self._worker.name} is shutting down")
            self._flush()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}  # chores, legs, and an opening that was given up
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _await_shut(future: Future[None]) -> None:
    try:
        future.result(_CLOSE_S)
    except Exception as error:  # also its time-out: the loop may be stuck
        log.warning("closing: %s", error or "the event loop does not answer")


def create(deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> TrtllmEngine:
    """Raises ConfigError when deployment or model directory are wrong; nothing is loaded yet."""
    deployment = deployment.with_worker(worker)  # its role may have been changed since
    check_trtllm(deployment)
    _warn(deployment)
    return TrtllmEngine(deployment, worker, epoch, key, resolve_model(deployment.model.path))


def _warn(deployment: Deployment) -> None:
    """Of what is allowed and known to go wrong."""
    prefill, decode = deployment.engine.trtllm.prefill, deployment.engine.trtllm.decode
    if not any(worker.role is Role.PREFILL for worker in deployment.workers):
        return
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        theirs, ours = getattr(prefill, name), getattr(decode, name)
        if theirs != ours:
            log.warning(
                "%s is %d for prefill and %d for decode: wrong text was reported for unequal sizes (TensorRT-LLM #6507); "
                "compare texts with scripts/verify-gpu before trusting it",
                name,
                theirs,
                ours,
            )
    if prefill.speculative_config != decode.speculative_config:
        log.warning("speculative_config differs between prefill and decode: KV of draft layers may be missing on one side")
