"""Where requests come from: what is taken from their heads and what is told in the answers'."""

from __future__ import annotations

import asyncio
import time

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message

from router.http.origin import Origin, Originated, origin_of
from tests.unit.router.journals import request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "x-request-id": "mine"}


def test_an_ask_knows_where_it_comes_from() -> None:
    origin = Origin(Headers(GIVEN))
    with origin.tokenizing():
        time.sleep(0.01)
    ask = origin.mark(request(), "chatcmpl-1", 0)
    assert (ask.client_id, ask.answer_id) == ("mine", "chatcmpl-1")
    assert ask.trace == origin.trace
    assert (origin.trace.trace_id, origin.trace.parent_id, origin.trace.tracestate) == (TRACE, PARENT, "a=b")
    assert ask.front_end is not None
    assert ask.front_end.tokenize_ms >= 10
    assert ask.front_end.received_ns <= time.time_ns()
    second = origin.mark(request(), "chatcmpl-1", 1)
    assert second.trace is not None
    assert second.trace.span_id != origin.trace.span_id
    assert second.trace.trace_id == TRACE


def test_without_an_id_of_its_own_a_request_is_called_like_its_trace() -> None:
    origin = Origin(Headers({}))
    assert origin.request_id == origin.trace.trace_id
    assert len(Origin(Headers({"x-request-id": "x" * 10_000})).request_id) == 128


@pytest.mark.parametrize(("path", "told"), [("/v1/models", True), ("/health", False)])
def test_the_head_of_an_answer_tells_the_ids(path: str, told: bool) -> None:
    seen: list[Origin] = []

    async def answer(request: Request) -> PlainTextResponse:
        if told:
            seen.append(origin_of(request))
        return PlainTextResponse("ok")

    app = Originated(Starlette(routes=[Route(path, answer)]))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in GIVEN.items()],
    }
    asyncio.run(app(scope, receive, send))
    headers = Headers(raw=sent[0]["headers"])
    if told:
        assert headers["x-request-id"] == "mine"
        assert headers["traceparent"] == seen[0].trace.traceparent
    else:
        assert "traceparent" not in headers
