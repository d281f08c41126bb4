"""The plot of what re-ranking finds against the time of a search."""

from __future__ import annotations

from typing import Any

from clipvisionalign.retrieval.metrics import RECALL_AT
from clipvisionalign.study.report.plots.style import INK, set_cost_axis, variant_styles
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.cost import Frontier
from clipvisionalign.study.report.states import variant_label


def plot_frontier(report: StudyReport) -> tuple[Any, ...] | None:
    """Recall of captions to images against milliseconds: fixed depths, margins, the one chosen; and other variants.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where no time was measured, or no design re-ranks.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    measured = {name: each for name, each in report.frontier.items() if each.fixed[-1].ms_per_query is not None}
    if not measured:
        return None
    styles = variant_styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, frontier in measured.items():
        colour, mark = styles[name]
        fixed = [(row.ms_per_query or 0.0, row.recall_sum) for row in frontier.fixed]
        # By margins the depth itself is the last.
        margins = sorted((row.ms_per_query or 0.0, row.recall_sum) for row in frontier.margins)
        axes.plot(*zip(*fixed, strict=True), color=colour, marker=mark, markersize=6, linewidth=1.0, linestyle="--",
                  label=variant_label(report, name))  # fmt: skip
        axes.plot(*zip(*margins, strict=True), color=colour, linewidth=1.6)
        if frontier.chosen is not None:
            axes.plot([frontier.chosen.ms_per_query or 0.0], [frontier.chosen.recall_sum], color=colour, marker="*",
                      markersize=13, markeredgecolor=INK, markeredgewidth=0.8, linestyle="none")  # fmt: skip
    others = {name: point for name in styles if name not in measured and (point := _vectors_alone(report, name))}
    for name, point in others.items():
        axes.plot(*[[each] for each in point], color=styles[name][0], marker=styles[name][1], markersize=6,
                  linestyle="none", label=variant_label(report, name))  # fmt: skip
    axes.margins(x=0.08, y=0.15)
    set_cost_axis(axes, [
        *(row.ms_per_query or 0.0 for each in measured.values() for row in each.fixed),
        *(milliseconds for milliseconds, _ in others.values()),
    ])  # fmt: skip
    axes.set_xlabel("ms a search")
    axes.set_ylabel("recall sum, captions to images")
    ways = [
        Line2D([], [], color=INK, linestyle="--", marker=".", linewidth=1.0, label="first 4, 8, ..."),
        Line2D([], [], color=INK, linewidth=1.6, label="within margins"),
        Line2D([], [], color=INK, marker="*", markersize=10, linestyle="none", label="margin chosen"),
    ]
    handles = [*axes.get_legend_handles_labels()[0], *ways]
    axes.legend(handles=handles, frameon=False, fontsize=9, ncols=3, loc="lower left",
                bbox_to_anchor=(0, 1.0))  # fmt: skip
    words = [*map(_words, measured, measured.values())]
    words += [f"{name}: {total:.1f} at {milliseconds:.1f} ms." for name, (milliseconds, total) in others.items()]
    return figure, f"Recall sum against milliseconds a search. {' '.join(words)}", ""


def _vectors_alone(report: StudyReport, name: str) -> tuple[float, float] | None:
    """Milliseconds and recall sum of a variant that does not re-rank; None where it has no results, or no time."""
    variant, cost = report.results.variants.get(name), report.cost.get(name)
    if variant is None or cost is None:
        return None
    recalls = [variant.metrics[f"text_to_image recall_at_{k}"].value for k in RECALL_AT]
    return float(cost.ms_per_query), float(sum(recalls))


def _words(name: str, frontier: Frontier) -> str:
    vectors, deepest, chosen = frontier.fixed[0], frontier.fixed[-1], frontier.chosen
    text = (
        f"{name}: {vectors.recall_sum:.1f} at {vectors.ms_per_query:.1f} ms by vectors alone, {deepest.recall_sum:.1f} "
        f"at {deepest.ms_per_query:.1f} ms by the first {deepest.candidates}"
    )
    if chosen is not None:
        text = f"{text}, {chosen.recall_sum:.1f} at {chosen.ms_per_query:.1f} ms where unsure"
    return f"{text}."
