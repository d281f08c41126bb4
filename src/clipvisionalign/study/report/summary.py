"""The summary of a report, in words that its figures carry: every number in a sentence is read from report.json.

A claim holds its text and the figures that it rests on, each with its place in report.json and as it is shown. "No
difference was shown" is said where that is so, and nothing is compared that was not measured often enough to tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from clipvisionalign.counts import plural
from clipvisionalign.number_format import decimal_format, p_value_format
from clipvisionalign.retrieval.equal_captions import describe_equal_captions
from clipvisionalign.retrieval.metrics import RECALL_AT, describe_rerank_gain
from clipvisionalign.study.aggregate import directed_metric_label
from clipvisionalign.study.cost import (
    COST_METRICS,
    WITHIN_SPREAD,
    CostMetric,
    most_different_pair,
    no_comparison_reason,
)
from clipvisionalign.study.gaps import NOT_MEASURED, NOT_TRAINED, UNFINISHED, missing_parts, trials_without_results
from clipvisionalign.study.primary_comparison import find_primary
from clipvisionalign.study.statistics import two_seeds_widen

CLAIM_LEVEL = 0.05

#: What is done to a caption to make its twin.
FOIL_LABELS = {
    "relation": "Relations swapped",
    "attribute": "Attributes swapped",
    "count": "Counts changed",
    "negation": "Negated",
}

#: An image of a lower rank than this was missed: no recall that is measured counts it.
MISSED_BEYOND = max(RECALL_AT)

#: The groups of examples: what they have in common, and whether the lowest and the highest rank of an image in all
#: variants are so.
EXAMPLE_GROUPS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "found by all": ("first in every variant", lambda low, high: high == 1),
    "found by none": (f"not within the first {MISSED_BEYOND} of any variant", lambda low, high: low > MISSED_BEYOND),
    "where they disagree": (
        f"first in one variant, and not within the first {MISSED_BEYOND} of another",
        lambda low, high: low == 1 and high > MISSED_BEYOND,
    ),
}


def shown_examples(report: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The groups of a report's examples that hold some: name, what they have in common, and those that are so. Reports
    from before there was a rule hold the best and the worst, whatever their ranks."""
    groups = []
    for kind, entries in report["examples"].get("groups", {}).items():
        description, fits = EXAMPLE_GROUPS[kind]
        matching = [entry for entry in entries if fits(min(entry["ranks"].values()), max(entry["ranks"].values()))]
        groups += [(kind, description, matching)] if matching else []
    return groups


def foils_note(report: dict[str, Any]) -> str:
    """Where the twins of a report's minimal pairs come from: each of its sets in a sentence."""
    # Reports from before it was written down: what the plan drew itself is known, and nothing else.
    is_drawn = report["data"].get("drawn", bool(report["plan"].get("scenes")) and not report["plan"].get("data"))
    sentences = []
    for name in report["results"]["composition"]:
        if name != "this data":
            sentences.append(f"Those of {name} are read as they were published.")
        elif is_drawn:
            sentences.append("The twins are made from what was drawn.")
        else:
            sentences.append("The twins are made from captions by rule: a few of them are true all the same.")
    return " ".join(sentences)


def lookup(report: dict[str, Any], path: str) -> Any:
    """What stands at a place such as "results/variants/self/figures/rsum/value". Raises KeyError, IndexError."""
    node: Any = report
    for key in path.split("/"):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


class Claim:
    """A sentence in the making: `number` reads a figure, writes it down, and gives it as it is shown."""

    def __init__(self, report: dict[str, Any], topic: str) -> None:
        self.report, self.topic = report, topic
        self.citations: list[dict[str, str]] = []
        self.text = ""

    def cite(self, path: str, form: str = "", factor: float = 1.0) -> str:
        """The figure at `path`, formatted: with one decimal, or as many as it takes to be told from zero."""
        value = lookup(self.report, path) * factor
        form = form or decimal_format(value)
        text = format(round(value) if form.endswith("d") else value, form)
        self.citations.append({"path": path, "shown": text, "form": form, "factor": str(factor)})
        return text

    def cite_count(self, path: str) -> str:
        """How many entries the list at `path` has."""
        text = str(len(lookup(self.report, path)))
        self.citations.append({"path": path, "shown": text, "form": "count", "factor": "1"})
        return text

    def cite_with_noun(self, path: str, noun: str) -> str:
        """The whole number at `path`, or how many entries the list there has, with its noun: "1 image", "2 images"."""
        value = lookup(self.report, path)
        text = self.cite_count(path) if isinstance(value, list) else self.cite(path, ",d")
        return f"{text} {noun if text == '1' else plural(noun)}"

    def cite_interval(self, path: str, sign: float = 1.0) -> str:
        """Value and 95% interval of an estimate, where it has one; with its sign changed where `sign` is -1."""
        if lookup(self.report, path)["low"] is None:
            return f"{self.cite(f'{path}/value', factor=sign)} (no interval)"
        low, high = ("low", "high") if sign > 0 else ("high", "low")
        value, low, high = (self.cite(f"{path}/{end}", factor=sign) for end in ("value", low, high))
        return f"{value} [{low}, {high}]"

    def cite_p_value(self, path: str) -> str:
        """A p value, with as many digits as tell on which side of the level it is."""
        return self.cite(path, p_value_format(lookup(self.report, path), CLAIM_LEVEL))

    def to_dict(self) -> dict[str, Any]:
        return {"about": self.topic, "text": self.text, "figures": self.citations}


def report_claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary of a report."""
    claims: list[Claim] = []
    for build_claims in (
        _primary_claims,
        _controls,
        _best_claims,
        _difference_claims,
        _gain_claims,
        _length_claims,
        _composition_claims,
        _cost_claims,
        _search_claims,
        _equal_caption_claims,
        _truncation_claims,
        _audit_claims,
        _missing_claims,
    ):
        claims += build_claims(report)
    return [claim.to_dict() for claim in claims]


# --- what was found --------------------------------------------------------------------------------------------------


def _primary_claims(report: dict[str, Any]) -> list[Claim]:
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
    lead = f"Named beforehand ({directed_metric_label(metric)}, {_code(a)} against {_code(b)}{passes})"
    if primary is None:
        missing = [name for name in (a, b) if name not in report["results"]["variants"]]
        has = "has" if len(missing) == 1 else "have"
        reason = f"{_list_names(missing)} {has} no result" if missing else "they have no seed in common"
        claim.text = f"{lead}: not compared, as {reason}."
        return [claim]
    index, row = primary
    path = f"results/differences/{index}"
    better, _, sign = _order_pair(row)
    seeds_text = f"over {claim.cite_count(f'{path}/seeds')} seeds" if len(row.get("seeds", [])) > 1 else "with one seed"
    if row["p"] is None:
        claim.text = (
            f"{lead}: not tested, as there are too few {drawn_units(report)}; {_lead_text(claim, path, row)} "
            f"{seeds_text}."
        )
    elif row["shown"]:
        claim.text = (
            f"{lead}: {_code(better)} is ahead by {claim.cite_interval(path, sign)} {seeds_text}, p = "
            f"{claim.cite_p_value(f'{path}/p')}, "
            "tested alone: the difference is shown."
        )
    else:
        claim.text = (
            f"{lead}: no difference is shown; {_lead_text(claim, path, row)} {seeds_text}, p = "
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


def _controls(report: dict[str, Any]) -> list[Claim]:
    """Variants that repeat another on purpose: what a test finds between the two is its error."""
    claims = []
    for name, variant in report["plan"]["variants"].items():
        if repeated := variant.get("same_as"):
            claim = Claim(report, "accuracy")
            what = f"{_code(name)} has all settings of {_code(repeated)}, as a control"
            claim.text = f"{what}: what differs between them is chance"
            rows = [
                (f"results/differences/{row_index}", row)
                for row_index, row in enumerate(report["results"]["differences"])
                if {row["a"], row["b"]} == {name, repeated} and row["shown"]
            ]
            if rows:
                path, row = rows[0]
                claim.text += (
                    f", though {_lead_text(claim, path, row)} ({directed_metric_label(row['figure'])}) is called "
                    "a difference"
                )
            claim.text += "."
            claims.append(claim)
    return claims


def _search_claims(report: dict[str, Any]) -> list[Claim]:
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


def drawn_units(report: dict[str, Any]) -> str:
    """What is drawn at random beside the seeds: images, or identities where images are of some."""
    return "identities" if "identities" in report["results"] else "images"


def identities_told(claim: Claim) -> str:
    """How many identities the images are of; "" where they are of none."""
    return claim.cite_with_noun("results/identities", "identity") if "identities" in claim.report["results"] else ""


def _best_claims(report: dict[str, Any]) -> list[Claim]:
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
    on = f"{images} of {of_identities}" if (of_identities := identities_told(claim)) else images
    context = f"({', '.join([*details, f'on {on} and {captions}'])})"
    if len(best) > 1:
        every = "All variants" if not lacking else f"{'Both' if len(best) == 2 else 'All'} that have results"
        names_text = every if len(best) == len(variants) else _list_names(best)
        height = "the same rsum" if len(best) == len(variants) else f"the same rsum, the highest{lacking}"
        claim.text = f"{names_text} have {height}, {claim.cite(f'{path}/figures/rsum/value')} {context}."
        return [claim]

    def recall(name: str) -> str:
        chance = f" (chance {claim.cite(f'results/chance/{name}')})" if report["results"].get("chance") else ""
        return f"{directed_metric_label(name)} {claim.cite(f'{path}/figures/{name}/value')} %{chance}"

    recalls = ", ".join(recall(name) for name in ("image_to_text recall_at_1", "text_to_image recall_at_1"))
    has = f"has the highest rsum{lacking}" if len(variants) > 1 else "has an rsum of"
    comma = "," if len(variants) > 1 else ""
    claim.text = f"{_code(best[0])} {has}{comma} {claim.cite_interval(f'{path}/figures/rsum')} {context}: {recalls}."
    return [claim]


#: Figures that are nearer to each other than this are equal: what is between them is rounding.
EQUALITY_TOLERANCE = 1e-6


def _difference_claims(report: dict[str, Any]) -> list[Claim]:
    rows = report["results"]["differences"]
    of_rsum = [index for index, row in enumerate(rows) if row["figure"] == "rsum"]
    # The one that was named beforehand has a sentence of its own.
    indices = [index for index in of_rsum if not rows[index].get("primary")]
    significant = [index for index in indices if rows[index]["shown"]]
    claims = []
    for index in sorted(significant, key=lambda row_index: -abs(rows[row_index]["value"])):
        claim = Claim(report, "accuracy")
        better, worse, sign = _order_pair(rows[index])
        claim.text = (
            f"{_code(better)} finds more than {_code(worse)}: "
            f"{claim.cite_interval(f'results/differences/{index}', sign)} in "
            f"rsum (p = {claim.cite_p_value(f'results/differences/{index}/p_holm')} after Holm's correction)."
        )
        claims.append(claim)
    rest = [index for index in indices if rows[index]["p"] is not None and index not in significant]
    if rest:
        claim = Claim(report, "accuracy")
        largest = max(rest, key=lambda row_index: abs(rows[row_index]["value"]))
        path = f"results/differences/{largest}"
        # What was named beforehand has been told, whether it was shown or not.
        other_word = "other " if significant or len(indices) < len(of_rsum) else ""
        lead = "" if len(rest) == 1 else "the largest, "
        claim.text = (
            f"No {other_word}difference in rsum was shown: {lead}{_lead_text(claim, path, rows[largest])} "
            f"(p = {claim.cite_p_value(f'{path}/p_holm')} after Holm's correction)."
        )
        claims.append(claim)
    for index in indices:
        if rows[index]["p"] is None:
            claim = Claim(report, "accuracy")
            claim.text = (
                f"{_lead_text(claim, f'results/differences/{index}', rows[index])} in rsum, not tested: the "
                f"gallery has too few {drawn_units(report)} to tell it from chance."
            )
            claims.append(claim)
    return claims + _seed_claims(report)


def _seed_claims(report: dict[str, Any]) -> list[Claim]:
    """What the number of seeds does to the comparisons, and which seeds were compared with none."""
    results = report["results"]
    rows = [row for row in results["differences"] if row["figure"] == "rsum" and row["p"] is not None]
    paired = [row["seeds"] for row in rows if "seeds" in row]
    ones = sum(len(seeds) == 1 for seeds in paired)
    claims = []
    if ones:
        claim = Claim(report, "accuracy")
        lead = "The difference is" if len(paired) == 1 else "One difference is" if ones == 1 else "Some differences are"
        lead = "The differences are" if ones == len(paired) > 1 else lead
        interval_text = "its interval" if lead.endswith("is") else "their intervals"
        claim.text = (
            f"{lead} of one seed, {interval_text} and p of the {drawn_units(report)} only: another seed may "
            "give another "
            "difference."
        )
        claims.append(claim)
    of_two = [row for row in rows if len(row.get("seeds", ())) == 2]
    wide = [row for row in of_two if two_seeds_widen(row)]
    if wide:
        claim = Claim(report, "accuracy")
        pairs = " or ".join(f"between {_code(row['a'])} and {_code(row['b'])}" for row in wide)
        where = "" if len(wide) == len(of_two) else f" {pairs}"
        claim.text = (
            f"Two seeds leave one degree of freedom: only differences{where} that are many times their standard error "
            "can be shown. A third seed makes the intervals up to three times as narrow."
        )
        claims.append(claim)
    for unpaired_row in results.get("unpaired", []):
        claim = Claim(report, "accuracy")
        seeds_text = _list_names(
            [f"{_code(unpaired_row[side])} seed {seed}" for side in ("a", "b") for seed in unpaired_row[f"only_{side}"]]
        )
        names_text = f"{_code(unpaired_row['a'])} and {_code(unpaired_row['b'])}"
        if unpaired_row["paired"]:
            claim.text = f"{names_text} are compared on the seeds that both have: left out is {seeds_text}."
        else:
            claim.text = f"{names_text} are not compared, as they have no seed in common: {seeds_text}."
        claims.append(claim)
    return claims


def _order_pair(row: dict[str, Any]) -> tuple[str, str, float]:
    return (row["a"], row["b"], 1.0) if row["value"] >= 0 else (row["b"], row["a"], -1.0)


def _lead_text(claim: Claim, path: str, row: dict[str, Any]) -> str:
    """By how much the one of two is over the other; none is where they are equal."""
    better, worse, sign = _order_pair(row)
    if abs(row["value"]) < EQUALITY_TOLERANCE:
        return f"{claim.cite_interval(path)} between {_code(better)} and {_code(worse)}"
    return f"{_code(better)} over {_code(worse)} by {claim.cite_interval(path, sign)}"


def _gain_claims(report: dict[str, Any]) -> list[Claim]:
    claims = []
    for name, variant in report["results"]["variants"].items():
        if "gain" not in variant:
            continue
        claim = Claim(report, "accuracy")
        gain_text = describe_rerank_gain(variant["gain"], partial(claim.cite_interval, f"results/variants/{name}/gain"))
        claim.text = f"Re-ranking by {_code(name)} {gain_text}."
        claims.append(claim)
    return claims


def _length_claims(report: dict[str, Any]) -> list[Claim]:
    rows = report["results"]["by_length_differences"]
    word_spans = report["results"]["lengths"]["words"]
    if not rows or len(word_spans) < 2:
        return []
    claims = []
    for index, row in enumerate(rows):
        if row["shown"]:
            claim = Claim(report, "length")
            better, worse, sign = _order_pair(row)
            claim.text = (
                f"By {row['third']} captions ({_tercile_span(claim, row['third'])}) {_code(better)} finds "
                "more images than "
                f"{_code(worse)}: {claim.cite_interval(f'results/by_length_differences/{index}', sign)} points of R@5."
            )
            claims.append(claim)
    significant = {row["third"] for row in rows if row["shown"]}
    tested = {row["third"] for row in rows if row["p"] is not None}
    for terciles, statement in (
        (tested - significant, "no difference in R@5 was shown"),
        (set(word_spans) - tested, f"differences were not tested, for too few {drawn_units(report)}"),
    ):
        if terciles:
            claim = Claim(report, "length")
            spans = [(tercile, _tercile_span(claim, tercile)) for tercile in word_spans if tercile in terciles]
            tercile_list = _join_words([f"{tercile} ({span})" for tercile, span in spans]) + " captions"
            claim.text = f"By {tercile_list if len(spans) > 1 else '{} captions ({})'.format(*spans[0])} {statement}."
            claims.append(claim)
    claim = Claim(report, "length")
    claim.text = shared_lengths_told(claim)
    return [*claims, claim] if claim.text else claims


def shared_lengths(report: dict[str, Any]) -> list[str]:
    """Where captions of one length stand in two parts, the paths of those lengths: reports from before the parts were
    cut between two lengths dealt them by their order in the data."""
    words = report["results"]["lengths"]["words"]
    return [f"results/lengths/words/{a}/1" for a, b in pairwise(words) if words[a][1] >= words[b][0]]


def shared_lengths_told(claim: Claim) -> str:
    """What has to be known of parts of length that share one; "" where none do."""
    shared = shared_lengths(claim.report)
    if not shared:
        return ""
    lengths = _join_words([claim.cite(path, ",d") for path in shared])
    return (
        f"Captions of {lengths} words stand in two parts of length, dealt by their order in the data: differences "
        "between the parts are not of length alone."
    )


def _tercile_span(claim: Claim, tercile: str) -> str:
    path = f"results/lengths/words/{tercile}"
    low, high = lookup(claim.report, path)
    if low == high:
        return claim.cite_with_noun(f"{path}/0", "word")
    return f"{claim.cite(f'{path}/0', 'd')} to {claim.cite_with_noun(f'{path}/1', 'word')}"


def _composition_claims(report: dict[str, Any]) -> list[Claim]:
    claims = []
    for name, rows in report["results"]["composition"].items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            claim = Claim(report, "composition")
            indices = [index for index, row in enumerate(rows) if row["kind"] == kind]
            label = FOIL_LABELS.get(kind, kind.capitalize()) + ("" if name == "this data" else f" ({name})")
            claim.text = f"{label}: {_foil_statement(claim, name, kind, indices)}."
            claims.append(claim)
    return claims


def pairs_together(row: dict[str, Any]) -> bool:
    """Whether some of a row's pairs were drawn together, and count as one."""
    return (row.get("units") or row["pairs"]) < row["pairs"]


def _foil_statement(claim: Claim, name: str, kind: str, indices: list[int]) -> str:
    """Which variants tell true from twin, and the best of them; then whether words alone do."""
    path = f"results/composition/{name}"
    rows = lookup(claim.report, path)
    if all(rows[index]["p_holm"] is None for index in indices):
        first = f"{path}/{indices[0]}"
        pairs = claim.cite_with_noun(f"{first}/pairs", "pair")
        if pairs_together(lookup(claim.report, first)):
            return f"not tested, as too few of its {pairs} were drawn apart ({claim.cite(f'{first}/units', ',d')})"
        # Reports from before it was written down counted every pair.
        if lookup(claim.report, first).get("units", 0) is None:
            return f"not tested, as it is not known which of its {pairs} are of one image"
        return f"not tested, as there are too few pairs ({pairs})"
    above = [index for index in indices if _is_significant(rows[index]) and rows[index]["value"] > 50]
    highest = max(rows[index]["value"] for index in indices)
    best = [index for index in indices if abs(rows[index]["value"] - highest) < EQUALITY_TOLERANCE]
    if len(indices) == 1:
        who, best_of_all = f"{_code(rows[best[0]]['variant'])} {'told' if above else 'was not shown to tell'}", ""
    else:
        who = _list_names([rows[p]["variant"] for p in above]) + " told" if above else "no variant was shown to tell"
        alike = len(best) == len(indices)
        best_of_all = f"; the best, {'all alike' if alike else _list_names([rows[p]['variant'] for p in best])}"
    value_text = claim.cite_interval(f"{path}/{best[0]}") if len(best) == 1 else claim.cite(f"{path}/{best[0]}/value")
    statement = f"{who} true from twin above chance{best_of_all}{',' if best_of_all else ':'} {value_text} %"
    controls = {row["kind"]: index for index, row in enumerate(claim.report["text_only"].get(name, []))}
    if kind not in controls:
        return statement
    baseline_path = f"text_only/{name}/{controls[kind]}"
    statement += f". A language model that sees no image: {claim.cite_interval(baseline_path)} %"
    if above and (lookup(claim.report, baseline_path)["low"] or 0) > 50:
        statement += ", so that the words alone give part of it away"
    return statement


# --- what it costs ---------------------------------------------------------------------------------------------------


def _cost_claims(report: dict[str, Any]) -> list[Claim]:
    """Time, memory and storage of the variants, compared where they were measured often enough to tell."""
    claims = []
    for cost in COST_METRICS:
        names = [name for name, each in report["cost"].items() if cost.value(each) is not None]
        if names and cost.sentence_start:
            claim = Claim(report, "cost")
            claim.text = _cost_statement(claim, cost, names)
            without = [name for name in report["cost"] if name not in names]
            if without:
                claim.text += f" Of {_list_names(without)} it was not measured."
            claims.append(claim)
    return claims


def _cost_statement(claim: Claim, cost: CostMetric, names: Sequence[str]) -> str:
    costs = claim.report["cost"]
    values = {name: cost.value(costs[name]) for name in names}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)

    def number(name: str) -> str:
        return claim.cite(f"cost/{name}/{cost.path}", cost.number_format(values[name]))

    if len(names) == 1:
        return f"{cost.sentence_start} {number(low)} {cost.unit} with {_code(low)}."
    if len({format(values[end], cost.number_format(values[end])) for end in (low, high)}) == 1:
        variants = "every variant" if len(names) == len(claim.report["plan"]["variants"]) else _list_names(names)
        return f"{cost.sentence_start} {number(low)} {cost.unit} with {variants}."
    reason = "" if cost.exact else no_comparison_reason(costs, names, cost)
    if not reason:
        if not cost.exact:
            low, high = most_different_pair(costs, names, cost)
        ends = [(number(end), [name for name in names if values[name] == values[end]]) for end in (low, high)]
        values_text = " and ".join(f"{value} {cost.unit} with {_list_names(variants)}" for value, variants in ends)
        return f"{cost.sentence_start} {values_text}."
    span = f"{cost.sentence_start} {number(low)} to {number(high)} {cost.unit}"
    return f"{span}: {reason}." if reason == WITHIN_SPREAD else f"{span}: {reason}, so that none is shown to take less."


# --- whether to believe it -------------------------------------------------------------------------------------------


def _equal_caption_claims(report: dict[str, Any]) -> list[Claim]:
    # Reports from before they were counted have none.
    equal = report["data"].get("equal_captions")
    if not equal or not equal["cost"]:
        return []
    claim = Claim(report, "belief")
    path = "data/equal_captions"
    captions, texts, images = (claim.cite_with_noun(f"{path}/{noun}s", noun) for noun in ("caption", "text", "image"))
    best, cost = claim.cite(f"{path}/best_rsum"), claim.cite(f"{path}/cost")
    claim.text = f"{describe_equal_captions(captions, texts, images, best, cost, '`identity: caption` in the plan')}."
    return [claim]


def _truncation_claims(report: dict[str, Any]) -> list[Claim]:
    claims = []
    for name, truncation in report.get("cut_captions", {}).items():
        cut = {split: counts for split, counts in truncation["splits"].items() if counts["cut"]}
        if not cut:
            continue
        claim = Claim(report, "belief")
        path = f"cut_captions/{name}"
        limit = claim.cite_with_noun(f"{path}/max_tokens", "token")
        split_counts = ", ".join(
            f"{claim.cite(f'{path}/splits/{split}/cut', ',d')} of the {split} split "
            f"({claim.cite(f'{path}/splits/{split}/share', factor=100.0)} %)"
            for split in cut
        )
        claim.text = f"{_code(name)} reads the first {limit} of a caption; longer ones, which are cut: {split_counts}."
        claims.append(claim)
    return claims


def _audit_claims(report: dict[str, Any]) -> list[Claim]:
    claim = Claim(report, "belief")
    refused, failed = report["results"]["refused"], report["failed"]
    variants = report["results"]["variants"]
    runs = sum(len(variant["runs"]) for variant in variants.values())
    sentences = ["No run has a result." if not runs else "The one run in the results passed its audit."]
    if runs > 1:
        sentences = ["Every run in the results passed its audit."]
    if refused:
        sentences.append(f"Refused, as the audit failed: {_list_names([_trial_name(row) for row in refused])}.")
    if failed:
        sentences.append(f"Failed, and in no figure: {_list_names([_trial_name(row) for row in failed])}.")
    if any(len(variant["seeds"]) == 1 for variant in variants.values()):
        sentences.append("A variant of one seed tells nothing of what another seed would have given.")
    claim.text = " ".join(sentences)
    return [claim]


def _missing_claims(report: dict[str, Any]) -> list[Claim]:
    """What is not there that the plan asks for, beside what failed or was refused."""
    trials = trials_without_results(report)
    sentences = [
        f"{intro}: {_list_names([_trial_name(trial) for trial in trials if trial['state'] == state])}."
        for state, intro in STATE_SENTENCES.items()
        if any(trial["state"] == state for trial in trials)
    ]
    parts = list(dict.fromkeys(gap["part"] for gap in missing_parts(report)))
    if parts:
        sentences.append(f"Not made, or not for all: {_join_words(parts)}.")
    if not sentences:
        return []
    claim = Claim(report, "belief")
    claim.text = " ".join([*sentences, "The table below has the reasons."])
    return [claim]


#: How the summary tells of cells that have no figures and did not fail.
STATE_SENTENCES = {
    UNFINISHED: "Stopped in its training, and in no figure",
    NOT_MEASURED: "Trained, but not measured, and in no figure",
    NOT_TRAINED: "Not begun",
}


def _is_significant(row: dict[str, Any]) -> bool:
    """Whether a row's corrected p, where it was tested, is below 5%."""
    return row["p_holm"] is not None and row["p_holm"] < CLAIM_LEVEL


def _trial_name(row: dict[str, Any]) -> str:
    return f"{_code(row['variant'])} seed {row['seed']}"


def _code(name: str) -> str:
    return f"`{name}`"


def _list_names(names: Sequence[str]) -> str:
    """Names of variants, or of runs, as a list in words."""
    return _join_words([name if "`" in name else _code(name) for name in names])


def _join_words(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def numbers_in(text: str) -> list[str]:
    """Every number that a sentence shows, names such as `late-2` and R@1 left out."""
    bare = re.sub(r"`[^`]*`|R@\d+|seed \d+|1,000 pairs", " ", text)
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", bare)
