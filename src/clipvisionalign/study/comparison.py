"""Two studies side by side: what each found and spent, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipvisionalign.counts import with_noun
from clipvisionalign.study.costs import Conditions, Cost, differ, in_rounds, measured_under, ranges_of
from clipvisionalign.study.gaps import state_of
from clipvisionalign.study.significant import significant
from clipvisionalign.study.tables import CHANCE, Table, counted, interval

#: What is compared of the costs. Training is not measured in rounds, and has no spread of its own.
COSTS = (
    Cost("ms_per_caption", "ms_per_caption/median", "ms a caption"),
    Cost("ms_per_picture", "ms_per_picture/median", "ms an image"),
    Cost("ms_per_1000_pairs", "ms_per_1000_pairs/median", "ms 1,000 pairs"),
    Cost("peak_memory_mib", "peak_memory_mib", "peak MiB"),
    Cost("peak_device_memory_mib", "peak_device_memory_mib", "peak GPU MiB"),
    Cost("training_seconds", "training_seconds/mean", "training s"),
)
#: Of a report's block "data" what makes two studies be of the same images and captions.
DATA = ("fingerprint", "gallery", "identity")
#: Where a study's data lies, and what else is told of it; the same data may lie elsewhere.
ABOUT_DATA = ("source", "layout", "splits", "official_splits")


def compare_reports(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Table], list[str]]:
    """Their tables of accuracy and cost, variant by variant, and in what they differ: data, plan, machine, versions.

    Nothing is tested: intervals of the same gallery stand beside each other. Of other data they answer another
    question, and are not compared.
    """
    both = (a, b)
    names = list(dict.fromkeys(name for report in both for name in report["plan"]["variants"]))
    tables = [_accuracy(both, names)]
    tables += [table for cost in COSTS if (table := _cost(both, names, cost)).rows]
    return tables, differing(a, b)


def same_data(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two studies were measured on the same images and captions."""
    split = a["results"]["split"] == b["results"]["split"]
    # The fingerprint has the images by size alone; reports from before their bytes were told have no more.
    both = [report["data"]["contents"] for report in (a, b) if "contents" in report["data"]]
    same = len(both) < 2 or both[0] == both[1]
    return split and same and all(a["data"].get(key) == b["data"].get(key) for key in DATA)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Everything in which two studies differ, a line each."""
    found = []
    if not same_data(a, b):
        found.append("the data is not the same: figures of A and B are of other images or captions")
    contents = ["contents"] if all("contents" in report["data"] for report in (a, b)) else []
    about = (*DATA, *ABOUT_DATA, *contents)
    plans = [report["plan"]["variants"] for report in (a, b)]
    common = set(plans[0]) & set(plans[1])
    for side, names in zip("AB", plans, strict=True):
        found += [f"variant {name}: in {side}'s plan alone" for name in names if name not in common]
    blocks: dict[str, Callable[[dict[str, Any]], Any]] = {
        "data": lambda report: {key: report["data"].get(key) for key in about},
        "plan": lambda report: {
            **report["plan"],
            "variants": {name: each for name, each in report["plan"]["variants"].items() if name in common},
        },
        "machine": lambda report: report["machine"],
        "versions": lambda report: report["versions"],
        "accuracy:": _measured_by if all("measured_by" in report for report in (a, b)) else lambda report: {},
        "time and memory:": _measured_under,
        "training:": _trained_under,
    }
    told = set()
    for name, block in blocks.items():
        left, right = _flat(block(a)), _flat(block(b))
        for key in dict.fromkeys([*left, *right]):
            line = f"{key}: A {_shown(left.get(key))}, B {_shown(right.get(key))}"
            # What was measured on the machine that made the report is told once.
            if left.get(key) != right.get(key) and line not in told:
                found.append(f"{name} {line}")
                told.add(line)
    return found


def _shown(value: Any) -> str:
    """What stands at a key; "-" for nothing, or an empty text."""
    return "-" if value is None or value == "" else str(value)


def _measured_by(report: dict[str, Any]) -> dict[str, str]:
    return _listed([each for several in report["measured_by"].values() for each in several])


def _measured_under(report: dict[str, Any]) -> dict[str, str]:
    return _listed([measured_under(cost) for cost in report["cost"].values()])


def _trained_under(report: dict[str, Any]) -> dict[str, str]:
    return _listed([each for cost in report["cost"].values() for each in cost.get("trained_under") or []])


def _listed(every: Sequence[Conditions]) -> dict[str, str]:
    """Each condition with all that it was."""
    keys = dict.fromkeys(key for each in every for key in each)
    return {key: " and ".join(dict.fromkeys(str(each.get(key, "-")) for each in every)) for key in keys}


def _accuracy(both: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    same = same_data(*both)
    for name in names:
        found = [report["results"]["variants"].get(name, {}).get("figures", {}).get("rsum") for report in both]
        cells = [_rsum(report, name, each) for report, each in zip(both, found, strict=True)]
        rows.append([name, *cells, _apart(found) if same else "other data" if all(found) else ""])
        keys.append([None, *(each["value"] if each else None for each in found), None])
    chance = [report["results"].get("chance", {}).get("rsum") for report in both]
    rows.append([CHANCE, *("" if each is None else f"{each:.1f}" for each in chance), ""])
    keys.append([None, *chance, None])
    counts = [counted(report) for report in both]
    told = (
        counts[:1] if counts[0] == counts[1] else [f"{side}: {count}" for side, count in zip("AB", counts, strict=True)]
    )
    note = "; ".join(told)
    note = f"{note[0].upper()}{note[1:]}."
    note += "" if same else " Of other images or captions: what A and B found is not compared."
    return Table("accuracy", "Rsum", ["variant", "A", "B", "intervals"], rows, keys, note)


def _rsum(report: dict[str, Any], name: str, found: dict[str, Any] | None) -> str:
    if found:
        seeds = len(report["results"]["variants"][name]["seeds"])
        told = state_of(report, name) or with_noun(seeds, "seed")
        return f"{interval(found)} ({told})"
    return "no result" if name in report["plan"]["variants"] else "not in the plan"


def _apart(both: Sequence[dict[str, Any] | None]) -> str:
    """Of two estimates whether their intervals overlap; nothing where one has none."""
    found = [each for each in both if each and each["low"] is not None]
    if len(found) < 2:
        return ""
    a, b = found
    return "apart" if a["low"] > b["high"] or b["low"] > a["high"] else "overlap"


def _cost(both: Sequence[dict[str, Any]], names: Sequence[str], cost: Cost) -> Table:
    """One figure of cost of the variants that have it in A or B."""
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    for name in names:
        pair = [cost.value(report["cost"].get(name)) for report in both]
        if pair == [None, None]:
            continue
        factor = pair[1] / pair[0] if all(pair) else None
        cells = ["" if value is None else format(value, significant(value, 4)) for value in pair]
        rows.append(
            [
                name,
                *cells,
                "" if factor is None else f"{factor:.2f}",
                "" if factor is None else _beyond(both, name, cost),
            ]
        )
        keys.append([None, *pair, factor, None])
    columns = ["variant", "A", "B", "B / A", "beyond their spread"]
    under = [[_under(report["cost"][row[0]], cost) for row in rows if row[0] in report["cost"]] for report in both]
    every = [each for several in under for each in several]
    same = both[0]["machine"] == both[1]["machine"] if not any(every) else all(each == every[0] for each in every)
    note = "" if same else "Not all are known to be measured on one machine under the same conditions."
    return Table(cost.name, cost.unit[0].upper() + cost.unit[1:], columns, rows, keys, note)


def _under(cost: Mapping[str, Any], of: Cost) -> list[Conditions]:
    """The conditions that one figure of a variant's cost was measured under."""
    if of.name == "training_seconds":
        return list(cost.get("trained_under") or [])
    return [measured_under(cost)]


def _beyond(both: Sequence[dict[str, Any]], name: str, cost: Cost) -> str:
    """Whether a variant's cost differs between two studies by more than it does within one."""
    costs: dict[str, Mapping[str, Any]] = {str(place): report["cost"][name] for place, report in enumerate(both)}
    ranges = ranges_of(costs, list(costs), cost) if cost.name != "training_seconds" else None
    if ranges is not None and differ(*ranges.values()):
        return "yes"
    return "no" if ranges is not None and in_rounds(costs, list(costs), cost) else "not measured"


def _flat(found: Any, path: str = "") -> dict[str, Any]:
    if isinstance(found, dict):
        return {key: value for name, below in found.items() for key, value in _flat(below, f"{path}{name}.").items()}
    return {path.rstrip("."): found}
