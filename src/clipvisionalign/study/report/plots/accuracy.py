"""The plot of rsum by variant."""

from __future__ import annotations

from typing import Any

from clipvisionalign.study.report.plots.style import draw_whiskers, set_zero_based_axis, variant_styles
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import variant_label, variant_state


def plot_accuracy(report: StudyReport) -> tuple[Any, ...] | None:
    """Rsum of each variant with its interval, each seed's own as a dash; None where there are no results.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    from matplotlib import pyplot

    variants = report.results.variants
    if not variants:
        return None
    styles = variant_styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    positions = {name: position for position, name in enumerate(report.plan.variants)}
    for name, variant in variants.items():
        colour, mark = styles[name]
        position = positions[name]
        draw_whiskers(axes, position, variant.metrics["rsum"], colour, mark)
        seeds = [run.rsum.value for run in variant.runs]
        axes.plot([position + 0.16] * len(seeds), seeds, linestyle="none", marker="_", markersize=9, color=colour)
    ticks = [f"{name}\n({text})" if (text := variant_state(report, name)) else name for name in positions]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    axes.set_ylabel("rsum (0 to 600)")
    set_zero_based_axis(axes, [variant.metrics["rsum"] for variant in variants.values()], 600)
    text = "; ".join(f"{name} {variant.metrics['rsum'].value:.1f}" for name, variant in variants.items())
    chance = report.results.chance
    text += "".join(f"; {variant_label(report, name)}" for name in positions if name not in variants)
    text += f"; a random ranking {chance['rsum']:.1f}" if chance else ""
    single_seed = max(len(variant.seeds) for variant in variants.values()) < 2
    of = f"of the {report.results.drawn_units} only, one seed"
    interval_text = f"its 95% interval {of}" if single_seed else "its 95% interval, and each seed's as a dash"
    if report.results.has_no_intervals:
        interval_text = "no interval" if single_seed else "no interval, and each seed's as a dash"
    text = f"Rsum of each variant with {interval_text}: {text}."
    if report.results.identities is None or report.results.has_no_intervals:
        return figure, text
    return figure, text, "Images of one identity count as one in the intervals."
