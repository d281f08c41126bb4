"""Counts of the images of an index per month and per place, each with the filter that finds them."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import metadata_columns
from clipvisionalign.search.unreachable import missing_note

#: Places and cameras of an answer at most, those of most images first.
MAX_FACET_VALUES = 100


class FacetCounts:
    """The counts of an index, computed once for each version of its table.

    Args:
        table: Reads the images.
    """

    def __init__(self, table: TableReader) -> None:
        self.table, self._lock = table, threading.Lock()
        self._cached: tuple[int, dict[str, list[Any]]] | None = None

    def read(self) -> dict[str, list[Any]]:
        """The counts of the table as it is now.

        Returns:
            As `facets` returns them; not to be changed.
        """
        with self._lock:
            version = self.table.version
            if self._cached is None or self._cached[0] != version:
                counted = facets(self.table)
                if "notes" in counted:
                    # Counted once more for each answer, until all shards are there.
                    return counted
                self._cached = version, counted
            return self._cached[1]


def facets(table: TableReader) -> dict[str, list[Any]]:
    """Counts per month, place and camera, for the columns that the index has.

    Args:
        table: Reads the images.

    Returns:
        "months", the latest first, "places" and "cameras", the most frequent first; each a list of "value", "count" and
        "where", a filter. Images without a value are in none; without such a column a list is empty. Where shards
        cannot be read now, "notes" has a line that names them: their images are not counted.
    """
    kinds = metadata_columns(table)
    names = [
        name for name, kind in (("taken", "date"), ("place", "text"), ("camera", "text")) if kinds.get(name) == kind
    ]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    rows, missing = table.read_reachable(names) if names else (None, ())
    for row in rows.to_pylist() if rows is not None else []:
        for name, value in row.items():
            if value is not None and name in counts:
                counts[name][f"{value:%Y-%m}".rjust(7, "0") if name == "taken" else value] += 1
    return {
        "months": [
            _facet(month, count, f"taken = {month}") for month, count in sorted(counts.get("taken", {}).items())
        ][::-1],
        "places": _frequent("place", counts),
        "cameras": _frequent("camera", counts),
    } | ({"notes": [missing_note(missing)]} if missing else {})


def _frequent(name: str, counts: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    values = sorted(counts.get(name, Counter()).items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_FACET_VALUES]
    return [_facet(value, count, f'{name} = "{value.replace(chr(34), chr(34) * 2)}"') for value, count in values]


def _facet(value: str, count: int, where: str) -> dict[str, Any]:
    return {"value": value, "count": count, "where": where}
