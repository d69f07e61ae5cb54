"""What generate_async returns: awaitable, async-iterable, cumulative."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from ..sampling_params import SamplingParams


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None


@dataclass
class Response:
    """From the executor's thread: new tokens of a request, or why there are no more."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None  # of all tokens so far
    finish_reason: str | None = None
    stop_token: int | None = None  # a stop_token_id was hit: it is taken off the tokens
    disaggregated_params: Any = None
    perf_metrics: Any = None
    error: Exception | None = None

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class GenerationResult:
    def __init__(
        self, request_id: int, prompt_token_ids: list[int], sampling_params: SamplingParams, abort: Callable[[int], None]
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.outputs = [CompletionOutput()]
        self.finished = False
        self._abort = abort
        self._aborted = False
        self._queue: queue.SimpleQueue[Response] = queue.SimpleQueue()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._aqueue: asyncio.Queue[Response] | None = asyncio.Queue() if self._loop else None

    def abort(self) -> None:
        self._abort(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> GenerationResult:
        while not self.finished:
            self._take(self._queue.get(timeout=timeout))
        return self

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        return self._aresult().__await__()

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self.finished:
            raise StopAsyncIteration
        await self._step()
        return self

    async def _aresult(self) -> GenerationResult:
        while not self.finished:
            await self._step()
        return self

    async def _step(self) -> None:
        assert self._aqueue is not None, "the asyncio event loop was not present when the request was made"
        self._take(await self._aqueue.get())

    def put(self, response: Response) -> None:
        """On the executor's thread."""
        if self._loop is None or self._aqueue is None:
            self._queue.put(response)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._aqueue.put_nowait, response)

    def _take(self, response: Response) -> None:
        self.finished = response.final
        if response.error is not None:
            raise response.error
        output = self.outputs[0]
        output.token_ids.extend(response.token_ids)
        if response.disaggregated_params is not None:
            output.disaggregated_params = response.disaggregated_params
        if response.logprobs is not None:
            output.logprobs = response.logprobs
            if response.finish_reason != "cancelled":
                assert len(output.logprobs) == len(output.token_ids)
        output.request_perf_metrics = response.perf_metrics or output.request_perf_metrics
        output.finish_reason = response.finish_reason
        if response.stop_token is not None:
            output.stop_reason = response.stop_token
            output.token_ids = output.token_ids[:-1]
