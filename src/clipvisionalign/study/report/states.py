"""Variants without results, and how a report marks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipvisionalign.retrieval.metrics import SIGNIFICANCE_LEVEL
from clipvisionalign.study.gaps import FAILED, MEASURED, REFUSED
from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.schema.parts import MissingPart
from clipvisionalign.study.report.schema.results import Difference, TrialReason, TrialState
from clipvisionalign.study.statistics import t_quantile


def find_primary(report: ReportLike) -> tuple[int, Difference] | None:
    """The comparison that the plan names, with its index among the differences; None where there is none.

    Args:
        report: The report.

    Returns:
        Index and difference.
    """
    rows = StudyReport.of(report).results.differences
    return next(((index, row) for index, row in enumerate(rows) if row.primary), None)


def missing_parts(report: ReportLike) -> tuple[MissingPart, ...]:
    """The parts of a report that could not be made.

    Args:
        report: The report.

    Returns:
        The parts, with reasons.
    """
    return StudyReport.of(report).missing_parts


def trials_without_results(report: ReportLike) -> list[TrialState]:
    """The trials that have no results, with state and reason; of older reports those that they name.

    Args:
        report: The report.

    Returns:
        The trials.
    """
    report = StudyReport.of(report)
    if report.trials is not None:
        return [trial for trial in report.trials if trial.state != MEASURED]

    def with_state(trial: TrialReason, state: str) -> TrialState:
        return TrialState(variant=trial.variant, seed=trial.seed, reason=trial.reason, state=state)

    refused = [with_state(trial, REFUSED) for trial in report.results.refused]
    return refused + [with_state(trial, FAILED) for trial in report.failed]


def variant_state(report: ReportLike, name: str) -> str:
    """What of a variant's seeds has no results, in a few words.

    Args:
        report: The report.
        name: The variant.

    Returns:
        Such as "2 of 3 seeds" or "refused"; "" where all have.
    """
    report = StudyReport.of(report)
    planned = len(report.plan.seeds)
    variant = report.results.variants.get(name)
    if variant is not None:
        return "" if len(variant.seeds) == planned else f"{len(variant.seeds)} of {planned} seeds"
    states = dict.fromkeys(trial.state for trial in trials_without_results(report) if trial.variant == name)
    return ", ".join(states) or "no results"


def variant_label(report: ReportLike, name: str, label: str = "") -> str:
    """A variant's name, or its `label`, for tables, axes and legends, with what of the variant has no results.

    Args:
        report: The report.
        name: The variant.
        label: What stands in the place of its name; "" for the name.

    Returns:
        The text.
    """
    state = variant_state(report, name)
    return f"{label or name} ({state})" if state else label or name


def two_seeds_widen(row: Mapping[str, Any]) -> bool:
    """Whether most of an estimate's squared half-width comes from its two seeds: then a third seed narrows it.

    Args:
        row: "value", "low", "high" and "spread" of an estimate over two seeds.

    Returns:
        Whether it does; false without an interval.
    """
    if None in (row["low"], row["spread"]):
        return False
    reach = max(row["high"] - row["value"], row["value"] - row["low"])
    # The variance of a mean of two is half of that of each.
    return bool((t_quantile(1, SIGNIFICANCE_LEVEL) * row["spread"]) ** 2 / 2 > reach**2 / 2)
