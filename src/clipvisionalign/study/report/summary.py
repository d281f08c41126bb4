"""The summary of a report: sentences whose numbers are all read from report.json.

"No difference was shown" is a sentence of its own, and nothing is compared that was not measured often enough."""

from __future__ import annotations

from typing import Any

from clipvisionalign.study.report.claims.accuracy import (
    added_seeds_claims,
    best_claims,
    control_claims,
    gain_claims,
    primary_claims,
    search_claims,
)
from clipvisionalign.study.report.claims.captions import composition_claims, length_claims
from clipvisionalign.study.report.claims.claim import Claim
from clipvisionalign.study.report.claims.cost import cost_claims, frontier_claims
from clipvisionalign.study.report.claims.differences import difference_claims
from clipvisionalign.study.report.claims.reliability import (
    audit_claims,
    equal_caption_claims,
    missing_claims,
    near_duplicate_claims,
    pretraining_claims,
    seal_claims,
    truncation_claims,
)
from clipvisionalign.study.report.schema import ReportLike, StudyReport


def report_claims(report: ReportLike) -> list[dict[str, Any]]:
    """The summary of a report: its sentences with what they cite, as report.json holds them.

    Args:
        report: The report.

    Returns:
        The sentences in their order.
    """
    typed = StudyReport.of(report)
    claims: list[Claim] = []
    for build_claims in (
        primary_claims,
        added_seeds_claims,
        control_claims,
        best_claims,
        difference_claims,
        gain_claims,
        length_claims,
        composition_claims,
        cost_claims,
        frontier_claims,
        search_claims,
        seal_claims,
        pretraining_claims,
        equal_caption_claims,
        near_duplicate_claims,
        truncation_claims,
        audit_claims,
        missing_claims,
    ):
        claims += build_claims(typed)
    return [claim.to_dict() for claim in claims]
