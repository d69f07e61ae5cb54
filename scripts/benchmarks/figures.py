"""What a benchmark measured: one figure per quantity and contender, shown as a table, a picture and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib.figure import Figure as Picture
from rich.table import Table

from loadtest.machine import Machine

_SIGNIFICANT = 3


class Figure(msgspec.Struct, frozen=True):
    """One quantity of one contender. values: one per repetition, in `unit`, in the order they were taken."""

    part: str
    quantity: str
    contender: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest."""
        return min(self.values), max(self.values)


class Report(msgspec.Struct, frozen=True):
    """All of one run of scripts/bench served. began: ISO 8601. busy: share of the cores that others used before it began."""

    command: str
    began: str
    machine: Machine
    busy: float
    figures: list[Figure]


def table(figures: Sequence[Figure]) -> Table:
    """A row per figure; where a quantity has several contenders, also the ratio to the first of them, round by round."""
    shown = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("part", "quantity", "contender"):
        shown.add_column(heading)
    for heading in ("median", "least", "most", "ratio"):
        shown.add_column(heading, justify="right")
    first: dict[tuple[str, str], Figure] = {}
    for figure in figures:
        base = first.setdefault((figure.part, figure.quantity), figure)
        ratio = "" if base is figure else f"{ratio_to(base, figure):.2f}"
        low, high = figure.spread
        quantity = f"{figure.quantity}, {figure.unit}"
        shown.add_row(figure.part, quantity, figure.contender, *map(_number, (figure.median, low, high)), ratio)
    return shown


def ratio_to(base: Figure, figure: Figure) -> float:
    """The median of the ratios of repetitions that stood side by side: what changes slowly on the machine drops out."""
    pairs = [value / before for before, value in zip(base.values, figure.values, strict=True) if before]
    return statistics.median(pairs) if pairs else float("nan")


def draw(figures: Sequence[Figure], path: Path) -> None:
    """A PNG: one panel per part and unit, medians as bars, least and most as whiskers."""
    panels: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        panels.setdefault((figure.part, figure.unit), []).append(figure)
    heights = [0.9 + 0.32 * len(panel) for panel in panels.values()]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        picture = Picture(figsize=(9, sum(heights)), layout="constrained")
        axes = picture.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, ((part, unit), panel) in zip(axes, panels.items(), strict=True):
            names = [f"{figure.quantity}: {figure.contender}" for figure in panel]
            medians = [figure.median for figure in panel]
            below = [figure.median - figure.spread[0] for figure in panel]
            above = [figure.spread[1] - figure.median for figure in panel]
            ax.barh(names, medians, xerr=[below, above], color="#4c78a8", ecolor="#555555", capsize=2)
            ax.invert_yaxis()
            ax.set_title(part, loc="left", fontweight="bold")
            ax.set_xlabel(unit)
        picture.savefig(path, dpi=120)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**_SIGNIFICANT else f"{value:.{_SIGNIFICANT}g}"
