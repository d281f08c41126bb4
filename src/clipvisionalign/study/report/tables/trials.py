"""The tables of audits, of pretraining data, and of trials and parts without results."""

from __future__ import annotations

from clipvisionalign.models.pretrained.known_checkpoints import DATA_SETS
from clipvisionalign.study.gaps import REFUSED
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import trials_without_results
from clipvisionalign.study.report.tables.table import ReportTable, TableRows


def audit_table(report: StudyReport) -> ReportTable:
    """The checks of each run's audit.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for name, variant in report.results.variants.items():
        for run in variant.runs:
            for check in run.audit.checks:
                verdict = "passed" if check.passed else "FAILED"
                rows.add((f"{name}, seed {run.seed}", None), (check.name, None), (verdict, None),
                         (check.meaning, None))  # fmt: skip
    for refused_row in report.results.refused:
        rows.add((f"{refused_row.variant}, seed {refused_row.seed}", None), ("audit", None), ("FAILED", None),
                 (refused_row.reason, None))  # fmt: skip
    return ReportTable(
        "audit", "The audit of every run", ["run", "check", "verdict", "what was seen"], rows.rows, rows.sort
    )


def pretraining_table(report: StudyReport) -> ReportTable:
    """What the pretrained models that variants start from were trained on, as far as it is known.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for model in report.pretraining:
        statuses = [(getattr(model, name), None) for name in DATA_SETS]
        origin = " ".join(filter(None, [model.trained_on, f"({model.detail})" if model.detail else ""])) or "unknown"
        rows.add((model.model, None), (", ".join(model.variants), None), (origin, None), *statuses,
                 (", ".join(model.sources), None))  # fmt: skip
    columns = ["model", "variants", "pretrained on", *DATA_SETS.values(), "source"]
    return ReportTable(
        "pretraining", "What the pretrained models were trained on", columns, rows.rows, rows.sort,
        "Whether a public set is in it: inside, not inside, or unknown. A figure on images that a model was pretrained "
        "on is no zero-shot figure.",
    )  # fmt: skip


def gaps_table(report: StudyReport) -> ReportTable:
    """Trials without results and parts that could not be made, with their reasons.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for trial in trials_without_results(report):
        rows.add((f"{trial.variant}, seed {trial.seed}", None), (trial.state, None), (trial.reason, None))
    for gap in report.missing_parts:
        suffix = f" of {gap.target}" if gap.target else ""
        rows.add((f"{gap.part}{suffix}", None), ("not made", None), (gap.reason, None))
    note = "None of it is in the results."
    states = {trial.state for trial in trials_without_results(report)}
    if states != {REFUSED} or report.missing_parts:
        note += " The study's command, given again, tries what failed and continues with the rest."
    if REFUSED in states:
        note += " A run whose audit failed stays refused: remove its folder to train it again."
    return ReportTable("gaps", "What has no results", ["what", "state", "reason"], rows.rows, rows.sort, note)
