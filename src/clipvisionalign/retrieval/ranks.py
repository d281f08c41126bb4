"""Exact ranks of the positives, streamed: memory grows with the gallery, not with gallery x queries.

The rank of a positive is 1 + the number of others that score at least as high: a tie counts against the model, so that
one that gives every pair the same score finds nothing. Another positive of the same query takes a place too, as it does
in any list of results: of two of them the one with fewer negatives before it stands first. Ties are defined in `ties`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.positives import Positives
from clipvisionalign.retrieval.ties import (
    NumericArray,
    VectorEquality,
    as_numeric_array,
    as_vectors,
    dot_product_error,
    tie_thresholds,
    vector_norms,
)

#: Scores in a block, 4 million float64 take 32 MiB, and captions across it.
SCORES_PER_BLOCK = 1 << 22
CAPTIONS_PER_BLOCK = 4096

#: scores(first image, last image, first caption, last caption) -> (images, captions)
ScoreBlock = Callable[[int, int, int, int], np.ndarray]


@dataclass(frozen=True)
class PositiveRanks:
    """Ranks of the positives, in both directions; the first is 1.

    Attributes:
        image_to_text: (N, R) ranks of each image's captions among all captions, best first, padded with 0.
        text_to_image: (M, S) ranks of each caption's images among all images, best first, padded with 0.
        distractors: Number of images in the gallery beside those N, of which no caption is asked for.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    distractors: int = 0


def _no_reduce(counts: np.ndarray) -> np.ndarray:
    return counts


@dataclass(frozen=True)
class WorkerShard:
    """One worker's part of a ranking: every `world_size`-th block of images, from `rank` on.

    Args:
        rank: Number of this worker, from 0.
        world_size: Number of workers.
        all_reduce: Sums an array over all workers, who call it together; all of them then have all ranks.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[np.ndarray], np.ndarray] = _no_reduce


#: The whole gallery.
SINGLE_WORKER = WorkerShard()


def ranks_of_vectors(
    image_vectors: Any, caption_vectors: Any, positives: Positives, shard: WorkerShard = SINGLE_WORKER
) -> PositiveRanks:
    """Exact ranks by the dot product, computed in float64, block by block.

    Args:
        image_vectors: (N, D) array, tensor of any floating-point dtype (bfloat16 too) on any device, or list of them.
        caption_vectors: (M, D) likewise.
        positives: Which captions belong to which images.
        shard: The part of the work, not of the gallery, that this worker does.

    Returns:
        The rank of every positive: 1 + the number of others that score at least as high.

    Raises:
        ValueError: Widths or numbers differ, or vectors are not finite.

    >>> vectors = np.eye(3, dtype=np.float16)
    >>> ranks_of_vectors(vectors, vectors, Positives.of([0, 1, 2], 3)).text_to_image.tolist()
    [[1], [1], [1]]
    """
    by_image, by_caption = count_ranks(image_vectors, caption_vectors, positives, shard)
    return PositiveRanks(by_image.ranks, by_caption.ranks)


def ranks_of_scores(scores: Any, positives: Positives) -> PositiveRanks:
    """Exact ranks by a table of scores.

    Args:
        scores: (N, M), in the dtype in which they were computed, which decides what is a tie. -inf, or what a masked
            array hides, is a pair that was not scored: a negative that precedes nothing.
        positives: Which captions belong to which images.

    Returns:
        The rank of every positive: 1 + the number of others that score at least as high.

    Raises:
        ValueError: The shape differs, a score is NaN or inf, or a true pair was not scored.

    >>> ranks_of_scores([[0.9, 0.1], [0.5, 0.5]], Positives.of([0, 1], 2)).image_to_text.tolist()
    [[1], [2]]
    """
    table = as_numeric_array(scores)
    values = table.values
    if values.shape != (positives.images, len(positives.caption_image)):
        raise ValueError(f"scores should be {(positives.images, len(positives.caption_image))}, not {values.shape}")
    pair_images, pair_captions = positives.pairs()
    true = values[pair_images, pair_captions].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(true))
    if bad.size:
        message = f"image {pair_images[bad[0]]} with its caption {pair_captions[bad[0]]}: {true[bad[0]]}"
        raise ValueError(f"{bad.size} scores of true pairs are not finite numbers, such as that of {message}")
    step = max(1, SCORES_PER_BLOCK // values.shape[1])
    for start in range(0, len(values), step):
        if not (values[start : start + step] < np.inf).all():
            message = "-inf stands for a pair that was not scored, NaN and inf for nothing"
            raise ValueError(f"some scores are not finite numbers: {message}")

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return values[first:last, start:stop].astype(np.float64)

    threshold = tie_thresholds(true, table.rounding)
    by_image = RankCounter(pair_images, pair_captions, threshold, threshold, positives.images)
    by_caption = RankCounter(pair_captions, pair_images, threshold, threshold, len(positives.caption_image))
    _count_negatives(block, by_image, by_caption, positives, SINGLE_WORKER)
    return PositiveRanks(by_image.ranks, by_caption.ranks)


def count_ranks(
    image_vectors: Any, caption_vectors: Any, positives: Positives, shard: WorkerShard = SINGLE_WORKER
) -> tuple[RankCounter, RankCounter]:
    """`ranks_of_vectors`, with the positives that the ranks are of.

    Args:
        image_vectors: (N, D), as in `ranks_of_vectors`.
        caption_vectors: (M, D), as in `ranks_of_vectors`.
        positives: Which captions belong to which images.
        shard: The part of the work that this worker does.

    Returns:
        The counts by image, whose queries are images, and by caption.

    Raises:
        ValueError: As in `ranks_of_vectors`.
    """
    images, captions = as_vectors(image_vectors, "image"), as_vectors(caption_vectors, "caption")
    width = images.values.shape[1]
    if width != captions.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, caption vectors {captions.values.shape[1]}")
    counts = len(images.values), len(captions.values)
    if counts != (positives.images, len(positives.caption_image)):
        message = f"{counts[0]} x {counts[1]} vectors, {positives.images} x {len(positives.caption_image)} partners"
        raise ValueError(f"vectors and partners differ in number: {message}")
    image_lengths, caption_lengths = vector_norms(images.values), vector_norms(captions.values)
    relative_error = dot_product_error(width)
    # One column more adds to each score what rounding can do to it: (D + 1,) instead of another pass over a block.
    left, right = (images.values, relative_error * image_lengths), (captions.values, caption_lengths)

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return _append_column(*left, slice(first, last)) @ _append_column(*right, slice(start, stop)).T

    pair_images, pair_captions = positives.pairs()
    true = true_scores(images, captions, pair_images, pair_captions)
    sizes = image_lengths[pair_images] * caption_lengths[pair_captions]
    threshold = true - relative_error * sizes

    def make_counter(
        query: np.ndarray, positive: np.ndarray, gallery: NumericArray, lengths: np.ndarray, queries: int
    ) -> RankCounter:
        # Vectors that are alike score alike within this: |s_a - s_b| <= |x| |y_a - y_b| and |y_b| <= |y_a| / (1 - r).
        format_error = gallery.rounding / (1.0 - gallery.rounding)
        if format_error <= relative_error:
            return RankCounter(query, positive, threshold, threshold, queries)
        return RankCounter(
            query, positive, threshold, threshold - format_error * sizes, queries, VectorEquality(gallery, lengths)
        )

    by_image = make_counter(pair_images, pair_captions, captions, caption_lengths, positives.images)
    by_caption = make_counter(pair_captions, pair_images, images, image_lengths, len(positives.caption_image))
    _count_negatives(block, by_image, by_caption, positives, shard)
    return by_image, by_caption


def true_scores(
    images: NumericArray, captions: NumericArray, image_index: np.ndarray, caption_index: np.ndarray
) -> np.ndarray:
    """Dot products of some pairs.

    Args:
        images: (N, D).
        captions: (M, D).
        image_index: (Q,) numbers of images.
        caption_index: (Q,) numbers of captions.

    Returns:
        (Q,) float64.
    """
    scores = np.empty(len(image_index))
    for start in range(0, len(scores), 1 << 14):
        part = slice(start, start + (1 << 14))
        left, right = images.values[image_index[part]], captions.values[caption_index[part]]
        scores[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return scores


def _append_column(vectors: np.ndarray, column: np.ndarray, rows: slice) -> np.ndarray:
    """Some vectors in float64 with one column more."""
    result = np.empty((len(vectors[rows]), vectors.shape[1] + 1))
    result[:, :-1] = vectors[rows]
    result[:, -1] = column[rows]
    return result


def _count_negatives(
    block: ScoreBlock, by_image: RankCounter, by_caption: RankCounter, positives: Positives, shard: WorkerShard
) -> None:
    """Count, for every true pair, the negatives that score at least as high: one pass over the blocks for both ways."""
    images, captions = positives.images, len(positives.caption_image)
    pair_images, pair_captions = positives.pairs()
    width = min(captions, CAPTIONS_PER_BLOCK)
    height = max(1, min(-(-images // shard.world_size), SCORES_PER_BLOCK // width))
    firsts = np.searchsorted(pair_images, np.arange(0, images + height, height))
    for block_index, first in enumerate(range(0, images, height)):
        if block_index % shard.world_size != shard.rank:
            continue
        last = min(first + height, images)
        own_images = pair_images[firsts[block_index] : firsts[block_index + 1]]
        own_captions = pair_captions[firsts[block_index] : firsts[block_index + 1]]
        for start in range(0, captions, width):
            stop = min(start + width, captions)
            scores = block(first, last, start, stop)
            inside = (own_captions >= start) & (own_captions < stop)
            # Positives do not count as negatives, in either direction.
            scores[own_images[inside] - first, own_captions[inside] - start] = -np.inf
            by_image.count_negatives(scores, slice(first, last), start, queries_are_rows=True)
            by_caption.count_negatives(scores, slice(start, stop), first, queries_are_rows=False)
    for counter in (by_image, by_caption):
        counter.negative_counts = shard.all_reduce(counter.negative_counts)


class RankCounter:
    """One direction of a ranking: each query's positives, and the negatives that were counted before each so far.

    Args:
        query: (P,) query number of each true pair.
        positive: (P,) number of its positive in the gallery.
        threshold: (P,) what a negative has to score to precede the positive.
        loose_threshold: (P,) what it has to score if its vector equals the positive's; at most `threshold`.
        queries: Number Q of queries.
        vector_equality: Decides which vectors of the gallery are equal; None if `threshold` alone decides.
    """

    def __init__(
        self,
        query: np.ndarray,
        positive: np.ndarray,
        threshold: np.ndarray,
        loose_threshold: np.ndarray,
        queries: int,
        vector_equality: VectorEquality | None = None,
    ) -> None:
        order = np.argsort(query, kind="stable")
        counts = np.bincount(query, minlength=queries)
        slot = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.vector_equality = vector_equality
        self.valid: np.ndarray = np.arange(counts.max(initial=1)) < counts[:, None]
        self.positive_index: np.ndarray = np.full(self.valid.shape, -1)
        self.threshold: np.ndarray = np.full(self.valid.shape, np.inf)
        self.loose_threshold: np.ndarray = np.full(self.valid.shape, np.inf)
        for target, values in (
            (self.positive_index, positive),
            (self.threshold, threshold),
            (self.loose_threshold, loose_threshold),
        ):
            target[query[order], slot] = values[order]
        self.lowest_threshold: np.ndarray = self.loose_threshold.min(axis=1)
        self.negative_counts: np.ndarray = np.zeros(self.valid.shape, dtype=np.int64)

    def count_negatives(self, scores: np.ndarray, queries: slice, start: int, queries_are_rows: bool) -> None:
        """Count the negatives within one block of scores.

        Args:
            scores: (images, captions) of the block; those of true pairs are -inf.
            queries: The queries of the block.
            start: Number of the first candidate of the block.
            queries_are_rows: Whether queries are the rows, or the columns.
        """
        lowest = self.lowest_threshold[queries]
        above = scores >= (lowest[:, None] if queries_are_rows else lowest[None, :])
        above_count = int(np.count_nonzero(above))
        if above_count > above.size // 4:
            self._count_negatives_dense(scores if queries_are_rows else scores.T, queries, start)
            return
        rows, columns = np.divmod(np.flatnonzero(above), scores.shape[1])
        value = scores[rows, columns]
        query, candidate = (rows, columns) if queries_are_rows else (columns, rows)
        for slot in range(self.valid.shape[1]):
            outranks = value >= self.threshold[queries, slot][query]
            if self.vector_equality is not None:
                near = np.flatnonzero((value >= self.loose_threshold[queries, slot][query]) & ~outranks)
                outranks[near] = self.vector_equality(
                    self.positive_index[queries, slot][query[near]], candidate[near] + start
                )
            self.negative_counts[queries, slot] += np.bincount(query[outranks], minlength=len(lowest))

    def _count_negatives_dense(self, scores: np.ndarray, queries: slice, start: int) -> None:
        """`count_negatives` where many candidates score above a query's lowest positive."""
        for slot in range(self.valid.shape[1]):
            threshold, loose_threshold = self.threshold[queries, slot, None], self.loose_threshold[queries, slot, None]
            outranking = (scores >= threshold).sum(axis=1)
            if self.vector_equality is not None:
                rows = np.flatnonzero((scores >= loose_threshold).sum(axis=1) > outranking)
                row, candidate = np.nonzero((scores[rows] >= loose_threshold[rows]) & (scores[rows] < threshold[rows]))
                same = self.vector_equality(self.positive_index[queries, slot][rows[row]], candidate + start)
                outranking += np.bincount(rows[row[same]], minlength=len(threshold))
            self.negative_counts[queries, slot] += outranking

    @property
    def order(self) -> np.ndarray:
        """(Q, R) positions of a query's positives: that with the fewest negatives before it first, then by score."""
        negative_counts = np.where(self.valid, self.negative_counts, np.iinfo(np.int64).max)
        return np.lexsort((-self.threshold, negative_counts), axis=1)

    @property
    def ranks(self) -> np.ndarray:
        """(Q, R) rank of each positive: negatives before it, positives before it, and itself; padded with 0."""
        negative_counts = np.take_along_axis(self.negative_counts, self.order, axis=1)
        return np.where(self.valid, negative_counts + np.arange(1, self.valid.shape[1] + 1), 0)

    @property
    def ranked_positives(self) -> np.ndarray:
        """(Q, R) number of the positive that each rank is of; padded with -1."""
        return np.take_along_axis(self.positive_index, self.order, axis=1)
