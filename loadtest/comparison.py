"""Deployments and other servers under the same load, several times in turn: medians, spread, ratios, all in one report.

Runs come in rounds: one of each side, with the same seed. Every side is compared with the first. A ratio is taken within a
round, so that what changes slowly on the machine drops out; then the median of the ratios is told, with the lowest and the
highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from loadtest.charts import MUTED, SERIES, Curve, LineStyle, cdf, draw, time_scale
from loadtest.plots import (
    GoodputSeries,
    Plot,
    goodput_chart,
    latency_curves,
    paint_itl,
    paint_prefill,
    place_legend,
    slos_text,
)
from loadtest.record import Record, Run
from loadtest.report import Page, duration, facts, warnings, write_page
from loadtest.summary import ALL, Figures, Point, figures, goodput_points
from loadtest.tables import Row, markdown, milliseconds, rate

_STYLES: tuple[LineStyle, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DIGITS = 3
_JSON = "comparison.json"

MOST_SIDES = len(SERIES)  # one colour each


@dataclass(frozen=True, slots=True)
class Side:
    """One deployment or server. `runs`: one per round, in order."""

    name: str
    runs: Sequence[tuple[Run, Sequence[Record]]]

    def figures_of(self, kind: str) -> list[Figures]:
        """One per round."""
        return [found for run, records in self.runs for found in figures(run, records) if found.kind == kind]


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure to compare. `less_is_better` says which way a ratio is good."""

    name: str
    value: Callable[[Figures], float]
    show: Callable[[float], str]
    less_is_better: bool
    of_one_kind: bool = False  # says nothing over kinds that differ
    needs_second_slo: bool = False


MEASURES = (
    Measure("TTFT p50", lambda f: f.ttft.p50, milliseconds, True, True),
    Measure("TTFT p99", lambda f: f.ttft.p99, milliseconds, True, True),
    Measure("ITL p50", lambda f: f.itl.p50, milliseconds, True, True),
    Measure("ITL p99", lambda f: f.itl.p99, milliseconds, True, True),
    Measure("tokens out per second", lambda f: f.output_rate, rate, False),
    Measure("tokens in and out per second", lambda f: f.total_rate, rate, False),
    Measure("goodput per second", lambda f: f.goodput, rate, False),
    Measure("goodput per second, second SLO", lambda f: f.second_goodput, rate, False, needs_second_slo=True),
    Measure("failed", lambda f: f.failed, rate, True),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One measure of one kind. `values`: per side, one per round."""

    kind: str
    measure: Measure
    values: Sequence[Sequence[float]]

    def ratios(self, side: int) -> list[float]:
        """That side over the first, of the rounds in which that has a meaning."""
        pairs = zip(self.values[0], self.values[side], strict=True)
        return [b / a for a, b in pairs if a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)]


def compare(sides: Sequence[Side]) -> list[Compared]:
    """All measures of all kinds. The sides have the same number of rounds and were given the same load."""
    kinds = [found.kind for found in figures(*sides[0].runs[0])]
    second = sides[0].runs[0][0].options.wanted_second_slo
    found = []
    for kind in kinds:
        rounds = [side.figures_of(kind) for side in sides]
        for measure in MEASURES:
            if (kind == ALL and measure.of_one_kind) or (measure.needs_second_slo and not second):
                continue
            found.append(Compared(kind, measure, [[measure.value(one) for one in side] for side in rounds]))
    return found


def rows(compared: Sequence[Compared]) -> list[Row]:
    """Median and range of each side, and of the ratios."""
    return [
        Row(
            f"{one.kind}: {one.measure.name}",
            (
                *(_spread(values, one.measure.show) for values in one.values),
                *(_spread(one.ratios(side), _ratio) for side in range(1, len(one.values))),
            ),
        )
        for one in compared
    ]


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    low, high = show(min(known)), show(max(known))
    if low.partition(" ")[2] == high.partition(" ")[2]:
        low = low.partition(" ")[0]  # the unit once
    return f"{show(float(np.median(known)))} ({low} to {high})"


def _ratio(value: float) -> str:
    return f"{value:.{_DIGITS}g}x"


def columns(sides: Sequence[Side]) -> list[str]:
    first, *others = (side.name for side in sides)
    return [first, *others, *(["ratio"] if len(others) == 1 else [f"{name} / {first}" for name in others])]


def write_comparison(directory: Path, sides: Sequence[Side], command: str) -> Path:
    """Write report.html, report.md and comparison.json for runs whose files are there; returns the page's path."""
    compared = compare(sides)
    run, _ = sides[0].runs[0]
    rounds = len(sides[0].runs)
    caption = f"{rounds} rounds of each, in turn; {duration(run)} each. {command}. {run.machine}."
    troubles = [
        f"{side.name}, round {number}: {trouble}"
        for side in sides
        for number, (run, records) in enumerate(side.runs, start=1)
        for trouble in warnings(run, records)
    ]
    protocols = {run.protocol for side in sides for run, _ in side.runs}
    if len(protocols) > 1:
        troubles.append(
            f"The sides were asked in different ways ({', '.join(sorted(protocols))}), which have costs of their own."
        )
    table = rows(compared)
    notes = [*troubles, _reading(sides), f"n: {_counts(sides)}. {caption}"]
    (directory / "report.md").write_text(markdown(columns(sides), table, notes))
    (directory / _JSON).write_bytes(_json(sides, compared, command))
    deployments = [(side.name, side.runs[0][0].deployment or side.runs[0][0].server) for side in sides]
    page = Page(
        title=f"{_names(sides)} under the same load",
        subtitle=f"{Path(run.options.scenario).name}, {run.began}",
        columns=columns(sides),
        rows=table,
        warnings=troubles,
        notes=[_reading(sides), f"n: {_counts(sides)}."],
        plots=_plots(sides, compared),
        facts=[("command", command), *deployments, *(fact for fact in facts(run) if fact[0] not in ("command", "deployment"))],
        caption=caption,
    )
    return write_page(directory, page)


def _json(sides: Sequence[Side], compared: Sequence[Compared], command: str) -> bytes:
    """Every value of every round, in order; null where there is none. Times in ms, rates per second.

    `goodput`: the stretches of each round, for each side.
    """
    run, _ = sides[0].runs[0]
    found = [
        {
            "kind": one.kind,
            "measure": one.measure.name,
            "values": {side.name: one.values[number] for number, side in enumerate(sides)},
            "ratios": {side.name: one.ratios(number) for number, side in enumerate(sides) if number},
        }
        for one in compared
    ]
    head = {"command": command, "began": run.began, "machine": run.machine, "options": run.options, "first": sides[0].name}
    points = {side.name: _points(side) for side in sides}
    return msgspec.json.format(msgspec.json.encode({**head, "figures": found, "goodput": points}), indent=1) + b"\n"


def _names(sides: Sequence[Side]) -> str:
    *others, last = (side.name for side in sides)
    return f"{', '.join(others)} and {last}"


def _reading(sides: Sequence[Side]) -> str:
    what = sides[1].name if len(sides) == 2 else "each other side"
    return f"Medians and ranges over the rounds. Ratio: {what} over {sides[0].name}, taken within each round."


def _counts(sides: Sequence[Side]) -> str:
    totals = [[sum(found.requests for found in side.figures_of(kind)) for kind in side.runs[0][0].slos] for side in sides]
    return "; ".join(f"{side.name} {sum(total):,} requests" for side, total in zip(sides, totals, strict=True))


def _plots(sides: Sequence[Side], compared: Sequence[Compared]) -> list[Plot]:
    ratios = [_ratios(sides, number, compared) for number in range(1, len(sides))]
    return [*ratios, _latency(sides), _over_time(sides), _goodput(sides)]


def _ratios(sides: Sequence[Side], number: int, compared: Sequence[Compared]) -> Plot:
    """Of side `number` over the first."""
    shown = [(one, ratios) for one in compared if one.kind != ALL and (ratios := one.ratios(number))]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        names = [f"{one.kind}: {one.measure.name}" for one, _ in shown]
        axes.set_xscale("log")
        for place, (one, ratios) in enumerate(shown):
            colour = _verdict_colour(ratios, one.measure.less_is_better)
            axes.plot(ratios, [place] * len(ratios), "o", color=colour, alpha=0.55, markersize=4.5)
            axes.plot(np.median(ratios), place, "|", color=colour, markersize=14, markeredgewidth=2.2)
        axes.axvline(1.0, color=MUTED, linewidth=1.0)
        axes.set_yticks(range(len(shown)), [name.replace(" per second", "/s") for name in names])
        axes.invert_yaxis()
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 1.25))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        _few_ratio_ticks(axes, narrow)
        axes.set_xlabel(f"{name} / {sides[0].name}")

    name = sides[number].name
    height = 0.9 + 0.24 * len(shown)
    n = f"{len(sides[0].runs)} rounds"
    text = f"A dot per round, a bar at the median. Green: {name} is better in every round; orange: worse; grey: neither."
    title = "Ratios" if len(sides) == 2 else f"Ratios: {name} over {sides[0].name}"
    return Plot(title, draw(f"ratios-{number}", paint, height, height), n, text)


def _verdict_colour(ratios: Sequence[float], less_is_better: bool) -> str:
    if min(ratios) <= 1 <= max(ratios):
        return SERIES[5]
    return SERIES[2] if (max(ratios) < 1) == less_is_better else SERIES[1]


def _few_ratio_ticks(axes: Axes, narrow: bool) -> None:
    low, high = axes.get_xlim()
    ticks = [value * 10.0**power for power in range(-4, 5) for value in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > (5 if narrow else 12):
        inside = [tick for tick in inside if abs(math.log10(tick) - round(math.log10(tick))) < 1e-6]
    axes.set_xticks(inside)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _pooled(side: Side) -> tuple[list[Curve], list[Curve]]:
    """(first tokens, gaps) of all rounds, per kind."""
    rounds = [latency_curves(run, records, lambda kind: kind, lambda index: ("", "-")) for run, records in side.runs]
    pooled = []
    for which in (0, 1):
        curves = [one[which] for one in rounds]
        pooled.append([Curve(same[0].name, "", np.concatenate([c.values for c in same])) for same in zip(*curves, strict=True)])
    return pooled[0], pooled[1]


def _latency(sides: Sequence[Side]) -> Plot:
    pooled = [_pooled(side) for side in sides]
    curves: list[list[Curve]] = [[], []]
    for number, side in enumerate(sides):
        for which in (0, 1):
            for index, curve in enumerate(pooled[number][which]):
                name = f"{side.name}: {curve.name}"
                curves[which].append(Curve(name, SERIES[number], curve.values, _STYLES[index % len(_STYLES)]))

    def paint(figure: Figure, narrow: bool) -> None:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        cdf(left, curves[0], "Time to first token")
        cdf(right, curves[1], "Between tokens (ITL)")
        place_legend(figure, left, narrow)

    n = f"{sum(curve.values.size for curve in curves[0]):,} first tokens, {sum(c.values.size for c in curves[1]):,} gaps"
    text = "All rounds together: the share of values that are not above. The axis stretches towards 100%."
    return Plot("Latency", draw("latency", paint, 3.4, 6.0), n, text)


def _over_time(sides: Sequence[Side]) -> Plot:
    """The first round, one side above the next, on the same scale."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots(2 * len(sides), 1, sharex=True, height_ratios=[2, 1] * len(sides))
        for number, side in enumerate(sides):
            run, records = side.runs[0]
            upper, lower = axes[2 * number], axes[2 * number + 1]
            paint_itl(upper, run, records, lambda kind: kind, lambda index: SERIES[index % len(SERIES)])
            upper.set_title(f"{side.name}: ITL, p99 dashed" if narrow else f"{side.name}: between tokens (ITL), p99 dashed")
            paint_prefill(lower, run, records, SERIES[-1])
            lower.set_title("Prompt tokens in prefill", fontweight="normal")
        limits = [upper.get_ylim() for upper in axes[::2]]
        for upper in axes[::2]:
            upper.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            time_scale(upper, "y")
        axes[-1].set_xlabel("seconds since the run began")
        place_legend(figure, axes[0], narrow)

    n = "the first round of each"
    return Plot(
        "Smoothness under prefill",
        draw("time", paint, 3.3 * len(sides), 3.7 * len(sides)),
        n,
        "The same requests come at the same seconds.",
    )


def _goodput(sides: Sequence[Side]) -> Plot:
    series = [
        GoodputSeries(side.name, SERIES[number], _MARKERS[number], [point for one in _points(side) for point in one])
        for number, side in enumerate(sides)
    ]
    run, _ = sides[0].runs[0]
    n = f"{sum(len(one.points) for one in series)} stretches"
    text = f"Each point is a stretch of a run. On the dotted line all requests are good. {slos_text(run)}"
    return Plot("Goodput against rate", goodput_chart(run, series), n, text)


def _points(side: Side) -> list[list[Point]]:
    """One list per round."""
    return [goodput_points(run, records) for run, records in side.runs]
