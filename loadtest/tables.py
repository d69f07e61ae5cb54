"""Figures as rows of text: what the HTML page, the Markdown table and the terminal show alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.record import Run
from loadtest.summary import Figures, Spread
from loadtest.workload import Slo


@dataclass(frozen=True, slots=True)
class Row:
    """One figure for every kind of request. `values`: one per column."""

    name: str
    values: tuple[str, ...]


def milliseconds(value: float) -> str:
    """`0.43 ms`, `42.1 ms`, `256 ms`, `4.21 s`; a dash for none."""
    if math.isnan(value):
        return "-"
    if value >= 1e3:
        return f"{value / 1e3:.3g} s" if value < 1e6 else f"{value / 1e3:,.0f} s"
    return f"{value:.0f} ms" if value >= 99.5 else f"{value:.3g} ms"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def slo_text(slo: Slo) -> str:
    """Longest time to the first token, and 99th percentile of times between tokens."""
    return f"{milliseconds(slo.ttft_ms)}, {milliseconds(slo.itl_ms)}"


def percentiles(values: Spread) -> str:
    return " / ".join(milliseconds(value) for value in (values.p50, values.p90, values.p99))


_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("requests (n)", lambda f: f"{f.requests:,}"),
    ("failed", lambda f: f"{f.failed:,}"),
    ("TTFT p50 / p90 / p99", lambda f: percentiles(f.ttft)),
    ("ITL p50 / p90 / p99", lambda f: percentiles(f.itl)),
    ("ITL longest", lambda f: milliseconds(f.itl.max)),
    ("gaps (n)", lambda f: f"{f.itl.n:,}"),
    ("time per output token p50", lambda f: milliseconds(f.tpot.p50)),
    ("whole request p50 / p90 / p99", lambda f: percentiles(f.e2e)),
    ("requests per second", lambda f: rate(f.request_rate)),
    ("tokens out per second", lambda f: rate(f.output_rate)),
    ("tokens in and out per second", lambda f: rate(f.total_rate)),
    ("SLO: TTFT, ITL p99", lambda f: slo_text(f.slo) if f.slo else "each its own"),
    ("goodput per second", lambda f: f"{rate(f.goodput)} ({f.good / max(f.requests, 1):.0%})"),
)


def rows(found: Sequence[Figures]) -> list[Row]:
    table = [Row(name, tuple(value(figures) for figures in found)) for name, value in _ROWS]
    second = found[0].second_slo
    if second:
        name = f"goodput per second, second SLO ({slo_text(second)})"
        values = (f"{rate(f.second_goodput)} ({f.second_good / max(f.requests, 1):.0%})" for f in found)
        table.append(Row(name, tuple(values)))
    if any(figures.cached_share for figures in found):
        table.append(Row("prompt tokens from a prefix cache", tuple(f"{figures.cached_share:.0%}" for figures in found)))
    if any(figures.routes for figures in found):
        table.append(Row("routes", tuple(_routes(figures) for figures in found)))
    return table


def _routes(figures: Figures) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(figures.routes.items())) or "-"


def client_line(run: Run, tokens: int) -> str:
    """What measuring cost, and whether it kept its times."""
    client = run.client
    cost = f", {client.cpu_s / tokens * 1e6:.0f} µs per token" if tokens else ""
    share = client.cpu_s / run.options.duration
    late = f"requests left {milliseconds(client.late_ms_p50)} late (p50), {milliseconds(client.late_ms_p99)} (p99)"
    return f"The client used {share:.0%} of a core{cost}; {late}."


def markdown(columns: Sequence[str], table: Sequence[Row], notes: Sequence[str]) -> str:
    """A table, and paragraphs under it."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += ["| " + " | ".join((row.name, *row.values)) + " |" for row in table]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)
