"""The tables of a report: in the terminal, as Markdown, as LaTeX."""

from clipvisionalign.study.report.tables.build import build_tables, write_tables
from clipvisionalign.study.report.tables.table import ReportTable, to_latex, to_markdown
from clipvisionalign.study.report.tables.terminal import print_tables, render_tables

__all__ = [
    "ReportTable",
    "build_tables",
    "print_tables",
    "render_tables",
    "to_latex",
    "to_markdown",
    "write_tables",
]
