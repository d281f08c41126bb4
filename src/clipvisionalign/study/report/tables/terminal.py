"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.tables.build import build_tables
from clipvisionalign.study.report.tables.table import ReportTable


def print_tables(report: ReportLike) -> None:
    """Print the main tables of a report and the sentences of its summary.

    These are accuracy, differences in rsum, cost and gaps; all others are in the report.

    Args:
        report: A report, or the document that report.json holds.

    Raises:
        ReportError: The document is not a report.
    """
    typed = StudyReport.of(report)
    selected = []
    for table in [table for table in build_tables(typed) if table.name in ("accuracy", "differences", "cost", "gaps")]:
        # In the terminal the first question only: the report has the others.
        rows = [row for row in table.rows if table.name != "differences" or row[1] == "rsum"]
        selected.append(replace(table, rows=rows))
    render_tables(selected)
    for claim in typed.claims:
        print(f"- {claim.text}")


def render_tables(tables: Sequence[ReportTable]) -> None:
    """Print tables; where standard output is no terminal, 220 columns wide.

    Args:
        tables: The tables.
    """
    from rich.console import Console
    from rich.table import Table as Printed

    # Names of variants and data sets are text: their brackets are no markup.
    console = Console(markup=False)
    # A table broken over many lines is unreadable: wide enough where the window's width is unknown.
    console = console if console.is_terminal else Console(width=220, markup=False)
    for table in tables:
        rich_table = Printed(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for index, column in enumerate(table.columns):
            rich_table.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
