"""An engine called directly, in this process: what serving is compared with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition
from types import TracebackType

from python_backends.core.config import Deployment
from python_backends.core.errors import EngineFailure
from python_backends.core.messages import Output, RequestFailed, TokenChunk
from python_backends.core.types import Epoch, GenerateRequest, RequestId, SamplingParams
from python_backends.engines.base import CacheChange, create_engine

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class BareRun:
    """ttft_ms: of the first request that had its first token."""

    tokens_per_second: float
    ttft_ms: float


class BareEngine:
    """The first worker's engine of a deployment. A context manager: loaded on entry, closed on exit."""

    def __init__(self, deployment: Deployment) -> None:
        self._engine = create_engine(deployment, deployment.workers[0], Epoch(1), secrets.token_bytes(32))
        self._news = Condition()
        self._running: set[RequestId] = set()
        self._tokens = 0
        self._first = 0.0
        self._failure = ""
        self._runs = 0

    def __enter__(self) -> BareEngine:
        self._engine.start(self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._engine.close()

    def run(self, prompts: Sequence[list[int]], max_tokens: int) -> BareRun:
        """All prompts at once, greedy, exactly so many tokens each. Raises EngineFailure."""
        self._runs += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True).validated()
        ids = [RequestId(f"{self._runs}.{number}") for number in range(len(prompts))]
        with self._news:
            self._running, self._tokens, self._first, self._failure = set(ids), 0, 0.0, ""
        began = time.monotonic()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._engine.decode(GenerateRequest(request_id, prompt, sampling, time.monotonic() + _TIMEOUT_S), None)
        with self._news:
            ended = self._news.wait_for(lambda: not self._running, _TIMEOUT_S)
            if self._failure or not ended:
                raise EngineFailure(self._failure or "the engine does not answer")
            elapsed = time.monotonic() - began
            return BareRun(self._tokens / elapsed, (self._first - began) * 1e3)

    def _take(self, outputs: Sequence[Output], change: CacheChange | None) -> None:
        """On the engine's thread."""
        now = time.monotonic()
        with self._news:
            for output in outputs:
                if isinstance(output, TokenChunk):
                    self._tokens += len(output.token_ids)
                    self._first = self._first or now
                if isinstance(output, RequestFailed):
                    self._failure = output.message
                if isinstance(output, RequestFailed) or (isinstance(output, TokenChunk) and output.finish_reason):
                    self._running.discard(output.request_id)
            self._news.notify_all()
