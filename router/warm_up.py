"""First handoffs between workers whose engines say that those are slow (TensorRT-LLM connects lazily), before clients'.

Each pair of a prefill and a decode worker of one model hands over a short prompt once per pair of lives. It goes the way
that requests go, under a salt of its own, so it also tells at once when KV can't move between two workers.
"""

from __future__ import annotations

import asyncio
import logging
import time

from python_backends.core.types import Epoch, Role
from router.canary import MOVED, Canary
from router.fleet import WorkerView
from router.house import House

log = logging.getLogger(__name__)

_SALT = "baton warm-up"
_TIMEOUT_S = 60.0  # a first handoff may compile kernels on its way
_TRIES = 3
_PAUSE_S = 1.0
_LOOK_EVERY_S = 60.0


class WarmUp:
    """Belongs to the router's event loop."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._canary = Canary(house, _SALT)
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
                if prefill.exchanges_with(decode) and (prefill.epoch, decode.epoch) not in self._seen:
                    return prefill, decode
        return None

    async def _warm(self, prefill: WorkerView, decode: WorkerView) -> None:
        for attempt in range(_TRIES):
            began = time.monotonic()
            verdict = await self._canary.hand_over(prefill, decode, _TIMEOUT_S, self._prompt(prefill))
            self._house.observer.warmed(verdict)
            pair = f"{prefill.id} -> {decode.id}"
            if verdict in MOVED:
                log.info("first handoff %s took %.2f s", pair, time.monotonic() - began)
                return
            log.warning("first handoff %s failed, try %d of %d: %s", pair, attempt + 1, _TRIES, verdict)
            await asyncio.sleep(_PAUSE_S)
            if not prefill.up or not decode.up:
                return
        log.error("KV does not move from %s to %s: their requests will be recomputed", prefill.id, decode.id)

    def _prompt(self, worker: WorkerView) -> list[int]:
        """More than a block."""
        size = worker.heartbeat.layout.block_size
        return [token % self._house.tokenizer.vocab_size for token in range(1, size + 2)]
