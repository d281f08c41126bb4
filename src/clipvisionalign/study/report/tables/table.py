"""A table of a report: its rows, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipvisionalign.number_format import p_value_format
from clipvisionalign.study.report.schema.results import Estimate
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class ReportTable:
    """A table of a report.

    Attributes:
        name: Name of its files.
        title: Its heading.
        columns: Headings of the columns.
        rows: Cells as text; the first column names the row.
        sort: For each cell the number by which its column is sorted, or None.
        note: A sentence below the table; "" for none.
    """

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
        """Add a row.

        Args:
            *cells: Each cell's text, and the number that it is sorted by, or None.
        """
        self.rows.append([text for text, _ in cells])
        self.sort.append([key for _, key in cells])

    def select_columns(self, indices: Sequence[int]) -> None:
        """Keep some columns only, in the given order.

        Args:
            indices: Their numbers, from 0.
        """
        self.rows = [[row[index] for index in indices] for row in self.rows]
        self.sort = [[keys[index] for index in indices] for keys in self.sort]


def format_interval(estimate: Estimate, form: str = "z.1f") -> str:
    """A value with its 95% interval, if there is one; nothing is printed as minus zero.

    Args:
        estimate: The value and its interval.
        form: Format of each number.

    Returns:
        "VALUE [LOW, HIGH]", or "VALUE, no interval".

    >>> format_interval(Estimate(value=-0.01, low=-74.1, high=74.1))
    '0.0 [-74.1, 74.1]'
    """
    if estimate.low is None:
        return f"{estimate.value:{form}}, no interval"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def estimate_cell(estimate: Estimate) -> tuple[str, float | None]:
    """A cell with an estimate and its interval.

    Args:
        estimate: The value and its interval.

    Returns:
        Its text, and the value to sort by.
    """
    return format_interval(estimate), estimate.value


def number_cell(value: float | None, form: str) -> tuple[str, float | None]:
    """A cell with a number.

    Args:
        value: The number; None for an empty cell.
        form: Its format.

    Returns:
        Its text, and the number to sort by.
    """
    return ("", None) if value is None else (format(value, form), value)


def p_value_cell(p: float | None) -> tuple[str, float | None]:
    """A cell with a p value.

    Args:
        p: The p value; None if it was not tested.

    Returns:
        Its text, and the number to sort by.
    """
    return ("not tested", None) if p is None else number_cell(p, p_value_format(p, SIGNIFICANCE_LEVEL))


def one_line(text: str) -> str:
    """A text without line breaks, which would end a table's row, such as those of a model's error.

    Args:
        text: The text.

    Returns:
        The text, every run of white space one blank.
    """
    return " ".join(text.split())


def to_markdown(table: ReportTable) -> str:
    """A table as Markdown: heading, table, note.

    Args:
        table: The table.

    Returns:
        Markdown; vertical bars within cells become slashes.
    """
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
    """A table as LaTeX, with booktabs.

    Args:
        table: The table.

    Returns:
        A `table` environment; special characters are escaped, and backslashes within cells become slashes.
    """

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in one_line(text).replace("\\", "/"))

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(f'{table.title}. {table.note}'.strip())}}}",
             rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]  # fmt: skip
    lines += [" & ".join(map(escaped, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
