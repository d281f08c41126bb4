"""Builds every table of a report, and writes each as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipvisionalign.files import atomic_write
from clipvisionalign.study.gaps import error_reason
from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.tables.accuracy import accuracy_table, differences_table
from clipvisionalign.study.report.tables.captions import composition_table, length_table, truncation_table
from clipvisionalign.study.report.tables.cost import cost_table, latency_table
from clipvisionalign.study.report.tables.frontier import frontier_table
from clipvisionalign.study.report.tables.table import ReportTable, to_latex, to_markdown
from clipvisionalign.study.report.tables.trials import audit_table, gaps_table, pretraining_table

#: Every table of a report, by its name.
TABLES: dict[str, Callable[[StudyReport], ReportTable]] = {
    "accuracy": accuracy_table,
    "differences": differences_table,
    "cost": cost_table,
    "latency": latency_table,
    "frontier": frontier_table,
    "length": length_table,
    "composition": composition_table,
    "cut": truncation_table,
    "audit": audit_table,
    "pretraining": pretraining_table,
    "gaps": gaps_table,
}


def build_tables(report: ReportLike) -> list[ReportTable]:
    """Every table of a report that has rows.

    Args:
        report: A report, or the document that report.json holds.

    Returns:
        The tables in the order of `TABLES`; one that cannot be made has one row with the reason.

    Raises:
        ReportError: The document is not a report.
    """
    typed = StudyReport.of(report)
    return [table for table in (_build_table(name, typed) for name in TABLES) if table.rows]


def _build_table(name: str, report: StudyReport) -> ReportTable:
    """A table; where it cannot be made the reason stands in its place, and the others are made all the same."""
    try:
        return TABLES[name](report)
    except Exception as error:
        message = f"this table could not be made: {error_reason(error)}"
        return ReportTable(name, name.capitalize(), ["table", "reason"], [[name, message]], [[None, None]])


def write_tables(report: ReportLike, folder: Path) -> None:
    """Write each table of a report as NAME.md and NAME.tex.

    Files of tables that have no rows, as an earlier report left them, are removed.

    Args:
        report: A report, or the document that report.json holds.
        folder: Where they are written; its parent exists.

    Raises:
        ReportError: The document is not a report.
        OSError: A file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    tables = {table.name: table for table in build_tables(report)}
    for name in TABLES:
        for ending, text_of in (("md", to_markdown), ("tex", to_latex)):
            path = folder / f"{name}.{ending}"
            if name not in tables:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as aside:
                aside.write_text(text_of(tables[name]), encoding="utf-8")
