"""The OpenAI protocol against a real HTTP server that speaks it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import pytest

from loadtest.options import Options
from loadtest.protocols import connect
from loadtest.protocols.base import Call, Connection, Part
from python_backends.core.errors import (
    BatonError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Unavailable,
)
from tests.unit.loadtest.openai_server import Behaviour, openai_server


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    with openai_server() as given:
        yield given


_open: list[Connection] = []


@pytest.fixture(autouse=True)
def _close_connections() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def _connect(address: str, **options: object) -> Connection:
    _open.append(connect(address, Options(**options)))  # type: ignore[arg-type]
    return _open[-1]


def _call(address: str, tokens: int = 5, *, api: Literal["chat", "completions"] = "chat", **options: object) -> Call:
    connection = _connect(address, api=api, **options)
    connection.wait_ready(5)
    return connection.prepare([1, 2, 3] if api == "completions" else "three little words", tokens)


def _all(call: Call) -> list[Part]:
    return list(call.parts())


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_chat_counts_and_times_tokens(server: tuple[str, Behaviour], line_end: bytes) -> None:
    address, behaviour = server
    behaviour.line_end = line_end
    behaviour.first_s, behaviour.gap_s = 0.1, 0.03
    call = _call(address)
    sent = time.monotonic()
    parts = _all(call)
    assert [part.tokens for part in parts] == [1] * 5, "the role alone is no token"
    assert 0.1 <= parts[0].time - sent < 0.4
    gaps = [after.time - before.time for before, after in pairwise(parts)]
    assert all(gap >= 0.02 for gap in gaps)
    usage = call.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.finish_reason) == (7, 5, 3, "length")
    (body,) = behaviour.bodies
    assert body["path"] == "/v1/chat/completions"
    assert body["model"] == "little", "the server's first one"
    assert body["messages"] == [{"role": "user", "content": "three little words"}]
    assert (body["stream"], body["stream_options"], body["max_tokens"]) == (True, {"include_usage": True}, 5)


def test_completions_take_token_ids(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    assert len(_all(_call(address, 3, api="completions"))) == 3
    assert behaviour.bodies[0]["path"] == "/v1/completions"
    assert behaviour.bodies[0]["prompt"] == [1, 2, 3]


def test_several_tokens_in_a_chunk(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.tokens_per_chunk = 4
    call = _call(address, 10)
    assert [part.tokens for part in _all(call)] == [1, 1, 1], "unknown until the end"
    assert call.usage.output_tokens == 10
    behaviour.usage_in_chunks = True
    assert [part.tokens for part in _all(_call(address, 10))] == [4, 4, 2]


def test_tokens_without_text_count_where_every_chunk_tells_how_many_there_are(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.late_text = True
    assert [part.tokens for part in _all(_call(address, 4))] == [1, 1]
    behaviour.usage_in_chunks = True
    assert [part.tokens for part in _all(_call(address, 4))] == [1, 1, 1, 1]


def test_a_server_without_usage(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.usage = False
    call = _call(address)
    assert len(_all(call)) == 5
    assert call.usage.output_tokens == 0


def test_fields_are_added_and_dropped(server: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch) -> None:
    address, behaviour = server
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    _all(_call(address, fields='{"ignore_eos": null, "top_p": 0.5}', model="other"))
    (body,) = behaviour.bodies
    assert "ignore_eos" not in body
    assert (body["top_p"], body["model"], body["key"]) == (0.5, "other", "Bearer sesame")


def test_the_route_of_a_server_that_tells_it(server: tuple[str, Behaviour]) -> None:
    call = _call(server[0], fields='{"baton": {"proof": true}}')
    _all(call)
    assert call.usage.route == "remote"


def test_connections_are_used_again_and_replaced_when_closed(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    connection = _connect(address)
    connection.wait_ready(5)
    opened = behaviour.connections
    for _ in range(3):
        assert len(list(connection.prepare("x", 2).parts())) == 2
    assert behaviour.connections == opened + 1
    idle = connection._server._idle[0]  # type: ignore[attr-defined]
    idle.sock.shutdown(2)  # as a server does that closes idle connections
    assert len(list(connection.prepare("x", 2).parts())) == 2
    assert behaviour.connections == opened + 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequest), (404, InvalidRequest), (429, Unavailable), (503, Unavailable), (500, EngineFailure)],
)
def test_refusals_are_told_in_the_servers_words(server: tuple[str, Behaviour], status: int, kind: type[BatonError]) -> None:
    address, behaviour = server
    behaviour.status = status
    with pytest.raises(kind, match=f"HTTP {status}: not today"):
        _all(_call(address))


def test_answers_that_end_in_the_middle(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.error_after = 2
    with pytest.raises(EngineFailure, match="the engine broke"):
        _all(_call(address))
    behaviour.error_after, behaviour.break_after = None, 2
    with pytest.raises(EngineFailure, match=r"connection to .* broke"):
        _all(_call(address))


def test_cancelling_from_another_thread_ends_it_at_the_server_too(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    call = _call(address, 1000)
    parts = call.parts()
    next(parts)
    threading.Timer(0.1, call.cancel).start()
    with pytest.raises(Cancelled):
        list(parts)
    end = time.monotonic() + 5
    while not behaviour.cut:
        assert time.monotonic() < end
        time.sleep(0.01)
    early = _call(address)
    early.cancel()
    with pytest.raises(Cancelled):
        _all(early)


def test_a_request_has_a_time_limit(server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    with pytest.raises(DeadlineExceeded, match=r"in 0.3 s"):
        _all(_call(address, 1000, timeout=0.3))
    behaviour.first_s = 1.0
    with pytest.raises(DeadlineExceeded, match=r"in 0.2 s"):
        _all(_call(address, timeout=0.2))


def test_addresses() -> None:
    for wrong in ("localhost:8000", "ftp://x", "", "http://"):
        with pytest.raises(ConfigError, match="is not an address like"):
            connect(wrong, Options())
    with pytest.raises(Unavailable, match=r"no server answers at http://127.0.0.1:9/v1"):
        _connect("http://127.0.0.1:9/v1").wait_ready(0.1)


def test_an_address_without_the_api_is_told(server: tuple[str, Behaviour]) -> None:
    address, _ = server
    with pytest.raises(InvalidRequest, match="HTTP 404: no such path"):
        _connect(address.removesuffix("/v1") + "/other").wait_ready(0.1)
