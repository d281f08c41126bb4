"""The tables of accuracy, and of differences between every two variants."""

from __future__ import annotations

from collections.abc import Collection

from clipvisionalign.study.aggregate import NO_INTERVALS, directed_metric_label
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import UnpairedSeeds
from clipvisionalign.study.report.states import two_seeds_widen, variant_label
from clipvisionalign.study.report.tables.table import ReportTable, TableRows, estimate_cell, number_cell, p_value_cell

#: The row of what no model at all would find.
CHANCE_LABEL = "chance: a random ranking"


def missing_variants(report: StudyReport, present: Collection[str]) -> list[str]:
    """The variants of the plan that are not `present`, in the plan's order: a row each, with nothing but what became of
    them.

    Args:
        report: The report.
        present: The variants that the table has.

    Returns:
        Their names.
    """
    return [name for name in report.plan.variants if name not in present]


def interval_note(report: StudyReport) -> str:
    """What the intervals of a report count: not the seeds where there is one only.

    Args:
        report: The report.

    Returns:
        A sentence.
    """
    unit = report.results.drawn_units
    counts = {len(variant.seeds) for variant in report.results.variants.values()}
    one = max(counts, default=0) < 2
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    if report.results.has_no_intervals:
        return f"{'one seed' if one else f'mean of {seeds} seeds'}; {NO_INTERVALS}"
    if one:
        return f"one seed: 95% intervals of the {unit} only, which do not include what another seed would change"
    note = f"mean of {seeds} seeds with 95% intervals that count seeds and {unit}"
    return note + (f" (of one seed: the {unit} only)" if 1 in counts else "")


def accuracy_table(report: StudyReport) -> ReportTable:
    """Retrieval metrics of each variant over its seeds, with intervals and chance.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    variants = report.results.variants
    names: list[str] = []
    for name, variant in variants.items():
        blocks = {name: variant.metrics}
        if variant.dual is not None:
            blocks = {f"{name}, its dual encoder": variant.dual, f"{name}, re-ranked": variant.metrics}
        for label, metrics in blocks.items():
            names = [metric for metric in metrics if metric != "rsum"]
            rows.add(
                (variant_label(report, name, label), None),
                estimate_cell(metrics["rsum"]),
                number_cell(metrics["rsum"].spread, ".1f"),
                *(estimate_cell(metrics[metric]) for metric in names),
            )
    for name in missing_variants(report, variants) if variants else ():
        rows.add((variant_label(report, name), None), ("no result", None), *[("", None)] * (1 + len(names)))
    # Reports from before chance was told have none.
    chance = report.results.chance
    if chance and variants:
        by_chance = (number_cell(chance.get(metric), ".1f") for metric in names)
        rows.add((CHANCE_LABEL, None), number_cell(chance["rsum"], ".1f"), ("", None), *by_chance)
    note = f"In percent, rsum from 0 to 600; {interval_note(report)}; spread: standard deviation between seeds."
    if report.results.selection is not None:
        note += f" {report.results.selection.capitalize()}."
    columns = ["variant", "rsum", "spread", *(directed_metric_label(metric) for metric in names)]
    return ReportTable("accuracy", "What each design finds", columns, rows.rows, rows.sort, note)


def differences_table(report: StudyReport) -> ReportTable:
    """Paired differences between variants, with intervals and corrected p values.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for row in report.results.differences:
        rows.add(
            (f"{row.a} - {row.b}", None),
            (directed_metric_label(row.metric), None),
            estimate_cell(row),
            p_value_cell(row.p),
            p_value_cell(row.p_holm),
            ("not tested" if row.p is None else "yes" if row.shown else "no difference shown", None),
        )
        if row.primary:
            rows.rows[-1][0] += ", named beforehand"
    columns = ["variants", "figure", "difference", "p", "p, Holm", "shown"]
    note = (
        "Same images, seed by seed; p corrected by Holm over all pairs in rsum, and over all pairs and other figures."
    )
    if any(row.primary for row in report.results.differences):
        note += " The comparison that the plan names is tested alone, the others are corrected without it."
    tested = [row for row in report.results.differences if row.p is not None]
    paired = [len(row.seeds) for row in tested if row.seeds is not None]
    if paired and min(paired) < 2:
        unit = report.results.drawn_units
        note += f" Where there is one seed the {unit} alone are counted: another seed may give another difference."
    elif of_two := [two_seeds_widen(row.model_dump()) for row in tested if len(row.seeds or ()) == 2]:
        whose = "their intervals" if all(of_two) else "intervals that are mostly of what the seeds differ by"
        if any(of_two):
            note += f" Two seeds leave one degree of freedom: {whose} are 12.7 standard errors wide each way."
    for pair in report.results.unpaired:
        note += f" {unpaired_note(pair)}"
    return ReportTable("differences", "Every two designs", columns, rows.rows, rows.sort, note)


def unpaired_note(pair: UnpairedSeeds) -> str:
    """Which seeds of two variants were not compared, as the other lacks them.

    Args:
        pair: The variants and their seeds.

    Returns:
        A sentence.
    """
    sides = ((pair.a, pair.only_a), (pair.b, pair.only_b))
    only = [f"seed {seed} of {name}" for name, seeds in sides for seed in seeds]
    note = f"{pair.a} - {pair.b}: {', '.join(only)} without a partner"
    return f"{note}; not compared, as no seed is in both." if not pair.paired else f"{note}, left out."
