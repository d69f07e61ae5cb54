"""Bodies of the OpenAI API: what they mean, and how what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.http.errors import ApiError
from router.http.requests import ChatCompletion, Completion, nth_choice, parse, plain_messages, sampling_of

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def _chat(**fields: Any) -> ChatCompletion:
    return parse(json.dumps({**CHAT, **fields}).encode(), ChatCompletion)


def _refused(body: Any, kind: type[Any] = ChatCompletion) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert caught.value.status == 400
    return caught.value


def test_every_sampling_field_arrives() -> None:
    body = _chat(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        stop="END",
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"7": -100},
        min_tokens=2,
        stop_token_ids=[9],
        ignore_eos=True,
    )
    sampling = sampling_of(body, 12, 3)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (12, 2, 0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1.0, -1.0, {7: -100.0})
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("END",), (9,), True)
    assert (sampling.seed, sampling.logprobs) == (3, 3)


def test_defaults_are_openais() -> None:
    sampling = sampling_of(_chat(), 5, None)
    assert (sampling.temperature, sampling.top_p, sampling.stop, sampling.logprobs) == (1.0, 1.0, (), None)
    assert sampling.seed is not None, "another router could not go on"


def test_choices_differ_by_their_seeds() -> None:
    sampling = sampling_of(_chat(seed=2**64 - 1, n=3), 5, None)
    assert [nth_choice(sampling, index).seed for index in range(3)] == [2**64 - 1, 0, 1]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{", None, "not JSON"),
        (b"\xff", None, "not JSON"),
        ({"messages": []}, "model", "model is missing"),
        ({**CHAT, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({**CHAT, "temperature": "hot"}, "temperature", "Expected `float | null`, got `str`"),
        ({**CHAT, "n": 0}, "n", "it must be 1 to 16"),
        ({**CHAT, "n": 17}, "n", "it must be 1 to 16"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options", "together with stream"),
        ({**CHAT, "messages": [{"role": "pope", "content": "x"}]}, "messages[0].role", "Invalid enum value 'pope'"),
        ({**CHAT, "messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({**CHAT, "baton": {"route": "nowhere"}}, "baton.route", "nowhere"),
        ({**CHAT, "stop": 5}, "stop", "stop"),
        ([], None, "Expected `object`"),
    ],
)
def test_what_is_wrong_is_named(body: Any, param: str | None, says: str) -> None:
    error = _refused(body)
    assert error.param == param
    assert says in str(error)
    assert json.loads(error.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_values_out_of_bounds_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        sampling_of(_chat(**fields), 5, None)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b'{"model": "\xff"}', b'{"messages": [{"content": ' + b"[" * 100_000, b"\0", b""])
def test_what_is_no_json_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, ChatCompletion)
    assert caught.value.status == 400


def test_fields_without_effect_are_accepted() -> None:
    _chat(store=False, metadata={"a": "b"}, service_tier="auto", prompt_cache_key="k", modalities=["text"], top_k=-1)
    assert sampling_of(_chat(top_k=-1), 5, None).top_k == 0


def test_messages_become_plain() -> None:
    body = _chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": "eve"},
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
        ]
    )
    assert plain_messages(body.messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two", "name": "eve"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
    ],
)
def test_messages_that_can_not_be_served(messages: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        plain_messages(_chat(messages=messages).messages)
    assert caught.value.param == param


def test_completions_take_text_and_ids() -> None:
    for prompt in ("x", ["x", "y"], [1, 2], [[1, 2], [3]]):
        assert parse(json.dumps({"model": "m", "prompt": prompt}).encode(), Completion).prompt == prompt
