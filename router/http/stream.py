"""Server-sent events, and clients that go away: a request nobody waits for any more is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

_Result = TypeVar("_Result")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies such as nginx would collect what is meant to arrive at once
]


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def unless_gone(work: Coroutine[Any, Any, _Result], receive: Receive) -> _Result:
    """The result of `work`. Raises ClientGone, and cancels it, when the client disconnects first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(task, gone)


class EventStream:
    """An ASGI response: each item of `events` is one or more whole events, sent as it comes."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        """`events` is closed in every case, also when nobody reads to the end."""
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        with suppress(ClientGone):
            await unless_gone(self._pump(send), receive)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
