"""The same towers under flawed protocols."""

from __future__ import annotations

from typing import Any

from clipvisionalign.study.report.plots.style import INK, PALETTE
from clipvisionalign.study.report.schema import StudyReport


def plot_protocols(report: StudyReport) -> tuple[Any, str] | None:
    """Recall at 1 under each protocol; None where none was measured.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, and what it shows in words; None where nothing was measured.
    """
    from matplotlib import pyplot

    flawed_protocols = report.flawed_protocols
    if not flawed_protocols:
        return None
    bars = flawed_protocols.bars
    figure, axes = pyplot.subplots(figsize=(7.2, 0.55 * len(bars) + 1.0), layout="constrained")
    for position, bar in enumerate(bars[::-1]):
        value = 100 * bar.recall_at_1
        honest_style: Any = {"color": PALETTE[0]}
        flawed_style: Any = {"color": "#b9bec6", "edgecolor": "#7d838c", "hatch": "//"}
        axes.barh(position, value, 0.62, **(honest_style if bar.honest else flawed_style))
        axes.text(value + 1, position, f"{value:.1f}", va="center")
        if bar.chance:
            axes.plot(
                [100 * bar.chance["recall_at_1"]] * 2, [position - 0.31, position + 0.31], color=INK, linewidth=1.4
            )
    axes.set_yticks(range(len(bars)), [bar.protocol for bar in bars[::-1]])
    axes.set_xlim(0, 112)
    axes.set_xlabel("R@1, %, mean of both ways, same trained towers")
    alt_text = "; ".join(
        f"{bar.protocol} {100 * bar.recall_at_1:.1f}"
        + (f" (chance {100 * bar.chance['recall_at_1']:.1f})" if bar.chance else "")
        for bar in bars
    )
    return (
        figure,
        f"Recall at 1 by the vectors of the same towers, only the first by the rules that results keep: {alt_text}.",
    )
