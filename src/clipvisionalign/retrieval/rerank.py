"""Re-ranking of the first candidates of a dual encoder by pair scores.

Every candidate is scored alike, the positive included if it is among them, and never if it is not. Positives beyond
the first k keep the rank that the dual encoder gave them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.ranks import SCORES_PER_BLOCK, PositiveRanks, Positives, RankCounter, count_ranks
from clipvisionalign.retrieval.ties import NumericArray, as_numeric_array, as_vectors, tie_thresholds

#: score_pairs(image numbers (Q,), caption numbers (Q,)) -> (Q,)
ScorePairs = Callable[[np.ndarray, np.ndarray], Any]


def top_candidates(queries: np.ndarray, gallery: np.ndarray, counter: RankCounter, count: int) -> np.ndarray:
    """The best of a gallery for each query.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        counter: The same queries' positives, ranked in this gallery.
        count: Number k of candidates; at most all of the gallery.

    Returns:
        (Q, k) numbers of the gallery, in no order: the positives whose rank, in which ties count against them, is
        within k, and the negatives that score highest.
    """
    count = min(count, len(gallery))
    best = np.empty((len(queries), count), dtype=np.int64)
    transposed = gallery.astype(np.float64).T
    positives, ranks = counter.ranked_positives, counter.ranks
    step = max(1, SCORES_PER_BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        scores = queries[start:stop].astype(np.float64) @ transposed
        rows, slots = np.nonzero(counter.valid[start:stop])
        is_candidate = ranks[start:stop][rows, slots] <= count
        # Whether a positive is among the first its rank says, which minds ties.
        scores[rows, positives[start:stop][rows, slots]] = np.where(is_candidate, np.inf, -np.inf)
        best[start:stop] = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return best


@dataclass(frozen=True)
class Candidates:
    """The candidates of a re-ranking before any pair is scored: computed once, for any number of scores.

    Attributes:
        dual_ranks: Ranks of the dual encoder.
        is_positive: (Q,) which of the pairs are true.
        i2t: (N, k) captions of each image.
        t2i: (M, k) images of each caption.
        pairs: (Q,) the pairs to score, image number x M + caption number; one that is a candidate both ways is there
            once.
        pair_index: (N k + M k,) position in `pairs` of each entry of `i2t`, then of each entry of `t2i`.
    """

    dual_ranks: PositiveRanks
    is_positive: np.ndarray
    i2t: np.ndarray
    t2i: np.ndarray
    pairs: np.ndarray
    pair_index: np.ndarray

    @classmethod
    def of(cls, image_vectors: Any, caption_vectors: Any, positives: Positives, count: int) -> Candidates:
        """The first candidates of a dual encoder, in both directions.

        Args:
            image_vectors: (N, D).
            caption_vectors: (M, D).
            positives: Which captions belong to which images.
            count: Number of candidates for each query.

        Returns:
            The candidates.

        Raises:
            ValueError: There is less than one candidate, or vectors do not fit.
        """
        if count < 1:
            raise ValueError(f"at least 1 candidate can be re-ranked, not {count}")
        image_numbers, caption_numbers = as_vectors(image_vectors, "image"), as_vectors(caption_vectors, "caption")
        by_image, by_caption = count_ranks(image_numbers, caption_numbers, positives)
        dual = PositiveRanks(by_image.ranks, by_caption.ranks)
        images, captions = image_numbers.values, caption_numbers.values
        i2t = top_candidates(images, captions, by_image, count)
        t2i = top_candidates(captions, images, by_caption, count)
        # A pair that is a candidate both ways is scored once.
        keys = np.concatenate(
            [
                (np.arange(len(images))[:, None] * len(captions) + i2t).ravel(),
                (t2i * len(captions) + np.arange(len(captions))[:, None]).ravel(),
            ]
        )
        pairs, pair_index = np.unique(keys, return_inverse=True)
        true = positives.contains(pairs // len(captions), pairs % len(captions))
        return cls(dual, true, i2t, t2i, pairs, pair_index)

    @property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and caption numbers of the pairs (Q,), (Q,)."""
        return self.pairs // len(self.t2i), self.pairs % len(self.t2i)

    def ranks(self, scores: Any) -> PositiveRanks:
        """The ranks by the scores of the pairs.

        A positive beyond the first candidates keeps the rank that the dual encoder gave it.

        Args:
            scores: (Q,) scores of `pairs`, in any dtype, which decides what is a tie.

        Returns:
            The ranks after re-ranking; a tie counts against the positive.

        Raises:
            ValueError: The scores have another shape or are not finite.
        """
        pair_scores = as_numeric_array(scores)
        scores = pair_scores.values.astype(np.float64)
        if scores.shape != self.pairs.shape or not np.isfinite(scores).all():
            raise ValueError(f"score_pairs should give {len(self.pairs)} finite numbers, not {scores.shape}")
        tied, true, size = (
            tie_thresholds(scores, pair_scores.rounding),
            self.is_positive[self.pair_index],
            self.i2t.size,
        )

        def new(old: np.ndarray, candidates: np.ndarray, part: slice) -> np.ndarray:
            indices = self.pair_index[part]
            return _new_ranks(
                old, true[part].reshape(candidates.shape), scores[indices].reshape(candidates.shape), tied[indices]
            )

        return PositiveRanks(
            new(self.dual_ranks.image_to_text, self.i2t, slice(None, size)),
            new(self.dual_ranks.text_to_image, self.t2i, slice(size, None)),
        )


def rerank(
    image_vectors: Any, caption_vectors: Any, positives: Positives, score_pairs: ScorePairs, candidates: int
) -> tuple[PositiveRanks, PositiveRanks]:
    """Ranks of the dual encoder, and of its first candidates re-ranked by pair scores, in both directions.

    Args:
        image_vectors: (N, D).
        caption_vectors: (M, D).
        positives: Which captions belong to which images.
        score_pairs: Returns the scores of pairs of images and captions.
        candidates: Number of candidates that are re-ranked for each query.

    Returns:
        The ranks of the dual encoder, and those after re-ranking.

    Raises:
        ValueError: There is less than one candidate.
    """
    pool = Candidates.of(image_vectors, caption_vectors, positives, candidates)
    return pool.dual_ranks, pool.ranks(score_pairs(*pool.index))


@dataclass(frozen=True)
class RerankResult:
    """Re-ranking at one depth.

    Attributes:
        candidates: Number of candidates for each query.
        ranks: Ranks after re-ranking.
        scored_pairs: Number of different pairs that had to be scored, in both directions together.
        seconds: Time that scoring them took.
    """

    candidates: int
    ranks: PositiveRanks
    scored_pairs: int
    seconds: float


def rerank_at_depths(
    image_vectors: Any, caption_vectors: Any, positives: Positives, score_pairs: ScorePairs, depths: Sequence[int]
) -> tuple[PositiveRanks, list[RerankResult]]:
    """`rerank` at several depths; a deeper one scores only the pairs that no shallower one had.

    Args:
        image_vectors: (N, D).
        caption_vectors: (M, D).
        positives: Which captions belong to which images.
        score_pairs: Returns the scores of pairs of images and captions, from image numbers (Q,) and caption numbers
            (Q,).
        depths: Numbers of candidates, each at least 1; they are taken in ascending order, each once.

    Returns:
        The ranks of the dual encoder, and a result for each depth; its seconds are those of all its pairs.

    Raises:
        ValueError: A depth is below one, or scores do not fit.
    """
    scored_keys = np.empty(0, dtype=np.int64)
    scores = np.empty(0)
    seconds = 0.0
    width = len(positives.caption_image)
    results: list[RerankResult] = []
    scored_pairs = 0
    coarsest = NumericArray(scores, "float64", 0.0)
    image_vectors, caption_vectors = as_vectors(image_vectors, "image"), as_vectors(caption_vectors, "caption")

    def score_new_pairs(images: np.ndarray, captions: np.ndarray) -> NumericArray:
        nonlocal scored_keys, scores, seconds, scored_pairs, coarsest
        keys = images * width + captions
        new = np.setdiff1d(keys, scored_keys, assume_unique=True)
        if len(new):
            start = time.perf_counter()
            new_scores = as_numeric_array(score_pairs(new // width, new % width))
            seconds += time.perf_counter() - start
            fresh, coarsest = (
                new_scores.values.astype(np.float64),
                max(coarsest, new_scores, key=lambda each: each.rounding),
            )
            order = np.argsort(np.concatenate([scored_keys, new]), kind="stable")
            scored_keys, scores = np.concatenate([scored_keys, new])[order], np.concatenate([scores, fresh])[order]
        scored_pairs = len(keys)
        return NumericArray(scores[np.searchsorted(scored_keys, keys)], coarsest.dtype_name, coarsest.rounding)

    for depth in sorted(set(depths)):
        dual_ranks, after = rerank(image_vectors, caption_vectors, positives, score_new_pairs, depth)
        results.append(RerankResult(depth, after, scored_pairs, seconds))
    return dual_ranks, results


def _new_ranks(old: np.ndarray, is_positive: np.ndarray, scores: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Ranks (Q, R) after re-ranking.

    old: (Q, R); is_positive, scores: (Q, k) of the candidates; tied: (Q * k,) the lowest score that ties with each.
    """
    # A positive stands where the lowest score that ties with its own would, and behind whatever is there.
    effective_scores = np.where(is_positive, tied.reshape(scores.shape), scores)
    order = np.lexsort((is_positive, -effective_scores), axis=1)
    positive_in_order = np.take_along_axis(is_positive, order, axis=1)
    new = np.where(old > is_positive.shape[1], old, 0)
    for query in np.flatnonzero(is_positive.any(axis=1)):
        positions = np.flatnonzero(positive_in_order[query]) + 1
        new[query, : len(positions)] = positions
    return new
