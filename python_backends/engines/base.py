"""The contract between a worker and its engine, and the registry of engines.

Promises of the caller
- `start` is called once, before anything else; `close` is called at the end, also after a failed start, and may be
  called twice. No other call is made concurrently with `start` or after `close`.
- `prefill`, `decode`, `abort` and `release` may be called from any thread; they hand over and return at once.
- Request ids are never used twice, not even for a retry.

Promises of the engine
- Every request handed over ends in exactly one of: PrefillDone, a TokenChunk with finish_reason, RequestFailed - or in
  silence, if it was aborted. Aborting an unknown, finished or aborted request is a no-op; aborting a request before it
  arrives makes it be ignored on arrival.
- After an abort, compute for the request stops within one step and its blocks, leases included, are free within 1 s.
  An engine that moves KV itself may be unable to take published KV back: it is free within the lease and 1 s then.
- A ticket that can't be used costs a recompute, never an error and never wrong text. KVReady says which.
- Outputs are delivered by `on_outputs` once per engine step, in order, from one thread that belongs to the engine.
- Published KV stays intact until its lease is released or expires; then it is reused and the ticket is worthless.
- Sampling is position-deterministic: the token at output position i depends on the seed and i, not on batch or worker.
  Engines that are not ours say in their own docstring how much of this they keep.
- An engine that can't go on says so in `load().fault`, and does not pretend to be well.

What an engine may leave out
- StepReporter: how long its steps take. The router predicts from it; of a worker without it, it assumes what it knows of
  others of the same model, and learns from the times of its requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.layout import KVLayout
from python_backends.core.messages import Output, StepSample
from python_backends.core.types import BlockHash, Epoch, GenerateRequest, LeaseEnd, RequestId, StoreCounts, WorkerLoad


class CacheChange(msgspec.Struct, frozen=True):
    """Full blocks that entered or left the prefix cache since the last delivery."""

    stored: list[bytes]
    removed: list[bytes]
    reset: bool = False


OnOutputs = Callable[[Sequence[Output], CacheChange | None], None]


class EngineInfo(msgspec.Struct, frozen=True):
    """Known once `start` has returned."""

    layout: KVLayout
    fingerprint: str
    max_context: int  # tokens
    step_tokens: int  # computed in one step, at most
    max_batch: int  # requests in one step
    warm_up: bool = False  # the first handoff of each pair of workers is slow
    family: str = ""  # as in Heartbeat
    cores: str = ""  # as in Heartbeat


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def start(self, on_outputs: OnOutputs) -> None:
        """Load the model; ready when it returns. Raises ConfigError with the fix."""

    def prefill(self, request: GenerateRequest) -> None:
        """Compute the prompt, sample one token, publish the KV under a lease: PrefillDone."""

    def decode(self, request: GenerateRequest, ticket: bytes | None) -> None:
        """Produce tokens to the end: KVReady, then TokenChunks. Without a ticket the prompt is computed here."""

    def abort(self, request_id: RequestId) -> None:
        """Stop the request and give back all it holds, its published KV included."""

    def release(self, lease_id: str, end: LeaseEnd = LeaseEnd.UNWANTED) -> None:
        """End a lease. Unknown or ended leases are a no-op."""

    def resync(self) -> None:
        """Deliver a CacheChange with `reset` that lists the whole prefix cache."""

    def load(self) -> WorkerLoad:
        """A snapshot, never older than one step. Any thread may ask, and gets an answer while the engine is stuck."""

    def close(self) -> None:
        """Stop computing, end all leases, free memory. Idempotent."""


@runtime_checkable
class StoreReader(Protocol):
    """What an engine offers besides, if it reads KV from store tiers (kv/store). May be called from any thread."""

    @property
    def node_place(self) -> str:
        """Where users of the node store meet; empty without one."""

    def store_counts(self) -> dict[str, StoreCounts]:
        """By tier; empty without stores."""

    def locate(self, hashes: Sequence[BlockHash], on_located: Callable[[int], None]) -> None:
        """Tell `on_located`, from another thread, how many leading blocks the stores have and it pays to fetch."""


@runtime_checkable
class Lender(Protocol):
    """What an engine offers besides, if it lends its cached blocks and borrows others'. May be called from any thread."""

    def lend(self, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        """Publish the leading blocks that are cached, under a lease of this request: Lent."""

    def prefill_with(self, request: GenerateRequest, loan: bytes) -> None:
        """As `prefill`, with a ticket for the KV of the first blocks: KVReady when the loan is no longer needed.

        A loan that can't be used, or is slower to fetch than to compute, costs nothing but itself.
        """

    def follow(self, request: GenerateRequest, loan: bytes) -> None:
        """Fetch the loan's blocks into the prefix cache, where there is room for them at once: Followed.

        request: as FollowWork has it.
        """


@runtime_checkable
class StepReporter(Protocol):
    """An engine that tells how long its steps take."""

    def calibration(self) -> Sequence[StepSample]:
        """A few steps of different shapes, timed once by `start`; empty before it."""

    def take_steps(self) -> list[StepSample]:
        """The steps since the last call, oldest first; when they are many, only the newest. From any thread."""


EngineFactory = Callable[[Deployment, WorkerConfig, Epoch, bytes], Engine]

_ENGINES = {
    "torch": "python_backends.engines.torch.engine:create",
    "trtllm": "python_backends.engines.trtllm.engine:create",
    "fake": "python_backends.engines.fake:create",
}


def create_engine(deployment: Deployment, worker: WorkerConfig, epoch: Epoch, key: bytes) -> Engine:
    """Import only the engine in use. `key` signs tickets."""
    location = _ENGINES.get(worker.engine)
    if location is None:
        raise ConfigError(f"workers: engine {worker.engine!r} is unknown; known are {', '.join(sorted(_ENGINES))}")
    module, _, name = location.partition(":")
    factory: EngineFactory = getattr(importlib.import_module(module), name)
    return factory(deployment, worker, epoch, key)
