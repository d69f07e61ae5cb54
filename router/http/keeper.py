"""Who restarts the router. The router watches over the workers; this front end watches over the router.

Triton does not notice that a model's process has died. As for workers, unload and load bring a new one. A router that lives and
says nothing is killed first: Triton would wait for its requests, hence keep it for ever, and their clients waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import httpx2

from router.door.client import DoorClient

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 1.0  # without a router that was there before; then it is restarted
_FIRST_PATIENCE_S = 10.0  # until the first one is found, once Triton serves, which it does with all models loaded
_BACKOFF_S = 10.0  # between tries
_TIMEOUT_S = 60.0  # for one load
_LIVE_TIMEOUT_S = 1.0


class RouterKeeper:
    def __init__(self, triton: str, headers: Mapping[str, str]) -> None:
        """`triton`: HOST:PORT of its HTTP service, started with --model-control-mode=explicit; it opens to `headers`."""
        self._headers = dict(headers)
        self._silent: int | None = None  # pidfd of a router that was given up alive
        self._repository = f"http://{triton}/v2/repository/models/router"
        self._live = f"http://{triton}/v2/health/live"

    def fell_silent(self, pidfd: int) -> None:
        """The router's process lives and does not answer: it is killed unless it does so soon."""
        self._forget_silent()
        self._silent = os.dup(pidfd)

    @asynccontextmanager
    async def watching(self, door: DoorClient) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch(door))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, door: DoorClient) -> None:
        while door.router is None and not (door.alone_s > _FIRST_PATIENCE_S and await self._serves()):  # the server starts
            await asyncio.sleep(_LOOK_EVERY_S)
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if door.alone_s > _PATIENCE_S:
                log.warning("the router is gone; restarting it")
                self._end_silent()
                await self._restart()
                await _router_or_timeout(door, _BACKOFF_S)

    def _end_silent(self) -> None:
        if self._silent is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._silent, signal.SIGKILL)
        self._forget_silent()

    def _forget_silent(self) -> None:
        if self._silent is not None:
            os.close(self._silent)
            self._silent = None

    async def _serves(self) -> bool:
        """Whether Triton does. Then a router that is not there has died, maybe with the front end that had kept it."""
        try:
            async with httpx2.AsyncClient(timeout=_LIVE_TIMEOUT_S) as client:
                return bool((await client.get(self._live)).is_success)
        except httpx2.HTTPError:
            return False

    async def _restart(self) -> None:
        try:
            async with httpx2.AsyncClient(timeout=_TIMEOUT_S, headers=self._headers) as client:
                for action in ("unload", "load"):
                    answer = await client.post(f"{self._repository}/{action}")
                    answer.raise_for_status()
        except httpx2.HTTPError as error:
            log.error("the router could not be restarted: %s", error)


async def _router_or_timeout(door: DoorClient, timeout_s: float) -> None:
    """The router that was loaded is found a moment later."""
    for _ in range(int(timeout_s / _LOOK_EVERY_S)):
        if door.router is not None:
            return
        await asyncio.sleep(_LOOK_EVERY_S)
