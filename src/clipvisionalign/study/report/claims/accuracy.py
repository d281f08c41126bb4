"""Sentences about accuracy: the comparison that the plan names, controls, the best variant, re-ranking, search."""

from __future__ import annotations

from functools import partial

from clipvisionalign.retrieval.metrics import describe_rerank_gain
from clipvisionalign.study.aggregate import directed_metric_label
from clipvisionalign.study.report.claims.claim import (
    EQUALITY_TOLERANCE,
    Claim,
    as_code,
    list_names,
)
from clipvisionalign.study.report.claims.differences import lead_text, order_pair
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.cost import Total
from clipvisionalign.study.report.schema.inputs import PlanComparison
from clipvisionalign.study.report.states import find_primary
from clipvisionalign.study.sequential import BY_SEEDS, BY_WIDTH


def primary_claims(report: StudyReport) -> list[Claim]:
    """The comparison that the study was made for.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    primary, comparison = find_primary(report), report.plan.compare or PlanComparison()
    if primary is None and not comparison.a:
        return []
    claim = Claim(report, "accuracy")
    a, b, metric = (
        (comparison.a, comparison.b, comparison.metric)
        if primary is None
        else (primary[1].a, primary[1].b, primary[1].metric)
    )
    passes = _passes_text(claim, a, b) if comparison.passes == "equal" else ""
    lead = f"Named beforehand ({directed_metric_label(metric)}, {as_code(a)} against {as_code(b)}{passes})"
    if primary is None:
        missing = [name for name in (a, b) if name not in report.results.variants]
        has = "has" if len(missing) == 1 else "have"
        reason = f"{list_names(missing)} {has} no result" if missing else "they have no seed in common"
        claim.text = f"{lead}: not compared, as {reason}."
        return [claim]
    index, row = primary
    path = f"results/differences/{index}"
    better, _, sign = order_pair(row)
    seeds_text = f"over {claim.cite_count(f'{path}/seeds')} seeds" if len(row.seeds or ()) > 1 else "with one seed"
    if row.p is None:
        claim.text = (
            f"{lead}: not tested, as there are too few {report.results.drawn_units}; {lead_text(claim, path, row)} "
            f"{seeds_text}."
        )
    elif row.shown:
        claim.text = (
            f"{lead}: {as_code(better)} is ahead by {claim.cite_interval(path, sign)} {seeds_text}, p = "
            f"{claim.cite_p_value(f'{path}/p')}, "
            "tested alone: the difference is shown."
        )
    else:
        claim.text = (
            f"{lead}: no difference is shown; {lead_text(claim, path, row)} {seeds_text}, p = "
            f"{claim.cite_p_value(f'{path}/p')}, tested alone."
        )
    return [claim]


def added_seeds_claims(report: StudyReport) -> list[Claim]:
    """Why seeds were added to the plan's, and what that costs.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    added = report.results.until
    if added is None:
        return []
    claim = Claim(report, "accuracy")
    path = "results/until"
    width = claim.cite(f"{path}/width")
    pair = f"{as_code(added.a)} minus {as_code(added.b)} ({directed_metric_label(added.metric)})"
    if not added.looks:
        claim.text = f"Seeds are added until the interval of {pair} is narrower than {width}; it has none yet."
        return [claim]
    last = f"{path}/looks/{len(added.looks) - 1}"
    now = f"{claim.cite_interval(last)} after {claim.cite_count(f'{last}/seeds')} seeds"
    ends = {
        BY_WIDTH: f"Seeds were added until the interval of {pair} was narrower than {width}: {now}",
        BY_SEEDS: f"The interval of {pair} was to become narrower than {width} and is not, with all seeds that the "
        f"plan allows: {now}",
    }
    lead = ends.get(added.stopped, f"Seeds are added until the interval of {pair} is narrower than {width}: {now}")
    claim.text = (
        f"{lead}. Stopping depends on the spread alone, and each look is at "
        f"{claim.cite(f'{path}/level', factor=100)} %, so that the interval still holds."
    )
    return [claim]


def _passes_text(claim: Claim, a: str, b: str) -> str:
    """Whether two variants that were to make equal passes made as many steps: one that stops early has made fewer."""
    paths, totals = zip(*(_training_steps(claim.report, name) for name in (a, b)), strict=True)
    known = [total for total in totals if total is not None]
    each = [count for total in known for count in ((total.mean,) if total.each is None else total.each)]
    if len(known) == 2 and len(set(each)) < 2:
        return ", equal passes"
    if len(known) < 2:
        # How many steps those made is unknown of one of them.
        return ", equal passes planned"
    steps_text = " and ".join(claim.cite(f"{path}/mean", ",.0f") for path in paths)
    on = " on average" if any(len(set(total.each or ())) > 1 for total in known) else ""
    return f", equal passes planned, {steps_text} steps trained{on}"


def _training_steps(report: StudyReport, name: str) -> tuple[str, Total | None]:
    """The steps of a variant's training with their path; None where they are unknown.

    Reports from before they had a block of their own have them in the block "cost".
    """
    if name in report.training_steps:
        return f"training_steps/{name}", report.training_steps[name]
    cost = report.cost.get(name)
    return f"cost/{name}/training_steps", cost.training_steps if cost else None


def control_claims(report: StudyReport) -> list[Claim]:
    """Variants that repeat another on purpose: what a test finds between the two is its error.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for name, variant in report.plan.variants.items():
        if repeated := variant.same_as:
            claim = Claim(report, "accuracy")
            what = f"{as_code(name)} has all settings of {as_code(repeated)}, as a control"
            claim.text = f"{what}: what differs between them is chance"
            rows = [
                (f"results/differences/{row_index}", row)
                for row_index, row in enumerate(report.results.differences)
                if {row.a, row.b} == {name, repeated} and row.shown
            ]
            if rows:
                path, row = rows[0]
                claim.text += (
                    f", though {lead_text(claim, path, row)} ({directed_metric_label(row.metric)}) is called "
                    "a difference"
                )
            claim.text += "."
            claims.append(claim)
    return claims


def best_claims(report: StudyReport) -> list[Claim]:
    """The variant, or the variants, of the highest rsum.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    variants = report.results.variants
    if not variants:
        return []
    rsum = {name: variant.metrics["rsum"].value for name, variant in variants.items()}
    best = [name for name, value in rsum.items() if abs(value - max(rsum.values())) < EQUALITY_TOLERANCE]
    lacking = " of those that have results" if len(variants) < len(report.plan.variants) else ""
    claim = Claim(report, "accuracy")
    path, unit = f"results/variants/{best[0]}", report.results.drawn_units
    details = []
    if report.results.chance:
        details.append(f"chance {claim.cite('results/chance/rsum')}")
    seeds = {len(variants[name].seeds) for name in best}
    has_interval = len(best) == 1 and variants[best[0]].metrics["rsum"].low is not None
    if seeds == {1}:
        details.append("of one seed" + (f", its interval of the {unit} only" if has_interval else ""))
    elif len(seeds) == 1:
        planned_text = (
            f" out of {claim.cite_count('plan/seeds')}" if len(variants[best[0]].seeds) < len(report.plan.seeds) else ""
        )
        details.append(f"mean of {claim.cite_count(f'{path}/seeds')} seeds{planned_text}")
    images, captions = (claim.cite_with_noun(f"results/gallery/{kind}s", kind) for kind in ("image", "caption"))
    on = f"{images} of {of_identities}" if (of_identities := cite_identities(claim)) else images
    context = f"({', '.join([*details, f'on {on} and {captions}'])})"
    if len(best) > 1:
        every = "All variants" if not lacking else f"{'Both' if len(best) == 2 else 'All'} that have results"
        names_text = every if len(best) == len(variants) else list_names(best)
        height = "the same rsum" if len(best) == len(variants) else f"the same rsum, the highest{lacking}"
        claim.text = f"{names_text} have {height}, {claim.cite(f'{path}/figures/rsum/value')} {context}."
        return [claim]

    def recall(name: str) -> str:
        chance = f" (chance {claim.cite(f'results/chance/{name}')})" if report.results.chance else ""
        return f"{directed_metric_label(name)} {claim.cite(f'{path}/figures/{name}/value')} %{chance}"

    recalls = ", ".join(recall(name) for name in ("image_to_text recall_at_1", "text_to_image recall_at_1"))
    has = f"has the highest rsum{lacking}" if len(variants) > 1 else "has an rsum of"
    comma = "," if len(variants) > 1 else ""
    claim.text = f"{as_code(best[0])} {has}{comma} {claim.cite_interval(f'{path}/figures/rsum')} {context}: {recalls}."
    return [claim]


def cite_identities(claim: Claim) -> str:
    """Cite how many identities the images are of.

    Args:
        claim: The sentence, whose citations grow.

    Returns:
        A phrase; "" where they are of none.
    """
    return claim.cite_with_noun("results/identities", "identity") if claim.report.results.identities is not None else ""


def gain_claims(report: StudyReport) -> list[Claim]:
    """What re-ranking adds to a variant's own dual encoder.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    claims = []
    for name, variant in report.results.variants.items():
        if variant.gain is None:
            continue
        claim = Claim(report, "accuracy")
        gain_text = describe_rerank_gain(
            variant.gain.model_dump(), partial(claim.cite_interval, f"results/variants/{name}/gain")
        )
        claim.text = f"Re-ranking by {as_code(name)} {gain_text}."
        claims.append(claim)
    return claims


def search_claims(report: StudyReport) -> list[Claim]:
    """What a search finds of what it is asked for, where that was counted.

    Args:
        report: The report that the sentences cite.

    Returns:
        A sentence each; none where the report has nothing to state.
    """
    if report.search is None:
        return []
    claim = Claim(report, "search")
    claim.text = (
        f"A search of {claim.cite_with_noun('search/gallery', 'image')} that were never trained on, for two "
        "things at a time: "
        f"{claim.cite('search/share')} % of the first {claim.cite_with_noun('search/first', 'answer')}, or of "
        "as many as there "
        f"are, hold both; by chance {claim.cite('search/chance')} % "
        f"({claim.cite_with_noun('search/queries', 'query')})."
    )
    return [claim]
