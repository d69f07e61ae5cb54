"""An engine under test, driven as a worker drives it; outputs are collected per request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Condition
from typing import Any

from python_backends.core.messages import KVReady, Output, PrefillDone, RequestFailed, TokenChunk
from python_backends.core.types import GenerateRequest, KVReport, RequestId, SamplingParams
from python_backends.engines.base import CacheChange, Engine

KEY = b"k" * 32
TIMEOUT_S = 60.0


def make_request(
    request_id: str,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    salt: str = "",
    timeout_s: float = 120.0,
    **sampling: Any,
) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "seed": 7} | sampling))
    return GenerateRequest(
        RequestId(request_id), list(prompt), params.validated(), time.monotonic() + timeout_s, list(output), salt
    )


class EngineBench:
    """Waits on what the engine's thread delivers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[Output]] = {}
        self.changes: list[CacheChange] = []
        self._news = Condition()
        engine.start(self._deliver)

    def _deliver(self, outputs: Sequence[Output], change: CacheChange | None) -> None:
        with self._news:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            if change is not None:
                self.changes.append(change)
            self._news.notify_all()

    def wait(self, ready: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        with self._news:
            assert self._news.wait_for(ready, timeout_s), "the engine did not deliver in time"

    def wait_load(self, ready: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """For conditions that no output announces."""
        end = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < end, f"not in time: {self.engine.load()}"
            time.sleep(0.005)

    def last(self, request_id: str) -> Output | None:
        outputs = self.outputs.get(request_id)
        if not outputs:
            return None
        output = outputs[-1]
        ended = isinstance(output, PrefillDone | RequestFailed) or (
            isinstance(output, TokenChunk) and output.finish_reason is not None
        )
        return output if ended else None

    def prefill(self, request: GenerateRequest) -> PrefillDone:
        self.engine.prefill(request)
        self.wait(lambda: self.last(request.request_id) is not None)
        done = self.last(request.request_id)
        assert isinstance(done, PrefillDone), done
        return done

    def decode(self, request: GenerateRequest, ticket: bytes | None = None) -> tuple[list[int], KVReport]:
        self.engine.decode(request, ticket)
        result = self.result(request.request_id)
        first = next(output for output in self.outputs[request.request_id] if isinstance(output, TokenChunk))
        assert first.start == len(request.output_ids)
        return result

    def result(self, request_id: str) -> tuple[list[int], KVReport]:
        """Tokens and final report of a decode request, once it has ended."""
        self.wait(lambda: self.last(request_id) is not None)
        last = self.last(request_id)
        assert isinstance(last, TokenChunk), last
        assert last.report is not None
        chunks = [output for output in self.outputs[request_id] if isinstance(output, TokenChunk)]
        for before, after in pairwise(chunks):
            assert after.start == before.start + len(before.token_ids), "a chunk is not where the one before it ends"
        return [token for chunk in chunks for token in chunk.token_ids], last.report

    def kv_ready(self, request_id: str) -> KVReady | None:
        return next((o for o in self.outputs.get(request_id, []) if isinstance(o, KVReady)), None)

    def assert_nothing_held(self) -> None:
        self.wait_load(self._holds_nothing)

    def _holds_nothing(self) -> bool:
        load = self.engine.load()
        held = load.held_blocks, load.active_leases, load.running_requests, load.queued_requests
        return not any(held) and load.free_blocks + load.cached_blocks == load.total_blocks
