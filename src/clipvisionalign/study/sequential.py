"""Seeds added until one interval is narrow enough: when to stop, and what the stopping costs.

After each seed from the third on, the interval of the comparison that the plan names is computed, and training stops
when it is narrower than the plan's width. Whether it stops depends on the spread of the figures alone, never on which
variant is ahead, so that nothing stops because a difference is shown. It still stops too early rather by chance, while
the spread is underestimated: at 95% such intervals would miss the difference in up to 10% of studies. Each look is
therefore at `SEQUENTIAL_LEVEL`, with which they miss it in at most 5.7% (`benchmarks/power.py` simulates both, over 360
kinds of studies).

Sources: Chow and Robbins, Annals of Mathematical Statistics 36 (1965) 457-462, for intervals of fixed width by a
sequential rule; Simons, Annals of Mathematical Statistics 39 (1968) 1946-1952, for the price of not knowing the
variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipvisionalign.retrieval.metrics import MIN_IMAGES, SIGNIFICANCE_LEVEL
from clipvisionalign.study.config import Comparison, Until
from clipvisionalign.study.statistics import estimate, metric_bounds

#: The level of each look: the chance that some look misses the difference then stays near 5%.
SEQUENTIAL_LEVEL = 0.025
#: Seeds of the first look.
FIRST_LOOK = 3
#: Why a study added no more seeds, and that it has not come to an end.
BY_WIDTH, BY_SEEDS, NOT_YET = "width", "seeds", "not yet"


def interval_at_look(table: np.ndarray, metric: str) -> tuple[float, float, float] | None:
    """The mean of a difference and its interval at `SEQUENTIAL_LEVEL`.

    Args:
        table: (S, N) differences of S seeds on N images.
        metric: What is compared.

    Returns:
        Mean, lower and upper end; None for fewer than `FIRST_LOOK` seeds, or too few images.
    """
    seeds, images = table.shape
    if seeds < FIRST_LOOK or images < MIN_IMAGES:
        return None
    bound = metric_bounds(metric)[1]
    estimated = estimate(table, (-bound, bound), SEQUENTIAL_LEVEL)
    if estimated.low is None or estimated.high is None:
        return None
    return estimated.value, estimated.low, estimated.high


def looks_at(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray], metric: str) -> list[dict[str, Any]]:
    """Every look at a difference, seed after seed.

    Args:
        a: (N,) contributions of the images to a metric by seed, of a variant.
        b: Likewise of the other.
        metric: The metric.

    Returns:
        For each number of seeds from `FIRST_LOOK` on "seeds", "value", "low" and "high"; those of seeds that both have,
        in the order of `a`.
    """
    seeds = [seed for seed in a if seed in b]
    rows = []
    for count in range(FIRST_LOOK, len(seeds) + 1):
        interval = interval_at_look(np.stack([a[seed] - b[seed] for seed in seeds[:count]]), metric)
        if interval is not None:
            value, low, high = interval
            rows.append({"seeds": seeds[:count], "value": value, "low": low, "high": high})
    return rows


def stopped_by(looks: Sequence[Mapping[str, Any]], width: float, seeds: int, max_seeds: int) -> str:
    """Why no more seeds are added.

    Args:
        looks: As `looks_at` returns them.
        width: The width that is asked for.
        seeds: Seeds that were trained.
        max_seeds: Seeds at most.

    Returns:
        `BY_WIDTH`, `BY_SEEDS` or `NOT_YET`.

    >>> stopped_by([{"low": -1.0, "high": 3.0}], 5.0, 3, 12)
    'width'
    >>> stopped_by([{"low": -4.0, "high": 3.0}], 5.0, 3, 12)
    'not yet'
    """
    if looks and looks[-1]["high"] - looks[-1]["low"] <= width:
        return BY_WIDTH
    return BY_SEEDS if seeds >= max_seeds else NOT_YET


def corrected_for_looks(rows: Sequence[Mapping[str, Any]], block: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of differences, of which that at whose width a study has stopped gets its last interval, and p to match.

    Args:
        rows: As `Difference.to_dict` returns them.
        block: As `added_seeds_block` returns it.

    Returns:
        New rows in their order; the corrected one has "sequential" true.
    """
    if not block or not block["looks"]:
        return [dict(row) for row in rows]
    last = block["looks"][-1]
    named = (block["a"], block["b"], block["figure"])
    return [
        # p is the level at which the interval ends at zero, of which 5% stand for `SEQUENTIAL_LEVEL`.
        {
            **row, "low": last["low"], "high": last["high"], "sequential": True,
            "p": min(1.0, row["p"] * SIGNIFICANCE_LEVEL / SEQUENTIAL_LEVEL),
        }
        if (row["a"], row["b"], row["figure"]) == named and row["p"] is not None
        else dict(row)
        for row in rows
    ]  # fmt: skip


def added_seeds_block(
    tables: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]], compare: Comparison, until: Until | None, seeds: int
) -> dict[str, Any] | None:
    """The block "until" of results: the looks at the named difference, by which seeds were added.

    Args:
        tables: By metric, by variant, by seed (N,) contributions of the images.
        compare: The comparison that the plan names.
        until: The width that is asked for.
        seeds: Seeds of the plan by now.

    Returns:
        The block as report.json has it; None where no seeds are to be added.
    """
    if until is None or not until.width:
        return None
    family = tables.get(compare.figure, {})
    # In the order of the table's rows, a minus b.
    a, b = sorted((compare.a, compare.b), key=lambda name: list(family).index(name) if name in family else len(family))
    looks = looks_at(family.get(a, {}), family.get(b, {}), compare.figure)
    return {
        "a": a, "b": b, "figure": compare.figure, "width": until.width, "max_seeds": until.max_seeds,
        "level": SEQUENTIAL_LEVEL, "looks": looks, "stopped": stopped_by(looks, until.width, seeds, until.max_seeds),
    }  # fmt: skip
