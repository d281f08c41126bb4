"""What a variant costs as it may be compared: figures of time or memory differ only beyond their own spread.

Both are measured in fresh processes, round after round, and what two variants differ by has to exceed what the rounds
of one variant differ by. Of a single round only the repeats within its process are known, and a machine that is busy
with something else slows a whole process down: such a range is widened by `ONE_PROCESS`. Of memory nothing is known
then, and nothing is compared.

They depend on the machine, its threads and the versions of the packages too: the conditions. Nothing is compared that
was measured under different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipvisionalign.counts import with_noun
from clipvisionalign.models.device import machine, versions
from clipvisionalign.study.significant import significant


@dataclass(frozen=True)
class Cost:
    """A figure of the block "cost" in report.json.

    name: in the blocks "rounds"; path: where it stands, by keys; told: how the sentence begins that is written of it,
    empty for none; exact: it is the same in every round by its nature.
    """

    name: str
    path: str
    unit: str
    told: str = ""
    exact: bool = False
    form: Callable[[float], str] = significant

    def value(self, cost: Mapping[str, Any] | None) -> Any:
        """Of one variant; None where it was not measured."""
        found: Any = cost
        for key in self.path.split("/"):
            found = None if found is None else found.get(key)
        return found


def _whole(value: float) -> str:
    return ",.0f"


MS_PER_CAPTION = Cost("ms_per_caption", "ms_per_caption/median", "ms", "Encoding a caption takes")
MS_PER_QUERY = Cost("ms_per_query", "ms_per_query", "ms")
MEMORY = Cost(
    "peak_memory_mib",
    "peak_memory_mib",
    "MiB",
    "The memory of a process that loads the model and encodes peaks at",
    form=_whole,
)
DEVICE_MEMORY = Cost(
    "peak_device_memory_mib", "peak_device_memory_mib", "MiB", "Its memory on the GPU peaks at", form=_whole
)
COSTS = (
    MS_PER_CAPTION,
    Cost("ms_per_1000_pairs", "ms_per_1000_pairs/median", "ms", "Scoring 1,000 pairs takes"),
    MS_PER_QUERY,
    Cost("", "bytes_per_picture", "bytes", "To score pairs later, an image is stored in", exact=True, form=_whole),
    MEMORY,
    DEVICE_MEMORY,
)

#: From the lowest to the highest of what was measured of one variant.
Range = tuple[float, float]
#: By what factor processes that do the same have been seen to differ, on a machine that did something else too.
ONE_PROCESS = 1.5
#: What is measured as less than this is this.
LEAST = 1e-9


def ranges_of(costs: Mapping[str, Mapping[str, Any]], names: Iterable[str], cost: Cost) -> dict[str, Range] | None:
    """Each variant's range; None where of one of them it is not known."""
    found = {}
    for name in names:
        rounds = [each[cost.name] for each in costs[name].get("rounds", []) if each.get(cost.name) is not None]
        repeats = costs[name].get(cost.name)
        if len(rounds) > 1:
            found[name] = (min(rounds), max(rounds))
        elif isinstance(repeats, Mapping):
            found[name] = (repeats["low"] / ONE_PROCESS, repeats["high"] * ONE_PROCESS)
        else:
            return None
    return found


def in_rounds(costs: Mapping[str, Mapping[str, Any]], names: Iterable[str], cost: Cost) -> bool:
    """Whether each variant was measured in more than one process, so that its spread is known and not assumed."""
    rounds = [[each for each in costs[name].get("rounds", []) if each.get(cost.name) is not None] for name in names]
    return all(len(each) > 1 for each in rounds)


#: Machine, threads, device and versions that a figure of time or memory was measured under, by name.
Conditions = Mapping[str, Any]


def conditions() -> dict[str, Any]:
    """Those of this process."""
    return {**machine(), **versions()}


def measured_under(cost: Mapping[str, Any]) -> Conditions:
    """The conditions of a variant's block "cost"; of reports from before the versions were kept the machine alone."""
    return cost.get("measured_under") or cost.get("machine") or {}


def grouped(under: Mapping[str, Sequence[Conditions]]) -> list[tuple[list[Conditions], list[str]]]:
    """Variants by the conditions that their figures are of: those of the same ones together, in their order."""
    found: list[tuple[list[Conditions], list[str]]] = []
    for name, several in under.items():
        for known, names in found:
            if len(known) == len(several) and all(each in known for each in several):
                names.append(name)
                break
        else:
            found.append((list(several), [name]))
    return found


def same_conditions(under: Mapping[str, Sequence[Conditions]]) -> bool:
    """Whether all figures of all variants were measured under the same conditions."""
    return len(grouped(under)) < 2 and all(len(several) < 2 for several in under.values())


def under_of(costs: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, list[Conditions]]:
    """The conditions that these variants' time and memory were measured under."""
    return {name: [measured_under(costs[name])] for name in names}


def conditions_told(under: Mapping[str, Sequence[Conditions]]) -> str:
    """In what the conditions of variants differ: "self, late: threads 2; cross: threads 8"; of the same ones the
    machine and PyTorch's version. Empty where none are known."""
    every = [each for several in under.values() for each in several]
    if not any(every):
        return ""
    if same_conditions(under):
        of = every[0]
        threads = with_noun(of["threads"], "thread") if "threads" in of else ""
        parts = [of.get("processor"), threads, of.get("instructions"), of.get("device")]
        torch = f"PyTorch {of['torch']}" if "torch" in of else ""
        return ", ".join(part for part in (*map(str, filter(None, parts)), torch) if part)
    keys = [
        key
        for key in dict.fromkeys(key for each in every for key in each)
        if len({str(each.get(key)) for each in every}) > 1
    ]

    def told(of: Conditions) -> str:
        return ", ".join(f"{key} {of[key]}" if key in of else f"{key} not known" for key in keys)

    groups = grouped(under)
    return "; ".join(f"{', '.join(names)}: {' and '.join(map(told, several))}" for several, names in groups)


def measured_by_told(report: Mapping[str, Any]) -> str:
    """By which versions the accuracy of which variants was measured, where that is not all by those of the report;
    empty else, and for reports from before that was told."""

    def of(every: Mapping[str, str]) -> Conditions:
        return {name: every[name] for name in ("clipvisionalign", "torch") if name in every}

    under = {name: [of(each) for each in several] for name, several in report.get("measured_by", {}).items()}
    under = {"this report": [of(report["versions"])], **under}
    return "" if same_conditions(under) else conditions_told(under)


def of_same_conditions(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], contents: Collection[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Of each variant the rounds that were measured under the same conditions, "measured_under" in each; and how many
    others it has, where it has any. Those come first that most rounds of all variants were measured under.

    rounds: as they are kept, with what they were "asked"; contents: what in that is no condition.
    """
    of = {name: [_kept_conditions(each, contents) for each in several] for name, several in rounds.items()}
    every = [under for several in of.values() for under in several]
    order = sorted(every, key=every.count, reverse=True)
    kept: dict[str, list[dict[str, Any]]] = {}
    left: dict[str, int] = {}
    for name, several in rounds.items():
        chosen = next((under for under in order if under in of[name]), None)
        kept[name] = [
            {**{key: value for key, value in each.items() if key != "asked"}, "measured_under": under}
            for each, under in zip(several, of[name], strict=True)
            if under == chosen
        ]
        if len(kept[name]) < len(several):
            left[name] = len(several) - len(kept[name])
    return kept, left


def _kept_conditions(found: Mapping[str, Any], contents: Collection[str]) -> dict[str, Any]:
    """Those of a kept round; of one from before they were kept the machine that its process named."""
    asked = {key: value for key, value in found.get("asked", {}).items() if key not in contents}
    return asked or dict(found.get("machine", {}))


def not_compared(costs: Mapping[str, Mapping[str, Any]], names: Sequence[str], cost: Cost) -> str:
    """Why none of several variants is told to cost less than another; empty where some differ beyond their spread."""
    if len(names) < 2:
        return ""
    if not same_conditions(under_of(costs, names)):
        return NOT_SAME
    ranges = ranges_of(costs, names, cost)
    if ranges is None:
        return NO_SPREAD
    if any(differ(ranges[a], ranges[b]) for a in names for b in names):
        return ""
    return WITHIN_SPREAD if in_rounds(costs, names, cost) else NO_SPREAD


def furthest_apart(costs: Mapping[str, Mapping[str, Any]], names: Sequence[str], cost: Cost) -> tuple[str, str]:
    """Of the pairs of variants that differ beyond their spread the one of the largest factor, the cheaper first. Raises
    ValueError where there is none."""
    ranges = ranges_of(costs, names, cost) or {}
    values = {name: cost.value(costs[name]) for name in names}
    pairs = [(a, b) for a in names for b in names if values[a] < values[b] and differ(ranges[a], ranges[b])]
    return max(pairs, key=lambda pair: values[pair[1]] / max(values[pair[0]], LEAST))


def lengths_apart(costs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The lengths in tokens of which some of these variants' times of one caption differ beyond their spread, and those
    of which they do not. A length that only one variant was measured at is in neither."""
    ranges = [_length_ranges(costs[name]) for name in names]
    found: tuple[list[int], list[int]] = ([], [])
    for tokens in sorted({tokens for each in ranges for tokens in each}):
        some = [each[tokens] for each in ranges if tokens in each]
        if len(some) > 1:
            found[0 if any(differ(a, b) for a in some for b in some) else 1].append(tokens)
    return found


def _length_ranges(cost: Mapping[str, Any]) -> dict[int, Range]:
    """A variant's range of times by tokens; of one round, or of reports that do not have each, widened."""
    rounds = [{row["tokens"]: row["ms_alone"] for row in each.get("by_length", [])} for each in cost.get("rounds", [])]
    found = {}
    for row in cost["by_length"]:
        times = [each[row["tokens"]] for each in rounds if row["tokens"] in each]
        wider = 1.0 if len(times) > 1 else ONE_PROCESS
        times = times or [row["ms_alone"]]
        found[row["tokens"]] = (min(times) / wider, max(times) * wider)
    return found


#: What `not_compared` gives.
NOT_SAME = "the variants were not measured on one machine under the same conditions"
NO_SPREAD = "the spread of one variant was not measured"
WITHIN_SPREAD = "the variants differ by no more than one variant does from process to process"


def differ(a: Range, b: Range) -> bool:
    """Whether two variants lie further apart, by factors, than the range of either is wide.

    >>> differ((1.0, 1.2), (1.3, 1.4)), differ((1.0, 1.1), (1.3, 1.4)), differ((1.0, 1.5), (1.2, 1.4))
    (False, True, False)
    """
    (low_a, high_a), (low_b, high_b) = ([math.log(max(end, LEAST)) for end in ends] for ends in (a, b))
    return max(low_b - high_a, low_a - high_b) > max(high_a - low_a, high_b - low_b)
