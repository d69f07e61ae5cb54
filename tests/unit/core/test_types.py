from __future__ import annotations

from typing import Any

import msgspec
import pytest

from python_backends.core.errors import InvalidRequest
from python_backends.core.types import (
    MAX_GRAMMAR,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOKENS_NAMED,
    GenerateRequest,
    RequestId,
    SamplingParams,
)

NAN, INF = float("nan"), float("inf")

ALLOWED: dict[str, list[Any]] = {
    "max_tokens": [1, 10**9],
    "min_tokens": [0, 128],
    "temperature": [0, 0.0, 1e-9, 100],
    "top_k": [0, 1, 10**9],
    "top_p": [1e-9, 1.0],
    "min_p": [0.0, 1.0],
    "repetition_penalty": [1e-9, 1.0, 100],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "logit_bias": [{}, {0: -100.0}, {5: 100.0}, dict.fromkeys(range(MAX_TOKENS_NAMED), 0.0)],
    "seed": [None, 0, 2**64 - 1],
    "stop": [(), ("a" * MAX_STOP_CHARS,) * MAX_STOPS],
    "stop_token_ids": [(), (0, 5), (7,) * MAX_TOKENS_NAMED],
    "ignore_eos": [True],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "grammar": [None, "start: /x/", "x" * MAX_GRAMMAR],
}
REFUSED: dict[str, list[Any]] = {
    "max_tokens": [0, -1],
    "min_tokens": [-1, 129],
    "temperature": [-1e-9, 100.1, NAN, INF, -INF],
    "top_k": [-1],
    "top_p": [0.0, -0.1, 1.1, NAN, INF],
    "min_p": [-0.1, 1.1, NAN, INF],
    "repetition_penalty": [0.0, -1.0, 100.1, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN, INF],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF],
    "logit_bias": [{-1: 0.0}, {0: 100.1}, {0: NAN}, {0: 1.0, 1: INF}, dict.fromkeys(range(MAX_TOKENS_NAMED + 1), 0.0)],
    "seed": [-1, 2**64],
    "stop": [("",), ("a", ""), ("a",) * (MAX_STOPS + 1), ("a" * (MAX_STOP_CHARS + 1),)],
    "stop_token_ids": [(-1,), (0, -5), (7,) * (MAX_TOKENS_NAMED + 1)],
    "logprobs": [-1, MAX_LOGPROBS + 1],
    "grammar": ["x" * (MAX_GRAMMAR + 1)],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


@pytest.mark.parametrize(("field", "value"), cases(ALLOWED))
def test_value_inside_the_bounds_is_kept(field: str, value: Any) -> None:
    sampling = SamplingParams(**{field: value})
    assert sampling.validated() is sampling


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_value_outside_the_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field} is .+; it must be "):
        SamplingParams(**{field: value}).validated()


def test_every_field_is_tried_above() -> None:
    assert set(ALLOWED) == set(SamplingParams.__struct_fields__)
    assert set(REFUSED) == set(ALLOWED) - {"ignore_eos"}


def test_a_grammar_has_an_end() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos is True; it must be false together with a grammar"):
        SamplingParams(grammar="start: /x/", ignore_eos=True).validated()


def test_defaults_are_valid() -> None:
    SamplingParams().validated()


def test_unknown_sampling_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.json.decode(b'{"temprature": 1}', type=SamplingParams)


def test_request_survives_the_wire() -> None:
    sampling = SamplingParams(seed=2**64 - 1, logit_bias={3: -1.5}, stop=("a",), stop_token_ids=(7,))
    request = GenerateRequest(RequestId("r"), [1, 2, 3], sampling, deadline=5.0, output_ids=[4], salt="tenant", priority=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request
    assert request.num_tokens == 4
