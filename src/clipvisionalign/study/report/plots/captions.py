"""Plots by the length of the caption, and of true captions against their foils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipvisionalign.number_format import word_range
from clipvisionalign.study.report.claims.captions import shared_lengths_note
from clipvisionalign.study.report.claims.claim import Claim
from clipvisionalign.study.report.plots.style import INK, draw_whiskers, variant_styles
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import Estimate, FoilShare
from clipvisionalign.study.report.states import variant_label


def plot_groups(
    report: StudyReport, groups: list[str], value: Callable[[str, str], Estimate | None], ylabel: str,
    reference: float | None = None, baseline: Callable[[str], Estimate | None] | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """Draw one estimate for each variant and group, and a baseline that has no image.

    Args:
        report: The report that is drawn.
        groups: Names of the groups, from left to right.
        value: Of a variant and a group; None where it was not measured.
        ylabel: What stands at the axis.
        reference: Where a level line for chance is drawn; None for none.
        baseline: Of a group; None for no baseline.

    Returns:
        The figure, and what it shows in words.
    """
    from matplotlib import pyplot

    names, styles = list(report.results.variants), variant_styles(report)
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    descriptions = []
    width = 0.7 / max(1, len(names) + (baseline is not None))
    for number, name in enumerate(names):
        label = variant_label(report, name)
        for position, group in enumerate(groups):
            estimate = value(name, group)
            if estimate is None:
                continue
            x = position + (number - (len(names) - 1) / 2) * width
            draw_whiskers(axes, x, estimate, *styles[name], label=label)
            label = ""
            descriptions.append(f"{group}, {name} {estimate.value:.1f}")
    if baseline is not None:
        label = "words alone"
        for position, group in enumerate(groups):
            estimate = baseline(group)
            if estimate is not None:
                x = position + (len(names) - (len(names) - 1) / 2) * width
                axes.plot(x, estimate.value, marker="x", color=INK, linestyle="none",
                          label=label or None)  # fmt: skip
                label = ""
                descriptions.append(f"{group}, words alone {estimate.value:.1f}")
    if reference is not None:
        axes.axhline(reference, color=INK, linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 104)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9, ncols=len(names) + 2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure, "; ".join(descriptions) + "."


def plot_length(report: StudyReport) -> tuple[Any, ...] | None:
    """Recall at 5 by the length of the caption; None where there are no results.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    results = report.results
    if not results.variants:
        return None
    word_spans = results.lengths.words
    labels = {f"{tercile}\n{word_range(span)}": tercile for tercile, span in word_spans.items()}

    def value(name: str, group: str) -> Estimate:
        return results.variants[name].by_length[labels[group]].recall_at_5

    figure, alt_text = plot_groups(report, list(labels), value, "R@5 text to image, %")
    chance = results.lengths.chance
    alt_text += "".join(
        f" By chance, {tercile} {chance_recall['recall_at_5']:.1f}." for tercile, chance_recall in chance.items()
    )
    about = shared_lengths_note(Claim(report, "length"))
    of = "Recall at 5 of images by captions of each part of length: " + alt_text.replace("\n", ", ")
    return (figure, f"{of} {about}", about) if about else (figure, of)


def plot_composition(report: StudyReport) -> tuple[Any, str] | None:
    """Shares of true captions above their foils, by kind; None where none were measured.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, and what it shows in words; None where nothing was measured.
    """
    sets = report.results.composition
    rows = [(name, row) for name, set_rows in sets.items() for row in set_rows]
    if not rows:
        return None
    multiple_sets = len(sets) > 1
    groups = list(dict.fromkeys(f"{row.kind}\n{name}" if multiple_sets else row.kind for name, row in rows))

    def key(name: str, row: FoilShare) -> str:
        return f"{row.kind}\n{name}" if multiple_sets else row.kind

    def value(variant: str, group: str) -> Estimate | None:
        return next((row for name, row in rows if row.variant == variant and key(name, row) == group), None)

    def baseline(group: str) -> Estimate | None:
        all_rows = [(name, row) for name, set_rows in report.blind_baseline.items() for row in set_rows]
        return next((row for name, row in all_rows if key(name, row) == group), None)

    figure, alt_text = plot_groups(report, groups, value, "true caption above its foil, %", 50.0, baseline)
    return figure, "Share of pairs whose true caption outscores its foil, chance 50: " + alt_text.replace("\n", ", ")
