"""Small requests of the router's own, which show that workers work. They go the way of all requests, with their own salt.

They are shorter than a block, so no prefix cache keeps anything of them, and they are served before others.
"""

from __future__ import annotations

import asyncio
import random

from python_backends.core.errors import TritonCode
from python_backends.core.messages import DecodeWork, KVReady, Output, PrefillDone, PrefillWork, RequestFailed, TokenChunk, Work
from python_backends.core.types import GenerateRequest, LeaseEnd, RequestId, Role, SamplingParams
from router.fleet import WorkerView
from router.house import House
from router.mailroom import Box
from router.run import lease_end

_FIRST = -(1 << 31)  # priority: lower is served first

MOVED = ("verified", "unchecked")
"""Verdicts on a handoff whose KV was used."""


class Canary:
    """Belongs to the router's event loop."""

    def __init__(self, house: House, salt: str) -> None:
        self._house = house
        self._salt = salt

    async def compute(self, worker: WorkerView, timeout_s: float) -> str:
        """Have one token computed by this worker alone: no KV is published or fetched. Returns why it wasn't, or nothing."""
        request = self._request(worker, "a", self._prompt(worker), [], timeout_s, max_tokens=1)
        work = PrefillWork(request) if worker.role is Role.PREFILL else DecodeWork(request)
        last = (await self._ask(worker, work, timeout_s))[-1]
        return last.message if isinstance(last, RequestFailed) else ""

    async def hand_over(
        self, prefill: WorkerView, decode: WorkerView, timeout_s: float, prompt: list[int] | None = None
    ) -> str:
        """One request from worker to worker. Returns the decode worker's verdict on the KV, or why there is none."""
        prompt = prompt or self._prompt(prefill)
        request = self._request(prefill, "p", prompt, [], timeout_s)
        (done,) = await self._ask(prefill, PrefillWork(request), timeout_s)
        if not isinstance(done, PrefillDone) or done.ticket is None:
            return _failure(done)
        work = DecodeWork(self._request(decode, "d", prompt, [done.token_id], timeout_s), done.ticket)
        outputs = await self._ask(decode, work, timeout_s)
        report = next((output.report for output in outputs if isinstance(output, KVReady)), None)
        if done.lease_id is not None:
            end = LeaseEnd.UNWANTED if report is None else lease_end(report)
            self._house.calls.release(prefill.id, done.lease_id, end)
        return report.digest if report is not None else _failure(outputs[-1])

    def _prompt(self, worker: WorkerView) -> list[int]:
        """Half a block, another one each time."""
        length = max(worker.heartbeat.layout.block_size // 2, 1)
        return random.choices(range(self._house.tokenizer.vocab_size), k=length)

    def _request(
        self, worker: WorkerView, leg: str, prompt: list[int], output: list[int], timeout_s: float, max_tokens: int = 2
    ) -> GenerateRequest:
        request_id = RequestId(f"{self._house.new_request_id()}.c{leg}")
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True)
        return GenerateRequest(request_id, prompt, sampling, self._house.clock.now() + timeout_s, output, self._salt, _FIRST)

    async def _ask(self, worker: WorkerView, work: Work, timeout_s: float) -> list[Output]:
        """All outputs up to the last one; a RequestFailed of our own when that does not come in time."""
        outputs: list[Output] = []
        request_id = work.request.request_id
        late = RequestFailed(request_id, TritonCode.UNAVAILABLE, "no answer in time", retryable=True)
        with self._house.mailroom.box(request_id, worker.id) as box:
            self._house.calls.submit(worker.id, work)
            worker.canaries += 1  # or it would seem to come from another router
            try:
                while not outputs or not _is_last(outputs[-1]):
                    outputs.append(await _next(box, timeout_s) or late)
            finally:
                worker.canaries -= 1
                if not outputs or not isinstance(outputs[-1], PrefillDone | TokenChunk):
                    self._house.calls.abort(worker.id, request_id)
        return outputs


async def _next(box: Box, timeout_s: float) -> Output | None:
    """None: nothing came in time. Not wait_for: before Python 3.12 it loses a cancellation that comes with the output."""
    getting = asyncio.ensure_future(box.get())
    try:
        await asyncio.wait({getting}, timeout=timeout_s)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()


def _is_last(output: Output) -> bool:
    return isinstance(output, PrefillDone | RequestFailed) or (
        isinstance(output, TokenChunk) and output.finish_reason is not None
    )


def _failure(output: Output) -> str:
    return "failed" if not isinstance(output, RequestFailed) else f"failed ({output.message})"
