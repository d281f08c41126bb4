"""Colours, markers, axes and intervals that all plots of a report share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import Estimate

#: Distinguishable with colour vision deficiency too, and on light and dark ground.
PALETTE = ("#4c78c8", "#2f9e6e", "#d97b29", "#c04a86", "#8a6fd1", "#8b8f3a", "#3aa0b5", "#a56b4a")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


#: Lines and letters: on a page they take the page's own colour.
INK = "#1b1f24"


def variant_styles(report: StudyReport) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each variant, the same in every figure.

    Args:
        report: The report.

    Returns:
        Both, by variant.
    """
    names = list(report.plan.variants)
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def interval_ends(estimate: Estimate) -> tuple[float, float, float]:
    """Value and both ends of the interval; the value itself where there is no interval to draw.

    Args:
        estimate: The estimate.

    Returns:
        Value, lower and upper end.
    """
    value = estimate.value
    return value, value if estimate.low is None else estimate.low, value if estimate.high is None else estimate.high


def set_cost_axis(axes: Any, costs: Sequence[float], ends: Sequence[float] = (), log: bool = True) -> None:
    """Set the horizontal axis of costs: from zero, or logarithmic where they are far apart.

    Args:
        axes: Matplotlib's axes.
        costs: What is drawn.
        ends: Upper ends of intervals that are drawn.
        log: Whether it may be logarithmic.
    """
    from matplotlib.ticker import LogLocator

    if log and max(costs) > 5 * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.12)
    else:
        axes.set_xlim(0, 1.15 * max([*costs, *ends]))


def draw_whiskers(axes: Any, x: float, estimate: Estimate, colour: str, mark: str, label: str = "") -> None:
    """Draw an estimate: a marker, and its interval where it has one.

    Args:
        axes: Matplotlib's axes.
        x: Where it is drawn.
        estimate: The estimate.
        colour: Of both.
        mark: Matplotlib's marker.
        label: In the legend; "" for none.
    """
    value, low, high = interval_ends(estimate)
    # An interval may be wider than what is shown of it; the middle never leaves the axes.
    reach = None if estimate.low is None else [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(
        x, value, reach, color=colour, marker=mark, markersize=6,
        capsize=3, linewidth=1.4, linestyle="none", label=label or None,
    )  # fmt: skip


def set_zero_based_axis(axes: Any, estimates: list[Estimate], highest: float) -> None:
    """An axis from 0 that shows all intervals, and no more than there is: a difference looks as large as it is.

    Args:
        axes: Matplotlib's axes.
        estimates: What is drawn.
        highest: The highest value that there can be.
    """
    top = max((high for _, _, high in map(interval_ends, estimates)), default=highest)
    axes.set_ylim(0, 1.04 * highest if top > 0.9 * highest else max(1.1 * top, 0.02 * highest))
