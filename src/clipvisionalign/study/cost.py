"""The conditions that time and memory are measured under: machine, threads, device and versions of packages.

Nothing is compared that was measured under different ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.models.device import library_versions, machine_info

#: Machine, threads, device and versions that a figure of time or memory was measured under, by name.
Conditions = Mapping[str, Any]


def current_conditions() -> dict[str, Any]:
    """The conditions of this process.

    Returns:
        Machine, threads, device and versions by name.
    """
    return {**machine_info(), **library_versions()}


def group_by_conditions(under: Mapping[str, Sequence[Conditions]]) -> list[tuple[list[Conditions], list[str]]]:
    """Group variants by the conditions that they were measured under.

    Args:
        under: Conditions by variant; of several rounds several.

    Returns:
        For each group its conditions and the names of its variants, in their order.
    """
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
    """Whether all variants were measured under the same conditions.

    Args:
        under: Conditions by variant; of several rounds several.

    Returns:
        Whether they were.
    """
    return len(group_by_conditions(under)) < 2 and all(
        len(variant_conditions) < 2 for variant_conditions in under.values()
    )


def describe_conditions(under: Mapping[str, Sequence[Conditions]]) -> str:
    """In what the conditions of variants differ, such as "self, late: threads 2; cross: threads 8".

    Args:
        under: Conditions by variant; of several rounds several.

    Returns:
        The differences; of the same conditions the machine and PyTorch's version. "" where none are known.
    """
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


def select_same_conditions(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], contents: Collection[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The rounds of each variant that were measured under the same conditions.

    Those conditions come first under which most rounds of all variants were measured.

    Args:
        rounds: Rounds by variant, each with what it was "asked".
        contents: Keys of "asked" that are no conditions.

    Returns:
        Rounds by variant, with "measured_under" in each; and by variant how many others it has.
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
