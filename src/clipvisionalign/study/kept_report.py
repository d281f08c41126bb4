"""The report in a study's folder, and what replaces it."""

from __future__ import annotations

import logging
from itertools import chain, count
from pathlib import Path
from typing import Any

from clipvisionalign.progress import progress_step
from clipvisionalign.study.gaps import Gaps
from clipvisionalign.study.report.build import add_gaps, read_report, write_report
from clipvisionalign.study.report.states import trials_without_results
from clipvisionalign.study.report.summary import report_claims

logger = logging.getLogger(__name__)


def merge_with_earlier(
    study: Path, before: dict[str, Any] | None, report: dict[str, Any], gaps: Gaps
) -> dict[str, Any]:
    """A new report, with what only the earlier one has; the earlier one where it has results that this one lacks.

    An earlier one that cannot be read is kept under another name.

    Args:
        study: The study's folder.
        before: The earlier report; None for none.
        report: The new one.
        gaps: What could not be made in it.

    Returns:
        The document that is kept.

    Raises:
        ValueError: Nothing takes the earlier one's place.
    """
    path = study / "report.json"
    if before is None:
        if path.is_file() and not report["results"]["variants"]:
            raise ValueError(f"{path}: cannot be read by this version, and no cell beside it has figures of it")
        _set_aside_unreadable(path)
        return report
    if lacks_results(study, before, report):
        return before
    if "search" in before:
        if before["results"] == report["results"]:
            report["search"] = before["search"]
            report["claims"] = report_claims(report)
        else:
            gaps.add_missing("search", "it was measured of other runs than there are now")
            add_gaps(report, gaps)
    return report


def lacks_results(study: Path, before: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether a report lacks results of the earlier one, which then stays: that is reported.

    Args:
        study: The study's folder.
        before: The earlier report.
        report: The new one.

    Returns:
        Whether it does.
    """
    lost = trials_with_results(before) - trials_with_results(report)
    if lost:
        named = ", ".join(f"{name}-{seed}" for name, seed in sorted(lost))
        logger.info(
            f"{study}: {named} of the report have no figures of this data there now: it is as it was made before"
        )
    return bool(lost)


def trials_with_results(report: dict[str, Any]) -> set[tuple[str, int]]:
    """Variants and seeds that a report has results of.

    Args:
        report: The report.

    Returns:
        The pairs.
    """
    return {(name, seed) for name, each in report["results"]["variants"].items() for seed in each["seeds"]}


def read_earlier_report(study: Path) -> dict[str, Any] | None:
    """The report that was made last; None where there is none, or none that can be read.

    Args:
        study: The study's folder.

    Returns:
        The document, or None.
    """
    if not (study / "report.json").is_file():
        return None
    try:
        return read_report(study)
    except ValueError as error:
        logger.info(str(error))
        return None


def _set_aside_unreadable(report: Path) -> None:
    """Keep a report that cannot be read, if there is one, under another name, beside those that were kept before."""
    if report.is_file():
        numbers = chain([""], (f"-{number}" for number in count(2)))
        names = (report.with_name(f"report.unread{number}.json") for number in numbers)
        aside = report.replace(next(name for name in names if not name.exists()))
        logger.info(f"{report}: cannot be read by this version; it is kept as {aside.name}")


def replace_report(study: Path, report: dict[str, Any]) -> None:
    """Write a report, unless the one that is there has results that it lacks, which is reported.

    Args:
        study: The study's folder.
        report: The document.

    Raises:
        ValueError: It has no result; the message has the reasons.
    """
    empty = not report["results"]["variants"]
    before = read_earlier_report(study)
    if before is None:
        _set_aside_unreadable(study / "report.json")
    if before is None or not lacks_results(study, before, report):
        with progress_step("writing the report"):
            write_report(study, report)
    if empty:
        reasons = "; ".join(f"{trial.variant}-{trial.seed}: {trial.reason}" for trial in trials_without_results(report))
        raise ValueError(f"{study}: no cell came to its end: {reasons}")
