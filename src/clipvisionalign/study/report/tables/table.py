"""A table of a report: its rows, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipvisionalign.number_format import p_value_format
from clipvisionalign.study.report.schema.results import Estimate
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class ReportTable:
    """A table. rows: cells as text, the first column names the row; sort: numbers to sort by, or None, of each."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    sort: list[list[float | None]]
    note: str = ""

    @property
    def is_text_column(self) -> list[bool]:
        """For each column whether it holds words: nothing to sort by in any row but text."""
        count = len(self.columns)
        return [any(row[i] for row in self.rows) and all(key[i] is None for key in self.sort) for i in range(count)]


class TableRows:
    """Rows of a table while it is built: text, and what it sorts by."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.sort: list[list[float | None]] = []

    def add(self, *cells: tuple[str, float | None]) -> None:
        """Add a row of cells: each its text and its number."""
        self.rows.append([text for text, _ in cells])
        self.sort.append([key for _, key in cells])

    def select_columns(self, indices: Sequence[int]) -> None:
        """These columns only."""
        self.rows = [[row[index] for index in indices] for row in self.rows]
        self.sort = [[keys[index] for index in indices] for keys in self.sort]


def format_interval(estimate: Estimate, form: str = "z.1f") -> str:
    """Value and 95% interval, where there is one; nothing of it is minus zero.

    >>> format_interval(Estimate(value=-0.01, low=-74.1, high=74.1))
    '0.0 [-74.1, 74.1]'
    """
    if estimate.low is None:
        return f"{estimate.value:{form}}, no interval"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def estimate_cell(estimate: Estimate) -> tuple[str, float | None]:
    """A cell with an estimate and its interval."""
    return format_interval(estimate), estimate.value


def number_cell(value: float | None, form: str) -> tuple[str, float | None]:
    """A cell with a number; empty for None."""
    return ("", None) if value is None else (format(value, form), value)


def p_value_cell(p: float | None) -> tuple[str, float | None]:
    """A cell with a p value."""
    return ("not tested", None) if p is None else number_cell(p, p_value_format(p, SIGNIFICANCE_LEVEL))


def one_line(text: str) -> str:
    """A cell's text without what would end its row, such as the lines of a model's error."""
    return " ".join(text.split())


def to_markdown(table: ReportTable) -> str:
    """A table as Markdown."""
    lines = [f"## {table.title}", "", f"| {' | '.join(table.columns)} |", f"|---{'|---:' * (len(table.columns) - 1)}|"]
    lines += [f"| {' | '.join(one_line(cell).replace('|', '/') for cell in row)} |" for row in table.rows]
    return "\n".join([*lines, "", table.note, ""])


_LATEX = {
    "^": r"\textasciicircum{}",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
}


def to_latex(table: ReportTable) -> str:
    """A table as LaTeX, with booktabs."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in one_line(text).replace("\\", "/"))

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(f'{table.title}. {table.note}'.strip())}}}",
             rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]  # fmt: skip
    lines += [" & ".join(map(escaped, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
