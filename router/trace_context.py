"""Which trace a request belongs to, as W3C Trace Context has it (https://www.w3.org/TR/trace-context/).

Every request has a trace, also when its client has sent none: then it begins one. The spans themselves are made afterwards,
from the journal's record (tracing.py); here are only their names.
"""

from __future__ import annotations

import re
import secrets

import msgspec

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
MAX_TRACESTATE = 512  # characters; the standard asks for at least so many, and allows to drop longer ones


class TraceContext(msgspec.Struct, frozen=True):
    """The request's own span in its trace."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    parent_id: str = ""  # the client's span; empty: the trace begins here
    sampled: bool | None = None  # what the client has decided about exporting; None: it has not
    tracestate: str = ""

    @property
    def traceparent(self) -> str:
        """What is passed on and returned."""
        return f"00-{self.trace_id}-{self.span_id}-{'00' if self.sampled is False else '01'}"


def continue_trace(traceparent: str | None, tracestate: str | None = None) -> TraceContext:
    """A span below the client's. A header that is missing or malformed begins a new trace, as the standard demands."""
    match = _TRACEPARENT.fullmatch((traceparent or "").strip())
    if match is None or not _is_valid(*match.groups()):
        return TraceContext(secrets.token_hex(16), secrets.token_hex(8))
    _, trace_id, parent_id, flags, _ = match.groups()
    state = (tracestate or "").strip()
    return TraceContext(
        trace_id,
        secrets.token_hex(8),
        parent_id,
        bool(int(flags, 16) & _SAMPLED),
        state if len(state) <= MAX_TRACESTATE else "",
    )


def sibling(context: TraceContext) -> TraceContext:
    """Another span with the same parent: one request of a client may become several."""
    return msgspec.structs.replace(context, span_id=secrets.token_hex(8))


def _is_valid(version: str, trace_id: str, parent_id: str, flags: str, rest: str | None) -> bool:
    """Version 00 has exactly four parts; later ones may have more."""
    known = version != "ff" and (version != "00" or rest is None)
    return known and int(trace_id, 16) != 0 and int(parent_id, 16) != 0
