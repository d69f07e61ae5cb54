"""The OpenAI API: a body in, asks at the router's door, an answer out. Starlette calls the methods of `Api`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from functools import wraps
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from python_backends.core.config import Deployment
from python_backends.core.errors import BatonError, InvalidRequest
from python_backends.core.types import SamplingParams
from router.door.client import Answer, DoorClient
from router.http.errors import ApiError, api_error
from router.http.forms import ChatForm, CompletionForm, Form, Tally
from router.http.origin import origin_of
from router.http.requests import (
    ChatCompletion,
    Completion,
    Generation,
    format_grammar,
    nth_choice,
    parse,
    plain_messages,
    sampling_of,
)
from router.http.stream import ClientGone, EventStream, unless_gone
from router.http.tools import CallFinder, Toolbox, spelled_out, with_parsed_arguments
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Piece, Sending

log = logging.getLogger(__name__)

_LONG_PROMPT_BYTES = 4_000  # from here on a prompt is tokenised off the event loop
_DONE = b"data: [DONE]\n\n"

_Owner = TypeVar("_Owner")
Handler = Callable[[_Owner, Request], Coroutine[Any, Any, Response | EventStream]]


def answered(handler: Handler[_Owner]) -> Handler[_Owner]:
    """Of a method: errors become OpenAI's error bodies; a bug becomes a 500 and a line in the log."""

    @wraps(handler)
    async def guarded(owner: _Owner, request: Request) -> Response | EventStream:
        try:
            return await handler(owner, request)
        except ApiError as error:
            failure = error
        except BatonError as error:
            failure = api_error(error)
        except ClientGone:
            return Response(status_code=499)
        except Exception:  # the per-request guard: the client is not to be left with a broken connection
            log.exception("internal error while serving a request")
            failure = ApiError(500, "internal error; the log of the front end has the details", kind="server_error")
        return Response(failure.body, failure.status, failure.headers, "application/json")

    return guarded


class Api:
    """Belongs to one front end process."""

    def __init__(self, deployment: Deployment, tokenizer: Tokenizer, door: DoorClient, api_keys: frozenset[bytes]) -> None:
        """api_keys: SHA-256 of each accepted key; empty: none is asked for."""
        self._config = deployment.http
        self._router = deployment.router
        self._model = deployment.model_name
        self._tokenizer = tokenizer
        self._door = door
        self._api_keys = api_keys
        self._started = 0

    # --- endpoints ---

    @answered
    async def models(self, request: Request) -> Response:
        self.authorize(request)
        return _json({"object": "list", "data": [self._model_card()]})

    @answered
    async def model(self, request: Request) -> Response:
        self.authorize(request)
        self._check_model(request.path_params["model"])
        return _json(self._model_card())

    @answered
    async def chat(self, request: Request) -> Response | EventStream:
        key = self.authorize(request)
        body = parse(await self._body(request), ChatCompletion)
        self._check_model(body.model)
        messages = plain_messages(body.messages)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        toolbox = Toolbox(body.tools or [], body.tool_choice, body.parallel_tool_calls is not False)
        if toolbox.in_use and body.response_format is not None and body.response_format.type != "text":
            raise ApiError(400, "response_format can't be had together with tools", param="response_format")
        output_grammar = toolbox.grammar() if toolbox.in_use else format_grammar(body)
        max_tokens = body.max_completion_tokens or body.max_tokens or self._router.default_max_tokens
        sampling = sampling_of(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None, output_grammar)
        with origin_of(request).tokenizing():
            prompt_ids = await self._chat_prompt(messages, toolbox)
        form = ChatForm(
            self._model,
            self._tokenizer.token_text,
            choices=body.choices,
            with_proof=body.baton.proof,
            with_logprobs=bool(body.logprobs),
            finders=[CallFinder() for _ in range(body.choices)] if toolbox.in_use else None,
            with_blanks=body.sending is Sending.TOKENS,
        )
        return await self._answer(request, body, [prompt_ids], sampling, form, key)

    @answered
    async def completions(self, request: Request) -> Response | EventStream:
        key = self.authorize(request)
        body = parse(await self._body(request), Completion)
        self._check_model(body.model)
        _check_legacy(body)
        prompts = _prompts(body.prompt)
        max_tokens = body.max_tokens or self._router.default_max_tokens
        sampling = sampling_of(body, max_tokens, body.logprobs, format_grammar(body))
        with origin_of(request).tokenizing():
            all_ids = [await self._prompt_ids(prompt) for prompt in prompts]
        echoes = [self._echo(prompt) if body.echo else "" for prompt in prompts for _ in range(body.choices)]
        form = CompletionForm(
            self._model,
            self._tokenizer.token_text,
            choices=body.choices,
            with_proof=body.baton.proof,
            with_logprobs=body.logprobs is not None,
            echoes=echoes,
        )
        return await self._answer(request, body, all_ids, sampling, form, key)

    # --- before the router is asked ---

    def authorize(self, request: Request) -> str:
        """The request's API key. Raises ApiError."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if self._api_keys and (kind.lower() != "bearer" or hashlib.sha256(key.encode()).digest() not in self._api_keys):
            message = "no accepted API key was given; send the header `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", kind="authentication_error")
        return key

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._config.max_body_bytes:
                limit = self._config.max_body_bytes
                raise ApiError(413, f"the body has more than {limit} bytes (http.max_body_bytes)", code="request_too_large")
        return bytes(body)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            message = f"model {name!r} is not served here; {self._model!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "baton"}

    async def _chat_prompt(self, messages: list[dict[str, Any]], toolbox: Toolbox) -> list[int]:
        """Raises ApiError."""
        tools = toolbox.for_template if toolbox.in_use else None
        messages = with_parsed_arguments(messages)
        if not self._tokenizer.template_knows_tools:
            messages = spelled_out(messages)
            messages, tools = (toolbox.instructed(messages) if tools else messages), None
        size = sum(len(message["content"]) for message in messages)
        return await self._tokenize(lambda: self._tokenizer.encode_chat(messages, tools), size, "messages")

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return await self._tokenize(lambda: self._tokenizer.encode(prompt), len(prompt), "prompt")

    async def _tokenize(self, encode: Callable[[], list[int]], size: int, field: str) -> list[int]:
        """`size`: characters of the prompt. Raises ApiError that blames `field`."""
        limit = self._router.max_prompt_bytes
        if size > limit:
            raise ApiError(400, f"{field} has {size} characters; at most {limit} are accepted", param=field)
        try:
            return encode() if size < _LONG_PROMPT_BYTES else await asyncio.to_thread(encode)
        except InvalidRequest as error:
            raise ApiError(400, str(error), param=field) from None

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _salt(self, body: Generation, key: str) -> str:
        """Who shares prefixes with whom. The tenant comes first, always as long, so no client can write itself another's."""
        if self._config.tenant == "none":
            return body.baton.cache_salt
        tenant = key if self._config.tenant == "api_key" else body.user or ""
        return f"{hashlib.sha256(tenant.encode()).hexdigest()} {body.baton.cache_salt}"

    # --- the answer ---

    async def _answer(
        self,
        request: Request,
        body: Generation,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        form: Form,
        key: str,
    ) -> Response | EventStream:
        """One ask per choice of each prompt. Errors that come before the first text are answers with a status."""
        asks = [
            ClientRequest(
                nth_choice(sampling, index),
                input_ids=prompt,
                wish=body.baton.route,
                salt=self._salt(body, key),
                priority=body.priority or 0,
                timeout_s=body.baton.timeout_s,
                slo_ttft_ms=body.baton.slo_ttft_ms,
                slo_itl_ms=body.baton.slo_itl_ms,
            )
            for prompt in prompts
            for index in range(body.choices)
        ]
        origin = origin_of(request)
        asks = [origin.mark(ask, form.id, number) for number, ask in enumerate(asks)]
        with ExitStack() as held:
            answers = [held.enter_context(self._door.ask(ask, body.sending)) for ask in asks]
            if not body.stream:
                pieces = await unless_gone(_all(answers), request.receive)
                return _json(form.whole(pieces))
            progress = _merged(answers) if len(answers) > 1 else _single(answers[0])
            first = await unless_gone(_next(progress), request.receive)
            tallies = [Tally() for _ in answers]
            return EventStream(_events(first, progress, tallies, form, held.pop_all(), body))


async def _all(answers: Sequence[Answer]) -> list[Piece]:
    return await asyncio.gather(*(answer.whole() for answer in answers))


_Progress = tuple[int, list[Piece]]
"""What has come of one answer: its index and the pieces."""


async def _next(progress: AsyncGenerator[_Progress, None]) -> _Progress:
    return await anext(progress)


async def _single(answer: Answer) -> AsyncGenerator[_Progress, None]:
    """The pieces of one answer as they come, to the last. Raises its error."""
    while True:
        pieces = await answer.pieces()
        yield 0, pieces
        if pieces[-1].finish_reason is not None:
            return


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[_Progress, None]:
    """The pieces of all answers as they come, to the end of the last. Raises the first error of any.

    One for the whole stream: what it has taken from an answer and not yielded is lost when it is closed.
    """
    waiting = {asyncio.ensure_future(answer.pieces()): index for index, answer in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                pieces = task.result()
                if pieces[-1].finish_reason is None:
                    waiting[asyncio.ensure_future(answers[index].pieces())] = index
                yield index, pieces
    finally:
        for task in waiting:
            task.cancel()


async def _events(
    first: _Progress,
    rest: AsyncGenerator[_Progress, None],
    tallies: Sequence[Tally],
    form: Form,
    held: ExitStack,
    body: Generation,
) -> AsyncGenerator[bytes, None]:
    """Everything a stream consists of. `held` closes the answers, however this ends. `tallies`: one per answer."""
    every_token = body.sending is Sending.TOKENS
    with held:
        try:
            openings = [form.opening(index) for index in range(len(tallies))]
            yield b"".join(_event(opening) for opening in openings if opening is not None)
            async with aclosing(_following(first, rest)) as progress:
                async for index, pieces in progress:
                    for piece in pieces:
                        tallies[index].add(piece)
                    chunks = [chunk for piece in pieces if (chunk := form.chunk(index, piece)) is not None]
                    if every_token:
                        chunks = [form.counted(chunk, tallies) for chunk in chunks]
                    yield b"".join(_event(chunk) for chunk in chunks)
        except BatonError as error:
            yield b"data: " + api_error(error).body + b"\n\n"
            return
        if body.with_usage:
            yield _event(form.usage_chunk(tallies))
        yield _DONE


async def _following(first: _Progress, rest: AsyncGenerator[_Progress, None]) -> AsyncGenerator[_Progress, None]:
    async with aclosing(rest):
        yield first
        async for progress in rest:
            yield progress


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One or several prompts, each text or token ids. Raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    several = [prompt] if prompt and all(isinstance(token, int) for token in prompt) else prompt
    try:
        return msgspec.convert(several, list[str | list[int]]) or _no_prompt()
    except msgspec.ValidationError:
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", param="prompt") from None


def _no_prompt() -> NoReturn:
    raise ApiError(400, "prompt is empty; give text or token ids", param="prompt")


def _check_legacy(body: Completion) -> None:
    """Options of the old API that can't be had."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported; put all of the context into prompt", param="suffix")
    if body.best_of not in (None, 1, body.choices):
        raise ApiError(400, f"best_of is {body.best_of}; only n ({body.choices}) is supported", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo together with logprobs is not supported: prompts have none here", param="echo")
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens is 0; it must be at least 1", param="max_tokens")
