"""The waterfall in the terminal."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from router.journal import Record, Trouble
from router.types import Outcome
from scripts.trace import draw_bar, render
from tests.unit.router.journals import entry, remote_record


def _text(record: Record) -> str:
    console = Console(width=120, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        for part in render(record):
            console.print(part, markup=False)
    return capture.get()


@pytest.mark.parametrize(
    ("begin", "end", "bar"),
    [
        (0, 1, "████████"),
        (0.5, 1, "    ████"),
        (0, 0, "▏       "),
        (0.25, 0.3125, "  ▌     "),
        (1, 1, "       █"),
        (0.99, 2, "       █"),
    ],
)
def test_bars_fit_their_width(begin: float, end: float, bar: str) -> None:
    assert draw_bar(begin, end, 8) == bar


def test_a_request_is_told_in_its_phases() -> None:
    lines = _text(remote_record()).splitlines()
    assert lines[0] == "r.1  ok  101 prompt tokens, 10 produced, 100 ms"
    assert lines[1:4] == [f"trace  {'a' * 32}", "client mine", "why    it is long"]
    names = [line[:18].strip() for line in lines[4:14]]
    expected = "request, front end, tokenize, router, queue, prefill, handoff, transfer, decode, first decode"
    assert names == expected.split(", ")
    assert "prefill" in lines[9][-10:], "the worker's name"
    assert lines[14] == "between tokens: 8.9 ms on average, 70.0 ms at most"
    assert all(len(line) <= 80 for line in lines[4:14])


def test_troubles_and_errors_are_told() -> None:
    failed = msgspec.structs.replace(
        remote_record(), outcome=Outcome.FAILED, proof=None, error="no worker is left", troubles=[Trouble(7.0, "decode died")]
    )
    text = _text(failed)
    assert "r.1  failed" in text
    assert "attempt failed after 7.0 ms: decode died" in text
    assert "no worker is left" in text


def test_a_request_in_flight_says_so() -> None:
    assert "r.9  in flight (queued)" in _text(entry("r.9").record())
