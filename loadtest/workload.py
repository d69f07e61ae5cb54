"""The values of a workload: a request that is planned, what it has to meet, and the streams that repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadtest.shapes import Shape


@dataclass(frozen=True, slots=True)
class Planned:
    """One request before it is sent.

    `kind` names its class in the report. The prompt is made of `blocks`: equal ids are equal tokens, so requests that
    begin with the same ids share a prefix. Every block has `block_tokens` tokens; the last one is cut to fit
    `input_tokens`.
    """

    time_s: float  # when it is due, seconds since the run began
    kind: str
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good request meets. `itl_ms` is compared with the 99th percentile of the request's own gaps."""

    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True)
class Streams:
    """Clients that send their next request as soon as the last one has ended. `draw` makes each request (time_s is 0)."""

    count: int
    draw: Callable[[], Planned]


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a run's load. `arrivals` come at their own times whatever the server does, in order of time_s."""

    streams: Streams | None
    arrivals: Iterator[Planned] | None
    shape: Shape
    duration_s: float
    slos: dict[str, Slo]  # one per kind

    @property
    def kinds(self) -> list[str]:
        return list(self.slos)
