"""How far a search reads on: as far as measured queries need for their exact first ten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from clipvisionalign.search.mapped.files import MappedFiles, Selection
from clipvisionalign.search.mapped.search import by_lists

#: Recall of the exact first `DEPTH` that a search has to have, and how far it is tried to read on for it.
MIN_RECALL, DEPTH = 0.99, 10
REACHES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
#: What a recall may be below the best.
TOLERANCE = 0.005
#: Of so many rows a filter leaves one, by which it is measured: rows at random, and so many groups of rows that
#: are near each other.
FILTERED, FILTERED_GROUPS = 20, 20
#: Vectors of the index, a little changed, by which it is measured beside words.
SAMPLE = 200
#: Rows that are compared at a time.
_ROWS_PER_PRODUCT = 16_384


class Reach(NamedTuple):
    """How far searches read on, and what they find.

    Attributes:
        reach: Among all rows.
        filtered_reach: Among the rows that a filter leaves, no less: a filter may leave nearly all.
        recall: The least of all kinds of queries and rows that were measured, 0 to 1.
    """

    reach: float
    filtered_reach: float
    recall: float


def choose_reach(files: MappedFiles, text_vectors: Callable[[], np.ndarray] | None) -> Reach:
    """The least of `REACHES` by which a search has `MIN_RECALL`, or hardly less than by any.

    It has to for both kinds of queries: vectors between those of the index, as an image has, and vectors of words,
    which lie elsewhere and are near to more lists. A filter has a reach of its own: for rows at random, and for rows
    that are near each other, as those of one event, place or kind are.

    Args:
        files: The files, whose record need not have one.
        text_vectors: Gives vectors of words, (M, D); None to measure without.

    Returns:
        Both, and the recall.
    """
    kinds = [perturbed_sample(files)] + ([np.asarray(text_vectors(), dtype=np.float32)] if text_vectors else [])
    live = np.flatnonzero(~files.deleted)
    whole = [None if len(live) == len(files.ids) else _selection(files, live)]
    parts = [_selection(files, each) for each in (_random_rows(live), _rows_near_each_other(files, live))]
    (reach, recall), (filtered_reach, filtered_recall) = (_least_reach(files, kinds, each) for each in (whole, parts))
    return Reach(reach, max(reach, filtered_reach), min(recall, filtered_recall))


def _least_reach(
    files: MappedFiles, kinds: list[np.ndarray], selections: Sequence[Selection | None]
) -> tuple[float, float]:
    """The least reach that is enough for each kind of queries among each selection of rows, and its recall."""
    measured = [
        (queries, last_cosines(files, queries, DEPTH, selection), selection)
        for queries in kinds
        for selection in selections
    ]
    recalls: dict[float, float] = {}
    for reach in REACHES:
        recalls[reach] = min(measure_recall(files, *given, reach) for given in measured)
        if recalls[reach] >= MIN_RECALL:
            break
    # Where all lists do not suffice, as of signs alone: what is as good as the best.
    enough = min(MIN_RECALL, max(recalls.values()) - TOLERANCE)
    return next((reach, recall) for reach, recall in recalls.items() if recall >= enough)


def _filtered_count(live: np.ndarray) -> int:
    return max(len(live) // FILTERED, 10 * DEPTH)


def _random_rows(live: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(live)[: _filtered_count(live)]


def _rows_near_each_other(files: MappedFiles, live: np.ndarray) -> np.ndarray:
    """The rows nearest to each of a few, as many as `_random_rows` gives or fewer: none twice."""
    size = -(-_filtered_count(live) // FILTERED_GROUPS)
    centres = np.random.default_rng(2).choice(live, min(FILTERED_GROUPS, len(live)), replace=False)
    directions, count = files.vectors[np.sort(centres)].T, len(files.vectors)
    best, cosines = np.empty((0, len(centres)), dtype=np.int64), np.empty((0, len(centres)), dtype=np.float32)
    for start in range(0, count, _ROWS_PER_PRODUCT):
        rows = np.arange(start, min(start + _ROWS_PER_PRODUCT, count))
        rows = rows[~files.deleted[rows]]
        cosines = np.concatenate([cosines, files.vectors[rows] @ directions])
        best = np.concatenate([best, np.broadcast_to(rows[:, None], (len(rows), len(centres)))])
        if size < len(best):
            first = np.argpartition(-cosines, size - 1, axis=0)[:size]
            best, cosines = np.take_along_axis(best, first, 0), np.take_along_axis(cosines, first, 0)
    return np.unique(best)


def perturbed_sample(files: MappedFiles, seed: int = 0) -> np.ndarray:
    """Some vectors of the index, a little changed.

    Args:
        files: The files.
        seed: Of the sample.

    Returns:
        (Q, D), float32.
    """
    rng = np.random.default_rng(seed)
    live = np.flatnonzero(~files.deleted)
    vectors = files.vectors[np.sort(rng.choice(live, min(SAMPLE, len(live)), replace=False))]
    noise = rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), vectors.shape)
    changed = (vectors + noise).astype(np.float32)
    return np.asarray(changed / np.linalg.norm(changed, axis=1, keepdims=True))


def _selection(files: MappedFiles, positions: np.ndarray) -> Selection:
    mask = np.zeros(files.record.positions, dtype=bool)
    mask[positions] = True
    return Selection(files, mask)


def last_cosines(files: MappedFiles, queries: np.ndarray, depth: int, selection: Selection | None = None) -> np.ndarray:
    """The cosine of the last of the exact first rows.

    Args:
        files: The files.
        queries: (Q, D).
        depth: Number of rows.
        selection: Which rows may be found; None for all.

    Returns:
        (Q,); of fewer rows that of the last of them.
    """
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    for start in range(0, len(files.vectors), _ROWS_PER_PRODUCT):
        rows = files.vectors[start : start + _ROWS_PER_PRODUCT]
        if selection is not None:
            rows = rows[selection.mask[start : start + _ROWS_PER_PRODUCT]]
        best = np.concatenate([best, queries @ rows.T], axis=1)
        if depth < best.shape[1]:
            best = -np.partition(-best, depth - 1, axis=1)[:, :depth]
    return best.min(axis=1, initial=np.inf)


def measure_recall(
    files: MappedFiles, queries: np.ndarray, last: np.ndarray, selection: Selection | None, reach: float
) -> float:
    """The share of the exact first `DEPTH` rows that a search of the lists finds; of rows of one cosine any will do.

    Args:
        files: The files.
        queries: (Q, D).
        last: Cosines of the last of them, (Q,).
        selection: Which rows may be found; None for all.
        reach: How far it reads on.

    Returns:
        The mean over the queries, 0 to 1.
    """
    depth = min(DEPTH, files.record.live if selection is None else selection.count)
    shares = []
    for query, least in zip(queries, last, strict=True):
        _, cosines = by_lists(files, query, depth, reach, selection)
        shares.append(float((cosines >= least - 1e-5).sum()) / max(1, depth))
    return float(np.mean(shares)) if shares else 1.0
