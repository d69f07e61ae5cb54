"""What the router's story needs of the outside, and nothing more: Triton and ZeroMQ in production, plain functions in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from python_backends.core.errors import BatonError
from python_backends.core.messages import Work
from python_backends.core.types import BlockHash, Epoch, LeaseEnd, RequestId, WorkerId
from router.fleet import WorkerView
from router.journal import Record
from router.lifecycle import State
from router.types import Piece, Way


@dataclass(frozen=True, slots=True)
class Destination:
    """A worker as work is sent to it: its Triton model, HOST:PORT of its server's gRPC (empty: this server), its life."""

    worker: WorkerId
    model: str
    server: str
    epoch: Epoch


class Failed(Protocol):
    """Told, on any thread, that work could not be handed to a worker.

    `wrecked`: its process stood still, and must end before it goes on. Triton 24.10 gives up a call that gets no answer within
    a second and frees its memory, but leaves the message that points there. A process that takes it then spoils the memory
    that it shares with the server, which aborts.
    """

    def __call__(self, why: str, *, wrecked: bool = False) -> None: ...


class Calls(Protocol):
    """Everything said to workers. All return at once; outputs come to the mailroom.

    Work that can't be handed over ends as a retryable RequestFailed in its box.
    """

    def submit(self, worker: WorkerId, work: Work) -> None: ...

    def abort(self, worker: WorkerId, request_id: RequestId) -> None: ...

    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None: ...

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...


class Reply(Protocol):
    """One client's answer. Exactly one of a last `send` (its piece has finish_reason) or `fail` ends it."""

    def send(self, piece: Piece) -> None: ...

    def fail(self, error: BatonError) -> None: ...


class Ending(Protocol):
    """What whoever started the server says about its end, asked a few times a second. Triton does not tell its models."""

    def draining(self) -> bool:
        """Requests that run are to end, and no others to begin."""

    def drained(self) -> None:
        """Told when none runs any more."""

    def stopping(self) -> bool:
        """Nothing is waited for any more."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The house at one moment. `workers` are its own views: read them at once and keep none."""

    states: Mapping[State, int]  # live requests
    requests: int
    waiting: int  # requests that are not at a worker yet
    queued_tokens: int
    index_blocks: int
    workers: Sequence[WorkerView]
    longest_step_ms: float = 0.0  # of streams alone, where the deployment has a target between tokens; 0: it has none


class Observer(Protocol):
    """Who counts. Called on the event loop; must not block."""

    def refresh(self, snapshot: Snapshot) -> None:
        """Take in how things stand; called a few times a second."""

    def decided(self, way: Way) -> None: ...

    def retried(self) -> None: ...

    def warmed(self, verdict: str) -> None:
        """A first handoff between two workers was tried: what became of the KV (KVReport.digest), or why nothing did."""

    def probed(self, worker: WorkerView, verdict: str) -> None:
        """A canary to the worker has ended (router.canary.Verdict)."""

    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None:
        """A canary was handed from one to the other; verdict as in `warmed`."""

    def tokens(self, count: int, gap_s: float) -> None:
        """A running request has so many more tokens, so long after those before."""

    def ended(self, record: Record) -> None: ...
