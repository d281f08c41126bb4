"""How widely the graph is searched: as widely as measured queries need for their exact first ten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipvisionalign.search.mapped.files import MappedFiles
from clipvisionalign.search.mapped.search import by_graph

#: Recall of the exact first `DEPTH` that a search has to reach, and numbers of candidates that are tried for it.
MIN_RECALL, DEPTH = 0.995, 10
EXPANSIONS = (48, 64, 96, 128, 192, 256, 384, 512, 768)
#: Vectors of the index, a little changed, by which it is measured beside words.
SAMPLE = 200
#: Rows that are compared at a time.
_ROWS_PER_PRODUCT = 16_384


def choose_expansion(files: MappedFiles, text_vectors: Callable[[], np.ndarray] | None) -> tuple[int, float]:
    """The least number of candidates by which a search reaches `MIN_RECALL`.

    It has to for both kinds of queries: vectors between those of the index, as an image has, and vectors of words,
    which lie elsewhere and need a wider search.

    Args:
        files: The files, whose record need not have an expansion.
        text_vectors: Gives vectors of words, (M, D); None to measure without.

    Returns:
        The number, and the recall, the lesser of both kinds.
    """
    kinds = [perturbed_sample(files)] + ([np.asarray(text_vectors(), dtype=np.float32)] if text_vectors else [])
    right = [exact_first(files, queries, DEPTH) for queries in kinds]
    recall, expansion = 0.0, EXPANSIONS[0]
    for expansion in EXPANSIONS:
        recall = min(
            measure_recall(files, queries, first, expansion) for queries, first in zip(kinds, right, strict=True)
        )
        if recall >= MIN_RECALL:
            break
    return expansion, recall


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


def exact_first(files: MappedFiles, queries: np.ndarray, depth: int) -> np.ndarray:
    """The positions of the exact first rows.

    Args:
        files: The files.
        queries: (Q, D).
        depth: Number of rows.

    Returns:
        (Q, depth), in no particular order; fewer where there are fewer rows.
    """
    count = len(files.vectors)
    best_scores = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    best = np.zeros((len(queries), 0), dtype=np.int64)
    for start in range(0, count, _ROWS_PER_PRODUCT):
        positions = np.arange(start, min(start + _ROWS_PER_PRODUCT, count))
        scores = queries @ files.vectors[start : start + _ROWS_PER_PRODUCT].T
        scores[:, files.deleted[positions]] = -np.inf
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best = np.concatenate([best, np.broadcast_to(positions, scores.shape)], axis=1)
        if depth < best.shape[1]:
            order = np.argpartition(-best_scores, depth - 1, axis=1)[:, :depth]
            best_scores, best = np.take_along_axis(best_scores, order, 1), np.take_along_axis(best, order, 1)
    return best


def measure_recall(files: MappedFiles, queries: np.ndarray, first: np.ndarray, expansion: int) -> float:
    """The share of the exact first rows that a search of the graph finds.

    Args:
        files: The files.
        queries: (Q, D).
        first: The exact ones, (Q, depth).
        expansion: Candidates of a search.

    Returns:
        The mean over the queries, 0 to 1.
    """
    live = ~files.deleted
    depth = first.shape[1]
    wanted = min(files.record.positions, depth * files.encoder.refine)
    shares = []
    for query, expected in zip(queries, first, strict=True):
        positions, _ = by_graph(files, query, depth, wanted, max(expansion, wanted), live)
        shares.append(len(np.intersect1d(positions, expected)) / max(1, depth))
    return float(np.mean(shares)) if shares else 1.0
