"""Triton's HTTP extension: POST /v2/models/router/generate_stream, answered by server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator

from loadtest.options import Options
from loadtest.protocols.base import Call, Part, Usage
from loadtest.protocols.grpc import cached_tokens
from loadtest.protocols.http import EventStream, HttpServer
from python_backends.core.errors import EngineFailure

_MODEL = "/v2/models/router"
_WANTED = {"stream": True, "return_num_output_tokens": True, "return_finish_reason": True, "return_proof": True}


class GenerateConnection:
    """Implements base.Connection."""

    def __init__(self, address: str, options: Options) -> None:
        self.name = "generate_stream"
        self.takes_ids = True
        self._server = HttpServer(address, options.timeout)
        sampling = {"sampling_parameters": json.dumps({"ignore_eos": True})}
        fields = {**sampling, **_WANTED, **options.extra_fields}
        self._fields = {name: value for name, value in fields.items() if value is not None}

    def wait_ready(self, timeout_s: float) -> None:
        self._server.wait_for(f"{_MODEL}/ready", timeout_s)

    def prepare(self, prompt: list[int] | str, output_tokens: int) -> Call:
        given = {"text_input" if isinstance(prompt, str) else "input_ids": prompt}
        return _GenerateCall(
            self._server.post(f"{_MODEL}/generate_stream", {**given, "max_tokens": output_tokens, **self._fields})
        )

    def close(self) -> None:
        self._server.close()


class _GenerateCall:
    """Implements base.Call."""

    def __init__(self, events: EventStream) -> None:
        self.usage = Usage()
        self._events = events

    def parts(self) -> Iterator[Part]:
        finished = False
        for time, data in self._events:
            event = json.loads(data)
            if "error" in event:
                raise EngineFailure(str(event["error"]))
            if event["num_output_tokens"]:
                yield Part(time, event["num_output_tokens"])
            if event.get("finish_reason"):
                finished = True
                self._read_last(event)
        if not finished:
            raise EngineFailure("the answer ended before its last response")

    def cancel(self) -> None:
        self._events.cancel()

    def _read_last(self, event: dict[str, str]) -> None:
        proof = json.loads(event.get("proof") or "{}")
        self.usage = Usage(
            finish_reason=event["finish_reason"], cached_tokens=cached_tokens(proof), route=str(proof.get("route", ""))
        )
