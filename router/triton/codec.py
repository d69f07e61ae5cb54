"""Triton tensors -> ClientRequest, and Piece -> tensors. Bad input ends here with a sentence that names the tensor.

The tables are in core/tensors.py. Scalars are read whatever their shape ([1] or [1, 1]).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from python_backends.core.errors import UNREADABLE, InvalidRequest
from python_backends.core.types import SamplingParams
from router import grammar
from router.trace_context import continue_trace
from router.types import MAX_INPUT_IDS, ClientRequest, Piece, Sending, Wish

TokenText = Callable[[int], str]

_SAMPLING_TENSORS = {  # tensor -> field of SamplingParams
    "max_tokens": "max_tokens",
    "min_length": "min_tokens",
    "min_tokens": "min_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "random_seed": "seed",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_SAMPLING_ALIASES = {"min_length": "min_tokens", "random_seed": "seed", "stop_words": "stop"}  # in sampling_parameters
_DRAWS = {"top_k", "top_p", "min_p", "seed"}  # given without a temperature, these mean temperature 1
_MUST_BE = {  # tensors of TensorRT-LLM clients that are accepted with the one value that asks for nothing
    "beam_width": (1, "beam search is not supported"),
    "num_return_sequences": (1, "send one request per sequence"),
    "return_context_logits": (False, "context logits are not supported"),
    "return_generation_logits": (False, "generation logits are not supported; return_log_probs is"),
    "lora_task_id": (0, "LoRA is not supported"),
    "stop": (False, "cancel the request instead of sending stop"),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the client wants back, and how."""

    sending: Sending
    prompt_text: str  # put before the completion; empty by default
    finish_reason: bool
    num_input_tokens: bool
    num_output_tokens: bool
    log_probs: bool
    cumulative: bool
    logprobs: bool
    output_ids: bool
    proof: bool
    times: bool
    error_codes: bool


class _Tensors:
    """The inputs of one request, by name."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def array(self, name: str) -> npt.NDArray[Any] | None:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            return None
        flat: npt.NDArray[Any] = tensor.as_numpy().reshape(-1)
        return flat

    def scalar(self, name: str) -> Any:
        array = self.array(name)
        if array is None:
            return None
        if array.size != 1:
            raise InvalidRequest(f"{name} has {array.size} elements; give one")
        value = array[0]
        return self._text(name, value) if isinstance(value, bytes | str) else value.item()

    def texts(self, name: str) -> list[str]:
        """The non-empty strings of a list."""
        array = self.array(name)
        return [] if array is None else [text for text in (self._text(name, value) for value in array) if text]

    def flag(self, name: str) -> bool:
        return bool(self.scalar(name))

    @staticmethod
    def _text(name: str, value: bytes | str) -> str:
        if isinstance(value, str):
            return value
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name} is not valid UTF-8 (byte {error.start}: {error.reason})") from error


def decode_request(request: Any, default_max_tokens: int) -> tuple[ClientRequest, Wanted]:
    """request: pb_utils.InferenceRequest. Raises InvalidRequest."""
    tensors, parameters = _Tensors(request), _parameters(request)
    _check_unsupported(tensors)
    text, messages, input_ids = _prompt(tensors)
    client = ClientRequest(
        sampling=_sampling(tensors, default_max_tokens),
        text=text,
        messages=messages,
        input_ids=input_ids,
        wish=_wish(tensors),
        salt=tensors.scalar("cache_salt") or "",
        priority=tensors.scalar("priority") or 0,
        slo_ttft_ms=_target(tensors, "slo_ttft_ms"),
        slo_itl_ms=_target(tensors, "slo_itl_ms"),
        timeout_s=request.timeout() / 1e6 if request.timeout() else None,
        client_id=request.request_id(),
        trace=continue_trace(*_trace_headers(request, parameters)),
    )
    return client, _wanted(tensors, text, _asks_for_codes(parameters))


def wants_error_codes(request: Any) -> bool:
    """Whether errors are to name their code in the message: in a gRPC stream Triton gives the message alone."""
    return _asks_for_codes(_parameters(request))


def _asks_for_codes(parameters: dict[str, Any]) -> bool:
    return parameters.get("error_codes") is True


def _parameters(request: Any) -> dict[str, Any]:
    parameters = request.parameters()
    return json.loads(parameters) if parameters else {}


def _trace_headers(request: Any, given: dict[str, Any]) -> tuple[str | None, str | None]:
    """traceparent and tracestate: the request's parameters, or else the server's own trace, if it makes one of it."""
    if "traceparent" not in given:
        context = request.trace().get_context()
        given = json.loads(context) if context else {}
    parent, state = given.get("traceparent"), given.get("tracestate")
    return (str(parent) if parent else None, str(state) if state else None)


def _prompt(tensors: _Tensors) -> tuple[str | None, list[dict[str, object]] | None, list[int] | None]:
    text, messages, ids = tensors.scalar("text_input"), tensors.scalar("messages"), tensors.array("input_ids")
    given = [value for value in (text, messages, ids) if value is not None]
    if len(given) != 1:
        raise InvalidRequest(f"give exactly one of text_input, messages and input_ids; {len(given)} were given")
    if text is not None and not text:
        raise InvalidRequest("text_input is empty; give at least one character")
    return (
        text,
        _json(messages, "messages", list[dict[str, object]]) if messages is not None else None,
        _token_ids(ids) if ids is not None else None,
    )


def _token_ids(ids: npt.NDArray[Any]) -> list[int]:
    if ids.size > MAX_INPUT_IDS:  # each of them becomes an object
        raise InvalidRequest(f"input_ids has {ids.size} tokens; at most {MAX_INPUT_IDS} are accepted")
    return [int(token) for token in ids]


def _sampling(tensors: _Tensors, default_max_tokens: int) -> SamplingParams:
    """Tensors win over sampling_parameters; without any of them the choice is greedy."""
    fields = _sampling_parameters(tensors.scalar("sampling_parameters"))
    for tensor, field in _SAMPLING_TENSORS.items():
        value = tensors.scalar(tensor)
        if value is not None:
            fields[field] = value
    stop_words = tensors.texts("stop_words")
    if stop_words:
        fields["stop"] = stop_words
    end_id = tensors.scalar("end_id")
    if end_id is not None and end_id >= 0:
        fields["stop_token_ids"] = [*_list(fields.get("stop_token_ids")), end_id]
    if tensors.flag("return_log_probs") or tensors.flag("return_cumulative_logprob") or tensors.flag("return_logprobs"):
        fields.setdefault("logprobs", 0)
    guide = _grammar(tensors.scalar("guided_decoding_guide_type"), tensors.scalar("guided_decoding_guide"))
    if guide is not None:
        fields["grammar"] = guide
    fields.setdefault("max_tokens", default_max_tokens)
    fields.setdefault("temperature", 1.0 if _DRAWS & fields.keys() else 0.0)
    try:
        sampling = msgspec.convert(fields, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling: {error}") from error
    return sampling.validated()


def _grammar(kind: str | None, guide: str | None) -> str | None:
    """TensorRT-LLM's names of what an answer is held to."""
    if not kind:
        return None
    if kind == "json":
        return grammar.json_object()
    if kind == "json_schema":
        return grammar.json_schema(_json(guide or "", "guided_decoding_guide", dict[str, Any]))
    if kind == "regex":
        return grammar.regex(guide or "")
    if kind == "ebnf_grammar":
        return grammar.ebnf(guide or "")
    raise InvalidRequest(f"guided_decoding_guide_type is {kind!r}; it must be json, json_schema, regex or ebnf_grammar")


def _sampling_parameters(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    fields: dict[str, Any] = {}
    for key, value in _json(text, "sampling_parameters", dict[str, Any]).items():
        name = _SAMPLING_ALIASES.get(key, key)
        if name in ("n", "best_of"):
            if str(value) != "1":
                raise InvalidRequest(f"sampling_parameters: {key} must be 1; send one request per sequence")
        elif name not in SamplingParams.__struct_fields__:
            raise InvalidRequest(f"sampling_parameters: unknown key {key!r}{_nearest(key)}")
        elif value is not None:
            fields[name] = [value] if name == "stop" and isinstance(value, str) else value
    for name in ("logit_bias", "stop", "stop_token_ids"):
        if isinstance(fields.get(name), str):
            fields[name] = _json(fields[name], f"sampling_parameters: {name}", Any)
    return fields


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, SamplingParams.__struct_fields__, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(SamplingParams.__struct_fields__)}"


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _json(text: str, name: str, shape: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=shape)
    except UNREADABLE as error:
        raise InvalidRequest(f"{name} is not the JSON that is expected: {error}") from error


def _wish(tensors: _Tensors) -> Wish | None:
    route = tensors.scalar("route")
    if not route:
        return None
    try:
        return Wish(route)
    except ValueError:
        known = ", ".join(wish.value for wish in Wish)
        raise InvalidRequest(f"route is {route!r}; it must be one of {known}") from None


def _target(tensors: _Tensors, name: str) -> float | None:
    value = tensors.scalar(name)
    if value is None:
        return None
    if not (math.isfinite(value) and value >= 0):
        raise InvalidRequest(f"{name} is {value!r}; it must be 0 (no target) or more, in ms")
    return float(value)


def _check_unsupported(tensors: _Tensors) -> None:
    for name, (allowed, why) in _MUST_BE.items():
        value = tensors.scalar(name)
        if value is not None and value != allowed:
            raise InvalidRequest(f"{name} is {value!r}; only {allowed!r} is accepted: {why}")
    if tensors.texts("bad_words"):
        raise InvalidRequest("bad_words is not supported; use logit_bias in sampling_parameters")


def _wanted(tensors: _Tensors, text: str | None, error_codes: bool) -> Wanted:
    keep_input = tensors.scalar("exclude_input_in_output") is False
    return Wanted(
        sending=_sending(tensors),
        prompt_text=(text or "") if keep_input else "",
        finish_reason=tensors.flag("return_finish_reason"),
        num_input_tokens=tensors.flag("return_num_input_tokens"),
        num_output_tokens=tensors.flag("return_num_output_tokens"),
        log_probs=tensors.flag("return_log_probs"),
        cumulative=tensors.flag("return_log_probs") or tensors.flag("return_cumulative_logprob"),
        logprobs=tensors.flag("return_logprobs"),
        output_ids=tensors.flag("return_output_ids"),
        proof=tensors.flag("return_proof") or tensors.flag("return_perf_metrics"),
        times=tensors.flag("return_perf_metrics"),
        error_codes=error_codes,
    )


def _sending(tensors: _Tensors) -> Sending:
    if not (tensors.flag("stream") or tensors.flag("streaming")):
        return Sending.WHOLE
    told = tensors.flag("return_num_output_tokens") or tensors.flag("return_output_ids")
    return Sending.TOKENS if told else Sending.TEXT  # who is told of tokens is told at once, and of their text when it is whole


def encode_piece(piece: Piece, wanted: Wanted, token_text: TokenText) -> Any:
    """One response: pb_utils.InferenceResponse with the outputs that are wanted, numbers of shape [1, n], texts of [1]."""
    out = [_text_tensor("text_output", piece.text.encode())]
    if wanted.finish_reason:
        out.append(_text_tensor("finish_reason", (piece.finish_reason.value if piece.finish_reason else "").encode()))
    if wanted.num_input_tokens:
        out.append(_tensor("num_input_tokens", [piece.num_input_tokens], np.int32))
    if wanted.num_output_tokens:
        out.append(_tensor("num_output_tokens", [len(piece.token_ids)], np.int32))
    if wanted.output_ids:
        out.append(_tensor("output_ids", piece.token_ids, np.int32))
    if wanted.log_probs:
        out.append(_tensor("output_log_probs", [entry.logprob for entry in piece.logprobs], np.float32))
    if wanted.cumulative:
        out.append(_tensor("cum_log_probs", [piece.cumulative_logprob], np.float32))
    if wanted.logprobs:
        out.append(_text_tensor("logprobs", _logprobs_json(piece, token_text)))
    if piece.proof is not None and wanted.proof:
        out.append(_text_tensor("proof", msgspec.json.encode(piece.proof)))
    if piece.proof is not None and wanted.times:
        out += [_tensor(name, [instant], np.int64) for name, instant in _times(piece).items()]
    return pb_utils.InferenceResponse(out)


def _text_tensor(name: str, text: bytes) -> Any:
    """Clients of TensorRT-LLM and vLLM take element 0 and decode it; with a batch dimension that would be an array."""
    return pb_utils.Tensor(name, np.array([text], dtype=np.object_))


def _tensor(name: str, values: list[Any], dtype: type[Any]) -> Any:
    return pb_utils.Tensor(name, np.array(values, dtype=dtype).reshape(1, -1))


def _times(piece: Piece) -> dict[str, int]:
    proof = piece.proof
    assert proof is not None
    after = {
        "arrival_time_ns": 0.0,
        "first_scheduled_time_ns": proof.queue_ms,
        "first_token_time_ns": proof.ttft_ms,
        "last_token_time_ns": proof.e2e_ms,
    }
    return {name: proof.arrival_ns + int(ms * 1e6) for name, ms in after.items()}


def _logprobs_json(piece: Piece, token_text: TokenText) -> bytes:
    """vLLM's form: per token {token_id: {logprob, rank, decoded_token}}; rank is null for a token outside the top n."""
    tokens = []
    for entry in piece.logprobs:
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, start=1)}
        listed = dict(entry.top) | {entry.token_id: entry.logprob}
        tokens.append(
            {
                str(token): {"logprob": logprob, "rank": ranks.get(token), "decoded_token": token_text(token)}
                for token, logprob in listed.items()
            }
        )
    return json.dumps(tokens).encode()
