"""The summary of a report, in words that its figures carry: every number in a sentence is read from report.json.

A claim holds its text and the figures that it rests on, each with its place in report.json and as it is shown. "No
difference was shown" is said where that is so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from clipvisionalign.study.primary import primary_of
from clipvisionalign.study.results import both_ways
from clipvisionalign.study.significant import significant

LEVEL = 0.05

#: What is done to a caption to make its twin.
KINDS = {
    "relation": "Relations swapped",
    "attribute": "Attributes swapped",
    "count": "Counts changed",
    "negation": "Negated",
}


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

    def number(self, path: str, form: str = ".1f", factor: float = 1.0) -> str:
        """The figure at `path`, formatted."""
        value = at(self.report, path) * factor
        shown = format(round(value) if form.endswith("d") else value, form)
        self.figures.append({"path": path, "shown": shown, "form": form, "factor": str(factor)})
        return shown

    def count(self, path: str) -> str:
        """How many entries the list at `path` has."""
        shown = str(len(at(self.report, path)))
        self.figures.append({"path": path, "shown": shown, "form": "count", "factor": "1"})
        return shown

    def interval(self, path: str, form: str = ".1f") -> str:
        """Value and 95% interval of an estimate, where it has one."""
        if at(self.report, path)["low"] is None:
            return f"{self.number(f'{path}/value', form)} (no interval)"
        value, low, high = (self.number(f"{path}/{part}", form) for part in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    def to_dict(self) -> dict[str, Any]:
        return {"about": self.about, "text": self.text, "figures": self.figures}


def claims_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary of a report."""
    found: list[Claim] = []
    for part in (
        _named,
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
    ):
        found += part(report)
    return [claim.to_dict() for claim in found]


def _named(report: dict[str, Any]) -> list[Claim]:
    """The comparison that the study was made for."""
    named = primary_of(report)
    if named is None:
        return []
    place, row = named
    path = f"results/differences/{place}"
    claim = Claim(report, "accuracy")
    more, _, sign = _ordered(row)
    figure = both_ways(row["figure"])
    passes = ", equal passes" if report["plan"]["compare"]["passes"] == "equal" else ""
    asked = f"Named beforehand ({figure}, {_code(row['a'])} against {_code(row['b'])}{passes})"
    if row["p"] is None:
        claim.text = f"{asked}: {_code(more)} is ahead by {_gap(claim, path, sign)}, not tested: too few pictures."
        return [claim]
    verdict = "the difference is shown" if row["shown"] else "no difference is shown"
    of = f"over {claim.count(f'{path}/seeds')} seeds" if len(row["seeds"]) > 1 else "with one seed"
    claim.text = (
        f"{asked}: {_code(more)} is ahead by {_gap(claim, path, sign)} {of}, p = {claim.number(f'{path}/p', '.2g')}, "
        f"tested alone: {verdict}."
    )
    return [claim]


def _search(report: dict[str, Any]) -> list[Claim]:
    """What a search finds of what it is asked for, where that was counted."""
    if "search" not in report:
        return []
    claim = Claim(report, "search")
    claim.text = (
        f"A search of {claim.number('search/gallery', ',d')} pictures that were never trained on, for two things at a "
        f"time: {claim.number('search/share')} % of the first {claim.number('search/first', 'd')} answers, or of as "
        f"many as there are, hold both; by chance {claim.number('search/chance')} % "
        f"({claim.number('search/queries', 'd')} queries)."
    )
    return [claim]


def _found_most(report: dict[str, Any]) -> list[Claim]:
    variants = report["results"]["variants"]
    if not variants:
        return []
    best = max(variants, key=lambda name: variants[name]["figures"]["rsum"]["value"])
    claim = Claim(report, "accuracy")
    figures = f"results/variants/{best}/figures"
    over = "of one seed, its interval of the pictures only"
    if len(variants[best]["seeds"]) > 1:
        over = f"mean of {claim.count(f'results/variants/{best}/seeds')} seeds"
        if len(variants[best]["seeds"]) < len(report["plan"]["seeds"]):
            over += f" out of {claim.count('plan/seeds')}"
    images, captions = (claim.number(f"results/gallery/{kind}", ",d") for kind in ("images", "captions"))

    def by_chance(name: str) -> str:
        return f" (chance {claim.number(f'results/chance/{name}')})" if report["results"].get("chance") else ""

    recalls = ", ".join(
        f"{both_ways(name)} {claim.number(f'{figures}/{name}/value')} %{by_chance(name)}"
        for name in ("image_to_text recall_at_1", "text_to_image recall_at_1")
    )
    claim.text = (
        f"{_code(best)} has the highest rsum, {claim.interval(f'{figures}/rsum')}{by_chance('rsum')} ({over}, on "
        f"{images} pictures and {captions} captions): {recalls}."
    )
    return [claim]


def _differences(report: dict[str, Any]) -> list[Claim]:
    rows = report["results"]["differences"]
    # The one that was named beforehand has a sentence of its own.
    places = [place for place, row in enumerate(rows) if row["figure"] == "rsum" and not row.get("primary")]
    shown = [place for place in places if rows[place]["shown"]]
    found = []
    for place in sorted(shown, key=lambda place: -abs(rows[place]["value"])):
        claim = Claim(report, "accuracy")
        more, less, sign = _ordered(rows[place])
        claim.text = (
            f"{_code(more)} finds more than {_code(less)}: {_gap(claim, f'results/differences/{place}', sign)} in rsum "
            f"(p = {claim.number(f'results/differences/{place}/p_holm', '.2g')} after Holm's correction)."
        )
        found.append(claim)
    rest = [place for place in places if rows[place]["p"] is not None and place not in shown]
    if rest:
        claim = Claim(report, "accuracy")
        largest = max(rest, key=lambda place: abs(rows[place]["value"]))
        more, less, sign = _ordered(rows[largest])
        many = "No difference in rsum between the variants was shown" if not shown else "No other difference was shown"
        claim.text = (
            f"{many}: the largest, {_code(more)} over {_code(less)}, is "
            f"{_gap(claim, f'results/differences/{largest}', sign)} "
            f"(p = {claim.number(f'results/differences/{largest}/p_holm', '.2g')})."
        )
        found.append(claim)
    for place in places:
        if rows[place]["p"] is None:
            claim = Claim(report, "accuracy")
            more, less, sign = _ordered(rows[place])
            claim.text = (
                f"{_code(more)} over {_code(less)}: {_gap(claim, f'results/differences/{place}', sign)} in rsum, not "
                "tested: the gallery has too few pictures to tell it from chance."
            )
            found.append(claim)
    return found + _seeds(report)


def _seeds(report: dict[str, Any]) -> list[Claim]:
    """What the number of seeds does to the comparisons, and which seeds were compared with none."""
    results = report["results"]
    paired = [row["seeds"] for row in results["differences"] if row["figure"] == "rsum" and "seeds" in row]
    found = []
    if any(len(seeds) == 1 for seeds in paired):
        claim = Claim(report, "accuracy")
        which = "The" if all(len(seeds) == 1 for seeds in paired) else "Some"
        claim.text = (
            f"{which} differences are of one seed, their intervals and p of the pictures only: another seed may give "
            "another difference."
        )
        found.append(claim)
    if any(len(seeds) == 2 for seeds in paired):
        claim = Claim(report, "accuracy")
        claim.text = (
            "Two seeds leave one degree of freedom: only differences that are many times their standard error can be "
            "shown. A third seed makes the intervals about three times as narrow."
        )
        found.append(claim)
    for left in results.get("unpaired", []):
        claim = Claim(report, "accuracy")
        told = _listed([f"{left[one]}, seed {seed}" for one in ("a", "b") for seed in left[f"only_{one}"]])
        pair = f"{_code(left['a'])} and {_code(left['b'])}"
        if left["paired"]:
            claim.text = f"{pair} are compared on the seeds that both have: left out is {told}."
        else:
            claim.text = f"{pair} are not compared, as they have no seed in common: {told}."
        found.append(claim)
    return found


def _ordered(row: dict[str, Any]) -> tuple[str, str, float]:
    return (row["a"], row["b"], 1.0) if row["value"] >= 0 else (row["b"], row["a"], -1.0)


def _gap(claim: Claim, path: str, sign: float) -> str:
    """A difference as a gain of the better one."""
    if at(claim.report, path)["low"] is None:
        return f"{claim.number(f'{path}/value', '.1f', sign)} (no interval)"
    low, high = ("low", "high") if sign > 0 else ("high", "low")
    value, low, high = (claim.number(f"{path}/{part}", ".1f", sign) for part in ("value", low, high))
    return f"{value} [{low}, {high}]"


def _gains(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, variant in report["results"]["variants"].items():
        if "gain" not in variant:
            continue
        claim = Claim(report, "accuracy")
        gain = variant["gain"]
        told = "was not shown to gain:"
        if gain["low"] is not None:
            told = "gains" if gain["low"] > 0 else "loses" if gain["high"] < 0 else told
        claim.text = (
            f"Re-ranking by {_code(name)} {told} {claim.interval(f'results/variants/{name}/gain')} in rsum over its "
            "own dual encoder."
        )
        found.append(claim)
    return found


def _lengths(report: dict[str, Any]) -> list[Claim]:
    results = report["results"]
    rows = results["by_length_differences"]
    if not rows:
        return []
    shown = [place for place, row in enumerate(rows) if row["shown"]]
    found = []
    for place in shown:
        row = rows[place]
        claim = Claim(report, "length")
        more, less, sign = _ordered(row)
        span = _span(claim, row["third"])
        claim.text = (
            f"By {row['third']} captions ({span}) {_code(more)} finds more pictures than {_code(less)}: "
            f"{_gap(claim, f'results/by_length_differences/{place}', sign)} points of R@5."
        )
        found.append(claim)
    if not shown:
        claim = Claim(report, "length")
        spans = ", ".join(f"{third} ({_span(claim, third)})" for third in results["lengths"]["words"])
        if all(row["p"] is None for row in rows):
            claim.text = f"Differences by length were not tested, for too few pictures: {spans}."
        else:
            claim.text = f"In no third of the captions by length was a difference in R@5 shown: {spans}."
        found.append(claim)
    return found


def _span(claim: Claim, third: str) -> str:
    low, high = (claim.number(f"results/lengths/words/{third}/{end}", "d") for end in (0, 1))
    return f"{low} to {high} words"


def _composition(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, rows in report["results"]["composition"].items():
        controls = {row["kind"]: place for place, row in enumerate(report["text_only"].get(name, []))}
        for kind in dict.fromkeys(row["kind"] for row in rows):
            places = [place for place, row in enumerate(rows) if row["kind"] == kind]
            claim = Claim(report, "composition")
            path = f"results/composition/{name}"
            above = [p for p in places if _below_level(rows[p]) and rows[p]["value"] > 50]
            best = max(places, key=lambda place: rows[place]["value"])
            if above:
                told = f"{_listed([rows[p]['variant'] for p in above])} told true from twin above chance"
            elif all(rows[p]["p_holm"] is None for p in places):
                told = "not tested, for too few pairs"
            else:
                told = "no variant was shown to tell true from twin above chance"
            what = KINDS.get(kind, kind.capitalize()) + ("" if name == "this data" else f" ({name})")
            text = f"{what}: {told}; the best, {_code(rows[best]['variant'])}, "
            text += f"{claim.interval(f'{path}/{best}')} %"
            if kind in controls:
                words = f"text_only/{name}/{controls[kind]}"
                text += f". A language model that sees no picture: {claim.interval(words)} %"
                if above and (at(report, words)["low"] or 0) > 50:
                    text += ", so that the words alone give part of it away"
            claim.text = f"{text}."
            found.append(claim)
    return found


def _costs(report: dict[str, Any]) -> list[Claim]:
    cost = report["cost"]
    if len(cost) < 2:
        return []
    kinds: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("Encoding a caption", "ms_per_caption/median", lambda each: each["ms_per_caption"]["median"]),
        ("Scoring 1,000 pairs", "ms_per_1000_pairs/median", lambda each: each["ms_per_1000_pairs"]["median"]),
    ]
    found = []
    for what, path, value in kinds:
        claim = Claim(report, "cost")
        low, high = min(cost, key=lambda name: value(cost[name])), max(cost, key=lambda name: value(cost[name]))
        cheap, dear = (claim.number(f"cost/{name}/{path}", significant(value(cost[name]))) for name in (low, high))
        claim.text = f"{what} takes {cheap} ms with {_code(low)} and {dear} ms with {_code(high)}."
        found.append(claim)
    claim = Claim(report, "cost")
    stored = {name: each["bytes_per_picture"] for name, each in cost.items()}
    low, high = min(stored, key=stored.__getitem__), max(stored, key=stored.__getitem__)
    small, large = (claim.number(f"cost/{name}/bytes_per_picture", ",.0f") for name in (low, high))
    claim.text = f"To score pairs later, {_code(low)} stores {small} bytes a picture and {_code(high)} {large}."
    return [*found, claim]


def _equal_captions(report: dict[str, Any]) -> list[Claim]:
    # Reports from before they were counted have none.
    equal = report["data"].get("equal_captions")
    if not equal or not equal["cost"]:
        return []
    claim = Claim(report, "belief")
    path = "data/equal_captions"
    captions, texts, images = (claim.number(f"{path}/{kind}", ",d") for kind in ("captions", "texts", "images"))
    claim.text = (
        f"{captions} captions are equal, word by word, to one of another picture ({texts} texts of {images} pictures): "
        f"no model that scores equal captions alike exceeds rsum {claim.number(f'{path}/best_rsum')}, "
        f"{claim.number(f'{path}/cost')} below the highest there is; `identity: caption` in the plan makes such "
        "pictures each other's partners."
    )
    return [claim]


def _cut_captions(report: dict[str, Any]) -> list[Claim]:
    found = []
    for name, several in report.get("cut_captions", {}).items():
        cut = {split: counts for split, counts in several["splits"].items() if counts["cut"]}
        if not cut:
            continue
        claim = Claim(report, "belief")
        path = f"cut_captions/{name}"
        limit = claim.number(f"{path}/max_tokens", "d")
        told = ", ".join(
            f"{claim.number(f'{path}/splits/{split}/cut', ',d')} of the {split} split "
            f"({claim.number(f'{path}/splits/{split}/share', '.1f', 100.0)} %)"
            for split in cut
        )
        claim.text = f"{_code(name)} reads the first {limit} tokens of a caption; longer ones, which are cut: {told}."
        found.append(claim)
    return found


def _believed(report: dict[str, Any]) -> list[Claim]:
    claim = Claim(report, "belief")
    refused, failed = report["results"]["refused"], report["failed"]
    said = ["Every run in the results passed its audit."]
    if refused:
        said.append(f"Refused, as the audit failed: {_listed([_run(row) for row in refused])}.")
    if failed:
        said.append(f"Failed, and in no figure: {_listed([_run(row) for row in failed])}.")
    if any(len(variant["seeds"]) == 1 for variant in report["results"]["variants"].values()):
        said.append("A variant of one seed tells nothing of what another seed would have given.")
    claim.text = " ".join(said)
    return [claim]


def _below_level(row: dict[str, Any]) -> bool:
    """Whether a row's corrected p, where it was tested, is below 5%."""
    return row["p_holm"] is not None and row["p_holm"] < LEVEL


def _run(row: dict[str, Any]) -> str:
    return f"{row['variant']}, seed {row['seed']}"


def _code(name: str) -> str:
    return f"`{name}`"


def _listed(names: list[str]) -> str:
    names = [name if ", seed" in name else _code(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def numbers_in(text: str) -> list[str]:
    """Every number that a sentence shows, names such as `late-2` and R@1 left out."""
    bare = re.sub(r"`[^`]*`|R@\d+|seed \d+|1,000 pairs", " ", text)
    return re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", bare)
