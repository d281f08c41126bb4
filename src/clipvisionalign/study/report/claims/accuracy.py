"""Sentences about accuracy: the comparison that the plan names, controls, the best variant, re-ranking, search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from clipvisionalign.retrieval.metrics import describe_rerank_gain
from clipvisionalign.study.aggregate import directed_metric_label
from clipvisionalign.study.primary_comparison import find_primary
from clipvisionalign.study.report.claims.claim import (
    EQUALITY_TOLERANCE,
    Claim,
    as_code,
    drawn_units,
    list_names,
    lookup,
)
from clipvisionalign.study.report.claims.differences import lead_text, order_pair


def primary_claims(report: dict[str, Any]) -> list[Claim]:
    """The comparison that the study was made for."""
    primary, comparison = find_primary(report), report["plan"].get("compare") or {}
    if primary is None and not comparison.get("a"):
        return []
    claim = Claim(report, "accuracy")
    a, b, metric = (
        (comparison["a"], comparison["b"], comparison["figure"])
        if primary is None
        else (primary[1][k] for k in ("a", "b", "figure"))
    )
    passes = ", equal passes" if comparison.get("passes") == "equal" else ""
    steps_at = _steps_at(report)
    steps = [lookup(report, steps_at(name)) if steps_at(name) else {} for name in (a, b)]
    each = [count for some in steps for count in some.get("each", [some.get("mean")])]
    if passes and (not all(steps) or len(set(each)) > 1):
        # One that stops early has made fewer; how many those made is not known of all.
        passes = ", equal passes planned"
        if all(steps):
            steps_text = (claim.cite(f"{steps_at(name)}/mean", ",.0f") for name in (a, b))
            on = " on average" if any(len(set(some.get("each", []))) > 1 for some in steps) else ""
            passes += f", {' and '.join(steps_text)} steps trained{on}"
    lead = f"Named beforehand ({directed_metric_label(metric)}, {as_code(a)} against {as_code(b)}{passes})"
    if primary is None:
        missing = [name for name in (a, b) if name not in report["results"]["variants"]]
        has = "has" if len(missing) == 1 else "have"
        reason = f"{list_names(missing)} {has} no result" if missing else "they have no seed in common"
        claim.text = f"{lead}: not compared, as {reason}."
        return [claim]
    index, row = primary
    path = f"results/differences/{index}"
    better, _, sign = order_pair(row)
    seeds_text = f"over {claim.cite_count(f'{path}/seeds')} seeds" if len(row.get("seeds", [])) > 1 else "with one seed"
    if row["p"] is None:
        claim.text = (
            f"{lead}: not tested, as there are too few {drawn_units(report)}; {lead_text(claim, path, row)} "
            f"{seeds_text}."
        )
    elif row["shown"]:
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


def _steps_at(report: dict[str, Any]) -> Callable[[str], str]:
    """Where the steps of a variant's training stand; "" where they are not known. Reports from before they had a place
    of their own have them with what was measured of cost."""

    def path(name: str) -> str:
        if (report.get("training_steps") or {}).get(name):
            return f"training_steps/{name}"
        return f"cost/{name}/training_steps" if (report["cost"].get(name) or {}).get("training_steps") else ""

    return path


def control_claims(report: dict[str, Any]) -> list[Claim]:
    """Variants that repeat another on purpose: what a test finds between the two is its error."""
    claims = []
    for name, variant in report["plan"]["variants"].items():
        if repeated := variant.get("same_as"):
            claim = Claim(report, "accuracy")
            what = f"{as_code(name)} has all settings of {as_code(repeated)}, as a control"
            claim.text = f"{what}: what differs between them is chance"
            rows = [
                (f"results/differences/{row_index}", row)
                for row_index, row in enumerate(report["results"]["differences"])
                if {row["a"], row["b"]} == {name, repeated} and row["shown"]
            ]
            if rows:
                path, row = rows[0]
                claim.text += (
                    f", though {lead_text(claim, path, row)} ({directed_metric_label(row['figure'])}) is called "
                    "a difference"
                )
            claim.text += "."
            claims.append(claim)
    return claims


def best_claims(report: dict[str, Any]) -> list[Claim]:
    variants = report["results"]["variants"]
    if not variants:
        return []
    rsum = {name: variant["figures"]["rsum"]["value"] for name, variant in variants.items()}
    best = [name for name, value in rsum.items() if abs(value - max(rsum.values())) < EQUALITY_TOLERANCE]
    lacking = " of those that have results" if len(variants) < len(report["plan"]["variants"]) else ""
    claim = Claim(report, "accuracy")
    path, unit = f"results/variants/{best[0]}", drawn_units(report)
    details = []
    if report["results"].get("chance"):
        details.append(f"chance {claim.cite('results/chance/rsum')}")
    seeds = {len(variants[name]["seeds"]) for name in best}
    has_interval = len(best) == 1 and variants[best[0]]["figures"]["rsum"]["low"] is not None
    if seeds == {1}:
        details.append("of one seed" + (f", its interval of the {unit} only" if has_interval else ""))
    elif len(seeds) == 1:
        planned_text = (
            f" out of {claim.cite_count('plan/seeds')}"
            if len(variants[best[0]]["seeds"]) < len(report["plan"]["seeds"])
            else ""
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
        chance = f" (chance {claim.cite(f'results/chance/{name}')})" if report["results"].get("chance") else ""
        return f"{directed_metric_label(name)} {claim.cite(f'{path}/figures/{name}/value')} %{chance}"

    recalls = ", ".join(recall(name) for name in ("image_to_text recall_at_1", "text_to_image recall_at_1"))
    has = f"has the highest rsum{lacking}" if len(variants) > 1 else "has an rsum of"
    comma = "," if len(variants) > 1 else ""
    claim.text = f"{as_code(best[0])} {has}{comma} {claim.cite_interval(f'{path}/figures/rsum')} {context}: {recalls}."
    return [claim]


def cite_identities(claim: Claim) -> str:
    """How many identities the images are of; "" where they are of none."""
    return claim.cite_with_noun("results/identities", "identity") if "identities" in claim.report["results"] else ""


def gain_claims(report: dict[str, Any]) -> list[Claim]:
    claims = []
    for name, variant in report["results"]["variants"].items():
        if "gain" not in variant:
            continue
        claim = Claim(report, "accuracy")
        gain_text = describe_rerank_gain(variant["gain"], partial(claim.cite_interval, f"results/variants/{name}/gain"))
        claim.text = f"Re-ranking by {as_code(name)} {gain_text}."
        claims.append(claim)
    return claims


def search_claims(report: dict[str, Any]) -> list[Claim]:
    """What a search finds of what it is asked for, where that was counted."""
    if "search" not in report:
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
