"""Adding vectors to a graph of USearch by several threads, and which of them no search of it reaches afterwards.

Threads that add at once do not see each other's rows: a row whose neighbours all keep nearer ones than it remains in
the graph, but no way leads to it.

Source of the graph: Malkov and Yashunin, "HNSW", arXiv:1603.09320.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from clipvisionalign.progress import progress

#: Rows that are added to a graph at a time.
ROWS_PER_ADD = 4096
#: Rows that one thread adds before several do: what is added to a small graph at once may remain without neighbours.
_FIRST_ROWS = 4096


def add_rows(
    graph: Any,
    encode: Callable[[np.ndarray], np.ndarray],
    vectors: np.ndarray,
    show_progress: bool = True,
) -> None:
    """Add vectors to a graph; their keys are their positions.

    Args:
        graph: A USearch index.
        encode: Gives the form of vectors that the graph holds.
        vectors: (N, D).
        show_progress: Whether progress is shown on standard error.
    """
    firsts = range(0, len(vectors), ROWS_PER_ADD)

    def size(first: int) -> int:
        return min(ROWS_PER_ADD, len(vectors) - first)

    description = "adding vectors to the graph"
    for first in progress(firsts, description, len(vectors), show_progress, units_per_item=size):
        keys = np.arange(first, first + size(first), dtype=np.uint64)
        codes = encode(np.asarray(vectors[first : first + len(keys)]))
        graph.add(keys, codes, threads=1 if first < _FIRST_ROWS else 0)


def missed_rows(rows: np.ndarray, codes: np.ndarray, matches: Any) -> np.ndarray:
    """The rows that are not among the results of a search by their own vectors, though they belong there.

    Args:
        rows: Positions, (N,).
        codes: Their vectors as the graph holds them, (N, W).
        matches: Results of the search for these.

    Returns:
        Positions, some of `rows`.
    """
    keys = np.asarray(matches.keys).reshape(len(codes), -1).astype(np.int64)
    farthest = np.asarray(matches.distances).reshape(len(codes), -1)[:, -1]
    # Of rows with one and the same vector any are as good as this one.
    return np.asarray(rows[~(keys == rows[:, None]).any(axis=1) & (farthest > _own_distances(codes))])


def _own_distances(codes: np.ndarray) -> np.ndarray:
    """The distance of codes (N, W) from themselves, as USearch gives it, and a little more."""
    squares = np.einsum("nw,nw->n", codes, codes, dtype=np.float64)
    return np.asarray(1 - squares + 1e-3 * squares)
