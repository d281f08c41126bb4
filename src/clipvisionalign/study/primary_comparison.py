"""The comparison that a plan names before anything is trained: tested alone.

Six pairs need a smaller p each, by Holm's correction. A comparison that is named beforehand, the one
the study is made for asks one question, and its p counts as it is; all other pairs are then corrected among themselves,
as if that one had not been looked at. The name has to stand in the plan: one that is chosen after the figures are seen
is one of six again, and a study's folder holds the plan that it was made by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipvisionalign.study.config import Comparison
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL, holm_correction_of_tested


def correct_for_primary(rows: Sequence[dict[str, Any]], compare: Comparison) -> list[dict[str, Any]]:
    """Correct the p values of a report's differences for the comparison that was named beforehand.

    The named one gets "primary": True and its own p as p_holm; the others of its family (rsum, or all other metrics)
    are corrected among themselves. Without a name, or where the named pair has no row, nothing changes.

    Args:
        rows: All differences, as `Difference.to_dict` returns them.
        compare: The comparison that the plan names.

    Returns:
        New rows in their order.
    """
    pair = {compare.a, compare.b}
    primary_rows = [row for row in rows if row["figure"] == compare.figure and {row["a"], row["b"]} == pair]
    if not compare.a or not primary_rows:
        return list(rows)
    primary_row = primary_rows[0]
    family = [row for row in rows if (row["figure"] == "rsum") == (compare.figure == "rsum") and row is not primary_row]
    corrected = dict(zip(map(id, family), holm_correction_of_tested([row["p"] for row in family]), strict=True))
    corrected[id(primary_row)] = primary_row["p"]
    result = []
    for row in rows:
        new = dict(row)
        if id(row) in corrected:
            p = corrected[id(row)]
            new |= {"p_holm": p, "shown": p is not None and p < SIGNIFICANCE_LEVEL}
        result.append(new | ({"primary": True} if row is primary_row else {}))
    return result
