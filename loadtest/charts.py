"""Plots as SVG that takes its colours and font from the page it stands in, so that it is legible light and dark.

Every plot is drawn twice, wide and narrow; the page shows the one that fits. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from loadtest.record import Floats

# Colours that no plot has by chance; `_page_colours` puts the page's variables in their place.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0a000{number}" for number in range(1, 7))
_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
_PAGE |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)}

_STYLE: dict[Any, Any] = {  # keys of matplotlib.rcParams
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}
_WIDE, _NARROW = 9.2, 4.5  # inches; 1 inch is 72 units of the SVG
_CURVE_POINTS = 300
_LABEL_INCHES = {"x": 0.62, "y": 0.24}  # that a label such as `200 ms` takes, with the space around it
_LOWEST_MS = 0.1


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot in both widths, as SVG elements."""

    wide: str
    narrow: str


LineStyle = str | tuple[float, tuple[float, ...]]
"""As matplotlib has it: `-`, or (offset, lengths of dashes and gaps)."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line."""

    name: str
    colour: str
    values: Floats
    style: LineStyle = "-"


def draw(name: str, paint: Callable[[Figure, bool], None], wide_height: float, narrow_height: float) -> Chart:
    """`paint(figure, narrow)` fills a figure. `name`: unique on the page. Heights in inches."""
    return Chart(
        _svg(f"{name}-wide", lambda figure: paint(figure, False), (_WIDE, wide_height)),
        _svg(f"{name}-narrow", lambda figure: paint(figure, True), (_NARROW, narrow_height)),
    )


def _svg(name: str, paint: Callable[[Figure], None], size: tuple[float, float]) -> str:
    # The salt keeps the ids of clip paths apart from those of other plots on the page, and the same from run to run.
    with matplotlib.rc_context(_STYLE):
        matplotlib.rcParams["svg.hashsalt"] = name
        figure = Figure(figsize=size)
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", svg)
    return re.sub("|".join(_PAGE), lambda found: _PAGE[found[0]], svg)


def nines(axes: Axes, most_values: int) -> None:
    """A y axis of percentiles that has as much room for 90 to 99 as for 0 to 90: tails can be read. Ends where data do."""
    axes.set_yscale("function", functions=(_to_nines, _from_nines))
    top = 1 - 1 / max(most_values, 10)
    ticks = [tick for tick in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999) if tick <= top]
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick * 100:g}%" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())


def _to_nines(share: Floats) -> Floats:
    return np.asarray(-np.log10(np.maximum(1 - np.asarray(share), 1e-7)), np.float64)


def _from_nines(value: Floats) -> Floats:
    return np.asarray(1 - 10 ** -np.asarray(value), np.float64)


def cdf(axes: Axes, curves: Sequence[Curve], title: str) -> None:
    """Milliseconds, logarithmic, against the share of values that are not above."""
    axes.set_title(title)
    time_scale(axes, "x")
    shown = [curve for curve in curves if curve.values.size]
    nines(axes, max((curve.values.size for curve in shown), default=10))
    for curve in shown:
        values = np.sort(curve.values)
        # Evenly spaced on the axis: all of the tail, and of the many in the middle enough.
        shares = _from_nines(np.linspace(0, _to_nines(np.array(1 - 1 / (values.size + 1))), _CURVE_POINTS))
        index = np.minimum((shares * values.size).astype(int), values.size - 1)
        axes.step(values[index], shares, where="post", color=curve.colour, linestyle=curve.style, label=curve.name)
    if shown:
        # What arrives in one go has gaps of microseconds, which would be half of a logarithmic axis.
        low = min(float(np.percentile(curve.values, 1)) for curve in shown)
        high = max(float(curve.values.max()) for curve in shown)
        axes.set_xlim(max(low, _LOWEST_MS) / 1.2, high * 1.15)
    else:
        axes.text(0.5, 0.5, "nothing arrived", transform=axes.transAxes, ha="center", color=MUTED)


def time_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis of milliseconds, labelled 20 ms, 50 ms, ... 2 s, as many as there is room for."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(_TimeLocator(axes, which))
    axis.set_major_formatter(FuncFormatter(time_label))
    axis.set_minor_formatter(NullFormatter())


class _TimeLocator(LogLocator):
    """1, 2, 5 of every decade, or as few of them as labels have room for beside each other."""

    def __init__(self, axes: Axes, which: Literal["x", "y"]) -> None:
        super().__init__(numticks=100)  # the room decides, not a number
        self._axes = axes
        self._which = which

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        box = self._axes.get_window_extent()
        pixels = box.width if self._which == "x" else box.height
        room = max(2.0, pixels / self._axes.figure.dpi / _LABEL_INCHES[self._which])
        for subs in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            self.set_params(subs=subs)
            ticks = [float(tick) for tick in super().tick_values(vmin, vmax)]
            if 2 <= sum(vmin <= tick <= vmax for tick in ticks) <= room:
                return ticks
        return [float(tick) for tick in MaxNLocator(int(room), min_n_ticks=2).tick_values(vmin, vmax)]  # within a decade


def time_label(value_ms: float, _: object = None) -> str:
    return f"{value_ms / 1e3:g} s" if value_ms >= 1e3 else f"{value_ms:g} ms"
