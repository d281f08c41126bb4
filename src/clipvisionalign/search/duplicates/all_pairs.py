"""Groups of equal and nearly equal images by their vectors alone: the function of before, for one more release."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clipvisionalign.search.tables import vector_column

if TYPE_CHECKING:
    from clipvisionalign.search.searcher import Searcher

#: Cosine from which two images are nearly equal.
DUPLICATE_THRESHOLD = 0.985


def find_duplicates(
    searcher: Searcher, threshold: float = DUPLICATE_THRESHOLD, block: int = 2048
) -> list[list[dict[str, Any]]]:
    """Group the images of an index that are equal byte for byte, or nearly equal by their vectors.

    Deprecated: `duplicate_report` also compares the pixels, and does not chain through unlike images.

    Args:
        searcher: An open index of N images.
        threshold: Cosine from which two images are nearly equal.
        block: Rows of the (N, N) cosines that are computed at a time.

    Returns:
        Groups of two images and more, largest first; for each image its id, path, hash and size in bytes.
    """
    message = "find_duplicates is deprecated: use clipvisionalign.search.duplicates.duplicate_report"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    table = searcher.table.read(["id", "path", "hash", "size", "vector"])
    count = len(table)
    if not count:
        return []
    rows = table.drop_columns(["vector"]).to_pylist()
    _, first, inverse = np.unique([row["hash"] for row in rows], return_index=True, return_inverse=True)
    edges = [np.stack([np.arange(count), first[inverse]]), *_near_pairs(vector_column(table), threshold, block)]
    groups: dict[int, list[dict[str, Any]]] = {}
    for row, label in zip(rows, _component_labels(np.concatenate(edges, axis=1), count).tolist(), strict=True):
        groups.setdefault(label, []).append(row)
    return sorted(
        (group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]["path"])
    )


def _component_labels(edges: np.ndarray, count: int) -> np.ndarray:
    """The number of the connected component of each of `count` nodes; edges: (2, E)."""
    graph = coo_array((np.ones(edges.shape[1], dtype=bool), (edges[0], edges[1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _near_pairs(vectors: np.ndarray, threshold: float, block: int) -> Iterator[np.ndarray]:
    """Pairs of rows (2, E) that connect all rows (N, D) whose cosine is `threshold` or more, one block at a time.

    Of n nearly equal images, n - 1 pairs are kept and not n (n - 1) / 2: the images of a collection may all be equal.
    """
    for start in range(0, len(vectors), block):
        for column_start in range(start, len(vectors), block):
            close = vectors[start : start + block] @ vectors[column_start : column_start + block].T >= threshold
            row_nodes, column_nodes = np.nonzero(close)
            # Rows of the block are nodes from 0, columns from `block`; on the diagonal they are the same images.
            column_nodes = column_nodes + (0 if start == column_start else block)
            if (row_nodes != column_nodes).any():
                _, first, component = np.unique(
                    _component_labels(np.stack([row_nodes, column_nodes]), 2 * block),
                    return_index=True, return_inverse=True,
                )  # fmt: skip
                local = np.stack([np.arange(2 * block), first[component]])
                local = local[:, local[0] != local[1]]
                yield np.where(local < block, start + local, column_start + local - block)
