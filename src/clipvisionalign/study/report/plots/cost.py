"""Plots of accuracy against time and memory, and of time by the length of the caption."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.number_format import significant_format
from clipvisionalign.study.cost import same_conditions
from clipvisionalign.study.report.costs import (
    DEVICE_MEMORY,
    MEMORY,
    MS_PER_CAPTION,
    MS_PER_QUERY,
    NO_SPREAD,
    NOT_SAME,
    WITHIN_SPREAD,
    CostMetric,
    CostRange,
    conditions_by_variant,
    cost_ranges,
    in_rounds,
    lengths_apart,
    no_comparison_reason,
    ranges_differ,
)
from clipvisionalign.study.report.plots.style import (
    INK,
    draw_whiskers,
    set_cost_axis,
    set_zero_based_axis,
    variant_styles,
)
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.cost import VariantCost
from clipvisionalign.study.report.schema.results import Results
from clipvisionalign.study.report.states import variant_label


def shown_better(results: Results) -> set[tuple[str, str]]:
    """Pairs of variants of which the first was shown to find more.

    Args:
        results: The block of a report.

    Returns:
        The pairs.
    """
    rows = [row for row in results.differences if row.metric == "rsum" and row.shown]
    return {(row.a, row.b) if row.value > 0 else (row.b, row.a) for row in rows}


def dearer_and_better(names: Sequence[str], ranges: dict[str, CostRange], results: Results) -> list[tuple[str, str]]:
    """Pairs of variants of which the first costs more beyond the spread of both, and was shown to find more.

    Args:
        names: The variants.
        ranges: What each costs, see `cost_ranges`.
        results: The block of a report.

    Returns:
        The pairs.
    """
    shown = shown_better(results)
    return [
        (a, b)
        for a in names
        for b in names
        if (a, b) in shown and sum(ranges[a]) > sum(ranges[b]) and ranges_differ(ranges[a], ranges[b])
    ]


def pareto_front(names: Sequence[str], ranges: dict[str, CostRange], results: Results) -> list[str]:
    """The variants, cheapest first, of which each costs more than the one before and was shown to find more.

    Args:
        names: The variants.
        ranges: What each costs, see `cost_ranges`.
        results: The block of a report.

    Returns:
        Their names; empty where there are no two such.
    """
    significant_pairs = shown_better(results)
    rsum = {name: results.variants[name].metrics["rsum"].value for name in names}
    front: list[str] = []
    for name in sorted(names, key=lambda name: sum(ranges[name])):
        if front and not ranges_differ(ranges[front[-1]], ranges[name]):
            # As cheap as the one before: the better of the two stays.
            front[-1] = max(front[-1], name, key=rsum.__getitem__)
        elif not front or (name, front[-1]) in significant_pairs:
            front.append(name)
    steps = list(pairwise(front))
    separated = all((b, a) in significant_pairs and ranges_differ(ranges[a], ranges[b]) for a, b in steps)
    return front if steps and separated else []


def plot_pareto(report: StudyReport, cost: CostMetric, label: str, log: bool) -> tuple[Any, ...] | None:
    """Rsum against a metric of cost, with the front of those that cost more and were shown to find more.

    Args:
        report: The report that is drawn.
        cost: The metric.
        label: What stands at its axis.
        log: Whether that axis is logarithmic where the costs are far apart.

    Returns:
        The figure, what it shows in words, and a note; None where nothing was measured.
    """
    from matplotlib import pyplot

    names = [name for name in report.results.variants if cost.value(report.cost.get(name)) is not None]
    if not names:
        return None
    styles = variant_styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    rsum = {name: report.results.variants[name].metrics["rsum"] for name in names}
    costs = {name: value for name in names if (value := cost.value(report.cost[name])) is not None}
    ranges = cost_ranges(report.cost, names, cost)
    reason = no_comparison_reason(report.cost, names, cost)
    for name in names:
        draw_whiskers(axes, costs[name], rsum[name], *styles[name], label=variant_label(report, name))
        if ranges:
            axes.plot(ranges[name], [rsum[name].value] * 2, color=styles[name][0], linewidth=1.4)
    front = pareto_front(names, ranges, report.results) if ranges and not reason else []
    if front:
        axes.plot([costs[name] for name in front], [rsum[name].value for name in front], color=INK, linewidth=1,
                  linestyle=":", drawstyle="steps-post", zorder=0, label="front")  # fmt: skip
    set_cost_axis(axes, list(costs.values()), [high for _, high in (ranges or {}).values()], log)
    set_zero_based_axis(axes, list(rsum.values()), 600)
    axes.set_xlabel(label)
    axes.set_ylabel("rsum")
    axes.legend(frameon=False, fontsize=9, ncols=min(5, len(names) + 1), loc="lower left", bbox_to_anchor=(0, 1.0))
    alt_text = "; ".join(
        f"{name} {rsum[name].value:.1f} at {format(costs[name], significant_format(costs[name], 4))}" for name in names
    )
    note = front_note(
        front, names, reason, dearer_and_better(names, ranges, report.results) if ranges and not reason else []
    )
    if ranges:
        note = f"Level lines: from the lowest to the highest round. {note}".strip()
    absent = [name for name in report.results.variants if name not in names]
    if absent:
        note = f"{note} Not shown, as it was not measured of them: {', '.join(absent)}.".strip()
    return figure, f"Rsum against {label}: {alt_text}. {note}", note


def front_note(front: Sequence[str], names: Sequence[str], reason: str, better: Sequence[tuple[str, str]]) -> str:
    """What may be said of the front, and of differences where there is none.

    Args:
        front: See `pareto_front`.
        names: The variants.
        reason: See `no_comparison_reason`.
        better: See `dearer_and_better`.

    Returns:
        A sentence.
    """
    if front:
        return f"Dotted: the front, along which each was shown to find more and costs more: {', '.join(front)}."
    if better:
        return f"Shown to find more, and costs more: {', '.join(f'{a} than {b}' for a, b in better)}."
    return spread_note(reason) or ("None that costs more was shown to find more." if len(names) > 1 else "")


def spread_note(reason: str) -> str:
    """What is to be said of differences of cost that are not shown.

    Args:
        reason: See `no_comparison_reason`.

    Returns:
        A sentence.
    """
    if reason in ("", WITHIN_SPREAD):
        return reason and f"{reason.capitalize()}."
    return f"{reason.capitalize()}: none is shown to cost less."


def plot_time(report: StudyReport) -> tuple[Any, ...] | None:
    """Rsum against the time of a text query.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    images = report.data.gallery.images
    return plot_pareto(report, MS_PER_QUERY, f"ms for a text query over {count_noun(images, 'image')}", log=True)


def plot_memory(report: StudyReport) -> tuple[Any, ...] | None:
    """The memory that has to be there: the GPU's where one was used, else the process's.

    Those whose figure is of another memory are named and not shown.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    on_device = any(DEVICE_MEMORY.value(cost) is not None for cost in report.cost.values())
    cost, memory_kind = (DEVICE_MEMORY, "GPU") if on_device else (MEMORY, "whole process")
    return plot_pareto(report, cost, f"peak memory, {memory_kind}, MiB", log=False)


def plot_length_time(report: StudyReport) -> tuple[Any, ...] | None:
    """Milliseconds of one caption by its length in tokens.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    from matplotlib import pyplot

    costs = {name: cost.by_length for name, cost in report.cost.items() if cost.by_length}
    if not costs:
        return None
    styles = variant_styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, rows in costs.items():
        colour, mark = styles[name]
        axes.plot([row.tokens for row in rows], [row.ms_alone for row in rows], color=colour, marker=mark,
                  markersize=5, linewidth=1.2, label=variant_label(report, name))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.08 * max(row.ms_alone for rows in costs.values() for row in rows))
    axes.set_xlabel("tokens of the caption")
    axes.set_ylabel("ms, one caption")
    axes.legend(frameon=False, fontsize=9)
    alt_text = "; ".join(
        f"{name} {rows[0].ms_alone:.1f} ms at {rows[0].tokens} tokens, {rows[-1].ms_alone:.1f} ms at {rows[-1].tokens}"
        for name, rows in costs.items()
    )
    note = _length_time_note(report.cost, list(costs))
    return figure, f"Milliseconds to encode one caption by its length: {alt_text}. {note}", note


def _length_time_note(costs: dict[str, VariantCost], names: Sequence[str]) -> str:
    """The sentence on the lines of time by length: at which lengths some differ beyond their own spread."""
    if len(names) < 2:
        return ""
    if not same_conditions(conditions_by_variant(costs, names)):
        return spread_note(NOT_SAME)
    apart, together = lengths_apart(costs, names)
    measured = in_rounds(costs, names, MS_PER_CAPTION)
    if not apart:
        return spread_note(WITHIN_SPREAD if measured else NO_SPREAD)
    if not together:
        return ""
    at = f"{', '.join(map(str, apart[:-1]))}{' and ' if apart[:-1] else ''}{count_noun(apart[-1], 'token')}"
    spread = "one variant does from process to process" if measured else "one process may by chance"
    return f"Some differ by more than {spread} at {at}, at other lengths none."
