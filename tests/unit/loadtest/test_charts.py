"""Axes that can be read: labels of times stand beside each other, not on each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from loadtest.charts import Curve, cdf


@pytest.mark.parametrize("inches", [4.5, 9.2])
@pytest.mark.parametrize("span", [(4.0, 6.0), (5.0, 90.0), (0.1, 120.0), (0.1, 20_000.0)])
def test_labels_of_times_do_not_touch(inches: float, span: tuple[float, float]) -> None:
    figure = Figure(figsize=(inches, 3.2), layout="constrained")
    axes = figure.subplots()
    cdf(axes, [Curve("one", "black", np.geomspace(*span, 500))], "Between tokens")
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels() if label.get_text() and low <= label.get_position()[0] <= high]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)), [label.get_text() for label in labels]
