from __future__ import annotations

from typing import Any

import pytest

from python_backends.core.errors import InvalidRequest
from python_backends.core.types import SamplingParams
from python_backends.engines.trtllm.library import Library
from python_backends.engines.trtllm.sampling import check_sampling, sampling_arguments

EOS = (2, 3)
OLD = Library("1.2.1", None, None, None, None, Exception)
NEW = Library("1.3.0", None, None, None, None, Exception)


def arguments(num_done: int = 0, max_new: int = 10, eos: tuple[int, ...] = EOS, **fields: Any) -> dict[str, Any]:
    sampling = SamplingParams(**{"temperature": 0.0, "seed": 5, **fields}).validated()
    return sampling_arguments(sampling, eos, num_done, max_new, perf_metrics=False)


def test_greedy_is_top_k_1_and_nothing_random() -> None:
    made = arguments()
    assert made["top_k"] == 1
    assert made.keys().isdisjoint({"temperature", "top_p", "seed"})


def test_sampling_always_names_top_p() -> None:
    made = arguments(temperature=0.7)
    assert (made["temperature"], made["top_p"], made["seed"]) == (0.7, 1.0, 5)
    assert "top_k" not in made, "0 means all, which is the default"
    assert arguments(temperature=0.7, top_k=40, top_p=0.9)["top_k"] == 40


def test_the_engine_makes_no_text_and_stop_strings_stay_with_the_router() -> None:
    made = arguments(stop=("END",))
    assert made["detokenize"] is False
    assert "stop" not in made


@pytest.mark.parametrize(
    ("fields", "stops"),
    [
        ({}, [2, 3]),
        ({"stop_token_ids": (9, 2)}, [2, 3, 9]),
        ({"ignore_eos": True}, None),
        ({"ignore_eos": True, "stop_token_ids": (9,)}, [9]),
        ({"min_tokens": 5, "max_tokens": 10}, None),
    ],
)
def test_every_end_token_of_the_model_stops(fields: dict[str, Any], stops: list[int] | None) -> None:
    assert arguments(**fields).get("stop_token_ids") == stops


def test_tokens_of_earlier_attempts_count_towards_min_tokens() -> None:
    assert arguments(min_tokens=8, max_tokens=20)["min_tokens"] == 8
    assert arguments(num_done=5, min_tokens=8, max_tokens=20)["min_tokens"] == 3
    done = arguments(num_done=8, min_tokens=8, max_tokens=20)
    assert "min_tokens" not in done
    assert done["stop_token_ids"] == [2, 3]


@pytest.mark.parametrize(("wanted", "asked"), [(None, None), (0, 1), (1, 1), (5, 5)])
def test_logprobs_0_asks_for_one(wanted: int | None, asked: int | None) -> None:
    """Up to 1.2 zero means none at all."""
    assert arguments(logprobs=wanted).get("logprobs") == asked


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_pass_where_they_work_and_are_left_out_when_neutral(name: str) -> None:
    fields: dict[str, Any] = {name: 1.5}
    penalised = SamplingParams(**fields)
    check_sampling(penalised, EOS, NEW)
    assert sampling_arguments(penalised, EOS, 0, 10, perf_metrics=False)[name] == 1.5
    with pytest.raises(InvalidRequest, match=rf"{name} has no effect in TensorRT-LLM 1\.2\.1"):
        check_sampling(penalised, EOS, OLD)
    assert name not in arguments()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"logit_bias": {4: 1.0}}, "logit_bias"),
        ({"grammar": "start: /a+/"}, r"grammar \(response_format, tools, guided_decoding_guide\)"),
    ],
)
def test_what_is_not_passed_on_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{named} is not supported by engine trtllm"):
        check_sampling(SamplingParams(**fields), EOS, NEW)


def test_a_parameter_that_is_new_to_us_is_refused_too() -> None:
    class Later(SamplingParams, frozen=True):
        dry_multiplier: float = 0.0

    check_sampling(Later(), EOS, OLD)
    with pytest.raises(InvalidRequest, match="dry_multiplier"):
        check_sampling(Later(dry_multiplier=0.8), EOS, OLD)


def test_stop_token_ids_can_not_be_held_back() -> None:
    with pytest.raises(InvalidRequest, match=r"stop_token_ids \[9\] with min_tokens"):
        check_sampling(SamplingParams(min_tokens=2, stop_token_ids=(9, 2)), EOS, NEW)
    check_sampling(SamplingParams(min_tokens=2, stop_token_ids=(2,)), EOS, NEW)
    check_sampling(SamplingParams(stop_token_ids=(9,)), EOS, NEW)
