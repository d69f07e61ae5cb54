"""What the router's story needs of the outside, and nothing more: Triton and ZeroMQ in production, plain functions in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from python_backends.core.errors import BatonError
from python_backends.core.messages import Work
from python_backends.core.types import BlockHash, RequestId, WorkerId
from router.types import Outcome, Piece, Proof, Way

if TYPE_CHECKING:
    from router.house import House


class Calls(Protocol):
    """Everything said to workers. All return at once; outputs come to the mailroom.

    Work that can't be handed over ends as a retryable RequestFailed in its box.
    """

    def submit(self, worker: WorkerId, work: Work) -> None: ...

    def abort(self, worker: WorkerId, request_id: RequestId) -> None: ...

    def release(self, worker: WorkerId, lease_id: str) -> None: ...

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...


class Reply(Protocol):
    """One client's answer. Exactly one of a last `send` (its piece has finish_reason) or `fail` ends it."""

    def send(self, piece: Piece) -> None: ...

    def fail(self, error: BatonError) -> None: ...


class Observer(Protocol):
    """Who counts. Called on the event loop; must not block."""

    def refresh(self, house: House) -> None:
        """Take in the state of the fleet; called a few times a second."""

    def decided(self, way: Way) -> None: ...

    def retried(self) -> None: ...

    def ended(self, outcome: Outcome, proof: Proof | None) -> None: ...
