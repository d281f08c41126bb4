"""Pairs of images whose vectors are alike, by the nearest neighbours of each: all of them, or approximate ones of many.

Source of the graph: Malkov and Yashunin, "HNSW", arXiv:1603.09320, as USearch has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.progress import progress
from clipvisionalign.search.graph import add_rows, missed_rows

#: Images up to which all pairs are compared.
MAX_EXACT_IMAGES = 5_000
#: Nearest neighbours of an image that are considered.
NEIGHBOURS = 16
#: Cosine from which two images are alike.
NEAR_COSINE = 0.9
#: Cosine down to which pairs are candidates as well where no cosine is given: copies of a third of the size lie there.
LOWEST_COSINE = 0.7
#: Links of a node of the graph; how widely it is searched while it is built, and afterwards.
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 96, 64
#: Vectors that are added or searched for at a time.
_CHUNK = 10_000


@dataclass(frozen=True)
class VectorPairs:
    """Pairs of images that are alike by their vectors.

    Attributes:
        pairs: (E, 2) positions, the smaller first; each pair once, in their order.
        cosines: (E,) float32.
        full: Number of images of which `NEIGHBOURS` others are alike: they may have more.
        threshold: Cosine that all of them reach.
    """

    pairs: np.ndarray
    cosines: np.ndarray
    full: int
    threshold: float


def similar_pairs(
    vectors: np.ndarray, threshold: float | None = None, *, exact_up_to: int = MAX_EXACT_IMAGES,
    show_progress: bool = True,
) -> VectorPairs:  # fmt: skip
    """Pairs of vectors whose cosine reaches a threshold: of each vector with its nearest.

    Args:
        vectors: Unit length, (N, D), float32.
        threshold: Cosine from which two are alike; None for `NEAR_COSINE`, and of the pairs between it and
            `LOWEST_COSINE` the N most alike: their number grows with the vectors, and not with their square.
        exact_up_to: N up to which all pairs are compared; beyond, neighbours are approximate.
        show_progress: Whether progress is shown on standard error.

    Returns:
        The pairs.
    """
    neighbours = nearest_rows(vectors, NEIGHBOURS, exact=len(vectors) <= exact_up_to, show_progress=show_progress)
    rows = np.repeat(np.arange(len(vectors)), neighbours.shape[1])
    others = neighbours.ravel().astype(np.int64)
    usual = (others >= 0) & (others != rows)
    rows, others = rows[usual], others[usual]
    cosines = pair_cosines(vectors, rows, others)
    alike = cosines >= (NEAR_COSINE if threshold is None else threshold)
    full = int((np.bincount(rows[alike], minlength=1) >= NEIGHBOURS).sum())
    if threshold is None:
        alike = cosines >= LOWEST_COSINE
    rows, others, cosines = rows[alike], others[alike], cosines[alike]
    keys, first = np.unique(np.minimum(rows, others) * len(vectors) + np.maximum(rows, others), return_index=True)
    pairs = np.stack([keys // max(1, len(vectors)), keys % max(1, len(vectors))], axis=1)
    cosines = cosines[first]
    if threshold is None:
        threshold = _lowest_of_most_alike(cosines, len(vectors))
        pairs, cosines = pairs[cosines >= threshold], cosines[cosines >= threshold]
    return VectorPairs(pairs, cosines, full, threshold)


def _lowest_of_most_alike(cosines: np.ndarray, count: int) -> float:
    """The cosine down to which pairs are kept: of those below `NEAR_COSINE` so many as there are vectors, or all."""
    below = cosines[cosines < NEAR_COSINE]
    if len(below) <= count:
        return LOWEST_COSINE
    # The one after them is left out, and with it all that are equal to it.
    first_left_out = -np.partition(-below, count)[count]
    return float(np.nextafter(first_left_out, np.float32(1)))


def nearest_rows(vectors: np.ndarray, count: int, *, exact: bool, show_progress: bool = True) -> np.ndarray:
    """The nearest vectors of each vector.

    Args:
        vectors: Unit length, (N, D), float32.
        count: Number of others for each.
        exact: Whether all are compared; else a graph is built in memory and searched.
        show_progress: Whether progress is shown on standard error.

    Returns:
        (N, at most count + 1) positions, nearest first, that of the vector itself among them; -1 for none.
    """
    if exact:
        return _nearest_exact(vectors, count, show_progress)
    graph = _build_graph(vectors, show_progress)
    parts, missed = [np.empty((0, 1), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    starts = range(0, len(vectors), _CHUNK)
    for start in progress(starts, "searching neighbours", len(vectors), show_progress, _CHUNK):
        chunk = vectors[start : start + _CHUNK]
        matches = graph.search(chunk, min(count + 1, len(vectors)))
        parts.append(np.asarray(matches.keys).astype(np.int64).reshape(len(chunk), -1))
        missed.append(missed_rows(np.arange(start, start + len(chunk)), chunk, matches))
    neighbours = np.concatenate(parts[1:] or parts)
    neighbours[(neighbours < 0) | (neighbours >= len(vectors))] = -1
    _add_missed(vectors, neighbours, np.concatenate(missed), show_progress)
    return neighbours


def _build_graph(vectors: np.ndarray, show_progress: bool) -> Any:
    graph = new_graph(vectors.shape[1])
    add_rows(graph, lambda rows: rows, vectors, show_progress=show_progress)
    return graph


def new_graph(width: int) -> Any:
    """An empty graph of vectors in half precision.

    Args:
        width: D, the width of the vectors.

    Returns:
        A USearch index.
    """
    from usearch.index import Index

    return Index(
        ndim=width, metric="ip", dtype="f16", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )  # fmt: skip


def _add_missed(vectors: np.ndarray, neighbours: np.ndarray, missed: np.ndarray, show_progress: bool) -> None:
    """Add to rows that no search reaches the nearest of the others like them: the graph gives them only reached ones.

    A reached row is a neighbour of an unreached one by the search for the latter, so that no pair is lost.
    """
    others = _nearest_exact(vectors[missed], neighbours.shape[1] - 1, show_progress)
    for row, nearest in zip(missed.tolist(), others, strict=True):
        candidates = np.union1d(neighbours[row], missed[nearest])
        candidates = candidates[candidates >= 0]
        best = np.argsort(-(vectors[candidates] @ vectors[row]), kind="stable")[: neighbours.shape[1]]
        neighbours[row] = -1
        neighbours[row, : len(best)] = candidates[best]


def _nearest_exact(vectors: np.ndarray, count: int, show_progress: bool) -> np.ndarray:
    depth = min(count + 1, len(vectors))
    parts = [np.zeros((0, depth), dtype=np.int64)]
    for start in progress(range(0, len(vectors), 512), "comparing vectors", len(vectors), show_progress, 512):
        cosines = vectors[start : start + 512] @ vectors.T
        parts.append(np.argpartition(-cosines, depth - 1, axis=1)[:, :depth])
    return np.concatenate(parts)


def pair_cosines(vectors: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines of pairs of rows, a chunk at a time.

    Args:
        vectors: Unit length, (N, D), float32.
        rows: Positions, (E,).
        others: Their partners, (E,).

    Returns:
        (E,), float32.
    """
    cosines = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _CHUNK):
        part = np.s_[start : start + _CHUNK]
        cosines[part] = np.einsum("ed,ed->e", vectors[rows[part]], vectors[others[part]])
    return cosines
