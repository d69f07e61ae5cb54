"""Where workers' outputs find the request that waits for them: one box per request id, all on the event loop.

A worker that is lost empties into its boxes a last output that says so; nobody waits for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from python_backends.core.errors import TritonCode
from python_backends.core.messages import Output, RequestFailed
from python_backends.core.types import RequestId, WorkerId


class Box:
    """Outputs for one request at one worker, in order."""

    def __init__(self, request_id: RequestId, worker: WorkerId) -> None:
        self.request_id = request_id
        self.worker = worker
        self.worker_died = False
        self.not_taken = False  # the work could not be handed over
        self.never_tried = False  # and that since the worker stood still already: it has not died of this
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()

    async def get(self) -> Output:
        return await self._outputs.get()

    def rest(self) -> list[Output]:
        """Those that have come and nobody has got."""
        return [self._outputs.get_nowait() for _ in range(self._outputs.qsize())]

    def put(self, output: Output) -> None:
        self._outputs.put_nowait(output)


class Mailroom:
    def __init__(self) -> None:
        self._boxes: dict[RequestId, Box] = {}

    @contextmanager
    def box(self, request_id: RequestId, worker: WorkerId) -> Iterator[Box]:
        """A box that is there as long as somebody waits."""
        box = self._boxes[request_id] = Box(request_id, worker)
        try:
            yield box
        finally:
            del self._boxes[request_id]

    def deliver(self, outputs: Iterable[Output]) -> list[Output]:
        """Put outputs into their boxes. Returns those that nobody waits for any more."""
        unclaimed = []
        for output in outputs:
            box = self._boxes.get(output.request_id)
            if box is None:
                unclaimed.append(output)
            else:
                box.put(output)
        return unclaimed

    def lose(self, worker: WorkerId, why: str, *, died: bool) -> list[RequestId]:
        """Tell everybody who waits for this worker. Returns what it had been asked for. `died`: not by anybody's will."""
        lost = [box for box in self._boxes.values() if box.worker == worker]
        for box in lost:
            box.worker_died = died and not box.never_tried
            box.put(RequestFailed(box.request_id, TritonCode.UNAVAILABLE, why, retryable=True))
        return [box.request_id for box in lost]

    def fail(self, request_ids: Iterable[RequestId], why: str, *, never_tried: bool = False) -> None:
        """Work that could not be handed over. `never_tried`: its worker stood still before."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            if request_id in self._boxes:
                self._boxes[request_id].not_taken = True
                self._boxes[request_id].never_tried = never_tried
        self.deliver(RequestFailed(id, TritonCode.UNAVAILABLE, why, retryable=True) for id in request_ids)
