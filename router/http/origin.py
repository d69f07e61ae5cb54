"""Where a request to the API comes from: its trace, its client's name for it, and when it came. The answer's head tells it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.trace_context import continue_trace, sibling
from router.types import ClientRequest, FrontEndTimes

TOLD_HEADERS = ("traceparent", "x-request-id")
_LONGEST_ID = 128  # characters of a client's x-request-id that are kept


class Origin:
    """Of one HTTP request."""

    def __init__(self, headers: Headers) -> None:
        self.received_ns = time.time_ns()
        self.trace = continue_trace(headers.get("traceparent"), headers.get("tracestate"))
        self.request_id = headers.get("x-request-id", "")[:_LONGEST_ID] or self.trace.trace_id
        self._tokenize_ms = 0.0

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Counts the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._tokenize_ms += (time.perf_counter() - began) * 1e3

    def mark(self, ask: ClientRequest, answer_id: str, index: int) -> ClientRequest:
        """The ask, knowing where it comes from. Of several (`index`) each has a span of its own in the same trace."""
        return msgspec.structs.replace(
            ask,
            client_id=self.request_id,
            answer_id=answer_id,
            trace=sibling(self.trace) if index else self.trace,
            front_end=FrontEndTimes(self.received_ns, self._tokenize_ms),
        )


def origin_of(request: Request) -> Origin:
    origin = request.state.origin
    assert isinstance(origin, Origin)
    return origin


class Originated:
    """ASGI middleware: gives each request of the API its Origin, and each answer its ids."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        origin = Origin(Headers(scope=scope))
        scope.setdefault("state", {})["origin"] = origin

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["traceparent"] = origin.trace.traceparent
                headers["x-request-id"] = origin.request_id
            await send(message)

        await self._app(scope, receive, tell)
