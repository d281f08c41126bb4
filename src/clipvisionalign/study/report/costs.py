"""Comparison of costs: variants differ in time or memory only beyond their own spread.

Both are measured in fresh processes, round after round, and two variants have to differ by more than the rounds of one
variant do. Of a single round only the repeats within its process are measured, and a machine that is busy with
something else slows a whole process down: such a range is widened by `SINGLE_PROCESS_FACTOR`. Of memory nothing is
known then, and nothing is compared. Nor is anything that was measured under different conditions (`study.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clipvisionalign.number_format import significant_format
from clipvisionalign.study.cost import Conditions, describe_conditions, same_conditions
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.cost import CostRound, MedianTime, Timing, Total, VariantCost


@dataclass(frozen=True)
class CostMetric:
    """A metric of the block "cost" in report.json.

    Args:
        path: where it is in the block of a variant.
        attribute: of `VariantCost`, and of `CostRound` where rounds have it.
        unit: the unit, in sentences.
        sentence_start: how the summary's sentence about it begins; empty for none.
        heading: what it is called where two studies are compared; empty where it is not.
        exact: whether it is the same in every round by its nature.
        number_format: from a value to its format specification.
    """

    path: str
    attribute: str
    unit: str
    sentence_start: str = ""
    heading: str = ""
    exact: bool = False
    number_format: Callable[[float], str] = significant_format

    @property
    def name(self) -> str:
        """Its key in report.json."""
        return self.path.partition("/")[0]

    def value(self, cost: VariantCost | None) -> float | None:
        """The metric's value for one variant.

        Args:
            cost: What was measured of the variant; None for nothing.

        Returns:
            The value; None where it was not measured.
        """
        quantity = None if cost is None else getattr(cost, self.attribute)
        if isinstance(quantity, MedianTime):
            return quantity.median
        return quantity.mean if isinstance(quantity, Total) else quantity

    def round_values(self, cost: VariantCost) -> list[float]:
        """The metric's value in each round that has it.

        Args:
            cost: What was measured of a variant.

        Returns:
            The values, in the order of the rounds.
        """
        if self.attribute not in CostRound.model_fields:
            return []
        values = [getattr(each, self.attribute) for each in cost.rounds]
        return [value for value in values if value is not None]


def _integer_format(value: float) -> str:
    return ",.0f"


MS_PER_CAPTION = CostMetric("ms_per_caption/median", "ms_per_caption", "ms", "Encoding a caption takes", "ms a caption")
MS_PER_IMAGE = CostMetric("ms_per_picture/median", "ms_per_image", "ms", heading="ms an image")
MS_PER_1000_PAIRS = CostMetric(
    "ms_per_1000_pairs/median", "ms_per_1000_pairs", "ms", "Scoring 1,000 pairs takes", "ms 1,000 pairs"
)
MS_PER_QUERY = CostMetric("ms_per_query", "ms_per_query", "ms")
BYTES_PER_IMAGE = CostMetric(
    "bytes_per_picture", "bytes_per_image", "bytes", "To score pairs later, an image is stored in",
    exact=True, number_format=_integer_format,
)  # fmt: skip
MEMORY = CostMetric(
    "peak_memory_mib", "peak_memory_mib", "MiB", "The memory of a process that loads the model and encodes peaks at",
    "peak MiB", number_format=_integer_format,
)  # fmt: skip
DEVICE_MEMORY = CostMetric(
    "peak_device_memory_mib", "peak_device_memory_mib", "MiB", "Its memory on the GPU peaks at", "peak GPU MiB",
    number_format=_integer_format,
)  # fmt: skip
#: Training is not measured in rounds, and has no spread of its own.
TRAINING_SECONDS = CostMetric("training_seconds/mean", "training_seconds", "s", heading="training s")
#: Every metric that is compared, in the order of sentences and tables.
COST_METRICS = (
    MS_PER_CAPTION, MS_PER_IMAGE, MS_PER_1000_PAIRS, MS_PER_QUERY, BYTES_PER_IMAGE, MEMORY, DEVICE_MEMORY,
    TRAINING_SECONDS,
)  # fmt: skip

#: From the lowest to the highest of what was measured of one variant.
CostRange = tuple[float, float]
#: By what factor processes that do the same have been seen to differ, on a machine that did something else too.
SINGLE_PROCESS_FACTOR = 1.5
#: What is measured as less than this is this.
MIN_COST = 1e-9

#: What `no_comparison_reason` returns.
NOT_SAME = "the variants were not measured on one machine under the same conditions"
NO_SPREAD = "the spread of one variant was not measured"
WITHIN_SPREAD = "the variants differ by no more than one variant does from process to process"


def cost_ranges(
    costs: Mapping[str, VariantCost], names: Iterable[str], metric: CostMetric
) -> dict[str, CostRange] | None:
    """Each variant's range; None where that of one of them is unknown.

    Args:
        costs: What was measured, by variant.
        names: The variants.
        metric: The metric.

    Returns:
        Lowest and highest value by variant, or None.
    """
    ranges = {}
    for name in names:
        rounds = metric.round_values(costs[name])
        repeats = getattr(costs[name], metric.attribute)
        if len(rounds) > 1:
            ranges[name] = (min(rounds), max(rounds))
        elif isinstance(repeats, Timing):
            ranges[name] = (repeats.low / SINGLE_PROCESS_FACTOR, repeats.high * SINGLE_PROCESS_FACTOR)
        else:
            return None
    return ranges


def in_rounds(costs: Mapping[str, VariantCost], names: Iterable[str], metric: CostMetric) -> bool:
    """Whether each variant was measured in more than one process, so that its spread is measured and not assumed.

    Args:
        costs: What was measured, by variant.
        names: The variants.
        metric: The metric.

    Returns:
        Whether each was.
    """
    return all(len(metric.round_values(costs[name])) > 1 for name in names)


def cost_conditions(cost: VariantCost) -> Conditions:
    """The conditions of a variant's measurement; in reports from before versions were kept the machine alone.

    Args:
        cost: What was measured of the variant.

    Returns:
        The conditions.
    """
    return cost.measured_under or cost.machine or {}


def conditions_by_variant(costs: Mapping[str, VariantCost], names: Iterable[str]) -> dict[str, list[Conditions]]:
    """The conditions that these variants' time and memory were measured under.

    Args:
        costs: What was measured, by variant.
        names: The variants.

    Returns:
        Under each condition's name, the conditions of the variants.
    """
    return {name: [cost_conditions(costs[name])] for name in names}


def measured_by_note(report: StudyReport) -> str:
    """By which versions the accuracy of which variants was measured.

    Empty where these are all the report's own, and for reports from before that was recorded.

    Args:
        report: The report.

    Returns:
        A sentence.
    """

    def selected(versions: Mapping[str, str]) -> Conditions:
        return {name: versions[name] for name in ("clipvisionalign", "torch") if name in versions}

    under = {name: [selected(each) for each in several] for name, several in (report.measured_by or {}).items()}
    under = {"this report": [selected(report.versions)], **under}
    return "" if same_conditions(under) else describe_conditions(under)


def no_comparison_reason(costs: Mapping[str, VariantCost], names: Sequence[str], metric: CostMetric) -> str:
    """Why no variant is shown to cost less than another; empty where some differ beyond their spread.

    Args:
        costs: What was measured, by variant.
        names: The variants.
        metric: The metric.

    Returns:
        The reason.
    """
    if len(names) < 2:
        return ""
    if not same_conditions(conditions_by_variant(costs, names)):
        return NOT_SAME
    ranges = cost_ranges(costs, names, metric)
    if ranges is None:
        return NO_SPREAD
    if any(ranges_differ(ranges[a], ranges[b]) for a in names for b in names):
        return ""
    return WITHIN_SPREAD if in_rounds(costs, names, metric) else NO_SPREAD


def most_different_pair(costs: Mapping[str, VariantCost], names: Sequence[str], metric: CostMetric) -> tuple[str, str]:
    """The pair of variants with the largest factor among those that differ beyond their spread.

    Args:
        costs: What was measured, by variant.
        names: The variants.
        metric: The metric.

    Returns:
        Two names, the cheaper first.

    Raises:
        ValueError: no two of them do.
    """
    ranges = cost_ranges(costs, names, metric) or {}
    values = {name: metric.value(costs[name]) or 0.0 for name in names}
    pairs = [(a, b) for a in names for b in names if values[a] < values[b] and ranges_differ(ranges[a], ranges[b])]
    return max(pairs, key=lambda pair: values[pair[1]] / max(values[pair[0]], MIN_COST))


def lengths_apart(costs: Mapping[str, VariantCost], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The lengths in tokens at which some of these variants' times of one caption differ beyond their spread, and those
    at which none do. A length at which only one variant was measured is in neither.

    Args:
        costs: What was measured, by variant.
        names: The variants.

    Returns:
        Lengths in tokens that differ, and that do not.
    """
    ranges = [_length_ranges(costs[name]) for name in names]
    apart_and_together: tuple[list[int], list[int]] = ([], [])
    for tokens in sorted({tokens for each in ranges for tokens in each}):
        some = [each[tokens] for each in ranges if tokens in each]
        if len(some) > 1:
            apart_and_together[0 if any(ranges_differ(a, b) for a in some for b in some) else 1].append(tokens)
    return apart_and_together


def _length_ranges(cost: VariantCost) -> dict[int, CostRange]:
    """A variant's range of times by tokens; of one round, or of reports that do not have each, widened."""
    rounds = [{row.tokens: row.ms_alone for row in each.by_length} for each in cost.rounds]
    ranges = {}
    for row in cost.by_length:
        times = [each[row.tokens] for each in rounds if row.tokens in each]
        wider = 1.0 if len(times) > 1 else SINGLE_PROCESS_FACTOR
        times = times or [row.ms_alone]
        ranges[row.tokens] = (min(times) / wider, max(times) * wider)
    return ranges


def ranges_differ(a: CostRange, b: CostRange) -> bool:
    """Whether two variants lie further apart, by factors, than the range of either is wide.

    Args:
        a: Lowest and highest value of a variant.
        b: Those of the other.

    Returns:
        Whether they do.

    >>> ranges_differ((1.0, 1.2), (1.3, 1.4)), ranges_differ((1.0, 1.1), (1.3, 1.4))
    (False, True)
    >>> ranges_differ((1.0, 1.5), (1.2, 1.4))
    False
    """
    (low_a, high_a), (low_b, high_b) = ([math.log(max(end, MIN_COST)) for end in ends] for ends in (a, b))
    return max(low_b - high_a, low_a - high_b) > max(high_a - low_a, high_b - low_b)
