"""How far a search reads on: as far as measured queries need for their exact first ten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipvisionalign.search.mapped.files import MappedFiles, Selection
from clipvisionalign.search.mapped.search import by_lists

#: Recall of the exact first `DEPTH` that a search has to have, and how far it is tried to read on for it.
MIN_RECALL, DEPTH = 0.99, 10
REACHES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
#: What a recall may be below the best.
TOLERANCE = 0.005
#: Of so many rows a filter leaves one, by which it is measured beside all rows.
FILTERED = 20
#: Vectors of the index, a little changed, by which it is measured beside words.
SAMPLE = 200
#: Rows that are compared at a time.
_ROWS_PER_PRODUCT = 16_384


def choose_reach(files: MappedFiles, text_vectors: Callable[[], np.ndarray] | None) -> tuple[float, float]:
    """The least of `REACHES` by which a search has `MIN_RECALL`, or hardly less than by any.

    It has to for both kinds of queries: vectors between those of the index, as an image has, and vectors of words,
    which lie elsewhere and are near to more lists; among all rows, and among those that a filter leaves.

    Args:
        files: The files, whose record need not have one.
        text_vectors: Gives vectors of words, (M, D); None to measure without.

    Returns:
        It, and the recall, the least of these.
    """
    kinds = [perturbed_sample(files)] + ([np.asarray(text_vectors(), dtype=np.float32)] if text_vectors else [])
    live = np.flatnonzero(~files.deleted)
    part = np.random.default_rng(1).permutation(live)[: max(len(live) // FILTERED, 10 * DEPTH)]
    among = [None if len(live) == len(files.ids) else _selection(files, live), _selection(files, part)]
    measured = [
        (queries, last_cosines(files, queries, DEPTH, selection), selection) for queries in kinds for selection in among
    ]
    recalls: dict[float, float] = {}
    for reach in REACHES:
        recalls[reach] = min(measure_recall(files, *given, reach) for given in measured)
        if recalls[reach] >= MIN_RECALL:
            break
    # Where all lists do not suffice, as of signs alone: what is as good as the best.
    enough = min(MIN_RECALL, max(recalls.values()) - TOLERANCE)
    return next((reach, recall) for reach, recall in recalls.items() if recall >= enough)


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
