"""The tables by the length of the caption, of captions against their foils, and of truncated captions."""

from __future__ import annotations

from clipvisionalign.number_format import word_range
from clipvisionalign.study.report.claims.captions import pairs_together, shared_lengths_note
from clipvisionalign.study.report.claims.claim import Claim
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import variant_label
from clipvisionalign.study.report.tables.accuracy import CHANCE_LABEL, interval_note
from clipvisionalign.study.report.tables.table import ReportTable, TableRows, estimate_cell, number_cell, p_value_cell


def length_table(report: StudyReport) -> ReportTable:
    """Recall of each variant by terciles of caption length.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    word_spans = report.results.lengths.words
    for name, variant in report.results.variants.items():
        cells = [estimate_cell(variant.by_length[tercile].recall_at(k)) for tercile in word_spans for k in (1, 5)]
        rows.add((variant_label(report, name), None), *cells)
    chance = report.results.lengths.chance
    if chance:
        rows.add(
            (CHANCE_LABEL, None),
            *(number_cell(chance[tercile][f"recall_at_{k}"], ".1f") for tercile in word_spans for k in (1, 5)),
        )
    columns = [
        "variant",
        *(f"{tercile} ({word_range(span)}) R@{k}" for tercile, span in word_spans.items() for k in (1, 5)),
    ]
    note = "Recall of images by captions of one part of the data's captions, in percent; the gallery stays whole; "
    note += f"{interval_note(report)}. {shared_lengths_note(Claim(report, 'length'))}".rstrip()
    return ReportTable("length", "By the length of the caption", columns, rows.rows, rows.sort, note)


def composition_table(report: StudyReport) -> ReportTable:
    """Shares of minimal pairs that each variant scores correctly, by set and kind.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for name, set_rows in report.results.composition.items():
        for set_row in set_rows:
            rows.add(
                (set_row.variant, None), (f"{set_row.kind} ({name})", None), (f"{set_row.pairs}",
                set_row.pairs), estimate_cell(set_row), p_value_cell(set_row.p_holm),
            )  # fmt: skip
        for baseline in report.blind_baseline.get(name, ()):
            rows.add(("words alone", None), (f"{baseline.kind} ({name})", None), (f"{baseline.pairs}",
                     baseline.pairs), estimate_cell(baseline), ("", None))  # fmt: skip
    columns = ["variant", "kind", "pairs", "true above foil, %", "p of chance, Holm"]
    note = "Chance is 50; a tie counts a half. 'words alone': a trigram model of the training captions, no image. "
    if any(pairs_together(row) for set_rows in report.results.composition.values() for row in set_rows):
        note += "In intervals and p, pairs of one image, identity or published row count as one. "
    note += f"{interval_note(report).capitalize()}."
    return ReportTable("composition", "True captions against their foils", columns, rows.rows, rows.sort, note)


def truncation_table(report: StudyReport) -> ReportTable:
    """Captions that are longer than a text tower reads, by split.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for name, truncation in report.cut_captions.items():
        for split, counts in truncation.splits.items():
            if counts.cut:
                rows.add(
                    (name, None),
                    (split, None),
                    number_cell(truncation.max_tokens, ",d"),
                    number_cell(counts.captions, ",d"),
                    number_cell(counts.cut, ",d"),
                    number_cell(100 * counts.share, ".1f"),
                    number_cell(counts.longest, ",d"),
                    number_cell(counts.tokens_lost, ",d"),
                )
    columns = ["variant", "split", "max_tokens", "captions", "cut", "%", "longest, tokens", "tokens lost"]
    note = (
        "Captions of more tokens than `max_tokens`, behind which nothing is read. Variants that cut none are left out."
    )
    return ReportTable("cut", "Captions that are cut", columns, rows.rows, rows.sort, note)
