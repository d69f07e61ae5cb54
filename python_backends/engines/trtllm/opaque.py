"""DisaggregatedParams in a ticket: by field names, so that releases with more or fewer fields understand each other.

msgpack, never pickle. The ticket around it is signed; a peer's bytes still become nothing but numbers, strings and lists.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import msgspec

from python_backends.core.errors import HandoffRefused, RefusalReason

_VERSION = 1
_LEFT_OUT = ("request_type", "first_gen_logits", "multimodal_embedding_handles", "multimodal_hashes")
# The other end sets its own type; logits are tensors; generation refuses multimodal handles.
_LOGPROBS = "first_gen_log_probs"


class _Packed(msgspec.Struct):
    version: int
    fields: dict[str, Any]


_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(params: Any) -> bytes:
    """The fields that are set. Raises TypeError for a value that isn't plain data: a release that this doesn't know."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is None or field.name in _LEFT_OUT:
            continue
        if isinstance(value, enum.Enum):
            value = int(value.value)
        elif field.name == _LOGPROBS:
            value = [[[int(token), float(entry.logprob), entry.rank] for token, entry in top.items()] for top in value]
        fields[field.name] = value
    return msgspec.msgpack.encode(_Packed(_VERSION, fields))


def unpack(packed: bytes, params_class: Any, logprob_class: Any) -> Any:
    """DisaggregatedParams of this release for the other half of the request. Fields it doesn't have are left out.

    Raises HandoffRefused (MALFORMED) for nonsense, or when what every release needs is missing.
    """
    try:
        decoded = _decoder.decode(packed)
        if decoded.version != _VERSION:
            raise ValueError(f"version {decoded.version}, this worker reads {_VERSION}")
        known = {field.name for field in dataclasses.fields(params_class)} - set(_LEFT_OUT)
        fields = {name: value for name, value in decoded.fields.items() if name in known}
        if _LOGPROBS in fields:
            fields[_LOGPROBS] = [
                {int(token): logprob_class(logprob=float(logprob), rank=rank) for token, logprob, rank in top}
                for top in fields[_LOGPROBS]
            ]
        if not isinstance(fields.get("opaque_state"), bytes) or not isinstance(fields.get("ctx_request_id"), int):
            raise ValueError("opaque_state or ctx_request_id is missing")
        first = fields.get("first_gen_tokens")
        if not isinstance(first, list) or not first or not all(isinstance(token, int) for token in first):
            raise ValueError("first_gen_tokens is missing")
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise HandoffRefused(RefusalReason.MALFORMED, f"opaque part: {error}") from error
    return params_class(request_type="generation_only", **fields)
