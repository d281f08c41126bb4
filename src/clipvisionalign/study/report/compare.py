"""Comparison of two studies: figures, costs, and differences in settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.number_format import significant_format
from clipvisionalign.study.cost import Conditions
from clipvisionalign.study.report.costs import (
    COST_METRICS,
    TRAINING_SECONDS,
    CostMetric,
    cost_conditions,
    cost_ranges,
    in_rounds,
    ranges_differ,
)
from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.schema.cost import VariantCost
from clipvisionalign.study.report.schema.results import Estimate
from clipvisionalign.study.report.states import variant_state
from clipvisionalign.study.report.tables.accuracy import CHANCE_LABEL, interval_note
from clipvisionalign.study.report.tables.table import ReportTable, format_interval

#: The parts of `DataSummary` by which two studies are of the same images and captions.
DATA_IDENTITY_KEYS = ("fingerprint", "gallery", "identity")
#: The other parts: the same data may be in another folder.
DATA_LOCATION_KEYS = ("source", "layout", "splits", "official_splits")


def compare_reports(a: ReportLike, b: ReportLike) -> tuple[list[ReportTable], list[str]]:
    """Their tables of accuracy and cost, variant by variant, and in what they differ: data, plan, machine, versions.

    Nothing is tested: intervals of the same gallery stand beside each other. Of other data they answer another
    question, and are not compared.

    Args:
        a: A report.
        b: Another one.

    Returns:
        The tables, and a line for each difference.
    """
    reports = StudyReport.of(a), StudyReport.of(b)
    names = list(dict.fromkeys(name for report in reports for name in report.plan.variants))
    tables = [_accuracy_table(reports, names)]
    compared = [metric for metric in COST_METRICS if metric.heading]
    tables += [table for metric in compared if (table := _cost_table(reports, names, metric)).rows]
    return tables, report_differences(*reports)


def same_data(a: StudyReport, b: StudyReport) -> bool:
    """Whether two studies were measured on the same images and captions.

    Args:
        a: A report.
        b: Another one.

    Returns:
        Whether they were.
    """
    split = a.results.split == b.results.split
    # The fingerprint has the images by size alone; reports from before their bytes were hashed have no more.
    both = [report.data.contents for report in (a, b) if report.data.contents is not None]
    same = len(both) < 2 or both[0] == both[1]
    return split and same and all(getattr(a.data, key) == getattr(b.data, key) for key in DATA_IDENTITY_KEYS)


def report_differences(a: StudyReport, b: StudyReport) -> list[str]:
    """Everything in which two studies differ, a line each.

    Args:
        a: A report.
        b: Another one.

    Returns:
        The lines.
    """
    lines = []
    if not same_data(a, b):
        lines.append("the data is not the same: figures of A and B are of other images or captions")
    contents = ["contents"] if all(report.data.contents is not None for report in (a, b)) else []
    about = (*DATA_IDENTITY_KEYS, *DATA_LOCATION_KEYS, *contents)
    plans = [report.plan.variants for report in (a, b)]
    common = set(plans[0]) & set(plans[1])
    for side, names in zip("AB", plans, strict=True):
        lines += [f"variant {name}: in {side}'s plan alone" for name in names if name not in common]
    blocks: dict[str, Callable[[StudyReport], Any]] = {
        "data": lambda report: {key: report.data.model_dump()[key] for key in about},
        "plan": lambda report: {
            **report.document["plan"],
            "variants": {name: each for name, each in report.document["plan"]["variants"].items() if name in common},
        },
        "machine": lambda report: report.machine,
        "versions": lambda report: report.versions,
        "accuracy:": _measured_by if all(report.measured_by is not None for report in (a, b)) else lambda report: {},
        "time and memory:": _measurement_conditions,
        "training:": _training_conditions,
    }
    reported_lines = set()
    for name, block in blocks.items():
        left, right = _flatten(block(a)), _flatten(block(b))
        for key in dict.fromkeys([*left, *right]):
            line = f"{key}: A {_shown(left.get(key))}, B {_shown(right.get(key))}"
            # What was measured on the machine that made the report is written once.
            if left.get(key) != right.get(key) and line not in reported_lines:
                lines.append(f"{name} {line}")
                reported_lines.add(line)
    return lines


def _shown(value: Any) -> str:
    """What stands at a key; "-" for nothing, or an empty text."""
    return "-" if value is None or value == "" else str(value)


def _measured_by(report: StudyReport) -> dict[str, str]:
    return _merge_conditions([each for several in (report.measured_by or {}).values() for each in several])


def _measurement_conditions(report: StudyReport) -> dict[str, str]:
    return _merge_conditions([cost_conditions(cost) for cost in report.cost.values()])


def _training_conditions(report: StudyReport) -> dict[str, str]:
    return _merge_conditions([each for cost in report.cost.values() for each in cost.trained_under])


def _merge_conditions(every: Sequence[Conditions]) -> dict[str, str]:
    """Each condition with all that it was."""
    keys = dict.fromkeys(key for each in every for key in each)
    return {key: " and ".join(dict.fromkeys(str(each.get(key, "-")) for each in every)) for key in keys}


def _accuracy_table(reports: Sequence[StudyReport], names: Sequence[str]) -> ReportTable:
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    same = same_data(*reports)
    for name in names:
        estimates = [_rsum(report, name) for report in reports]
        cells = [_format_rsum(report, name, each) for report, each in zip(reports, estimates, strict=True)]
        rows.append([name, *cells, _interval_relation(estimates) if same else "other data" if all(estimates) else ""])
        keys.append([None, *(each.value if each else None for each in estimates), None])
    chance = [report.results.chance.get("rsum") for report in reports]
    rows.append([CHANCE_LABEL, *("" if each is None else f"{each:.1f}" for each in chance), ""])
    keys.append([None, *chance, None])
    counts = [interval_note(report) for report in reports]
    lead = (
        counts[:1] if counts[0] == counts[1] else [f"{side}: {count}" for side, count in zip("AB", counts, strict=True)]
    )
    note = "; ".join(lead)
    note = f"{note[0].upper()}{note[1:]}."
    note += "" if same else " Of other images or captions: what A and B found is not compared."
    return ReportTable("accuracy", "Rsum", ["variant", "A", "B", "intervals"], rows, keys, note)


def _rsum(report: StudyReport, name: str) -> Estimate | None:
    variant = report.results.variants.get(name)
    return variant.metrics.get("rsum") if variant else None


def _format_rsum(report: StudyReport, name: str, estimate: Estimate | None) -> str:
    if estimate:
        seeds = len(report.results.variants[name].seeds)
        note = variant_state(report, name) or count_noun(seeds, "seed")
        return f"{format_interval(estimate)} ({note})"
    return "no result" if name in report.plan.variants else "not in the plan"


def _interval_relation(estimates: Sequence[Estimate | None]) -> str:
    """Of two estimates whether their intervals overlap; nothing where one has none."""
    intervals = [(each.low, each.high) for each in estimates if each and each.low is not None and each.high is not None]
    if len(intervals) < 2:
        return ""
    (low_a, high_a), (low_b, high_b) = intervals
    return "apart" if low_a > high_b or low_b > high_a else "overlap"


def _cost_table(reports: Sequence[StudyReport], names: Sequence[str], cost: CostMetric) -> ReportTable:
    """One figure of cost of the variants that have it in A or B."""
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    for name in names:
        pair = [cost.value(report.cost.get(name)) for report in reports]
        if pair == [None, None]:
            continue
        factor = pair[1] / pair[0] if pair[0] and pair[1] else None
        cells = ["" if value is None else format(value, significant_format(value, 4)) for value in pair]
        rows.append(
            [
                name,
                *cells,
                "" if factor is None else f"{factor:.2f}",
                "" if factor is None else _exceeds_spread(reports, name, cost),
            ]
        )
        keys.append([None, *pair, factor, None])
    columns = ["variant", "A", "B", "B / A", "beyond their spread"]
    under = [[_conditions_of(report.cost[row[0]], cost) for row in rows if row[0] in report.cost] for report in reports]
    every = [each for report_conditions in under for each in report_conditions]
    same = reports[0].machine == reports[1].machine if not any(every) else all(each == every[0] for each in every)
    note = "" if same else "Not all are known to be measured on one machine under the same conditions."
    return ReportTable(cost.name, cost.heading[0].upper() + cost.heading[1:], columns, rows, keys, note)


def _conditions_of(cost: VariantCost, metric: CostMetric) -> list[Conditions]:
    """The conditions that one figure of a variant's cost was measured under."""
    if metric is TRAINING_SECONDS:
        return list(cost.trained_under)
    return [cost_conditions(cost)]


def _exceeds_spread(reports: Sequence[StudyReport], name: str, cost: CostMetric) -> str:
    """Whether a variant's cost differs between two studies by more than it does within one."""
    costs = {str(index): report.cost[name] for index, report in enumerate(reports)}
    ranges = cost_ranges(costs, list(costs), cost) if cost is not TRAINING_SECONDS else None
    if ranges is not None and ranges_differ(*ranges.values()):
        return "yes"
    return "no" if ranges is not None and in_rounds(costs, list(costs), cost) else "not measured"


def _flatten(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in _flatten(child, f"{path}{name}.").items()}
    return {path.rstrip("."): node}
