"""From records to the figures of a report, and to the series of its plots.

What counts: requests that were due inside the window (after the warm-up, before the end), gaps and tokens that arrived
inside it. Requests in flight at the end are waited for, so slow ones count; their tokens after the end do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.record import UNFINISHED, Floats, Record, Run
from loadtest.shapes import Shape
from loadtest.workload import Slo

_WINDOWS = 10  # pieces of a run whose load has no steps
_MIN_WINDOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of `n` values; NaN without any."""

    n: int
    p50: float
    p90: float
    p99: float
    max: float


def spread(values: Floats) -> Spread:
    values = values[np.isfinite(values)]
    if values.size == 0:
        return Spread(0, *[float("nan")] * 4)
    return Spread(values.size, *(float(value) for value in np.percentile(values, (50, 90, 99, 100))))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one kind of request, or of all. Times in ms, rates per second of the window."""

    kind: str
    slo: Slo | None  # None: kinds with different ones
    requests: int
    failed: int
    good: int
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    request_rate: float  # requests that arrived
    goodput: float  # good requests
    input_rate: float  # prompt tokens of requests whose first token came
    output_rate: float  # tokens that arrived
    cached_share: float  # of prompt tokens, found in a prefix cache; 0 where the server does not say
    routes: dict[str, int]
    second_slo: Slo | None = None
    second_good: int = 0
    second_goodput: float = 0.0

    @property
    def total_rate(self) -> float:
        return self.input_rate + self.output_rate


ALL = "all"


def figures(run: Run, records: Sequence[Record]) -> list[Figures]:
    """One entry per kind in the plan's order, and one for all if there are several."""
    kinds = [kind for kind in run.slos if any(record.kind == kind for record in records)]
    found = [_figures(kind, run, [record for record in records if record.kind == kind]) for kind in kinds]
    return [*found, _figures(ALL, run, records)] if len(found) > 1 else found


def _figures(kind: str, run: Run, records: Sequence[Record]) -> Figures:
    counted = [record for record in records if _inside(record.due_s, run)]
    good = sum(record.meets(run.slos[record.kind]) for record in counted)
    second = run.options.wanted_second_slo
    second_good = sum(record.meets(second) for record in counted) if second else 0
    seconds = run.window[1] - run.window[0]
    prefilled = [record for record in records if record.arrival_s and _inside(record.arrival_s[0], run)]
    inputs = sum(record.input_tokens for record in counted)
    routes: dict[str, int] = {}
    for record in counted:
        if record.route:
            routes[record.route] = routes.get(record.route, 0) + 1
    return Figures(
        kind=kind,
        slo=run.slos.get(kind),
        requests=len(counted),
        failed=sum(not record.ok for record in counted),
        good=good,
        ttft=spread(_array(record.ttft_ms for record in counted)),
        itl=spread(gaps_inside(records, run)[1]),
        tpot=spread(_array(record.tpot_ms for record in counted if record.ok)),
        e2e=spread(_array(record.e2e_ms for record in counted if record.ok)),
        request_rate=len(counted) / seconds,
        goodput=good / seconds,
        input_rate=sum(record.input_tokens for record in prefilled) / seconds,
        output_rate=sum(_tokens_inside(record, run) for record in records) / seconds,
        cached_share=sum(record.cached_tokens for record in counted) / inputs if inputs else 0.0,
        routes=routes,
        second_slo=second,
        second_good=second_good,
        second_goodput=second_good / seconds,
    )


def _array(values: Iterable[float]) -> Floats:
    return np.fromiter(values, np.float64)


def _inside(time_s: float, run: Run) -> bool:
    return run.window[0] <= time_s < run.window[1]


def _tokens_inside(record: Record, run: Run) -> float:
    """Where the server counted other than arrivals did, every arrival has the same share."""
    times = np.frombuffer(record.arrival_s, np.float64)
    inside = (times >= run.window[0]) & (times < run.window[1])
    counts = np.array(record.arrival_tokens, np.float64)
    arrived = counts.sum()
    return float(counts[inside].sum() * (record.output_tokens / arrived)) if arrived else 0.0


def gaps_inside(records: Sequence[Record], run: Run) -> tuple[Floats, Floats]:
    """(second at which each gap ended, its length in ms), of gaps that ended in the window; in order of time."""
    ends = [np.frombuffer(record.arrival_s, np.float64)[1:] for record in records if record.arrival_s]
    if not ends:
        return np.empty(0), np.empty(0)
    end_s = np.concatenate(ends)
    gap_ms = np.concatenate([record.gaps() for record in records if record.arrival_s])
    order = np.argsort(end_s, kind="stable")
    end_s, gap_ms = end_s[order], gap_ms[order]
    inside = (end_s >= run.window[0]) & (end_s < run.window[1])
    return end_s[inside], gap_ms[inside]


def waiting_tokens(records: Sequence[Record], at_s: Floats) -> Floats:
    """Prompt tokens whose request was sent and had no first token yet, at each of the times: the prefill load."""
    sent = np.array([record.sent_s for record in records])
    end = np.array([prefill_end(record) for record in records])
    tokens = np.array([record.input_tokens for record in records], np.float64)
    order_sent, order_end = np.argsort(sent), np.argsort(end)
    began = np.concatenate([[0.0], np.cumsum(tokens[order_sent])])[np.searchsorted(sent[order_sent], at_s, side="right")]
    ended = np.concatenate([[0.0], np.cumsum(tokens[order_end])])[np.searchsorted(end[order_end], at_s, side="right")]
    return np.asarray(began - ended, np.float64)


def prefill_end(record: Record) -> float:
    """The second in which its first token came; infinite where it was waited for to the end."""
    if record.arrival_s:
        return record.arrival_s[0]
    return float("inf") if record.error == UNFINISHED else record.sent_s  # when it failed is not known; it was no load


@dataclass(frozen=True, slots=True)
class Point:
    """A stretch of the run: requests per second that arrived, and that were good. `level`: of the shape, meanwhile.

    `second_goodput`: under the second SLO, if there is one.
    """

    start_s: float
    level: float
    rate: float
    goodput: float
    second_goodput: float | None


def goodput_points(run: Run, records: Sequence[Record]) -> list[Point]:
    """One per step of the shape; of a steady load, one per tenth of the window."""
    low, high = run.window
    shape, second = Shape(tuple(run.levels)), run.options.wanted_second_slo
    windows = [(max(a, low), b) for a, b in shape.windows(high)]
    if len(windows) == 1:
        edges = np.linspace(low, high, min(_WINDOWS, max(1, int((high - low) / _MIN_WINDOW_S))) + 1)
        windows = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    points = []
    for start, end in windows:
        if end - start < _MIN_WINDOW_S / 2:
            continue
        due = [record for record in records if start <= record.due_s < end]
        good = sum(record.meets(run.slos[record.kind]) for record in due) / (end - start)
        second_good = sum(record.meets(second) for record in due) / (end - start) if second else None
        points.append(Point(start, shape.level(start), len(due) / (end - start), good, second_good))
    return points
