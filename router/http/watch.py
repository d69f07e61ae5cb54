"""What the page shows, as server-sent events. While nobody watches nothing is asked of the router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from itertools import islice

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.door.client import DoorClient
from router.door.messages import News
from router.http.api import Api, answered
from router.http.errors import ApiError
from router.http.stream import EventStream

log = logging.getLogger(__name__)

_EVERY_S = 0.25
_IDLE_S = 1.0  # between events when nothing changes, so that the page knows that this process lives
_KEPT = 2000  # requests that whoever comes later is told of
_MOST_PER_EVENT = 200
_MOST_WATCHERS = 64
_encode = msgspec.json.encode


class Hub:
    """Asks the router while somebody watches, and remembers the requests that ended, through the deaths of routers too."""

    def __init__(self, door: DoorClient) -> None:
        self._door = door
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._router = ""
        self._after = 0  # News.sequence of that router
        self._records: deque[bytes] = deque(maxlen=_KEPT)  # each as JSON, oldest first
        self._num_records = 0  # that were ever put into it
        self._workers = b"[]"  # as they were last known
        self._state = b""  # empty: not yet known
        self._version = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        """All that is known, then what changes, until it is closed. A slow reader gets fewer and larger events."""
        self._watchers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        seen = self._num_records - len(self._records)
        version = -1 if self._state else 0
        try:
            while True:
                async with self._changed:
                    while version == self._version and (seen >= self._num_records or not self._state):
                        await self._changed.wait()
                version = self._version
                first = max(seen, self._num_records - len(self._records))
                offset = first - (self._num_records - len(self._records))
                ended = list(islice(self._records, offset, offset + _MOST_PER_EVENT))
                seen = first + len(ended)
                yield b'data: {"state":' + self._state + b',"ended":[' + b",".join(ended) + b"]}\n\n"
        finally:
            self._watchers -= 1
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task, self._state, self._version = None, b"", 0

    @property
    def is_full(self) -> bool:
        return self._watchers >= _MOST_WATCHERS

    async def _follow(self) -> None:
        told = 0.0
        before: object = None
        while True:
            news = await self._door.news(self._after)
            if news is not None and news.router != self._router:
                self._router, self._after = news.router, 0
                news = await self._door.news(0)
            if news is not None:
                self._take(news)
            now = _what_matters(news)
            if now != before or (news is not None and news.live) or time.monotonic() - told >= _IDLE_S:
                before, told = now, time.monotonic()
                self._state = self._describe(news)
                self._version += 1
                async with self._changed:
                    self._changed.notify_all()
            if news is None or not news.more:
                await asyncio.sleep(_EVERY_S)

    def _take(self, news: News) -> None:
        self._after = news.sequence
        self._records.extend(_encode(record) for record in news.ended)
        self._num_records += len(news.ended)
        self._workers = _encode(news.workers)

    def _describe(self, news: News | None) -> bytes:
        """The state as JSON. Without a router: for how long, and the workers as they were."""
        now = {"time_ms": time.time() * 1e3, "alone_s": self._door.alone_s}
        if news is None:
            now |= {"router": "", "trouble": "the router is gone", "live": []}  # type: ignore[dict-item]
        else:
            now |= {field: getattr(news, field) for field in _FIELDS}
        return _encode(now)[:-1] + b',"workers":' + self._workers + b"}"


_FIELDS = ("router", "trouble", "live", "requests", "queued_tokens", "index_blocks")


def _what_matters(news: News | None) -> object:
    """What must be told at once when it changes."""
    if news is None:
        return None
    workers = [(w.id, w.up, w.resting, w.epoch, w.requests, w.load) for w in news.workers]
    return news.router, news.trouble, news.sequence, news.requests, workers


class Watching:
    """The endpoints behind the page and scripts/trace. They ask for an API key where the API does."""

    def __init__(self, api: Api, door: DoorClient) -> None:
        self._api = api
        self._door = door
        self._hub = Hub(door)

    @answered
    async def events(self, request: Request) -> Response | EventStream:
        self._api.authorize(request)
        if self._hub.is_full:
            raise ApiError(503, "too many pages are open at this front end", code="service_unavailable", retry_after_s=5)
        return EventStream(self._hub.events())

    @answered
    async def requests(self, request: Request) -> Response:
        """Of the router's journal, those that are called so."""
        self._api.authorize(request)
        what = request.path_params["what"]
        records = await self._door.find(what)
        if not records:
            message = f"no request {what!r} is among the last that the router remembers"
            raise ApiError(404, message, code="not_found")
        return Response(_encode({"requests": records}), media_type="application/json")
