"""Runs made by hand: requests whose every time is known."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from loadtest.machine import Machine
from loadtest.options import Options
from loadtest.record import Client, Record, Run
from loadtest.workload import Slo

SLO = Slo(ttft_ms=1000, itl_ms=50)


def run(
    options: Options | None = None, kinds: Sequence[str] = ("stream",), levels: Sequence[tuple[float, float]] = ((0.0, 1.0),)
) -> Run:
    return Run(
        command="scripts/loadtest --duration 10",
        server="grpc://127.0.0.1:8001",
        protocol="gRPC",
        options=options or Options(duration=10.0, warmup=2.0),
        levels=list(levels),
        slos=dict.fromkeys(kinds, SLO),
        began="2026-01-02T03:04:05+00:00",
        machine=Machine("Some CPU", 2, 24.0, "Linux 6", "3.11"),
        client=Client(cpu_s=0.5, late_ms_p50=0.1, late_ms_p99=1.0, late_ms_max=2.0),
    )


def record(
    number: int,
    sent_s: float,
    ttft_s: float,
    gaps_s: Sequence[float],
    *,
    kind: str = "stream",
    input_tokens: int = 100,
    error: str = "",
) -> Record:
    """First token after `ttft_s`, then one after each gap."""
    arrivals = [sent_s + ttft_s]
    for gap in gaps_s:
        arrivals.append(arrivals[-1] + gap)
    made = Record(
        number, kind, sent_s, input_tokens, len(arrivals), sent_s, error=error, finish_reason="" if error else "length"
    )
    made.arrival_s, made.arrival_tokens = array("d", arrivals), array("l", [1] * len(arrivals))
    return made


def failed(number: int, sent_s: float, error: str, kind: str = "stream") -> Record:
    return Record(number, kind, sent_s, 100, 4, sent_s, error=error)
