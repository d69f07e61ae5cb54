"""W3C trace contexts: continued when well formed, else begun anew."""

from __future__ import annotations

import pytest

from router.trace_context import continue_trace, sibling

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True)])
def test_a_client_s_trace_goes_on_below_its_span(flags: str, sampled: bool) -> None:
    context = continue_trace(f"00-{TRACE}-{PARENT}-{flags}", "vendor=1")
    assert (context.trace_id, context.parent_id, context.sampled) == (TRACE, PARENT, sampled)
    assert context.span_id not in ("", PARENT)
    assert context.tracestate == "vendor=1"
    assert context.traceparent == f"00-{TRACE}-{context.span_id}-{'01' if sampled else '00'}"


def test_a_later_version_may_have_more_parts() -> None:
    assert continue_trace(f"cc-{TRACE}-{PARENT}-01-what-comes").trace_id == TRACE


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x",
    ],
)
def test_what_is_not_well_formed_begins_a_trace(header: str | None) -> None:
    context, other = continue_trace(header), continue_trace(header)
    assert context.parent_id == ""
    assert context.sampled is None
    assert len(context.trace_id) == 32
    assert context.trace_id not in (TRACE, other.trace_id)


def test_siblings_share_trace_and_parent() -> None:
    one = continue_trace(f"00-{TRACE}-{PARENT}-01")
    other = sibling(one)
    assert other.span_id != one.span_id
    assert (other.trace_id, other.parent_id, other.sampled) == (one.trace_id, one.parent_id, one.sampled)


def test_a_tracestate_that_is_too_long_is_dropped() -> None:
    assert continue_trace(f"00-{TRACE}-{PARENT}-01", "a=" + "x" * 600).tracestate == ""
