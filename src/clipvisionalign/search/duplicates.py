"""Groups of equal and nearly equal images in an index."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.tables import vector_column

#: Cosine from which two images are nearly equal.
DUPLICATE_THRESHOLD = 0.985


def find_duplicates(
    searcher: Searcher, threshold: float = DUPLICATE_THRESHOLD, block: int = 2048
) -> list[list[dict[str, Any]]]:
    """Groups of pictures that are the same, byte for byte, or nearly: a cosine of `near` or more; largest first."""
    count = searcher.table.count_rows()
    if not count:
        return []
    columns = ["id", "path", "hash", "size", "vector"]
    table = searcher.table.search().select(columns).limit(count).to_arrow()
    vectors = vector_column(table)
    rows = table.drop_columns(["vector"]).to_pylist()
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first_by_hash: dict[str, int] = {}
    for row_index, row in enumerate(rows):
        parent[root(row_index)] = root(first_by_hash.setdefault(row["hash"], row_index))
    for start in range(0, count, block):
        for column_start in range(start, count, block):
            close = vectors[start : start + block] @ vectors[column_start : column_start + block].T >= threshold
            for a, b in zip(*np.nonzero(close), strict=True):
                if start + a < column_start + b:
                    parent[root(column_start + int(b))] = root(start + int(a))
    groups: dict[int, list[dict[str, Any]]] = {}
    for row_index, row in enumerate(rows):
        groups.setdefault(root(row_index), []).append(row)
    return sorted(
        (group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]["path"])
    )
