"""The tables of audits, and of trials and parts without results."""

from __future__ import annotations

from clipvisionalign.study.gaps import REFUSED
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import trials_without_results
from clipvisionalign.study.report.tables.table import ReportTable, TableRows


def audit_table(report: StudyReport) -> ReportTable:
    """The checks of each run's audit."""
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


def gaps_table(report: StudyReport) -> ReportTable:
    """Trials without results and parts that could not be made, with their reasons."""
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
