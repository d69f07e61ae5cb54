"""Streams of several choices, with a door whose answers come all at the same moment."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal, cast

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request

from python_backends.core.config import Deployment, HttpConfig, WorkerConfig
from python_backends.core.types import FinishReason, Role
from router.door.client import Answer, DoorClient
from router.door.messages import Ask, AskId
from router.http.api import Api
from router.http.origin import Origin
from router.http.stream import EventStream
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Piece, Sending

DEPLOYMENT = Deployment(workers=(WorkerConfig(Role.AGGREGATED, "aggregated", "fake"),))


class _Words:
    """Stands for router.tokenizer.Tokenizer."""

    def token_text(self, token_id: int) -> str:
        return f"w{token_id}"


class _Door:
    """Every answer is there at once: stands for router.door.client.DoorClient."""

    def __init__(self) -> None:
        self.dropped: list[AskId] = []

    def ask(self, request: ClientRequest, sending: Sending) -> Answer:
        answer = Answer(cast(DoorClient, self), Ask(AskId(1), request, sending))
        answer.add(Piece("one", [5], [], 0.0, 3))
        answer.add(Piece(" two", [6], [], 0.0, 3, FinishReason.LENGTH))
        return answer

    def drop(self, ask_id: AskId) -> None:
        self.dropped.append(ask_id)


class _Listener(_Door):
    """Keeps what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ClientRequest] = []

    def ask(self, request: ClientRequest, sending: Sending) -> Answer:
        self.asked.append(request)
        return super().ask(request, sending)


async def _salt(tenant: Literal["none", "user", "api_key"], key: str = "", **fields: Any) -> str:
    """Under which salt POST /v1/completions with these fields asks the router."""
    door = _Listener()
    deployment = msgspec.structs.replace(DEPLOYMENT, http=HttpConfig(tenant=tenant))
    api = Api(deployment, cast(Tokenizer, _Words()), cast(DoorClient, door), frozenset())
    body = json.dumps({"model": deployment.model_name, "prompt": [1, 2, 3], "stream": True, **fields}).encode()
    incoming = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if not incoming:
            await asyncio.Event().wait()
        return incoming.pop()

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
    scope["state"] = {"origin": Origin(Headers())}
    assert isinstance(await api.completions(Request(scope, receive)), EventStream)
    return door.asked[0].salt


async def _stream(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of POST /v1/completions without the last, [DONE]."""
    api = Api(DEPLOYMENT, cast(Tokenizer, _Words()), cast(DoorClient, _Door()), frozenset())
    incoming = [{"type": "http.request", "body": json.dumps({"model": DEPLOYMENT.model_name, "stream": True, **body}).encode()}]
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if not incoming:
            await asyncio.Event().wait()  # a client that stays
        return incoming.pop()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    scope["state"] = {"origin": Origin(Headers())}
    answer = await api.completions(Request(scope, receive))
    assert isinstance(answer, EventStream)
    await answer(scope, receive, send)
    events = [event.removeprefix("data: ") for event in b"".join(sent).decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def _texts(events: list[dict[str, Any]], choices: int) -> list[str]:
    texts = [""] * choices
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_choices_that_come_at_the_same_moment_are_all_whole() -> None:
    for choices in (1, 2, 8):
        events = asyncio.run(
            asyncio.wait_for(_stream({"prompt": [1, 2, 3], "n": choices, "stream_options": {"include_usage": True}}), 10)
        )
        assert _texts(events, choices) == ["one two"] * choices
        assert events[-1]["usage"]["completion_tokens"] == 2 * choices


def test_every_token_has_its_chunk_with_the_usage_so_far_for_who_counts() -> None:
    body = {"prompt": [1, 2, 3], "stream_options": {"continuous_usage_stats": True}}
    events = asyncio.run(asyncio.wait_for(_stream(body), 10))
    assert _texts(events, 1) == ["one two"]
    assert all(event["usage"]["prompt_tokens"] == 3 for event in events)
    assert events[-1]["usage"]["completion_tokens"] == 2


def test_tenants_are_kept_apart_whatever_they_write() -> None:
    """A salt of the client's own divides its tenant further, and never leads into another tenant's."""

    def salt(*arguments: Any, **fields: Any) -> str:
        return asyncio.run(asyncio.wait_for(_salt(*arguments, **fields), 10))

    written = ["", "a", "alice", "alice\0", "\0", salt("user", user="alice")]
    users = [salt("user", user=user, baton={"cache_salt": own}) for user in ["alice", "alice\0", "bob", ""] for own in written]
    keys = [salt("api_key", key, baton={"cache_salt": own}) for key in ["sk-1", "sk-2", ""] for own in written]
    assert len({*users}) == len(users)
    assert len({*keys}) == len(keys)
    assert salt("api_key", "sk-1") == salt("api_key", "sk-1", user="bob")
    assert "sk-1" not in salt("api_key", "sk-1")
    assert [salt("none", user="alice"), salt("none", baton={"cache_salt": "mine"})] == ["", "mine"]
