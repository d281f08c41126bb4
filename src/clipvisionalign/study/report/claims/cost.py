"""Sentences about time, memory and storage."""

from __future__ import annotations

from collections.abc import Sequence

from clipvisionalign.number_format import decimal_format
from clipvisionalign.study.report.claims.claim import Claim, as_code, list_names
from clipvisionalign.study.report.costs import (
    COST_METRICS,
    WITHIN_SPREAD,
    CostMetric,
    most_different_pair,
    no_comparison_reason,
)
from clipvisionalign.study.report.schema import StudyReport


def cost_claims(report: StudyReport) -> list[Claim]:
    """Time, memory and storage of the variants, compared where they were measured often enough.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for cost in COST_METRICS:
        names = [name for name, each in report.cost.items() if cost.value(each) is not None]
        if names and cost.sentence_start:
            claim = Claim(report, "cost")
            claim.text = _cost_statement(claim, cost, names)
            without = [name for name in report.cost if name not in names]
            if without:
                claim.text += f" Of {list_names(without)} it was not measured."
            claims.append(claim)
    return claims


def frontier_claims(report: StudyReport) -> list[Claim]:
    """What re-ranking only the unsure hits changes, of each variant that re-ranks.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each.
    """
    claims = []
    for name, frontier in report.frontier.items():
        chosen, deepest = frontier.chosen, f"frontier/{name}/fixed/{len(frontier.fixed) - 1}"
        if chosen is None:
            continue
        claim, path = Claim(report, "cost"), f"frontier/{name}/chosen"
        claim.text = (
            f"With {as_code(name)}, re-ranking only the hits of which a search is unsure, "
            f"{claim.cite(f'{path}/images')} instead of {claim.cite(f'frontier/{name}/depth', 'd')} images, changes "
            "the recall of captions to images "
            f"(recall sum) by {claim.cite_interval(f'{path}/against_deepest')}"
        )
        times = [each for each in (chosen.ms_per_query, frontier.fixed[-1].ms_per_query) if each is not None]
        # Of cheap pairs nearly all of the time is the caption's: both are the same as they are shown.
        if len({format(each, decimal_format(each)) for each in times}) == 2:
            shown, deepest_shown = (claim.cite(f"{each}/ms_per_query") for each in (path, deepest))
            claim.text += f" and takes {shown} instead of {deepest_shown} ms"
        claim.text += "."
        claims.append(claim)
    return claims


def _cost_statement(claim: Claim, cost: CostMetric, names: Sequence[str]) -> str:
    costs = claim.report.cost
    values = {name: value for name in names if (value := cost.value(costs[name])) is not None}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)

    def number(name: str) -> str:
        return claim.cite(f"cost/{name}/{cost.path}", cost.number_format(values[name]))

    if len(names) == 1:
        return f"{cost.sentence_start} {number(low)} {cost.unit} with {as_code(low)}."
    if len({format(values[end], cost.number_format(values[end])) for end in (low, high)}) == 1:
        variants = "every variant" if len(names) == len(claim.report.plan.variants) else list_names(names)
        return f"{cost.sentence_start} {number(low)} {cost.unit} with {variants}."
    reason = "" if cost.exact else no_comparison_reason(costs, names, cost)
    if not reason:
        if not cost.exact:
            low, high = most_different_pair(costs, names, cost)
        ends = [(number(end), [name for name in names if values[name] == values[end]]) for end in (low, high)]
        values_text = " and ".join(f"{value} {cost.unit} with {list_names(variants)}" for value, variants in ends)
        return f"{cost.sentence_start} {values_text}."
    span = f"{cost.sentence_start} {number(low)} to {number(high)} {cost.unit}"
    return f"{span}: {reason}." if reason == WITHIN_SPREAD else f"{span}: {reason}, so that none is shown to take less."
