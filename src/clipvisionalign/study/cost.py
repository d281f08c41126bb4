"""What a variant costs as it may be compared: figures of time or memory differ only beyond their own spread.

Both are measured in fresh processes, round after round, and what two variants differ by has to exceed what the rounds
of one variant differ by. Of a single round only the repeats within its process are known, and a machine that is busy
with something else slows a whole process down: such a range is widened by `SINGLE_PROCESS_FACTOR`. Of memory nothing
is known then, and nothing is compared.

They depend on the machine, its threads and the versions of the packages too: the conditions. Nothing is compared that
was measured under different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.models.device import library_versions, machine_info
from clipvisionalign.number_format import significant_format


@dataclass(frozen=True)
class CostMetric:
    """A figure of the block "cost" in report.json.

    name: in the blocks "rounds"; path: where it stands, by keys; told: how the sentence begins that is written of it,
    empty for none; exact: it is the same in every round by its nature.
    """

    name: str
    path: str
    unit: str
    sentence_start: str = ""
    exact: bool = False
    number_format: Callable[[float], str] = significant_format

    def value(self, cost: Mapping[str, Any] | None) -> Any:
        """Of one variant; None where it was not measured."""
        node: Any = cost
        for key in self.path.split("/"):
            node = None if node is None else node.get(key)
        return node


def _integer_format(value: float) -> str:
    return ",.0f"


MS_PER_CAPTION = CostMetric("ms_per_caption", "ms_per_caption/median", "ms", "Encoding a caption takes")
MS_PER_QUERY = CostMetric("ms_per_query", "ms_per_query", "ms")
MEMORY = CostMetric(
    "peak_memory_mib",
    "peak_memory_mib",
    "MiB",
    "The memory of a process that loads the model and encodes peaks at",
    number_format=_integer_format,
)
DEVICE_MEMORY = CostMetric(
    "peak_device_memory_mib",
    "peak_device_memory_mib",
    "MiB",
    "Its memory on the GPU peaks at",
    number_format=_integer_format,
)
COST_METRICS = (
    MS_PER_CAPTION,
    CostMetric("ms_per_1000_pairs", "ms_per_1000_pairs/median", "ms", "Scoring 1,000 pairs takes"),
    MS_PER_QUERY,
    CostMetric(
        "",
        "bytes_per_picture",
        "bytes",
        "To score pairs later, an image is stored in",
        exact=True,
        number_format=_integer_format,
    ),
    MEMORY,
    DEVICE_MEMORY,
)

#: From the lowest to the highest of what was measured of one variant.
CostRange = tuple[float, float]
#: By what factor processes that do the same have been seen to differ, on a machine that did something else too.
SINGLE_PROCESS_FACTOR = 1.5
#: What is measured as less than this is this.
MIN_COST = 1e-9


def cost_ranges(
    costs: Mapping[str, Mapping[str, Any]], names: Iterable[str], cost: CostMetric
) -> dict[str, CostRange] | None:
    """Each variant's range; None where of one of them it is not known."""
    ranges = {}
    for name in names:
        rounds = [each[cost.name] for each in costs[name].get("rounds", []) if each.get(cost.name) is not None]
        repeats = costs[name].get(cost.name)
        if len(rounds) > 1:
            ranges[name] = (min(rounds), max(rounds))
        elif isinstance(repeats, Mapping):
            ranges[name] = (repeats["low"] / SINGLE_PROCESS_FACTOR, repeats["high"] * SINGLE_PROCESS_FACTOR)
        else:
            return None
    return ranges


def in_rounds(costs: Mapping[str, Mapping[str, Any]], names: Iterable[str], cost: CostMetric) -> bool:
    """Whether each variant was measured in more than one process, so that its spread is known and not assumed."""
    rounds = [[each for each in costs[name].get("rounds", []) if each.get(cost.name) is not None] for name in names]
    return all(len(each) > 1 for each in rounds)


#: Machine, threads, device and versions that a figure of time or memory was measured under, by name.
Conditions = Mapping[str, Any]


def current_conditions() -> dict[str, Any]:
    """Those of this process."""
    return {**machine_info(), **library_versions()}


def cost_conditions(cost: Mapping[str, Any]) -> Conditions:
    """The conditions of a variant's block "cost"; of reports from before the versions were kept the machine alone."""
    return cost.get("measured_under") or cost.get("machine") or {}


def group_by_conditions(under: Mapping[str, Sequence[Conditions]]) -> list[tuple[list[Conditions], list[str]]]:
    """Variants by the conditions that their figures are of: those of the same ones together, in their order."""
    groups: list[tuple[list[Conditions], list[str]]] = []
    for name, variant_conditions in under.items():
        for group_conditions, names in groups:
            if len(group_conditions) == len(variant_conditions) and all(
                each in group_conditions for each in variant_conditions
            ):
                names.append(name)
                break
        else:
            groups.append((list(variant_conditions), [name]))
    return groups


def same_conditions(under: Mapping[str, Sequence[Conditions]]) -> bool:
    """Whether all figures of all variants were measured under the same conditions."""
    return len(group_by_conditions(under)) < 2 and all(
        len(variant_conditions) < 2 for variant_conditions in under.values()
    )


def conditions_by_variant(costs: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, list[Conditions]]:
    """The conditions that these variants' time and memory were measured under."""
    return {name: [cost_conditions(costs[name])] for name in names}


def describe_conditions(under: Mapping[str, Sequence[Conditions]]) -> str:
    """In what the conditions of variants differ: "self, late: threads 2; cross: threads 8"; of the same ones the
    machine and PyTorch's version. Empty where none are known."""
    every = [each for variant_conditions in under.values() for each in variant_conditions]
    if not any(every):
        return ""
    if same_conditions(under):
        shared = every[0]
        threads = count_noun(shared["threads"], "thread") if "threads" in shared else ""
        parts = [shared.get("processor"), threads, shared.get("instructions"), shared.get("device")]
        torch = f"PyTorch {shared['torch']}" if "torch" in shared else ""
        return ", ".join(item for item in (*map(str, filter(None, parts)), torch) if item)
    keys = [
        key
        for key in dict.fromkeys(key for each in every for key in each)
        if len({str(each.get(key)) for each in every}) > 1
    ]

    def describe(values: Conditions) -> str:
        return ", ".join(f"{key} {values[key]}" if key in values else f"{key} not known" for key in keys)

    groups = group_by_conditions(under)
    return "; ".join(
        f"{', '.join(names)}: {' and '.join(map(describe, variant_conditions))}" for variant_conditions, names in groups
    )


def measured_by_told(report: Mapping[str, Any]) -> str:
    """By which versions the accuracy of which variants was measured, where that is not all by those of the report;
    empty else, and for reports from before that was told."""

    def of(every: Mapping[str, str]) -> Conditions:
        return {name: every[name] for name in ("clipvisionalign", "torch") if name in every}

    under = {name: [of(each) for each in several] for name, several in report.get("measured_by", {}).items()}
    under = {"this report": [of(report["versions"])], **under}
    return "" if same_conditions(under) else describe_conditions(under)


def select_same_conditions(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], contents: Collection[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Of each variant the rounds that were measured under the same conditions, "measured_under" in each; and how many
    others it has, where it has any. Those come first that most rounds of all variants were measured under.

    rounds: as they are kept, with what they were "asked"; contents: what in that is no condition.
    """
    round_conditions = {
        name: [_recorded_conditions(each, contents) for each in variant_rounds]
        for name, variant_rounds in rounds.items()
    }
    every = [under for variant_rounds in round_conditions.values() for under in variant_rounds]
    order = sorted(every, key=every.count, reverse=True)
    selected: dict[str, list[dict[str, Any]]] = {}
    omitted: dict[str, int] = {}
    for name, variant_rounds in rounds.items():
        common = next((under for under in order if under in round_conditions[name]), None)
        selected[name] = [
            {**{key: value for key, value in each.items() if key != "asked"}, "measured_under": under}
            for each, under in zip(variant_rounds, round_conditions[name], strict=True)
            if under == common
        ]
        if len(selected[name]) < len(variant_rounds):
            omitted[name] = len(variant_rounds) - len(selected[name])
    return selected, omitted


def _recorded_conditions(round_cost: Mapping[str, Any], contents: Collection[str]) -> dict[str, Any]:
    """Those of a kept round; of one from before they were kept the machine that its process named."""
    recorded = {key: value for key, value in round_cost.get("asked", {}).items() if key not in contents}
    return recorded or dict(round_cost.get("machine", {}))


def no_comparison_reason(costs: Mapping[str, Mapping[str, Any]], names: Sequence[str], cost: CostMetric) -> str:
    """Why none of several variants is told to cost less than another; empty where some differ beyond their spread."""
    if len(names) < 2:
        return ""
    if not same_conditions(conditions_by_variant(costs, names)):
        return NOT_SAME
    ranges = cost_ranges(costs, names, cost)
    if ranges is None:
        return NO_SPREAD
    if any(ranges_differ(ranges[a], ranges[b]) for a in names for b in names):
        return ""
    return WITHIN_SPREAD if in_rounds(costs, names, cost) else NO_SPREAD


def most_different_pair(
    costs: Mapping[str, Mapping[str, Any]], names: Sequence[str], cost: CostMetric
) -> tuple[str, str]:
    """Of the pairs of variants that differ beyond their spread the one of the largest factor, the cheaper first. Raises
    ValueError where there is none."""
    ranges = cost_ranges(costs, names, cost) or {}
    values = {name: cost.value(costs[name]) for name in names}
    pairs = [(a, b) for a in names for b in names if values[a] < values[b] and ranges_differ(ranges[a], ranges[b])]
    return max(pairs, key=lambda pair: values[pair[1]] / max(values[pair[0]], MIN_COST))


def lengths_apart(costs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The lengths in tokens of which some of these variants' times of one caption differ beyond their spread, and those
    of which they do not. A length that only one variant was measured at is in neither."""
    ranges = [_length_ranges(costs[name]) for name in names]
    apart_and_together: tuple[list[int], list[int]] = ([], [])
    for tokens in sorted({tokens for each in ranges for tokens in each}):
        some = [each[tokens] for each in ranges if tokens in each]
        if len(some) > 1:
            apart_and_together[0 if any(ranges_differ(a, b) for a in some for b in some) else 1].append(tokens)
    return apart_and_together


def _length_ranges(cost: Mapping[str, Any]) -> dict[int, CostRange]:
    """A variant's range of times by tokens; of one round, or of reports that do not have each, widened."""
    rounds = [{row["tokens"]: row["ms_alone"] for row in each.get("by_length", [])} for each in cost.get("rounds", [])]
    ranges = {}
    for row in cost["by_length"]:
        times = [each[row["tokens"]] for each in rounds if row["tokens"] in each]
        wider = 1.0 if len(times) > 1 else SINGLE_PROCESS_FACTOR
        times = times or [row["ms_alone"]]
        ranges[row["tokens"]] = (min(times) / wider, max(times) * wider)
    return ranges


#: What `no_comparison_reason` gives.
NOT_SAME = "the variants were not measured on one machine under the same conditions"
NO_SPREAD = "the spread of one variant was not measured"
WITHIN_SPREAD = "the variants differ by no more than one variant does from process to process"


def ranges_differ(a: CostRange, b: CostRange) -> bool:
    """Whether two variants lie further apart, by factors, than the range of either is wide.

    >>> ranges_differ((1.0, 1.2), (1.3, 1.4)), ranges_differ((1.0, 1.1), (1.3, 1.4))
    (False, True)
    >>> ranges_differ((1.0, 1.5), (1.2, 1.4))
    False
    """
    (low_a, high_a), (low_b, high_b) = ([math.log(max(end, MIN_COST)) for end in ends] for ends in (a, b))
    return max(low_b - high_a, low_a - high_b) > max(high_a - low_a, high_b - low_b)
