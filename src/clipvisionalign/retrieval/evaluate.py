"""Evaluation of a model on a whole gallery: any object with `encode_images` and `encode_captions`, or `score`.

A model that also answers `pair_scorer` is measured twice: as the dual encoder that it is, and with the dual encoder's
first candidates re-ranked. One whose `scores_all_pairs` is true is measured by `score`, though it may encode as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.argument_checks import check_lists
from clipvisionalign.data.captioned import text_id
from clipvisionalign.retrieval.equal_captions import EqualCaptions, count_equal_captions
from clipvisionalign.retrieval.metrics import RESAMPLES, MetricEstimate, RetrievalMetrics, metrics_of_ranks, rsum_gain
from clipvisionalign.retrieval.protocols import PairModel, RetrievalModel, can_encode, can_rerank, can_score
from clipvisionalign.retrieval.ranks import (
    SINGLE_WORKER,
    PositiveRanks,
    Positives,
    WorkerShard,
    ranks_of_scores,
    ranks_of_vectors,
)
from clipvisionalign.retrieval.rerank import RerankResult, rerank_at_depths
from clipvisionalign.retrieval.ties import NumericArray, as_numeric_array

#: The file of a run folder that holds the ranks of its dev gallery.
RANKS_FILE = "ranks.npz"

#: Scores in memory; a larger table of a model that only answers `score` goes to a temporary file.
MAX_SCORES_IN_MEMORY = 1 << 26


@dataclass(frozen=True)
class Evaluation:
    """The figures of a model, and for one that re-ranks also those of its dual encoder.

    Attributes:
        metrics: The model's figures; after re-ranking, where it re-ranks.
        dual: The figures of its dual encoder alone; None without re-ranking.
        candidates: Number of candidates that were re-ranked for each query; 0 without re-ranking.
        gain: Paired difference in rsum between `metrics` and `dual`; None without re-ranking.
        depths: For each number of candidates its recall at 1 both ways, rsum, scored pairs and milliseconds per query.
        equal_captions: Captions of different images that are equal word by word, and what they can cost; None if
            unknown.
    """

    metrics: RetrievalMetrics
    dual: RetrievalMetrics | None = None
    candidates: int = 0
    gain: MetricEstimate | None = None
    depths: tuple[dict[str, Any], ...] = ()
    equal_captions: EqualCaptions | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures; for a model that re-ranks also the blocks "dual" and "reranked" of the same form."""
        result = self.metrics.to_dict()
        if self.equal_captions is not None:
            result["equal_captions"] = self.equal_captions.to_dict()
        if self.dual is not None:
            result |= {"candidates": self.candidates, "dual": self.dual.to_dict(), "reranked": self.metrics.to_dict()}
            result |= {"gain": self.gain.to_dict() if self.gain else None, "depths": list(self.depths)}
        return result

    @property
    def ranks_by_name(self) -> dict[str, PositiveRanks]:
        """The ranks as they are saved: "ranks", and "dual" of a model that re-ranks."""
        return {"ranks": self.metrics.ranks} | ({"dual": self.dual.ranks} if self.dual is not None else {})

    def save_ranks(self, path: Path) -> None:
        """Save the ranks, from which every figure can be computed again.

        Args:
            path: File to write, a compressed archive of NumPy; NumPy appends .npz to a name without it.
        """
        blocks = self.ranks_by_name
        ways = ("image_to_text", "text_to_image")
        np.savez_compressed(
            path, **{f"{name}_{way}": getattr(ranks, way) for name, ranks in blocks.items() for way in ways}
        )


def load_ranks(path: Path) -> dict[str, PositiveRanks]:
    """Load what `Evaluation.save_ranks` saved.

    Args:
        path: The .npz file; no pickle is loaded.

    Returns:
        The ranks as "ranks", and for a model that re-ranks those of its dual encoder as "dual".

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such an archive.
        KeyError: It lacks the ranks of one direction.
    """
    with np.load(path, allow_pickle=False) as arrays:
        names = {name.partition("_")[0] for name in arrays.files}
        return {
            name: PositiveRanks(arrays[f"{name}_image_to_text"], arrays[f"{name}_text_to_image"])
            for name in sorted(names)
        }


def evaluate(
    model: RetrievalModel,
    images: Sequence[Any],
    captions: Sequence[str],
    caption_image: Any,
    identity: Any = None,
    candidates: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    shard: WorkerShard = SINGLE_WORKER,
    caption_group: Any = None,
) -> Evaluation:
    """Measure a model on N images and M captions, in both directions.

    Args:
        model: An object with `encode_images` and `encode_captions`, or with `score`. Its vectors and scores keep their
            dtype; `retrieval.ties` defines which of them are equal.
        images: N images, in any form that the model takes.
        captions: M captions.
        caption_image: (M,) index of each caption's image.
        identity: (N,) images of one identity are positives of each other's captions; None if each is its own.
        candidates: Number of candidates to re-rank, if the model has `pair_scorer(images, captions)`; 0 measures the
            dual encoder alone.
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the bootstrap.
        shard: The share of the ranking that this process computes, where several processes share it.
        caption_group: (M,) equal numbers for equal captions, each of which belongs to every image that has one of them;
            None if captions are compared by their images only.

    Returns:
        The figures of both directions, with intervals over images, and the ranks behind them.

    Raises:
        TypeError: The model has neither interface, or one image or one string is given where a list is required.
        ValueError: The model's outputs have another number, another shape or non-finite values.

    >>> class PerfectModel:
    ...     encode_images = encode_captions = staticmethod(lambda items: np.eye(3)[: len(items)])
    >>> figures = evaluate(PerfectModel(), ["1.jpg", "2.jpg", "3.jpg"], ["a dog", "a cat", "a car"], [0, 1, 2])
    >>> figures.to_dict()["rsum"]["value"]
    600.0
    """
    check_lists(images, captions)
    positives = Positives.of(caption_image, len(images), identity, caption_group)
    if len(captions) != len(positives.caption_image):
        raise ValueError(f"{len(captions)} captions, but caption_image has {len(positives.caption_image)} whose")
    owners = positives.caption_image
    equal_counts = count_equal_captions([text_id(caption) for caption in captions], positives)
    if not can_encode(model) or (getattr(model, "scores_all_pairs", False) and not candidates):
        if not can_score(model):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to measure")
        ranks = ranks_of_scores(score_table(model, images, captions), positives)
        return Evaluation(
            metrics_of_ranks(ranks, owners, resamples, seed, positives.identity), equal_captions=equal_counts
        )
    if not candidates:
        ranks = ranks_of_vectors(model.encode_images(images), model.encode_captions(captions), positives, shard)
        return Evaluation(
            metrics_of_ranks(ranks, owners, resamples, seed, positives.identity), equal_captions=equal_counts
        )
    if not can_rerank(model):
        raise TypeError(f"{type(model).__name__} answers no pair_scorer: it re-ranks no candidates")
    pair_scorer = model.pair_scorer(images, captions)
    image_vectors, caption_vectors = (
        as_numeric_array(pair_scorer.image_vectors),
        as_numeric_array(pair_scorer.caption_vectors),
    )
    dual_ranks, results = rerank_at_depths(
        image_vectors, caption_vectors, positives, pair_scorer, rerank_depths(candidates)
    )
    final_ranks = results[-1].ranks
    return Evaluation(
        metrics_of_ranks(final_ranks, owners, resamples, seed, positives.identity),
        metrics_of_ranks(dual_ranks, owners, resamples, seed, positives.identity),
        candidates,
        rsum_gain(final_ranks, dual_ranks, owners, resamples, seed, positives.identity),
        depth_rows(results, owners),
        equal_counts,
    )


def rerank_depths(candidates: int) -> list[int]:
    """The depths of re-ranking that are measured: the one asked for, its half, quarter and eighth.

    Args:
        candidates: Number of candidates that is asked for.

    Returns:
        Numbers of candidates in ascending order, each once and at least 1.

    >>> rerank_depths(20)
    [2, 5, 10, 20]
    """
    return sorted({max(1, candidates // divisor) for divisor in (1, 2, 4, 8)})


def depth_rows(results: Sequence[RerankResult], caption_image: np.ndarray) -> tuple[dict[str, Any], ...]:
    """What re-ranking gives and costs at each depth.

    Args:
        results: Re-ranking at each depth.
        caption_image: (M,) number of each caption's image.

    Returns:
        For each depth "candidates", "recall_at_1" (image to text, text to image; shares), "rsum", "pairs" (scored in
        both directions together) and "ms_per_query"; no intervals.
    """
    rows = []
    for result in results:
        metrics = metrics_of_ranks(result.ranks, caption_image, 0)
        rows.append(
            {
                "candidates": result.candidates,
                "recall_at_1": [metrics.image_to_text["recall_at_1"].value, metrics.text_to_image["recall_at_1"].value],
                "rsum": metrics.rsum.value,
                "pairs": result.scored_pairs,
                "ms_per_query": round(1000 * result.seconds / (metrics.images + metrics.captions), 3),
            }
        )
    return tuple(rows)


def score_table(model: PairModel, images: Sequence[Any], captions: Sequence[str]) -> NumericArray:
    """Score all pairs, some images at a time.

    Args:
        model: An object with `score`.
        images: N images.
        captions: M captions.

    Returns:
        The scores (N, M) in the format in which the model gives them; a large table is in a temporary file.

    Raises:
        ValueError: The model returns another number of scores.
    """
    shape = (len(images), len(captions))
    table: np.ndarray | None = None
    coarsest: NumericArray | None = None
    step = max(1, MAX_SCORES_IN_MEMORY // max(1, len(captions)))
    for start in range(0, len(images), step):
        part = as_numeric_array(model.score(images[start : start + step], captions))
        count = min(step, len(images) - start)
        if part.values.shape != (count, len(captions)):
            message = f"{part.values.shape} for {count} images and {len(captions)} captions"
            raise ValueError(
                f"{type(model).__name__}.score gave {message}: every image has to be scored with every caption"
            )
        if table is None:
            table, coarsest = _empty_table(shape, part.values.dtype), part
        elif np.result_type(table, part.values) != table.dtype:
            wider = _empty_table(shape, part.values.dtype)
            wider[:start] = table[:start]
            table = wider
        table[start : start + count] = part.values
        coarsest = part if coarsest is None or part.rounding > coarsest.rounding else coarsest
    assert table is not None
    assert coarsest is not None
    return NumericArray(table, coarsest.dtype_name, coarsest.rounding)


def _empty_table(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """In memory, or in a temporary file that lives as long as the table."""
    if shape[0] * shape[1] <= MAX_SCORES_IN_MEMORY:
        return np.empty(shape, dtype=dtype)
    return np.memmap(tempfile.TemporaryFile(), dtype, "w+", shape=shape)
