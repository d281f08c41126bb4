"""What a variant costs as it may be compared: figures of time or memory differ only beyond their own spread.

Both are measured in fresh processes, round after round, and what two variants differ by has to exceed what the rounds
of one variant differ by. Of a single round only the repeats within its process are known, and a machine that is busy
with something else slows a whole process down: such a range is widened by `ONE_PROCESS`. Of memory nothing is known
then, and nothing is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


def differ(a: Range, b: Range) -> bool:
    """Whether two variants lie further apart, by factors, than the range of either is wide.

    >>> differ((1.0, 1.2), (1.3, 1.4)), differ((1.0, 1.1), (1.3, 1.4)), differ((1.0, 1.5), (1.2, 1.4))
    (False, True, False)
    """
    (low_a, high_a), (low_b, high_b) = ([math.log(max(end, LEAST)) for end in ends] for ends in (a, b))
    return max(low_b - high_a, low_a - high_b) > max(high_a - low_a, high_b - low_b)
