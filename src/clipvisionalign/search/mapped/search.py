"""Searching mapped files: by the graph, or exactly where that costs less, among the rows that a filter leaves."""

from __future__ import annotations

import numpy as np

from clipvisionalign.search.mapped.files import MappedFiles

#: Rows that are compared exactly in the time of one candidate of the graph, about.
ROWS_PER_CANDIDATE = 16
#: Candidates of the graph per row that is wanted and share that a filter leaves, beyond the plain number.
_FILTER_MARGIN = 1.5
#: Rows that are compared at a time.
_ROWS_PER_PRODUCT = 65_536


def search_files(
    files: MappedFiles, vector: np.ndarray, depth: int, allowed: np.ndarray | None = None, kept: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of mapped files.

    A filter counts before the search: rows outside it take no part. Where it leaves few rows, they are compared
    exactly; else the graph is searched as much wider as the filter leaves less, and still wider until enough of the
    candidates are allowed ones. The first allowed ones of a list of the nearest are the nearest allowed ones.

    Args:
        files: The files, of N positions.
        vector: The query, (D,), unit length.
        depth: Number of rows at most.
        allowed: Which rows may be found, (N,); None for all.
        kept: Number of these.

    Returns:
        Positions (M,), nearest first, and their cosines (M,), float32.
    """
    total = files.record.positions
    kept = total if allowed is None else kept
    depth = min(depth, kept)
    if depth <= 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    refine = files.encoder.refine
    if allowed is None:
        wanted = refine * depth
    else:
        # The coarser the form, the farther down its list a near row may be.
        wanted = int(np.ceil(max(_FILTER_MARGIN, refine / 4) * depth * total / kept)) + refine * depth
    while True:
        expansion = max(files.record.expansion, wanted)
        if expansion * ROWS_PER_CANDIDATE >= kept or expansion >= total:
            return _exact(files, vector, depth, allowed)
        positions, scores = by_graph(files, vector, depth, wanted, expansion, allowed)
        if len(positions) == depth:
            return positions, scores
        wanted *= 2


def by_graph(
    files: MappedFiles, vector: np.ndarray, depth: int, wanted: int, expansion: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows among candidates of the graph, compared by their full vectors.

    Args:
        files: The files, of N positions.
        vector: The query, (D,), unit length.
        depth: Number of rows at most.
        wanted: Number of candidates that are compared.
        expansion: Candidates of the search of the graph.
        allowed: Which rows may be found, (N,); None for all.

    Returns:
        As `search_files`; fewer than `depth` where so few candidates are allowed.
    """
    positions = files.candidates(vector, wanted, expansion)
    if len(files.unreached):
        positions = np.union1d(positions, files.unreached)
    if allowed is not None:
        positions = positions[allowed[positions]]
    positions = np.sort(positions)
    return _first(positions, files.vectors[positions] @ vector, depth)


def _exact(
    files: MappedFiles, vector: np.ndarray, depth: int, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of all allowed rows, by all of their vectors."""
    positions = np.arange(files.record.positions) if allowed is None else np.flatnonzero(allowed)
    scores = np.empty(len(positions), dtype=np.float32)
    for start in range(0, len(positions), _ROWS_PER_PRODUCT):
        rows = positions[start : start + _ROWS_PER_PRODUCT]
        whole = len(rows) == rows[-1] - rows[0] + 1
        block = files.vectors[rows[0] : rows[-1] + 1] if whole else files.vectors[rows]
        scores[start : start + len(rows)] = block @ vector
    return _first(positions, scores, depth)


def _first(positions: np.ndarray, scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the greatest scores, greatest first; of equal ones the first row."""
    best = np.argpartition(scores, len(scores) - depth)[-depth:] if depth < len(scores) else np.arange(len(scores))
    order = best[np.lexsort((positions[best], -scores[best]))]
    return positions[order], scores[order]
