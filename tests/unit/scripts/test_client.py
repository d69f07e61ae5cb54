"""What the client refuses before anything is sent, and what it says when nobody answers."""

from __future__ import annotations

import pytest

from python_backends.core.errors import BatonError, Cancelled, EngineFailure, InvalidRequest, Unavailable
from scripts.client import Client, encode_request, stated_error


def test_fields_become_tensors() -> None:
    request = encode_request(
        {"text_input": "hé", "max_tokens": 5, "stop_words": ["a", "b"], "seed": 2**64 - 1, "top_p": None}, 2.0
    )
    tensors = {tensor.name: tensor for tensor in request.inputs}
    assert set(tensors) == {"text_input", "max_tokens", "stop_words", "seed"}
    assert list(tensors["text_input"].contents.bytes_contents) == ["hé".encode()]
    assert list(tensors["stop_words"].shape) == [1, 2]
    assert tensors["seed"].contents.uint64_contents[0] == 2**64 - 1
    assert request.parameters["timeout"].int64_param == 2_000_000


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"temprature": 1.0}, "temprature"), ({"max_tokens": "many"}, "max_tokens is 'many'"), ({"seed": -1}, "seed is -1")],
)
def test_a_field_that_can_not_be_sent_is_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        encode_request(fields, 1.0)


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("INVALID_ARG: max_tokens is -1: give more", InvalidRequest, "max_tokens is -1: give more"),
        ("UNAVAILABLE: try again in 2 s", Unavailable, "try again in 2 s"),
        ("CANCELLED: the client went away", Cancelled, "the client went away"),
        ("INTERNAL: it broke", EngineFailure, "it broke"),
        ("Request for unknown model: 'router' is not found", Unavailable, "Request for unknown model: 'router' is not found"),
        ("Stub process 'router_0_0' is not healthy.", EngineFailure, "Stub process 'router_0_0' is not healthy."),
    ],
)
def test_errors_of_a_stream_are_told_apart(message: str, kind: type[BatonError], text: str) -> None:
    error = stated_error(message)
    assert type(error) is kind
    assert str(error) == text


def test_nobody_answers() -> None:
    with Client("127.0.0.1:9") as client:
        with pytest.raises(Unavailable, match=r"no server answers at 127.0.0.1:9; start one with `make serve`"):
            client.wait_ready(0.1)
        with pytest.raises(Unavailable, match="no server answers"), client.stream("hello", timeout_s=5) as stream:
            next(stream)
