"""The OpenAI-compatible front end with the real `openai` client, curl, and sockets that close."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held, worker_process

pytestmark = pytest.mark.triton

MODEL = "smollm2-135m-instruct"
CHAT: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a miller, his three sons and a very clever cat."}]


def _client(server: TritonServer, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"http://{server.host}:{server.openai_port}/v1", api_key=key, max_retries=0, timeout=60)


def _url(server: TritonServer, path: str) -> str:
    return f"http://{server.host}:{server.openai_port}{path}"


def _post(server: TritonServer, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(_url(server, path), body), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def real(real_server: TritonServer) -> Iterator[OpenAI]:
    with _client(real_server) as client:
        yield client


@pytest.fixture(scope="module")
def fake(fake_server: TritonServer) -> Iterator[OpenAI]:
    with _client(fake_server) as client:
        yield client


# --- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_answer_with_proof_and_usage(real: OpenAI) -> None:
    answer = real.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        temperature=0,
        max_completion_tokens=20,
        extra_body={"baton": {"proof": True, "route": "remote"}},
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    proof = answer.model_extra["baton"]["proof"] if answer.model_extra else {}
    assert proof["route"] == "remote"
    assert proof["kv_tokens_recomputed"] == 0
    assert proof["kv_tokens_received"] + proof["kv_tokens_reused"] == answer.usage.prompt_tokens


def test_the_same_answer_by_grpc_generate_stream_and_openai(real: OpenAI, real_server: TritonServer) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 77}
    by_openai = real.chat.completions.create(model=MODEL, messages=STORY, max_tokens=24, **sampling)  # type: ignore[call-overload]
    streamed = real.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=STORY, max_tokens=24, stream=True, stream_options={"include_usage": True}, **sampling
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    asking = Asking(real_server)
    by_grpc = asking.ask(messages=json.dumps(STORY), max_tokens=24, stream=True, **sampling).text
    asking.close()
    body = json.dumps({"messages": json.dumps(STORY), "max_tokens": 24, **sampling}).encode()
    url = f"http://{real_server.host}:{real_server.http_port}/v2/models/router/generate"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        by_generate = json.loads(response.read())["text_output"]
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}_stream", body[:-1] + b', "stream": true}'), timeout=60
    ) as response:
        pieces = [json.loads(line.removeprefix(b"data: ")) for line in response if line.startswith(b"data: ")]
    assert by_openai.choices[0].message.content == text == by_grpc == by_generate
    assert "".join(piece["text_output"] for piece in pieces) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == by_openai.usage or chunks[-1].usage.completion_tokens == by_openai.usage.completion_tokens
    assert len(chunks) > 20, "it was not streamed"


def test_choices_prompts_and_echo(fake: OpenAI) -> None:
    answer = fake.completions.create(model=MODEL, prompt=["one two", "three"], n=2, max_tokens=4, seed=1, echo=True)
    texts = [choice.text for choice in answer.choices]
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["one two", "one two", "three", "three"], strict=True)]
    assert len(set(texts)) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    again = fake.completions.create(model=MODEL, prompt="one two", n=2, max_tokens=4, seed=1)
    assert ["one two" + choice.text for choice in again.choices] == texts[:2]
    ids = fake.completions.create(model=MODEL, prompt=[300, 301, 302], max_tokens=4, seed=1)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize("tokens", [1, 6])
def test_several_choices_streamed(fake: OpenAI, tokens: int) -> None:
    whole = fake.chat.completions.create(model=MODEL, messages=CHAT, n=3, max_tokens=tokens, seed=5)
    texts = ["", "", ""]
    finishes: dict[int, str] = {}
    for chunk in fake.chat.completions.create(model=MODEL, messages=CHAT, n=3, max_tokens=tokens, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == {0: "length", 1: "length", 2: "length"}


def test_logprobs_in_both_forms(real: OpenAI) -> None:
    chat = real.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
    for entry in chat.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token, "greedy takes the likeliest"
        assert entry.logprob == entry.top_logprobs[0].logprob < 0
        assert len(entry.top_logprobs) == 3
    plain = real.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=3, logprobs=2
    ).choices[0]
    assert plain.logprobs is not None
    assert "".join(plain.logprobs.tokens or []) == plain.text
    assert plain.logprobs.text_offset == [
        0,
        len((plain.logprobs.tokens or [""])[0]),
        len("".join((plain.logprobs.tokens or [])[:2])),
    ]


def test_stop_and_logit_bias(fake: OpenAI) -> None:
    whole = fake.completions.create(model=MODEL, prompt="a b c", max_tokens=20, seed=2).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    cut = fake.completions.create(model=MODEL, prompt="a b c", max_tokens=20, seed=2, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_models_health_and_metrics(fake: OpenAI, fake_server: TritonServer) -> None:
    assert [model.id for model in fake.models.list()] == [MODEL]
    assert fake.models.retrieve(MODEL).owned_by == "baton"
    for path in ("/health", "/health/live"):
        with urllib.request.urlopen(_url(fake_server, path), timeout=10) as response:
            assert response.status == 200
    with urllib.request.urlopen(_url(fake_server, "/metrics"), timeout=10) as response:
        assert b"baton_requests_total" in response.read()


# --- what answers are held to ------------------------------------------------------------------------------------------

CITY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("route", ["remote", "local", "aggregated"])
def test_json_schema_is_kept_on_every_route(real: OpenAI, route: str) -> None:
    answer = real.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": CITY_SCHEMA, "strict": True}},
        extra_body={"baton": {"route": route}},
    ).choices[0]
    told = json.loads(answer.message.content or "")
    assert set(told) == {"city", "country"}
    assert told["country"] in ("France", "Italy")
    assert answer.finish_reason == "stop"


def test_json_object_streamed_and_seeded(real: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "seed": 11, "max_tokens": 60}
    options["response_format"] = {"type": "json_object"}
    whole = real.chat.completions.create(**options).choices[0]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in real.chat.completions.create(**options, stream=True))
    assert text == whole.message.content
    assert text.startswith("{")
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_tool_is_called(real: OpenAI) -> None:
    """Also by a model that is too small to know of tools: when a call is required, it is one that fits."""
    tools: list[Any] = [
        {"type": "function", "function": {"name": "find", "description": "find a city", "parameters": CITY_SCHEMA}}
    ]
    options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 60, "tools": tools}
    answer = real.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "find"
    assert set(json.loads(call.function.arguments)) == {"city", "country"}
    history = [*CHAT, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "It is Paris."}]
    after = real.chat.completions.create(**{**options, "messages": history}, tool_choice="none").choices[0]
    assert after.message.content
    assert after.message.tool_calls is None
    auto = real.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in auto)


def test_grammars_through_tritons_tensors(real_server: TritonServer) -> None:
    asking = Asking(real_server)
    kinds = {"regex": "[0-9]{4}", "ebnf_grammar": 'root ::= "yes" | "no"', "json_schema": json.dumps(CITY_SCHEMA)}
    texts = {
        kind: asking.ask(
            messages=json.dumps(CHAT), guided_decoding_guide_type=kind, guided_decoding_guide=guide, max_tokens=40
        ).text
        for kind, guide in kinds.items()
    }
    assert re.fullmatch("[0-9]{4}", texts["regex"])
    assert texts["ebnf_grammar"] in ("yes", "no")
    assert set(json.loads(texts["json_schema"])) == {"city", "country"}
    assert "regex" in str(asking.ask(text_input="x", guided_decoding_guide_type="regex", guided_decoding_guide="(").error)
    assert "must be json" in str(asking.ask(text_input="x", guided_decoding_guide_type="sonnet").error)
    asking.close()


def test_a_grammar_survives_a_killed_worker(fake_server: TritonServer, fake: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": STORY, "seed": 9, "max_tokens": 200}
    options["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "string", "minLength": 900}},
    }
    expected = fake.chat.completions.create(**options).choices[0].message.content
    text, killed = "", False
    for chunk in fake.chat.completions.create(**options, stream=True):
        text += chunk.choices[0].delta.content or ""
        if len(text) > 40 and not killed:
            os.kill(worker_process(fake_server, "decode").pid, signal.SIGKILL)
            killed = True
    assert text == expected
    assert text.startswith('"')
    _wait_for(lambda: total(metrics(fake_server), "baton_worker_up") == 3, 20)


def test_what_can_not_be_had_is_named(fake: OpenAI) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "nonsense",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ]
    for fields, says in bad:
        with pytest.raises(openai.BadRequestError, match=says):
            fake.chat.completions.create(model=MODEL, messages=CHAT, extra_body=fields)


# --- errors ------------------------------------------------------------------------------------------------------------


def test_errors_have_openais_classes(fake: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'gpt-9' is not served here") as missing:
        fake.chat.completions.create(model="gpt-9", messages=CHAT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature is -1") as bad:
        fake.chat.completions.create(model=MODEL, messages=CHAT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="must fit into") as long:
        fake.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 60_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        fake.chat.completions.create(model=MODEL, messages=CHAT, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        fake.chat.completions.create(model=MODEL, messages=CHAT, top_logprobs=2)
    with pytest.raises(openai.InternalServerError, match="deadline") as late:
        fake.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4000, extra_body={"baton": {"timeout_s": 0.3}})
    assert late.value.status_code == 504


def test_errors_in_the_middle_of_a_stream_are_raised(fake: OpenAI) -> None:
    stream = fake.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=4000, stream=True, extra_body={"baton": {"timeout_s": 0.5}}
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/chat/completions", b"{", 400, "not JSON"),
        ("/v1/chat/completions", b"\xff\xfe", 400, "not JSON"),
        ("/v1/chat/completions", b"x" * 4_100_000, 413, "http.max_body_bytes"),
        ("/v1/completions", b'{"model": "smollm2-135m-instruct", "prompt": []}', 400, "prompt is empty"),
        ("/v1/completions", b'{"model": "smollm2-135m-instruct", "prompt": [[1], "x", 3.5]}', 400, "prompt must be"),
        ("/v1/completions", b'{"model": "smollm2-135m-instruct", "prompt": "x", "suffix": "y"}', 400, "suffix"),
        ("/v1/completions", b'{"model": "smollm2-135m-instruct", "prompt": [99999999]}', 400, "not in the vocabulary"),
        ("/v1/embeddings", b"{}", 404, "the API is under /v1"),
        ("/v1/models", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_bad_input_is_one_clear_error(fake_server: TritonServer, path: str, body: bytes, status: int, says: str) -> None:
    got, answer = _post(fake_server, path, body)
    assert got == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert says in answer["error"]["message"]


def test_keys_cors_and_overload(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha\n\nbeta\n")
    config = tmp_path / "guarded.yaml"
    config.write_text(
        "workers: [{role: aggregated, engine: fake}]\n"
        "router: {max_requests: 1}\n"
        f"http: {{api_keys_file: {tmp_path}/keys, cors_origins: ['http://friend.example'], tenant: api_key, processes: 2}}\n"
    )
    with TritonServer(config) as server:
        with _client(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
            stranger.models.list()
        with _client(server, "beta") as friend:
            assert friend.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2).choices
            with friend.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4000, stream=True) as running:
                next(iter(running))
                with pytest.raises(openai.RateLimitError, match="max_requests") as refused:
                    friend.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2)
                assert refused.value.response.headers["retry-after"] == "1"
        request = urllib.request.Request(
            _url(server, "/v1/models"), headers={"Origin": "http://friend.example", "Authorization": "Bearer alpha"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.headers["access-control-allow-origin"] == "http://friend.example"


# --- going away and dying ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything_within_a_second(fake_server: TritonServer, stream: bool) -> None:
    before = total(metrics(fake_server), "baton_requests_total", outcome="cancelled")
    body = json.dumps({"model": MODEL, "messages": STORY, "max_tokens": 4000, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((fake_server.host, fake_server.openai_port), 5) as connection:
        connection.sendall(head.encode() + body)
        _wait_for(lambda: metrics(fake_server)["baton_router_requests"] == 1, 5)
    _wait_for(lambda: total(metrics(fake_server), "baton_requests_total", outcome="cancelled") == before + 1, 1)
    wait_until_nothing_is_held(fake_server, within_s=1.5)


def test_a_router_that_is_killed_costs_no_request(tmp_path: Path) -> None:
    """The stream stops for the seconds that Triton needs, and goes on with the very next token."""
    config = tmp_path / "one.yaml"
    config.write_text(
        "workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]\nengine: {fake: {step_us: 20000}}\n"
    )
    with TritonServer(config) as server, _client(server) as client:
        options: dict[str, Any] = {"model": MODEL, "messages": STORY, "max_tokens": 80, "seed": 3, "temperature": 0.9}
        expected = client.chat.completions.create(**options).choices[0].message.content
        text, killed = "", False
        for chunk in client.chat.completions.create(**options, stream=True):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 40 and not killed:
                os.kill(worker_process(server, "router").pid, signal.SIGKILL)
                killed = True
        assert killed
        assert text == expected


def test_a_front_end_that_is_killed_comes_back(fake_server: TritonServer, fake: OpenAI) -> None:
    processes = psutil.Process(fake_server.pid).parent()
    assert processes is not None
    (front_end,) = [child for child in processes.children() if "router.http" in child.cmdline()]
    front_end.kill()
    _wait_for(lambda: _is_live(fake_server), 10)
    assert fake.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2).choices
    wait_until_nothing_is_held(fake_server, within_s=2)


def _is_live(server: TritonServer) -> bool:
    try:
        with urllib.request.urlopen(_url(server, "/health"), timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)
