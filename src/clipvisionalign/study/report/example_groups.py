"""The groups of a report's example captions, and which of them a report shows."""

from __future__ import annotations

from collections.abc import Callable

from clipvisionalign.retrieval.metrics import RECALL_AT
from clipvisionalign.study.report.schema.parts import Example, Examples

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


def shown_examples(examples: Examples) -> list[tuple[str, str, list[Example]]]:
    """The groups of a report's examples that hold some: name, what they have in common, and those to which it applies.

    Reports from before there was a rule hold the best and the worst, whatever their ranks.

    Args:
        examples: The block of a report.

    Returns:
        A group each.
    """
    groups = []
    for kind, entries in examples.groups.items():
        description, fits = EXAMPLE_GROUPS[kind]
        matching = [entry for entry in entries if fits(min(entry.ranks.values()), max(entry.ranks.values()))]
        groups += [(kind, description, matching)] if matching else []
    return groups
