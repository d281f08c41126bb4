"""Ranking all images of an index by their pair scores with a query: by lists of centroids, then by the patches.

A term's score of an image is cosine x scale + weight of late interaction x the sum, over its tokens, of the token's
weight x the cosine of its best patch. For a token the lists of its nearest centroids are read; in an image of none of
them its best patch counts as the nearest centroid that was not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipvisionalign.search.late.files import LateFiles

#: Centroids of a token whose lists are read, and images whose patches are, for the ten best: of 100,000 images 0.96 of
#: the first ten by late interaction alone, in 3 % of the time that all patches take (docs/results.md).
PROBES, CANDIDATES = 64, 2048
#: Patches whose codes are widened at a time.
_BLOCK = 65_536


@dataclass(frozen=True)
class LateTerm:
    """One term of a query.

    Attributes:
        vector: (D,) unit length.
        tokens: (T, E) unit length.
        token_weights: (T,).
        weight: Of the term; negative for an unwanted one.
    """

    vector: np.ndarray
    tokens: np.ndarray
    token_weights: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class LateQuery:
    """A query, and how the model weighs the parts of a pair's score.

    Attributes:
        terms: Its terms.
        scale: Of the cosine of the vectors.
        late_scale: Of the late interaction, its weight included.
    """

    terms: Sequence[LateTerm]
    scale: float
    late_scale: float


def rank_images(
    files: LateFiles, query: LateQuery, count: int, allowed: np.ndarray | None = None, *, probes: int = PROBES,
    candidates: int = CANDIDATES,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The best images of an index.

    Args:
        files: Of the index.
        query: The query.
        count: Number of images at most.
        allowed: Which may be among them, (N,); None for all.
        probes: Centroids of a token whose lists are read.
        candidates: Images whose patches are read, for up to ten results; as many times more for more.

    Returns:
        Positions of images, best first, and their scores, float32.
    """
    scores = estimate(files, query, probes)
    if allowed is not None:
        scores[~allowed] = -np.inf
    there = len(scores) if allowed is None else int(np.count_nonzero(allowed))
    first = min(there, max(candidates, candidates * count // 10))
    if first < len(scores):
        chosen = np.sort(np.argpartition(-scores, first - 1)[:first]) if first else np.empty(0, dtype=np.int64)
    else:
        chosen = np.arange(len(scores))
    exact = score_images(files, query, chosen)
    best = np.lexsort((chosen, -exact))[:count]
    return chosen[best], exact[best]


def estimate(files: LateFiles, query: LateQuery, probes: int) -> np.ndarray:
    """Scores of all images by centroids alone.

    Args:
        files: Of the index.
        query: The query.
        probes: Centroids of a token whose lists are read.

    Returns:
        (N,) float32.
    """
    total = np.zeros(len(files.ids), dtype=np.float32)
    best = np.zeros(len(files.ids), dtype=np.float32)
    for term in query.terms:
        total += np.float32(term.weight * query.scale) * (files.vectors @ term.vector.astype(np.float32))
        cosines = term.tokens.astype(np.float32) @ files.centroids.T
        for of_token, weight in zip(cosines, term.token_weights, strict=True):
            images, gains, floor = _listed(files, of_token, probes)
            # Of an image in several lists the last one counts, that of the nearest centroid.
            best[images] = gains
            factor = np.float32(term.weight * query.late_scale * weight)
            total += factor * (best + floor)
            best[images] = 0.0
    return total


def _listed(files: LateFiles, cosines: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The images in the lists of the nearest centroids, farthest list first, what each gains there, and the cosine that
    all others have."""
    read = min(probes, len(cosines) - 1)
    order = np.argpartition(-cosines, read)[: read + 1]
    order = order[np.argsort(cosines[order])]
    floor, order = cosines[order[0]], order[1:]
    starts, ends = files.list_offsets[order], files.list_offsets[order + 1]
    images = [files.list_images[start:end] for start, end in zip(starts, ends, strict=True)]
    gains = np.repeat(cosines[order] - floor, ends - starts)
    return np.concatenate([*images, np.empty(0, dtype=np.int32)]), gains, floor


def score_images(files: LateFiles, query: LateQuery, positions: np.ndarray) -> np.ndarray:
    """The pair scores of images, by their patches.

    Args:
        files: Of the index.
        query: The query.
        positions: Positions of images, (M,).

    Returns:
        (M,) float32.
    """
    scores = np.zeros(len(positions), dtype=np.float32)
    if not len(positions):
        return scores
    tokens = np.concatenate([term.tokens for term in query.terms]).astype(np.float32)
    weights = np.concatenate([term.weight * query.late_scale * term.token_weights for term in query.terms])
    vector = sum(np.float32(term.weight * query.scale) * term.vector for term in query.terms)
    counts = files.offsets[positions + 1] - files.offsets[positions]
    for part in np.split(np.arange(len(positions)), _block_ends(counts)):
        rows = _ranges(files.offsets[positions[part]], counts[part])
        cosines = (files.codes[rows].astype(np.float32) @ tokens.T) * files.norms[rows, None]
        starts = np.concatenate([[0], np.cumsum(counts[part])[:-1]])
        best = np.maximum.reduceat(cosines, starts)
        scores[part] = best @ weights.astype(np.float32) + files.vectors[positions[part]] @ vector
    return scores


def score_patches(query: LateQuery, vectors: np.ndarray, patches: Sequence[np.ndarray]) -> np.ndarray:
    """The pair scores of images whose patches are given.

    Args:
        query: The query.
        vectors: (M, D) unit length.
        patches: For each image (P, E), of any length: their directions count.

    Returns:
        (M,) float32.
    """
    scores = np.zeros(len(vectors), dtype=np.float32)
    for term in query.terms:
        scores += np.float32(term.weight * query.scale) * (vectors @ term.vector.astype(np.float32))
        factors = (term.weight * query.late_scale * term.token_weights).astype(np.float32)
        for number, rows in enumerate(patches):
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            scores[number] += (unit @ term.tokens.T.astype(np.float32)).max(axis=0) @ factors
    return scores


def _block_ends(counts: np.ndarray) -> np.ndarray:
    """Where blocks of images end, each of about `_BLOCK` patches."""
    blocks = np.cumsum(counts) // _BLOCK
    return np.flatnonzero(np.diff(blocks)) + 1


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each start on, so many of each, as one array."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
