"""Sentences about the length of captions, and about true captions against their foils."""

from __future__ import annotations

from itertools import pairwise

from clipvisionalign.study.report.claims.claim import (
    CLAIM_LEVEL,
    EQUALITY_TOLERANCE,
    Claim,
    as_code,
    join_words,
    list_names,
)
from clipvisionalign.study.report.claims.differences import order_pair
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.results import FoilShare, VariantFoilShare

#: What is done to a caption to make its foil.
FOIL_LABELS = {
    "relation": "Relations swapped",
    "attribute": "Attributes swapped",
    "count": "Counts changed",
    "negation": "Negated",
}


def foils_note(report: StudyReport) -> str:
    """Where the foils of a report's minimal pairs come from: each of its sets in a sentence.

    Args:
        report: The report.

    Returns:
        The sentences.
    """
    # Reports from before it was recorded: only what the plan drew itself is certain.
    drawn_by_plan = bool(report.plan.scenes) and not report.plan.data
    is_drawn = drawn_by_plan if report.data.drawn is None else report.data.drawn
    sentences = []
    for name in report.results.composition:
        if name != "this data":
            sentences.append(f"Those of {name} are read as they were published.")
        elif is_drawn:
            sentences.append("The foils are made from what was drawn.")
        else:
            sentences.append("The foils are made from captions by rule: a few of them are true all the same.")
    return " ".join(sentences)


def length_claims(report: StudyReport) -> list[Claim]:
    """Differences by the length of the caption.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    rows = report.results.by_length_differences
    word_spans = report.results.lengths.words
    if not rows or len(word_spans) < 2:
        return []
    claims = []
    for index, row in enumerate(rows):
        if row.shown:
            claim = Claim(report, "length")
            better, worse, sign = order_pair(row)
            claim.text = (
                f"By {row.tercile} captions ({_tercile_span(claim, row.tercile)}) {as_code(better)} finds "
                f"more images than {as_code(worse)}: "
                f"{claim.cite_interval(f'results/by_length_differences/{index}', sign)} points of R@5."
            )
            claims.append(claim)
    significant = {row.tercile for row in rows if row.shown}
    tested = {row.tercile for row in rows if row.p is not None}
    for terciles, statement in (
        (tested - significant, "no difference in R@5 was shown"),
        (set(word_spans) - tested, f"differences were not tested, for too few {report.results.drawn_units}"),
    ):
        if terciles:
            claim = Claim(report, "length")
            spans = [(tercile, _tercile_span(claim, tercile)) for tercile in word_spans if tercile in terciles]
            tercile_list = join_words([f"{tercile} ({span})" for tercile, span in spans]) + " captions"
            claim.text = f"By {tercile_list if len(spans) > 1 else '{} captions ({})'.format(*spans[0])} {statement}."
            claims.append(claim)
    claim = Claim(report, "length")
    claim.text = shared_lengths_note(claim)
    return [*claims, claim] if claim.text else claims


def shared_lengths(report: StudyReport) -> list[str]:
    """The lengths that are in two terciles.

    Reports from before terciles were cut between two lengths assigned captions of one length by their order in the
    data.

    Args:
        report: The report.

    Returns:
        Their paths in it.
    """
    words = report.results.lengths.words
    return [f"results/lengths/words/{a}/1" for a, b in pairwise(words) if words[a][1] >= words[b][0]]


def shared_lengths_note(claim: Claim) -> str:
    """Write the sentence on terciles that share a length.

    Args:
        claim: The sentence that it follows, whose citations grow.

    Returns:
        It; "" where none do.
    """
    shared = shared_lengths(claim.report)
    if not shared:
        return ""
    lengths = join_words([claim.cite(path, ",d") for path in shared])
    return (
        f"Captions of {lengths} words stand in two parts of length, dealt by their order in the data: differences "
        "between the parts are not of length alone."
    )


def _tercile_span(claim: Claim, tercile: str) -> str:
    path = f"results/lengths/words/{tercile}"
    low, high = claim.report.results.lengths.words[tercile]
    if low == high:
        return claim.cite_with_noun(f"{path}/0", "word")
    return f"{claim.cite(f'{path}/0', 'd')} to {claim.cite_with_noun(f'{path}/1', 'word')}"


def composition_claims(report: StudyReport) -> list[Claim]:
    """Minimal pairs: a sentence for each set and kind.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for name, rows in report.results.composition.items():
        for kind in dict.fromkeys(row.kind for row in rows):
            claim = Claim(report, "composition")
            indices = [index for index, row in enumerate(rows) if row.kind == kind]
            label = FOIL_LABELS.get(kind, kind.capitalize()) + ("" if name == "this data" else f" ({name})")
            claim.text = f"{label}: {_foil_statement(claim, name, kind, indices)}."
            claims.append(claim)
    return claims


def pairs_together(row: FoilShare) -> bool:
    """Whether some of a row's pairs were drawn together, and count as one.

    Args:
        row: Shares of one set and kind.

    Returns:
        Whether they were.
    """
    return (row.units or row.pairs) < row.pairs


def _foil_statement(claim: Claim, name: str, kind: str, indices: list[int]) -> str:
    """Which variants score true captions above foils, and the best of them; then whether the blind baseline does."""
    path = f"results/composition/{name}"
    rows = claim.report.results.composition[name]
    if all(rows[index].p_holm is None for index in indices):
        first = f"{path}/{indices[0]}"
        pairs = claim.cite_with_noun(f"{first}/pairs", "pair")
        if pairs_together(rows[indices[0]]):
            return f"not tested, as too few of its {pairs} were drawn apart ({claim.cite(f'{first}/units', ',d')})"
        # Reports from before it was written down counted every pair.
        if rows[indices[0]].units is None:
            return f"not tested, as it is not known which of its {pairs} are of one image"
        return f"not tested, as there are too few pairs ({pairs})"
    above = [index for index in indices if _is_significant(rows[index]) and rows[index].value > 50]
    highest = max(rows[index].value for index in indices)
    best = [index for index in indices if abs(rows[index].value - highest) < EQUALITY_TOLERANCE]
    if len(indices) == 1:
        who, best_of_all = f"{as_code(rows[best[0]].variant)} {'told' if above else 'was not shown to tell'}", ""
    else:
        who = list_names([rows[p].variant for p in above]) + " told" if above else "no variant was shown to tell"
        alike = len(best) == len(indices)
        best_of_all = f"; the best, {'all alike' if alike else list_names([rows[p].variant for p in best])}"
    value_text = claim.cite_interval(f"{path}/{best[0]}") if len(best) == 1 else claim.cite(f"{path}/{best[0]}/value")
    statement = f"{who} true from foil above chance{best_of_all}{',' if best_of_all else ':'} {value_text} %"
    baselines = {row.kind: (index, row) for index, row in enumerate(claim.report.blind_baseline.get(name, ()))}
    if kind not in baselines:
        return statement
    index, baseline = baselines[kind]
    baseline_path = f"text_only/{name}/{index}"
    statement += f". A language model that sees no image: {claim.cite_interval(baseline_path)} %"
    if above and (baseline.low or 0) > 50:
        statement += ", so that the words alone give part of it away"
    return statement


def _is_significant(row: VariantFoilShare) -> bool:
    """Whether a row's corrected p, where it was tested, is below 5%."""
    return row.p_holm is not None and row.p_holm < CLAIM_LEVEL
