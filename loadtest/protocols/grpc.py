"""Triton's gRPC, by scripts/client.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from loadtest.options import Options
from loadtest.protocols.base import Call, Part, Usage
from python_backends.core.errors import Cancelled
from scripts.client import Client, Stream

_CACHED = (
    ("kv_tokens_reused", "kv_tokens_node", "kv_tokens_remote"),
    ("prefill_tokens_reused", "prefill_tokens_node", "prefill_tokens_remote", "prefill_tokens_peer"),
)


class GrpcConnection:
    """Implements base.Connection. One HTTP/2 connection for all requests."""

    def __init__(self, address: str, options: Options) -> None:
        self.name = "gRPC"
        self.takes_ids = True
        self._client = Client(address)
        self._timeout_s = options.timeout
        self._fields = {"sampling_parameters": json.dumps({"ignore_eos": True}), **options.extra_fields}

    def wait_ready(self, timeout_s: float) -> None:
        self._client.wait_ready(timeout_s)

    def prepare(self, prompt: list[int] | str, output_tokens: int) -> Call:
        fields = {**self._fields, "max_tokens": output_tokens}
        if isinstance(prompt, str):
            return _GrpcCall(self._client, prompt, fields, self._timeout_s)
        return _GrpcCall(self._client, None, {**fields, "input_ids": prompt}, self._timeout_s)

    def close(self) -> None:
        self._client.close()


class _GrpcCall:
    """Implements base.Call."""

    def __init__(self, client: Client, prompt: str | None, fields: dict[str, object], timeout_s: float) -> None:
        self.usage = Usage()
        self._client, self._prompt, self._fields, self._timeout_s = client, prompt, fields, timeout_s
        self._stream: Stream | None = None
        self._cancelled = False

    def parts(self) -> Iterator[Part]:
        with self._client.stream(self._prompt, timeout_s=self._timeout_s, **self._fields) as self._stream:
            if self._cancelled:
                raise Cancelled("cancelled before it was sent")
            for chunk in self._stream:
                if chunk.num_tokens:
                    yield Part(chunk.time, chunk.num_tokens)
                if chunk.proof is not None:
                    self._read_proof(chunk.proof, chunk.finish_reason)

    def cancel(self) -> None:
        self._cancelled = True
        if self._stream is not None:
            self._stream.close()

    def _read_proof(self, proof: dict[str, Any], finish_reason: str) -> None:
        self.usage.finish_reason = finish_reason
        self.usage.route = str(proof.get("route", ""))
        self.usage.cached_tokens = cached_tokens(proof)


def cached_tokens(proof: Mapping[str, Any]) -> int:
    """Prompt tokens that were in a cache or store: as the decode worker or the prefill worker has it, whichever had more."""
    return max(sum(int(proof.get(name, 0)) for name in names) for names in _CACHED)
