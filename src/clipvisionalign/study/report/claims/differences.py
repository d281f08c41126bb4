"""Sentences about differences between variants: which were shown, and of how many seeds."""

from __future__ import annotations

from clipvisionalign.study.report.claims.claim import EQUALITY_TOLERANCE, Claim, as_code, list_names
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import Difference
from clipvisionalign.study.report.states import two_seeds_widen


def difference_claims(report: StudyReport) -> list[Claim]:
    """Differences in rsum: those that were shown, the largest of the others, those that were not tested.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    rows = report.results.differences
    of_rsum = [index for index, row in enumerate(rows) if row.metric == "rsum"]
    # The one that was named beforehand has a sentence of its own.
    indices = [index for index in of_rsum if not rows[index].primary]
    significant = [index for index in indices if rows[index].shown]
    claims = []
    for index in sorted(significant, key=lambda row_index: -abs(rows[row_index].value)):
        claim = Claim(report, "accuracy")
        better, worse, sign = order_pair(rows[index])
        claim.text = (
            f"{as_code(better)} finds more than {as_code(worse)}: "
            f"{claim.cite_interval(f'results/differences/{index}', sign)} in "
            f"rsum (p = {claim.cite_p_value(f'results/differences/{index}/p_holm')} after Holm's correction)."
        )
        claims.append(claim)
    rest = [index for index in indices if rows[index].p is not None and index not in significant]
    if rest:
        claim = Claim(report, "accuracy")
        largest = max(rest, key=lambda row_index: abs(rows[row_index].value))
        path = f"results/differences/{largest}"
        # What was named beforehand is reported, whether it was shown or not.
        other_word = "other " if significant or len(indices) < len(of_rsum) else ""
        lead = "" if len(rest) == 1 else "the largest, "
        claim.text = (
            f"No {other_word}difference in rsum was shown: {lead}{lead_text(claim, path, rows[largest])} "
            f"(p = {claim.cite_p_value(f'{path}/p_holm')} after Holm's correction)."
        )
        claims.append(claim)
    for index in indices:
        if rows[index].p is None:
            claim = Claim(report, "accuracy")
            claim.text = (
                f"{lead_text(claim, f'results/differences/{index}', rows[index])} in rsum, not tested: the "
                f"gallery has too few {report.results.drawn_units} to tell it from chance."
            )
            claims.append(claim)
    return claims + _seed_claims(report)


def _seed_claims(report: StudyReport) -> list[Claim]:
    """What the number of seeds does to the comparisons, and which seeds were compared with none."""
    results = report.results
    rows = [row for row in results.differences if row.metric == "rsum" and row.p is not None]
    paired = [row.seeds for row in rows if row.seeds is not None]
    ones = sum(len(seeds) == 1 for seeds in paired)
    claims = []
    if ones:
        claim = Claim(report, "accuracy")
        lead = "The difference is" if len(paired) == 1 else "One difference is" if ones == 1 else "Some differences are"
        lead = "The differences are" if ones == len(paired) > 1 else lead
        interval_text = "its interval" if lead.endswith("is") else "their intervals"
        claim.text = (
            f"{lead} of one seed, {interval_text} and p of the {report.results.drawn_units} only: another seed may "
            "give another "
            "difference."
        )
        claims.append(claim)
    of_two = [row for row in rows if len(row.seeds or ()) == 2]
    wide = [row for row in of_two if two_seeds_widen(row.model_dump())]
    if wide:
        claim = Claim(report, "accuracy")
        pairs = " or ".join(f"between {as_code(row.a)} and {as_code(row.b)}" for row in wide)
        where = "" if len(wide) == len(of_two) else f" {pairs}"
        claim.text = (
            f"Two seeds leave one degree of freedom: only differences{where} that are many times their standard error "
            "can be shown. A third seed makes the intervals up to three times as narrow."
        )
        claims.append(claim)
    for unpaired_row in results.unpaired:
        claim = Claim(report, "accuracy")
        sides = ((unpaired_row.a, unpaired_row.only_a), (unpaired_row.b, unpaired_row.only_b))
        seeds_text = list_names([f"{as_code(name)} seed {seed}" for name, seeds in sides for seed in seeds])
        names_text = f"{as_code(unpaired_row.a)} and {as_code(unpaired_row.b)}"
        if unpaired_row.paired:
            claim.text = f"{names_text} are compared on the seeds that both have: left out is {seeds_text}."
        else:
            claim.text = f"{names_text} are not compared, as they have no seed in common: {seeds_text}."
        claims.append(claim)
    return claims


def order_pair(row: Difference) -> tuple[str, str, float]:
    """Which of two variants is the better.

    Args:
        row: Their difference.

    Returns:
        The better variant, the worse, and the sign of the better minus the worse in the row.
    """
    return (row.a, row.b, 1.0) if row.value >= 0 else (row.b, row.a, -1.0)


def lead_text(claim: Claim, path: str, row: Difference) -> str:
    """By how much one variant is over the other; neither is where they are equal.

    Args:
        claim: The sentence, whose citations grow.
        path: Of the difference in the report.
        row: The difference.

    Returns:
        A phrase.
    """
    better, worse, sign = order_pair(row)
    if abs(row.value) < EQUALITY_TOLERANCE:
        return f"{claim.cite_interval(path)} between {as_code(better)} and {as_code(worse)}"
    return f"{as_code(better)} over {as_code(worse)} by {claim.cite_interval(path, sign)}"
