"""The plots of one run's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from loadtest.charts import INK, MUTED, SERIES, Chart, Curve, LineStyle, cdf, draw, time_scale
from loadtest.record import Floats, Record, Run
from loadtest.summary import Point, gaps_inside, goodput_points, waiting_tokens
from loadtest.tables import slo_text

_BINS = 90
_MIN_BIN_S = 0.5
_SAMPLES = 400
_SPARSE = 0.5

Naming = Callable[[str], str]
"""What a kind is called in the legend."""
Look = Callable[[int], tuple[str, LineStyle]]
"""Colour and line style of the kind with this number."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart and the words that stand with it. `n`: what was counted."""

    title: str
    chart: Chart
    n: str
    text: str


def make_plots(run: Run, records: Sequence[Record]) -> list[Plot]:
    return [_latency(run, records), smoothness(run, records), _goodput(run, records)]


def _latency(run: Run, records: Sequence[Record]) -> Plot:
    first, between = latency_curves(run, records, lambda kind: kind, lambda index: (SERIES[index % len(SERIES)], "-"))

    def paint(figure: Figure, narrow: bool) -> None:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        cdf(left, first, "Time to first token")
        cdf(right, between, "Between tokens (ITL)")
        left.set_ylabel("requests")
        right.set_ylabel("gaps")
        if len(first) > 1:
            place_legend(figure, left, narrow)

    n = f"{sum(curve.values.size for curve in first):,} first tokens, {sum(curve.values.size for curve in between):,} gaps"
    text = "Share of values that are not above. The axis stretches towards 100%, so that the tail can be read."
    return Plot("Latency", draw("latency", paint, 3.2, 5.6), n, text)


def latency_curves(run: Run, records: Sequence[Record], name: Naming, look: Look) -> tuple[list[Curve], list[Curve]]:
    """(first tokens, gaps), one curve per kind. `name(kind)`; `look(index)`: colour and line style."""
    first, between = [], []
    for index, kind in enumerate(run.slos):
        own = [record for record in records if record.kind == kind]
        colour, style = look(index)
        counted = [record.ttft_ms for record in own if record.arrival_s and run.window[0] <= record.due_s < run.window[1]]
        first.append(Curve(name(kind), colour, np.array(counted, np.float64), style))
        between.append(Curve(name(kind), colour, gaps_inside(own, run)[1], style))
    return first, between


def place_legend(figure: Figure, axes: Axes, narrow: bool) -> None:
    """One for the whole figure, below it."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower left", ncols=2 if narrow else 4, handlelength=1.6)


def smoothness(run: Run, records: Sequence[Record]) -> Plot:
    """ITL over time, and under it the prompt tokens in prefill."""

    def paint(figure: Figure, narrow: bool) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        paint_itl(upper, run, records, lambda kind: kind, lambda index: SERIES[index % len(SERIES)])
        upper.set_title("Between tokens (ITL): median, and 99th percentile dashed")
        if narrow:
            upper.set_title("ITL: median, p99 dashed")
        paint_prefill(lower, run, records, SERIES[-1])
        lower.set_xlabel("seconds since the run began")
        place_legend(figure, upper, narrow)

    n = f"{gaps_inside(records, run)[1].size:,} gaps"
    text = "Where a line is broken, nothing arrived. Below: prompt tokens of requests that waited for their first token."
    return Plot("Smoothness under prefill", draw("time", paint, 4.2, 4.6), n, text)


def paint_itl(axes: Axes, run: Run, records: Sequence[Record], name: Naming, colour: Callable[[int], str]) -> None:
    """Per kind and bin of time the median and the 99th percentile of gaps, logarithmic."""
    for index, kind in enumerate(run.slos):
        end_s, gap_ms = gaps_inside([record for record in records if record.kind == kind], run)
        if gap_ms.size == 0:
            continue
        middle, p50, p99 = _binned(end_s, gap_ms, run)
        sparse = np.isfinite(p50).mean() < _SPARSE  # lines alone would not show bins without neighbours
        axes.plot(middle, p50, color=colour(index), label=name(kind), marker="." if sparse else "")
        axes.plot(middle, p99, color=colour(index), linestyle=(0, (3, 1.5)), linewidth=1.0, marker="." if sparse else "")
    time_scale(axes, "y")
    axes.set_xlim(*run.window)


def _binned(end_s: Floats, gap_ms: Floats, run: Run) -> tuple[Floats, Floats, Floats]:
    """(middle of each bin, median, 99th percentile); NaN where nothing arrived."""
    low, high = run.window
    count = max(1, min(_BINS, int((high - low) / _MIN_BIN_S)))
    edges = np.linspace(low, high, count + 1)
    bins = np.clip(np.searchsorted(edges, end_s, side="right") - 1, 0, count - 1)
    values = [gap_ms[bins == number] for number in range(count)]
    p50, p99 = ([float(np.percentile(v, p)) if v.size else np.nan for v in values] for p in (50, 99))
    return (edges[:-1] + edges[1:]) / 2, np.array(p50), np.array(p99)


def paint_prefill(axes: Axes, run: Run, records: Sequence[Record], colour: str) -> None:
    times = np.linspace(*run.window, _SAMPLES)
    tokens = waiting_tokens(records, times)
    axes.fill_between(times, tokens, step="post", color=colour, alpha=0.35, linewidth=0)
    axes.step(times, tokens, where="post", color=colour, linewidth=1.0)
    axes.set_ylim(0, max(1.0, float(tokens.max()) * 1.15))
    axes.set_title("Prompt tokens in prefill")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(*run.window)


def _goodput(run: Run, records: Sequence[Record]) -> Plot:
    points = goodput_points(run, records)
    text = f"Each point is a stretch of the run. On the dotted line all requests are good. {slos_text(run)}"
    chart = goodput_chart(run, [GoodputSeries("measured", SERIES[0], "o", points)])
    return Plot("Goodput against rate", chart, f"{len(points)} stretches", text)


@dataclass(frozen=True, slots=True)
class GoodputSeries:
    """The stretches of one side, of all its runs."""

    name: str
    colour: str
    marker: str
    points: Sequence[Point]


def goodput_chart(run: Run, series: Sequence[GoodputSeries]) -> Chart:
    """Good requests against those that arrived, a panel per SLO; a line joins the medians of the load's levels."""
    seconds = [False, True] if run.options.wanted_second_slo else [False]

    def paint(figure: Figure, narrow: bool) -> None:
        across = (len(seconds), 1) if narrow else (1, len(seconds))
        panels = figure.subplots(*across, squeeze=False).ravel()
        for axes, second in zip(panels, seconds, strict=True):
            for one in series:
                _paint_goodput(axes, one, second)
            _finish_goodput(axes, max((point.rate for one in series for point in one.points), default=1.0))
            if len(seconds) > 1:
                axes.set_title("Second SLO" if second else "First SLO")
        if len(series) > 1:
            place_legend(figure, panels[0], narrow)

    return draw("goodput", paint, 3.4, 3.7 * len(seconds))


def slos_text(run: Run) -> str:
    """What good requests meet."""
    slos = [f"{kind}: {slo_text(slo)}" for kind, slo in run.slos.items()]
    second = run.options.wanted_second_slo
    more = [f"second SLO: {slo_text(second)}"] if second else []
    return f"Good: longest TTFT, ITL p99 of each request: {'; '.join(slos + more)}."


def _paint_goodput(axes: Axes, series: GoodputSeries, second: bool) -> None:
    found: dict[float, list[tuple[float, float]]] = {}
    for point in series.points:
        found.setdefault(point.level, []).append((point.rate, (point.second_goodput or 0.0) if second else point.goodput))
    every = [pair for pairs in found.values() for pair in pairs]
    rates, good = zip(*every, strict=True) if every else ((), ())
    colour, marker = series.colour, series.marker
    if len(found) == 1:
        axes.plot(rates, good, linestyle="none", alpha=0.85, markersize=6, label=series.name, color=colour, marker=marker)
        return
    axes.plot(rates, good, linestyle="none", alpha=0.4, markersize=4, color=colour, marker=marker)
    middle = np.array([np.median(found[level], axis=0) for level in sorted(found)])
    axes.plot(middle[:, 0], middle[:, 1], markersize=6, label=series.name, color=colour, marker=marker)


def _finish_goodput(axes: Axes, highest: float) -> None:
    top = highest * 1.1 or 1.0
    axes.plot([0, top], [0, top], color=MUTED, linewidth=1.0, linestyle=":")
    axes.text(top, top, "all good ", color=INK, ha="right", va="top", fontsize=8.5)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("requests per second that arrived")
    axes.set_ylabel("good requests per second")
