"""OpenAI's API, of any server that speaks it: /chat/completions or /completions with server-sent events.

Tokens are counted as the server reports them: a chunk with text is one, unless `usage` (asked for by
`stream_options.include_usage`) says otherwise at the end or in every chunk. Where every chunk has it
(`stream_options.continuous_usage_stats`), tokens whose text is still to come, such as half a character, count as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from loadtest.options import Options
from loadtest.protocols.base import Call, Part, Usage
from loadtest.protocols.http import EventStream, HttpServer, error_text
from python_backends.core.errors import ConfigError, EngineFailure

_DONE = b"[DONE]"
_TEXTS = ("content", "reasoning_content", "reasoning", "text")


class OpenAIConnection:
    """Implements base.Connection. The key is that of $OPENAI_API_KEY, if there is one."""

    def __init__(self, address: str, options: Options) -> None:
        """`address`: with the path that comes before `/chat/completions`, usually /v1."""
        key = os.environ.get("OPENAI_API_KEY")
        self.name = f"OpenAI {options.api}"
        self.takes_ids = options.api == "completions"
        self._chat = options.api == "chat"
        self._model = options.model
        self._server = HttpServer(address, options.timeout, {"Authorization": f"Bearer {key}"} if key else None)
        fixed = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True}
        self._fields = {name: value for name, value in {**fixed, **options.extra_fields}.items() if value is not None}

    def wait_ready(self, timeout_s: float) -> None:
        """Also asks for the models, to take the first when none was named."""
        body = self._server.wait_for("/models", timeout_s)
        try:
            names = [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._server.url}/models: not OpenAI's list of models; the address must end as /v1 does"
            ) from error
        if not self._model:
            if not names:
                raise ConfigError(f"{self._server.url} has no model; name one with --model")
            self._model = names[0]

    def prepare(self, prompt: list[int] | str, output_tokens: int) -> Call:
        path = "/chat/completions" if self._chat else "/completions"
        given: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}
        body = {"model": self._model, **given, "max_tokens": output_tokens, **self._fields}
        return _OpenAICall(self._server.post(path, body))

    def close(self) -> None:
        self._server.close()


class _OpenAICall:
    """Implements base.Call."""

    def __init__(self, events: EventStream) -> None:
        self.usage = Usage()
        self._events = events
        self._counted = 0  # tokens yielded so far

    def parts(self) -> Iterator[Part]:
        for time, data in self._events:
            if data == _DONE:
                continue  # the connection is read to its end, so that it can be used again
            chunk = json.loads(data)
            if chunk.get("error"):
                raise EngineFailure(error_text(data))
            tokens = self._read(chunk)
            if tokens:
                self._counted += tokens
                yield Part(time, tokens)
        if not self.usage.finish_reason:
            raise EngineFailure("the answer ended before its finish_reason")

    def cancel(self) -> None:
        self._events.cancel()

    def _read(self, chunk: dict[str, Any]) -> int:
        """New tokens in it."""
        has_text, ended = False, not chunk.get("choices")
        for choice in chunk.get("choices") or ():
            piece = choice.get("delta") or choice
            has_text |= any(piece.get(name) for name in _TEXTS) or bool(piece.get("tool_calls"))
            ended |= bool(choice.get("finish_reason"))
            self.usage.finish_reason = choice.get("finish_reason") or self.usage.finish_reason
        usage = chunk.get("usage")
        if usage:
            self._read_usage(usage)
        proof = (chunk.get("baton") or {}).get("proof")  # Baton's own, when --fields asks for it
        if proof:
            self.usage.route = str(proof.get("route", ""))
        new = self.usage.output_tokens - self._counted
        if has_text:
            return max(1, new)  # more than one only where every chunk has a usage
        return max(0, new) if usage and not ended else 0  # at the end they are those of all chunks

    def _read_usage(self, usage: dict[str, Any]) -> None:
        self.usage.input_tokens = usage.get("prompt_tokens") or 0
        self.usage.output_tokens = usage.get("completion_tokens") or 0
        details = usage.get("prompt_tokens_details") or {}
        self.usage.cached_tokens = details.get("cached_tokens") or 0
