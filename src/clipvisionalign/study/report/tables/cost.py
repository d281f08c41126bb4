"""The tables of time, memory and storage, and of latency."""

from __future__ import annotations

from clipvisionalign.number_format import significant_format
from clipvisionalign.study.cost import describe_conditions, same_conditions
from clipvisionalign.study.report.costs import conditions_by_variant
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.cost import Total
from clipvisionalign.study.report.tables.accuracy import missing_variants
from clipvisionalign.study.report.tables.table import ReportTable, TableRows, number_cell


def cost_table(report: StudyReport) -> ReportTable:
    """Time, memory, storage and training cost of each variant.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for name, cost in report.cost.items():
        rows.add(
            (name, None),
            number_cell(_mean(cost.training_seconds), ",.0f"),
            number_cell(_mean(cost.training_steps), ",.0f"),
            number_cell(cost.ms_per_caption.median, ".2f"),
            number_cell(cost.ms_per_image.median, ".1f"),
            number_cell(cost.ms_per_1000_pairs.median, significant_format(cost.ms_per_1000_pairs.median)),
            number_cell(cost.ms_per_query, significant_format(cost.ms_per_query)),
            number_cell(cost.peak_memory_mib, ",.0f"),
            number_cell(cost.peak_device_memory_mib, ",.0f"),
            number_cell(cost.bytes_per_image, ",.0f"),
            number_cell(cost.bytes_per_caption, ",.0f"),
            number_cell(cost.parameters / 1e6, ".1f"),
            number_cell(cost.flops_per_caption / 1e9, ".2f"),
            number_cell(cost.flops_per_image / 1e9, ".2f"),
            number_cell(cost.energy.joules_per_1000_captions, ".1f"),
        )
    for name in missing_variants(report, report.cost) if rows.rows else ():
        rows.add((name, None), ("not measured", None), *[("", None)] * (len(rows.rows[0]) - 2))
    columns = ["variant", "training s", "training steps", "ms a caption", "ms an image", "ms 1,000 pairs", "ms a query",
               "peak MiB", "peak GPU MiB", "bytes an image", "bytes a caption", "M parameters", "GFLOP a caption",
               "GFLOP an image", "J 1,000 captions"]  # fmt: skip
    column_indices = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in rows.rows)]
    rows.select_columns(column_indices)
    note = (
        "Fresh processes that take turns; medians. Times compare within this table only. A query: one caption encoded "
        "and scored with the gallery, or with the candidates that are re-ranked. Training counts what a variant starts "
        "from. Memory: the most that the whole process, or PyTorch on the GPU, has taken."
        f"{_measurement_note(report)}{_training_note(report)}"
    )
    columns = [columns[index] for index in column_indices]
    return ReportTable("cost", "What each design costs", columns, rows.rows, rows.sort, note)


def _mean(total: Total | None) -> float | None:
    return None if total is None else total.mean


def _measurement_note(report: StudyReport) -> str:
    """Where time and memory were measured, and that variants that were measured elsewhere are not to be compared."""
    under = conditions_by_variant(report.cost, report.cost)
    description = describe_conditions(under)
    if same_conditions(under):
        return f" Measured on: {description}." if description else ""
    return f" Not measured under the same conditions, so that these variants are not to be compared: {description}."


def _training_note(report: StudyReport) -> str:
    # Reports from before it was recorded lack it.
    under = {name: cost.trained_under for name, cost in report.cost.items() if cost.trained_under}
    if same_conditions(under):
        return ""
    description = describe_conditions(under)
    return f" Not trained under the same conditions, so that seconds of training are not to be compared: {description}."


def latency_table(report: StudyReport) -> ReportTable:
    """Latency percentiles and time by batch size of each variant.

    Args:
        report: The report that is tabulated.

    Returns:
        The table.
    """
    rows = TableRows()
    for name, cost in report.cost.items():
        latencies = (cost.caption_latency_ms, cost.image_latency_ms)
        batches = {row.batch: row.ms_per_caption.median for row in cost.by_batch}
        rows.add(
            (name, None),
            *(number_cell(value, ".2f") for each in latencies for value in (each.p50, each.p95, each.p99)),
            *(number_cell(value, ".2f") for value in batches.values()),
        )
    sizes = [row.batch for row in next(iter(report.cost.values())).by_batch] if report.cost else []
    columns = ["variant", *(f"{modality} {p}" for modality in ("caption", "image") for p in ("p50", "p95", "p99")),
               *(f"by {size}" for size in sizes)]  # fmt: skip
    note = "Milliseconds: one caption or image alone (percentiles), and per caption in batches of so many."
    note += _measurement_note(report)
    return ReportTable("latency", "Time of one, and in batches", columns, rows.rows, rows.sort, note)
