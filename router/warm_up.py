"""First handoffs between workers whose engines say that those are slow (TensorRT-LLM connects lazily), before clients'.

Each pair of a prefill and a decode worker of one model hands over a short prompt once per pair of lives. It goes the way
that requests go, under a salt of its own, so it also tells at once when KV can't move between two workers.
"""

from __future__ import annotations

import asyncio
import logging
import time

from python_backends.core.errors import TritonCode
from python_backends.core.messages import DecodeWork, KVReady, Output, PrefillDone, PrefillWork, RequestFailed, TokenChunk, Work
from python_backends.core.types import Epoch, GenerateRequest, LeaseEnd, RequestId, Role, SamplingParams
from router.fleet import WorkerView
from router.house import House
from router.run import lease_end

log = logging.getLogger(__name__)

_SALT = "baton warm-up"
_SAMPLING = SamplingParams(max_tokens=2, temperature=0, seed=0, ignore_eos=True)  # two tokens, so that there is a handoff
_TIMEOUT_S = 60.0  # a first handoff may compile kernels on its way
_TRIES = 3
_PAUSE_S = 1.0
_LOOK_EVERY_S = 60.0
_MOVED = ("verified", "unchecked")


class WarmUp:
    """Belongs to the router's event loop."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._seen: set[tuple[Epoch, Epoch]] = set()

    async def watch(self) -> None:
        """Warm new pairs, one after the other, until cancelled."""
        while True:
            pair = self._cold_pair()
            if pair is None:
                await self._house.fleet.wait_for_change(_LOOK_EVERY_S)
                continue
            self._seen.add((pair[0].epoch, pair[1].epoch))
            await self._warm(*pair)

    def _cold_pair(self) -> tuple[WorkerView, WorkerView] | None:
        workers = [worker for worker in self._house.fleet.up() if worker.heartbeat.warm_up]
        for prefill in (worker for worker in workers if worker.role is Role.PREFILL):
            for decode in (worker for worker in workers if worker.role is Role.DECODE):
                same = prefill.heartbeat.fingerprint == decode.heartbeat.fingerprint
                if same and (prefill.epoch, decode.epoch) not in self._seen:
                    return prefill, decode
        return None

    async def _warm(self, prefill: WorkerView, decode: WorkerView) -> None:
        for attempt in range(_TRIES):
            began = time.monotonic()
            verdict = await self._hand_over(prefill, decode)
            self._house.observer.warmed(verdict)
            pair = f"{prefill.id} -> {decode.id}"
            if verdict in _MOVED:
                log.info("first handoff %s took %.2f s", pair, time.monotonic() - began)
                return
            log.warning("first handoff %s failed, try %d of %d: %s", pair, attempt + 1, _TRIES, verdict)
            await asyncio.sleep(_PAUSE_S)
            if not prefill.up or not decode.up:
                return
        log.error("KV does not move from %s to %s: their requests will be recomputed", prefill.id, decode.id)

    async def _hand_over(self, prefill: WorkerView, decode: WorkerView) -> str:
        """One request from worker to worker. Returns the decode worker's verdict on the KV, or why there is none."""
        size = prefill.heartbeat.layout.block_size
        prompt = [token % self._house.tokenizer.vocab_size for token in range(1, size + 2)]
        request = self._request("p", prompt, [])
        (done,) = await self._ask(prefill, PrefillWork(request))
        if not isinstance(done, PrefillDone) or done.ticket is None:
            return _failure(done)
        outputs = await self._ask(decode, DecodeWork(self._request("d", prompt, [done.token_id]), done.ticket))
        report = next((output.report for output in outputs if isinstance(output, KVReady)), None)
        if done.lease_id is not None:
            end = LeaseEnd.UNWANTED if report is None else lease_end(report)
            self._house.calls.release(prefill.id, done.lease_id, end)
        return report.digest if report is not None else _failure(outputs[-1])

    def _request(self, leg: str, prompt: list[int], output: list[int]) -> GenerateRequest:
        request_id = RequestId(f"{self._house.new_request_id()}.w{leg}")
        return GenerateRequest(request_id, prompt, _SAMPLING, time.time() + _TIMEOUT_S, output, _SALT)

    async def _ask(self, worker: WorkerView, work: Work) -> list[Output]:
        """All outputs up to the last one; a RequestFailed of our own when that does not come in time."""
        outputs: list[Output] = []
        request_id = work.request.request_id
        with self._house.mailroom.box(request_id, worker.id) as box:
            self._house.calls.submit(worker.id, work)
            try:
                while not outputs or not _is_last(outputs[-1]):
                    outputs.append(await asyncio.wait_for(box.get(), _TIMEOUT_S))
            except asyncio.TimeoutError:
                self._house.calls.abort(worker.id, request_id)
                outputs.append(RequestFailed(request_id, TritonCode.UNAVAILABLE, "no answer in time", retryable=True))
        return outputs


def _is_last(output: Output) -> bool:
    return isinstance(output, PrefillDone | RequestFailed) or (
        isinstance(output, TokenChunk) and output.finish_reason is not None
    )


def _failure(output: Output) -> str:
    return "failed" if not isinstance(output, RequestFailed) else f"failed ({output.message})"
