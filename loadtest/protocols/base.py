"""What every protocol does for a load test: encode a request ahead of time, send it, tell when tokens arrive.

All of it blocks: a request is read in a thread of its own (run.py says why), and cancelled from another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Part:
    """One piece of an answer that has `tokens` new ones. `time`: of arrival, time.monotonic() seconds."""

    time: float
    tokens: int


@dataclass(slots=True)
class Usage:
    """What the server said of the request at its end. 0 or empty where it said nothing."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in a prefix cache
    finish_reason: str = ""
    route: str = ""


class Call(Protocol):
    """One request, encoded and not yet sent."""

    usage: Usage

    def parts(self) -> Iterator[Part]:
        """Send it and yield what arrives; `usage` is filled in at the end. Once, in one thread.

        Raises BatonError: the server's own words, whatever the protocol.
        """

    def cancel(self) -> None:
        """Make `parts` end soon with an error. Any thread may call it, at any time."""


class Connection(Protocol):
    """One server. Any number of threads may use it at once."""

    name: str  # of the protocol, in reports
    takes_ids: bool  # whether prompts may be token ids

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the server can be asked. Raises BatonError that says what is missing."""

    def prepare(self, prompt: list[int] | str, output_tokens: int) -> Call:
        """A request for exactly `output_tokens` tokens: the model's own end of text does not count."""

    def close(self) -> None: ...
