"""Bodies of the OpenAI API: every field that is accepted, and what it means for a ClientRequest.

An unknown field, a wrong type or a value out of bounds is an ApiError that names the field, as OpenAI does it. Fields that
only ask for what this server never does otherwise (`store`, `service_tier`, ...) are accepted and have no effect.
"""

from __future__ import annotations

import difflib
import re
import secrets
from typing import Any, Literal, TypeVar

import msgspec

from python_backends.core.errors import UNREADABLE, InvalidRequest
from python_backends.core.section import NonNegativeFloat
from python_backends.core.types import SamplingParams
from router import grammar
from router.http.errors import ApiError
from router.http.tools import Choice, ToolSpec
from router.types import Sending, Wish

MAX_CHOICES = 16


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = (
        False  # vLLM's: each token is told at once, with the usage so far, even if its text is still to come
    )
    include_obfuscation: bool = False  # padding against traffic analysis; nothing is padded here


class BatonOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What OpenAI has no word for."""

    route: Wish | None = None
    proof: bool = False  # return the proof with the answer
    cache_salt: str = ""
    timeout_s: float | None = None
    slo_ttft_ms: NonNegativeFloat | None = None  # None: the deployment's
    slo_itl_ms: NonNegativeFloat | None = None


class Generation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and plain completions share."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # not OpenAI's, named as in vLLM
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    response_format: ResponseFormat | None = None
    baton: BatonOptions = msgspec.field(default_factory=BatonOptions)
    # accepted without effect
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with it."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sending(self) -> Sending:
        if not self.stream:
            return Sending.WHOLE
        every = self.stream_options is not None and self.stream_options.continuous_usage_stats
        return Sending.TOKENS if every else Sending.TEXT


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletion(Generation, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None


class Completion(Generation, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[Any]  # text, token ids, or a list of either
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


_Body = TypeVar("_Body", bound=Generation)


def parse(body: bytes, kind: type[_Body]) -> _Body:
    """Raises ApiError."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None
    except UNREADABLE as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not 1 <= request.choices <= MAX_CHOICES:
        raise ApiError(400, f"n is {request.n}; it must be 1 to {MAX_CHOICES}", param="n")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed together with stream: true", param="stream_options")
    return request


def _invalid(message: str, kind: type[Generation]) -> ApiError:
    """msgspec's sentence with the field it names as `param`."""
    unknown = re.search(r"unknown field `([^`]*)`", message)
    path = re.search(r" - at `\$\.?([^`]*)`$", message)
    place = path[1] if path else ""
    if unknown:
        field = f"{place}.{unknown[1]}" if place else unknown[1]
        near = difflib.get_close_matches(unknown[1], kind.__struct_fields__, n=1) if not place else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"{field} is not a field of this request{hint}", param=field)
    missing = re.search(r"missing required field `([^`]*)`", message)
    if missing:
        field = f"{place}.{missing[1]}" if place else missing[1]
        return ApiError(400, f"{field} is missing", param=field)
    return ApiError(400, f"{place}: {message.partition(' - at ')[0]}" if place else message, param=place or None)


def format_grammar(request: Generation) -> str | None:
    """What response_format asks of the answer. Raises ApiError."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    try:
        if wanted.type == "json_object":
            return grammar.json_object()
        if wanted.json_schema is None or wanted.json_schema.schema is None:
            raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format.json_schema.schema")
        return grammar.json_schema(wanted.json_schema.schema)
    except InvalidRequest as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from None


def sampling_of(
    request: Generation, max_tokens: int, logprobs: int | None, output_grammar: str | None = None
) -> SamplingParams:
    """Of the first choice; it has a seed. Raises ApiError that names the field."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    values: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_k": None if request.top_k == -1 else request.top_k,  # vLLM's word for all
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _logit_bias(request.logit_bias),
        "seed": request.seed if request.seed is not None else secrets.randbits(63),
        "stop": tuple(stop),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "ignore_eos": request.ignore_eos,
        "logprobs": logprobs,
        "grammar": output_grammar,
    }
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None}).validated()
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from None


def nth_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choices differ by their seeds, which follow from the request's."""
    seed = sampling.seed or 0
    return msgspec.structs.replace(sampling, seed=(seed + index) % 2**64) if index else sampling


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    try:
        return {int(token): bias for token, bias in (given or {}).items()} or None
    except ValueError as error:
        raise ApiError(400, f"logit_bias: keys must be token ids: {error}", param="logit_bias") from None


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content as one string. Raises ApiError."""
    if not messages:
        raise ApiError(400, "messages is empty; give at least one message", param="messages")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise ApiError(
            400, f"{where}.content is missing; only an assistant's tool calls can do without", param=f"{where}.content"
        )
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = _text(message.content, where)
    return plain


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            field = f"{where}.content[{index}]"
            raise ApiError(400, f"{field}: only parts of type text with a string `text` are supported", param=field)
    return "".join(part["text"] for part in content)
