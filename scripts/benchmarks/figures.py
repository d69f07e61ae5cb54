"""What a benchmark measured: one figure per quantity and contender, shown as a table, as pictures and in JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib.figure import Figure as Picture
from rich.table import Table

from loadtest.machine import Machine

_SIGNIFICANT = 3
_COLOUR, _WHISKERS = "#4c78a8", "#555555"
_WIDE = 50  # times: where bars of the least could not be seen, points on a logarithmic axis can


class Figure(msgspec.Struct, frozen=True):
    """One quantity of one contender. values: one per repetition, in `unit`, in the order they were taken.

    A value that is not finite says that there was nothing to measure in that repetition: no answer came, say.
    """

    part: str
    quantity: str
    contender: str
    unit: str
    values: tuple[float, ...]

    @property
    def known(self) -> list[float]:
        """The values that are. The others want one at least."""
        return [value for value in self.values if math.isfinite(value)]

    @property
    def median(self) -> float:
        return statistics.median(self.known)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest."""
        return min(self.known), max(self.known)


class Report(msgspec.Struct, frozen=True):
    """All of one run. began: ISO 8601. busy: share of the cores that others used before it began.

    left_out: what could not be measured, parts and contenders, and why.
    """

    command: str
    began: str
    machine: Machine
    busy: float
    figures: list[Figure]
    left_out: dict[str, str]


def table(figures: Sequence[Figure]) -> Table:
    """A row per figure; where a quantity has several contenders, also the ratio to the first of them, round by round.

    What stands in the row above is not said again.
    """
    shown = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("part", "quantity", "contender"):
        shown.add_column(heading)
    for heading in ("median", "least", "most", "ratio"):
        shown.add_column(heading, justify="right")
    part = ""
    for (of, _), contenders in _by_quantity(figures).items():
        base = contenders[0]
        names = ("" if of == part else of, f"{base.quantity}, {base.unit}")
        part = of
        for figure in contenders:
            ratio = "" if figure is base else _number(ratio_to(base, figure))
            low, high = figure.spread
            shown.add_row(*names, figure.contender, *map(_number, (figure.median, low, high)), ratio)
            names = ("", "")
    return shown


def _by_quantity(figures: Sequence[Figure]) -> dict[tuple[str, str], list[Figure]]:
    """By part and quantity, each where its first figure stands."""
    found: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        found.setdefault((figure.part, figure.quantity), []).append(figure)
    return found


def ratio_to(base: Figure, figure: Figure) -> float:
    """The median of the ratios of repetitions that stood side by side: what changes slowly on the machine drops out.

    One of the two may have fewer: it was interrupted, or sat out.
    """
    pairs = [value / before for before, value in zip(base.values, figure.values, strict=False) if before]
    ratios = [ratio for ratio in pairs if math.isfinite(ratio)]
    return statistics.median(ratios) if ratios else float("nan")


def draw(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """PART.png for each part: medians as bars or points, least and most as whiskers. Returns their paths."""
    parts = list(dict.fromkeys(figure.part for figure in figures))
    return [_draw([figure for figure in figures if figure.part == part], directory / f"{part}.png") for part in parts]


def _draw(figures: Sequence[Figure], path: Path) -> Path:
    """One panel per unit."""
    panels: dict[str, list[Figure]] = {}
    for contenders in _by_quantity(figures).values():
        panels.setdefault(contenders[0].unit, []).extend(contenders)
    heights = [0.9 + 0.32 * len(panel) for panel in panels.values()]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        picture = Picture(figsize=(9, sum(heights)), layout="constrained")
        axes = picture.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (unit, panel) in zip(axes, panels.items(), strict=True):
            names = [f"{figure.quantity}: {figure.contender}" for figure in panel]
            medians = [figure.median for figure in panel]
            below = [figure.median - figure.spread[0] for figure in panel]
            above = [figure.spread[1] - figure.median for figure in panel]
            if min(medians) > 0 and max(medians) > _WIDE * min(medians):
                ax.errorbar(medians, names, xerr=[below, above], fmt="o", color=_COLOUR, ecolor=_WHISKERS, capsize=2)
                ax.set_xscale("log")
            else:
                ax.barh(names, medians, xerr=[below, above], color=_COLOUR, ecolor=_WHISKERS, capsize=2)
            ax.invert_yaxis()
            ax.set_xlabel(unit)
        axes[0].set_title(figures[0].part, loc="left", fontweight="bold")
        picture.savefig(path, dpi=120)
    return path


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**_SIGNIFICANT else f"{value:.{_SIGNIFICANT}g}"
