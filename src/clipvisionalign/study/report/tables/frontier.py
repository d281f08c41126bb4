"""The table of re-ranking: fixed depths, and only where a search is unsure."""

from __future__ import annotations

from clipvisionalign.number_format import significant_format
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.tables.table import ReportTable, TableRows, estimate_cell, number_cell


def frontier_table(report: StudyReport) -> ReportTable:
    """What re-ranking finds and costs, a row for each way.

    Args:
        report: The report that is tabulated.

    Returns:
        The table; without rows where no design re-ranks, or none was measured so.
    """
    rows = TableRows()
    for name, frontier in report.frontier.items():
        deepest = frontier.fixed[-1]

        def share(milliseconds: float | None, of: float | None = deepest.ms_per_query) -> tuple[str, float | None]:
            return number_cell(None if milliseconds is None or not of else 100.0 * milliseconds / of, ".0f")

        for row in frontier.fixed:
            rows.add(
                (name, None), (f"first {row.candidates}" if row.candidates else "vectors alone", None),
                number_cell(row.recall_sum, ".1f"), number_cell(row.candidates, ".1f"),
                number_cell(100.0 * bool(row.candidates), ".0f"), _milliseconds(row.ms_per_query),
                share(row.ms_per_query), ("", None),
            )  # fmt: skip
        if chosen := frontier.chosen:
            rows.add(
                (name, None), ("where unsure", None), number_cell(chosen.recall_sum, ".1f"),
                number_cell(chosen.images, ".1f"), number_cell(100.0 * chosen.queries, ".0f"),
                _milliseconds(chosen.ms_per_query), share(chosen.ms_per_query),
                estimate_cell(chosen.against_deepest),
            )  # fmt: skip
    columns = ["variant", "re-ranked", "recall sum", "images a query", "% of queries", "ms a query",
               "% of the deepest's", "against the deepest"]  # fmt: skip
    note = (
        "One seed of each variant; every caption searches for its own image. Recall sum: recall at 1, 5 and 10 of "
        "captions to images, in percent. Where unsure: the hits within a margin of the first one, which one half of "
        "the gallery chooses and the other half measures. Milliseconds: one caption encoded, and its pairs "
        "scored, by the table of cost."
    )
    return ReportTable("frontier", "Re-ranking, and where it is worth its time", columns, rows.rows, rows.sort, note)


def _milliseconds(value: float | None) -> tuple[str, float | None]:
    return ("", None) if value is None else number_cell(value, significant_format(value))
