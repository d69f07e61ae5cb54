"""Asks the prefill instance for a prompt's KV and the decode instance for the answer, as vLLM's NIXL connector wants it."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web

_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
_ONLY_DECODE = ("stream_options", "min_tokens")  # what makes no sense of one token


class Proxy:
    """/v1/completions of both instances together. `prefill`, `decode`: their addresses, without a path."""

    def __init__(self, session: aiohttp.ClientSession, prefill: str, decode: str) -> None:
        self._session = session
        self._prefill = prefill
        self._decode = decode

    def application(self) -> web.Application:
        made = web.Application(client_max_size=2**30)
        made.router.add_post("/v1/completions", self._complete)
        made.router.add_get("/v1/models", self._models)
        made.router.add_get("/health", self._health)
        return made

    async def healthy(self) -> bool:
        """Whether both instances are."""
        return all(await asyncio.gather(*(self._answers(address) for address in (self._prefill, self._decode))))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        async with self._session.post(f"{self._prefill}/v1/completions", json=_for_prefill(asked)) as answer:
            if not answer.ok:
                return await _copied(answer)
            found = await answer.json()
        asked = {**asked, "kv_transfer_params": found["kv_transfer_params"]}
        async with self._session.post(f"{self._decode}/v1/completions", json=asked) as answer:
            passed = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
            await passed.prepare(request)
            async for piece in answer.content.iter_any():
                await passed.write(piece)
            return passed

    async def _models(self, request: web.Request) -> web.StreamResponse:
        async with self._session.get(f"{self._decode}/v1/models") as answer:
            return await _copied(answer)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if await self.healthy() else 503)

    async def _answers(self, address: str) -> bool:
        try:
            async with self._session.get(f"{address}/health") as answer:
                return answer.ok
        except aiohttp.ClientError:
            return False


def _for_prefill(asked: dict[str, Any]) -> dict[str, Any]:
    """The same request for one token, whose KV is kept for another instance."""
    wanted = {name: value for name, value in asked.items() if name not in _ONLY_DECODE}
    transfer = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(_REMOTE)}
    return {**wanted, "stream": False, "max_tokens": 1, "kv_transfer_params": transfer}


async def _copied(answer: aiohttp.ClientResponse) -> web.Response:
    return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
