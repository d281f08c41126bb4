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
from clipvisionalign.retrieval.equal_captions import equal_captions_told
from clipvisionalign.retrieval.metrics import RECALL_AT, gain_told
from clipvisionalign.study.costs import COSTS, WITHIN_SPREAD, Cost, furthest_apart, not_compared
from clipvisionalign.study.gaps import NOT_MEASURED, NOT_TRAINED, UNFINISHED, not_made, without_results
from clipvisionalign.study.primary import primary_of
from clipvisionalign.study.results import both_ways
from clipvisionalign.study.significant import decimal, p_value_form
from clipvisionalign.study.statistics import two_seeds_widen

LEVEL = 0.05

#: What is done to a caption to make its twin.
KINDS = {
    "relation": "Relations swapped",
    "attribute": "Attributes swapped",
    "count": "Counts changed",
    "negation": "Negated",
}

#: An image of a lower rank than this was missed: no recall that is measured counts it.
MISSED_BEYOND = max(RECALL_AT)

#: The groups of examples: what they have in common, and whether the lowest and the highest rank of an image in all
#: variants are so.
EXAMPLES: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "found by all": ("first in every variant", lambda low, high: high == 1),
    "found by none": (f"not within the first {MISSED_BEYOND} of any variant", lambda low, high: low > MISSED_BEYOND),
    "where they disagree": (
        f"first in one variant, and not within the first {MISSED_BEYOND} of another",
        lambda low, high: low == 1 and high > MISSED_BEYOND,
    ),
}


def examples_shown(report: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The groups of a report's examples that hold some: name, what they have in common, and those that are so. Reports
    from before there was a rule hold the best and the worst, whatever their ranks."""
    found = []
    for kind, several in report["examples"].get("groups", {}).items():
        told, fits = EXAMPLES[kind]
        kept = [one for one in several if fits(min(one["ranks"].values()), max(one["ranks"].values()))]
        found += [(kind, told, kept)] if kept else []
    return found


def twins_told(report: dict[str, Any]) -> str:
    """Where the twins of a report's minimal pairs come from: each of its sets in a sentence."""
    # Reports from before it was written down: what the plan drew itself is known, and nothing else.
    drawn = report["data"].get("drawn", bool(report["plan"].get("scenes")) and not report["plan"].get("data"))
    told = []
    for name in report["results"]["composition"]:
        if name != "this data":
            told.append(f"Those of {name} are read as they were published.")
        elif drawn:
            told.append("The twins are made from what was drawn.")
        else:
            told.append("The twins are made from captions by rule: a few of them are true all the same.")
    return " ".join(told)


def at(report: dict[str, Any], path: str) -> Any:
    """What stands at a place such as "results/variants/self/figures/rsum/value". Raises KeyError, IndexError."""
    found: Any = report
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


class Claim:
    """A sentence in the making: `number` reads a figure, writes it down, and gives it as it is shown."""

    def __init__(self, report: dict[str, Any], about: str) -> None:
        self.report, self.about = report, about
        self.figures: list[dict[str, str]] = []
        self.text = ""

    def number(self, path: str, form: str = "", factor: float = 1.0) -> str:
        """The figure at `path`, formatted: with one decimal, or as many as it takes to be told from zero."""
        value = at(self.report, path) * factor
        form = form or decimal(value)
        shown = format(round(value) if form.endswith("d") else value, form)
        self.figures.append({"path": path, "shown": shown, "form": form, "factor": str(factor)})
        return shown

    def count(self, path: str) -> str:
        """How many entries the list at `path` has."""
        shown = str(len(at(self.report, path)))
        self.figures.append({"path": path, "shown": shown, "form": "count", "factor": "1"})
        return shown

    def of(self, path: str, noun: str) -> str:
        """The whole number at `path`, or how many entries the list there has, with its noun: "1 image", "2 images"."""
        found = at(self.report, path)
        shown = self.count(path) if isinstance(found, list) else self.number(path, ",d")
        return f"{shown} {noun if shown == '1' else plural(noun)}"

    def interval(self, path: str, sign: float = 1.0) -> str:
        """Value and 95% interval of an estimate, where it has one; with its sign changed where `sign` is -1."""
        if at(self.report, path)["low"] is None:
            return f"{self.number(f'{path}/value', factor=sign)} (no interval)"
        low, high = ("low", "high") if sign > 0 else ("high", "low")
        value, low, high = (self.number(f"{path}/{part}", factor=sign) for part in ("value", low, high))
        return f"{value} [{low}, {high}]"

    def p(self, path: str) -> str:
        """A p value, with as many digits as tell on which side of the level it is."""
        return self.number(path, p_value_form(at(self.report, path), LEVEL))

    def to_dict(self) -> dict[str, Any]:
        return {"about": self.about, "text": self.text, "figures": self.figures}


def claims_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary of a report."""
    found: list[Claim] = []
    for part in (
        _named,
        _controls,
        _found_most,
        _differences,
        _gains,
        _lengths,
        _composition,
        _costs,
        _search,
        _equal_captions,
        _cut_captions,
        _believed,
        _missing,
    ):
        found += part(report)
    return [claim.to_dict() for claim in found]


# --- what was found --------------------------------------------------------------------------------------------------


def _named(report: dict[str, Any]) -> list[Claim]:
    """The comparison that the study was made for."""
    named, asked = primary_of(report), report["plan"].get("compare") or {}
    if named is None and not asked.get("a"):
        return []
    claim = Claim(report, "accuracy")
    a, b, figure = (
        (asked["a"], asked["b"], asked["figure"]) if named is None else (named[1][k] for k in ("a", "b", "figure"))
    )
    passes = ", equal passes" if asked.get("passes") == "equal" else ""
    steps_at = _steps_at(report)
    steps = [at(report, steps_at(name)) if steps_at(name) else {} for name in (a, b)]
    each = [count for some in steps for count in some.get("each", [some.get("mean")])]
    if passes and (not all(steps) or len(set(each)) > 1):
        # One that stops early has made fewer; how many those made is not known of all.
        passes = ", equal passes planned"
        if all(steps):
            shown = (claim.number(f"{steps_at(name)}/mean", ",.0f") for name in (a, b))
            on = " on average" if any(len(set(some.get("each", []))) > 1 for some in steps) else ""
            passes += f", {' and '.join(shown)} steps trained{on}"
    what = f"Named beforehand ({both_ways(figure)}, {_code(a)} against {_code(b)}{passes})"
    if named is None:
        missing = [name for name in (a, b) if name not in report["results"]["variants"]]
        has = "has" if len(missing) == 1 else "have"
        why = f"{_listed(missing)} {has} no result" if missing else "they have no seed in common"
        claim.text = f"{what}: not compared, as {why}."
        return [claim]
    place, row = named
    path = f"results/differences/{place}"
    more, _, sign = _ordered(row)
    of = f"over {claim.count(f'{path}/seeds')} seeds" if len(row.get("seeds", [])) > 1 else "with one seed"
    if row["p"] is None:
        claim.text = f"{what}: not tested, as there are too few {drawn_units(report)}; {_lead(claim, path, row)} {of}."
    elif row["shown"]:
        claim.text = (
            f"{what}: {_code(more)} is ahead by {claim.interval(path, sign)} {of}, p = {claim.p(f'{path}/p')}, "
            "tested alone: the difference is shown."
        )
    else:
        claim.text = (
            f"{what}: no difference is shown; {_lead(claim, path, row)} {of}, p = {claim.p(f'{path}/p')}, tested alone."
        )
    return [claim]


def _steps_at(report: dict[str, Any]) -> Callable[[str], str]:
    """Where the steps of a variant's training stand; "" where they are not known. Reports from before they had a place
    of their own have them with what was measured of cost."""

    def place(name: str) -> str:
        if (report.get("training_steps") or {}).get(name):
            return f"training_steps/{name}"
        return f"cost/{name}/training_steps" if (report["cost"].get(name) or {}).get("training_steps") else ""

    return place


def _controls(report: dict[str, Any]) -> list[Claim]:
    """Variants that repeat another on purpose: what a test finds between the two is its error."""
    found = []
    for name, variant in report["plan"]["variants"].items():
        if repeated := variant.get("same_as"):
            claim = Claim(report, "accuracy")
            what = f"{_code(name)} has all settings of {_code(repeated)}, as a control"
            claim.text = f"{what}: what differs between them is chance"
            rows = [
                (f"results/differences/{place}", row)
                for place, row in enumerate(report["results"]["differences"])
                if {row["a"], row["b"]} == {name, repeated} and row["shown"]
            ]
            if rows:
                path, row = rows[0]
                claim.text += f", though {_lead(claim, path, row)} ({both_ways(row['figure'])}) is called a difference"
            claim.text += "."
            found.append(claim)
    return found


def _search(report: dict[str, Any]) -> list[Claim]:
    """What a search finds of what it is asked for, where that was counted."""
    if "search" not in report:
        return []
    claim = Claim(report, "search")
    claim.text = (
        f"A search of {claim.of('search/gallery', 'image')} that were never trained on, for two things at a time: "
        f"{claim.number('search/share')} % of the first {claim.of('search/first', 'answer')}, or of as many as there "
        f"are, hold both; by chance {claim.number('search/chance')} % ({claim.of('search/queries', 'query')})."
    )
    return [claim]


def drawn_units(report: dict[str, Any]) -> str:
    """What is drawn at random beside the seeds: images, or identities where images are of some."""
    return "identities" if "identities" in report["results"] else "images"


def identities_told(claim: Claim) -> str:
    """How many identities the images are of; "" where they are of none."""
    return claim.of("results/identities", "identity") if "identities" in claim.report["results"] else ""


def _found_most(report: dict[str, Any]) -> list[Claim]:
    variants = report["results"]["variants"]
    if not variants:
        return []
    rsum = {name: found["figures"]["rsum"]["value"] for name, found in variants.items()}
    best = [name for name, value in rsum.items() if abs(value - max(rsum.values())) < SAME]
    lacking = " of those that have results" if len(variants) < len(report["plan"]["variants"]) else ""
    claim = Claim(report, "accuracy")
    path, unit = f"results/variants/{best[0]}", drawn_units(report)
    about = []
    if report["results"].get("chance"):
        about.append(f"chance {claim.number('results/chance/rsum')}")
    seeds = {len(variants[name]["seeds"]) for name in best}
    has_interval = len(best) == 1 and variants[best[0]]["figures"]["rsum"]["low"] is not None
    if seeds == {1}:
        about.append("of one seed" + (f", its interval of the {unit} only" if has_interval else ""))
    elif len(seeds) == 1:
        of = (
            f" out of {claim.count('plan/seeds')}"
            if len(variants[best[0]]["seeds"]) < len(report["plan"]["seeds"])
            else ""
        )
        about.append(f"mean of {claim.count(f'{path}/seeds')} seeds{of}")
    images, captions = (claim.of(f"results/gallery/{kind}s", kind) for kind in ("image", "caption"))
    on = f"{images} of {of_identities}" if (of_identities := identities_told(claim)) else images
    told = f"({', '.join([*about, f'on {on} and {captions}'])})"
    if len(best) > 1:
        every = "All variants" if not lacking else f"{'Both' if len(best) == 2 else 'All'} that have results"
        whose = every if len(best) == len(variants) else _listed(best)
        height = "the same rsum" if len(best) == len(variants) else f"the same rsum, the highest{lacking}"
        claim.text = f"{whose} have {height}, {claim.number(f'{path}/figures/rsum/value')} {told}."
        return [claim]

    def recall(name: str) -> str:
        chance = f" (chance {claim.number(f'results/chance/{name}')})" if report["results"].get("chance") else ""
        return f"{both_ways(name)} {claim.number(f'{path}/figures/{name}/value')} %{chance}"

    recalls = ", ".join(recall(name) for name in ("image_to_text recall_at_1", "text_to_image recall_at_1"))
    has = f"has the highest rsum{lacking}" if len(variants) > 1 else "has an rsum of"
    comma = "," if len(variants) > 1 else ""
    claim.text = f"{_code(best[0])} {has}{comma} {claim.interval(f'{path}/figures/rsum')} {told}: {recalls}."
    return [claim]


#: Figures that are nearer to each other than this are equal: what is between them is rounding.
SAME = 1e-6


def _differences(report: dict[str, Any]) -> list[Claim]:
    rows = report["results"]["differences"]
    of_rsum = [place for place, row in enumerate(rows) if row["figure"] == "rsum"]
    # The one that was named beforehand has a sentence of its own.
    places = [place for place in of_rsum if not rows[place].get("primary")]
    shown = [place for place in places if rows[place]["shown"]]
    found = []
    for place in sorted(shown, key=lambda place: -abs(rows[place]["value"])):
        claim = Claim(report, "accuracy")
        more, less, sign = _ordered(rows[place])
        claim.text = (
            f"{_code(more)} finds more than {_code(less)}: {claim.interval(f'results/differences/{place}', sign)} in "
            f"rsum (p = {claim.p(f'results/differences/{place}/p_holm')} after Holm's correction)."
        )
        found.append(claim)
    rest = [place for place in places if rows[place]["p"] is not None and place not in shown]
    if rest:
        claim = Claim(report, "accuracy")
        largest = max(rest, key=lambda place: abs(rows[place]["value"]))
        path = f"results/differences/{largest}"
        # What was named beforehand has been told, whether it was shown or not.
        other = "other " if shown or len(places) < len(of_rsum) else ""
        which = "" if len(rest) == 1 else "the largest, "
        claim.text = (
            f"No {other}difference in rsum was shown: {which}{_lead(claim, path, rows[largest])} "
            f"(p = {claim.p(f'{path}/p_holm')} after Holm's correction)."
        )
        found.append(claim)
    for place in places:
        if rows[place]["p"] is None:
            claim = Claim(report, "accuracy")
            claim.text = (
                f"{_lead(claim, f'results/differences/{place}', rows[place])} in rsum, not tested: the "
                f"gallery has too few {drawn_units(report)} to tell it from chance."
            )
            found.append(claim)
    return found + _seeds(report)


def _seeds(report: dict[str, Any]) -> list[Claim]:
    """What the number of seeds does to the comparisons, and which seeds were compared with none."""
    results = report["results"]
    rows = [row for row in results["differences"] if row["figure"] == "rsum" and row["p"] is not None]
    paired = [row["seeds"] for row in rows if "seeds" in row]
    ones = sum(len(seeds) == 1 for seeds in paired)
    found = []
    if ones:
        claim = Claim(report, "accuracy")
        which = (
            "The difference is" if len(paired) == 1 else "One difference is" if ones == 1 else "Some differences are"
        )
        which = "The differences are" if ones == len(paired) > 1 else which
        whose = "its interval" if which.endswith("is") else "their intervals"
        claim.text = (
            f"{which} of one seed, {whose} and p of the {drawn_units(report)} only: another seed may give another "
            "difference."
        )
        found.append(claim)
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
        found.append(claim)
    for left in results.get("unpaired", []):
        claim = Claim(report, "accuracy")
        told = _listed([f"{_code(left[one])} seed {seed}" for one in ("a", "b") for seed in left[f"only_{one}"]])
        pair = f"{_code(left['a'])} and {_code(left['b'])}"
        if left["paired"]:
            claim.text = f"{pair} are compared on the seeds that both have: left out is {told}."
        else:
            claim.text = f"{pair} are not compared, as they have no seed in common: {told}."
        found.append(claim)
    return found


def _ordered(row: dict[str, Any]) -> tuple[str, str, float]:
    return (row["a"], row["b"], 1.0) if row["value"] >= 0 else (row["b"], row["a"], -1.0)


def _lead(claim: Claim, path: str, row: dict[str, Any]) -> str:
    """By how much the one of two is over the other; none is where they are equal."""
    more, less, sign = _ordered(row)
    if abs(row["value"]) < SAME:
        return f"{claim.interval(path)} between {_code(more)} and {_code(less)}"
    return f"{_code(more)} over {_code(less)} by {claim.interval(path, sign)}"


def _gains(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, variant in report["results"]["variants"].items():
        if "gain" not in variant:
            continue
        claim = Claim(report, "accuracy")
        told = gain_told(variant["gain"], partial(claim.interval, f"results/variants/{name}/gain"))
        claim.text = f"Re-ranking by {_code(name)} {told}."
        found.append(claim)
    return found


def _lengths(report: dict[str, Any]) -> list[Claim]:
    rows = report["results"]["by_length_differences"]
    words = report["results"]["lengths"]["words"]
    if not rows or len(words) < 2:
        return []
    found = []
    for place, row in enumerate(rows):
        if row["shown"]:
            claim = Claim(report, "length")
            more, less, sign = _ordered(row)
            claim.text = (
                f"By {row['third']} captions ({_span(claim, row['third'])}) {_code(more)} finds more images than "
                f"{_code(less)}: {claim.interval(f'results/by_length_differences/{place}', sign)} points of R@5."
            )
            found.append(claim)
    shown = {row["third"] for row in rows if row["shown"]}
    tested = {row["third"] for row in rows if row["p"] is not None}
    for parts, told in (
        (tested - shown, "no difference in R@5 was shown"),
        (set(words) - tested, f"differences were not tested, for too few {drawn_units(report)}"),
    ):
        if parts:
            claim = Claim(report, "length")
            spans = [(third, _span(claim, third)) for third in words if third in parts]
            several = _joined([f"{third} ({span})" for third, span in spans]) + " captions"
            claim.text = f"By {several if len(spans) > 1 else '{} captions ({})'.format(*spans[0])} {told}."
            found.append(claim)
    claim = Claim(report, "length")
    claim.text = shared_lengths_told(claim)
    return [*found, claim] if claim.text else found


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
    lengths = _joined([claim.number(path, ",d") for path in shared])
    return (
        f"Captions of {lengths} words stand in two parts of length, dealt by their order in the data: differences "
        "between the parts are not of length alone."
    )


def _span(claim: Claim, third: str) -> str:
    path = f"results/lengths/words/{third}"
    low, high = at(claim.report, path)
    if low == high:
        return claim.of(f"{path}/0", "word")
    return f"{claim.number(f'{path}/0', 'd')} to {claim.of(f'{path}/1', 'word')}"


def _composition(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, rows in report["results"]["composition"].items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            claim = Claim(report, "composition")
            places = [place for place, row in enumerate(rows) if row["kind"] == kind]
            what = KINDS.get(kind, kind.capitalize()) + ("" if name == "this data" else f" ({name})")
            claim.text = f"{what}: {_twins(claim, name, kind, places)}."
            found.append(claim)
    return found


def pairs_together(row: dict[str, Any]) -> bool:
    """Whether some of a row's pairs were drawn together, and count as one."""
    return (row.get("units") or row["pairs"]) < row["pairs"]


def _twins(claim: Claim, name: str, kind: str, places: list[int]) -> str:
    """Which variants tell true from twin, and the best of them; then whether words alone do."""
    path = f"results/composition/{name}"
    rows = at(claim.report, path)
    if all(rows[place]["p_holm"] is None for place in places):
        first = f"{path}/{places[0]}"
        pairs = claim.of(f"{first}/pairs", "pair")
        if pairs_together(at(claim.report, first)):
            return f"not tested, as too few of its {pairs} were drawn apart ({claim.number(f'{first}/units', ',d')})"
        # Reports from before it was written down counted every pair.
        if at(claim.report, first).get("units", 0) is None:
            return f"not tested, as it is not known which of its {pairs} are of one image"
        return f"not tested, as there are too few pairs ({pairs})"
    above = [place for place in places if _below_level(rows[place]) and rows[place]["value"] > 50]
    most = max(rows[place]["value"] for place in places)
    best = [place for place in places if abs(rows[place]["value"] - most) < SAME]
    if len(places) == 1:
        who, best_of_all = f"{_code(rows[best[0]]['variant'])} {'told' if above else 'was not shown to tell'}", ""
    else:
        who = _listed([rows[p]["variant"] for p in above]) + " told" if above else "no variant was shown to tell"
        alike = len(best) == len(places)
        best_of_all = f"; the best, {'all alike' if alike else _listed([rows[p]['variant'] for p in best])}"
    figure = claim.interval(f"{path}/{best[0]}") if len(best) == 1 else claim.number(f"{path}/{best[0]}/value")
    told = f"{who} true from twin above chance{best_of_all}{',' if best_of_all else ':'} {figure} %"
    controls = {row["kind"]: place for place, row in enumerate(claim.report["text_only"].get(name, []))}
    if kind not in controls:
        return told
    words = f"text_only/{name}/{controls[kind]}"
    told += f". A language model that sees no image: {claim.interval(words)} %"
    if above and (at(claim.report, words)["low"] or 0) > 50:
        told += ", so that the words alone give part of it away"
    return told


# --- what it costs ---------------------------------------------------------------------------------------------------


def _costs(report: dict[str, Any]) -> list[Claim]:
    """Time, memory and storage of the variants, compared where they were measured often enough to tell."""
    found = []
    for cost in COSTS:
        names = [name for name, each in report["cost"].items() if cost.value(each) is not None]
        if names and cost.told:
            claim = Claim(report, "cost")
            claim.text = _cost(claim, cost, names)
            without = [name for name in report["cost"] if name not in names]
            if without:
                claim.text += f" Of {_listed(without)} it was not measured."
            found.append(claim)
    return found


def _cost(claim: Claim, cost: Cost, names: Sequence[str]) -> str:
    costs = claim.report["cost"]
    values = {name: cost.value(costs[name]) for name in names}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)

    def number(name: str) -> str:
        return claim.number(f"cost/{name}/{cost.path}", cost.form(values[name]))

    if len(names) == 1:
        return f"{cost.told} {number(low)} {cost.unit} with {_code(low)}."
    if len({format(values[end], cost.form(values[end])) for end in (low, high)}) == 1:
        whose = "every variant" if len(names) == len(claim.report["plan"]["variants"]) else _listed(names)
        return f"{cost.told} {number(low)} {cost.unit} with {whose}."
    why = "" if cost.exact else not_compared(costs, names, cost)
    if not why:
        if not cost.exact:
            low, high = furthest_apart(costs, names, cost)
        ends = [(number(end), [name for name in names if values[name] == values[end]]) for end in (low, high)]
        return f"{cost.told} {' and '.join(f'{shown} {cost.unit} with {_listed(whose)}' for shown, whose in ends)}."
    span = f"{cost.told} {number(low)} to {number(high)} {cost.unit}"
    return f"{span}: {why}." if why == WITHIN_SPREAD else f"{span}: {why}, so that none is shown to take less."


# --- whether to believe it -------------------------------------------------------------------------------------------


def _equal_captions(report: dict[str, Any]) -> list[Claim]:
    # Reports from before they were counted have none.
    equal = report["data"].get("equal_captions")
    if not equal or not equal["cost"]:
        return []
    claim = Claim(report, "belief")
    path = "data/equal_captions"
    captions, texts, images = (claim.of(f"{path}/{noun}s", noun) for noun in ("caption", "text", "image"))
    best, cost = claim.number(f"{path}/best_rsum"), claim.number(f"{path}/cost")
    claim.text = f"{equal_captions_told(captions, texts, images, best, cost, '`identity: caption` in the plan')}."
    return [claim]


def _cut_captions(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, several in report.get("cut_captions", {}).items():
        cut = {split: counts for split, counts in several["splits"].items() if counts["cut"]}
        if not cut:
            continue
        claim = Claim(report, "belief")
        path = f"cut_captions/{name}"
        limit = claim.of(f"{path}/max_tokens", "token")
        told = ", ".join(
            f"{claim.number(f'{path}/splits/{split}/cut', ',d')} of the {split} split "
            f"({claim.number(f'{path}/splits/{split}/share', factor=100.0)} %)"
            for split in cut
        )
        claim.text = f"{_code(name)} reads the first {limit} of a caption; longer ones, which are cut: {told}."
        found.append(claim)
    return found


def _believed(report: dict[str, Any]) -> list[Claim]:
    claim = Claim(report, "belief")
    refused, failed = report["results"]["refused"], report["failed"]
    variants = report["results"]["variants"]
    runs = sum(len(variant["runs"]) for variant in variants.values())
    said = ["No run has a result." if not runs else "The one run in the results passed its audit."]
    if runs > 1:
        said = ["Every run in the results passed its audit."]
    if refused:
        said.append(f"Refused, as the audit failed: {_listed([_run(row) for row in refused])}.")
    if failed:
        said.append(f"Failed, and in no figure: {_listed([_run(row) for row in failed])}.")
    if any(len(variant["seeds"]) == 1 for variant in variants.values()):
        said.append("A variant of one seed tells nothing of what another seed would have given.")
    claim.text = " ".join(said)
    return [claim]


def _missing(report: dict[str, Any]) -> list[Claim]:
    """What is not there that the plan asks for, beside what failed or was refused."""
    cells = without_results(report)
    said = [f"{told}: {_listed([_run(cell) for cell in cells if cell['state'] == state])}."
            for state, told in STATES.items() if any(cell["state"] == state for cell in cells)]  # fmt: skip
    parts = list(dict.fromkeys(gap["part"] for gap in not_made(report)))
    if parts:
        said.append(f"Not made, or not for all: {_joined(parts)}.")
    if not said:
        return []
    claim = Claim(report, "belief")
    claim.text = " ".join([*said, "The table below has the reasons."])
    return [claim]


#: How the summary tells of cells that have no figures and did not fail.
STATES = {
    UNFINISHED: "Stopped in its training, and in no figure",
    NOT_MEASURED: "Trained, but not measured, and in no figure",
    NOT_TRAINED: "Not begun",
}


def _below_level(row: dict[str, Any]) -> bool:
    """Whether a row's corrected p, where it was tested, is below 5%."""
    return row["p_holm"] is not None and row["p_holm"] < LEVEL


def _run(row: dict[str, Any]) -> str:
    return f"{_code(row['variant'])} seed {row['seed']}"


def _code(name: str) -> str:
    return f"`{name}`"


def _listed(names: Sequence[str]) -> str:
    """Names of variants, or of runs, as a list in words."""
    return _joined([name if "`" in name else _code(name) for name in names])


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def numbers_in(text: str) -> list[str]:
    """Every number that a sentence shows, names such as `late-2` and R@1 left out."""
    bare = re.sub(r"`[^`]*`|R@\d+|seed \d+|1,000 pairs", " ", text)
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", bare)
