"""What re-ranking only the unsure hits of a search finds, and how many images that scores; beside fixed depths.

Every caption searches the whole gallery for its own image. The margin within which hits are re-ranked
(`search/rerank_margin.py`) is chosen by the captions of one half of the gallery and measured on those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.retrieval.evaluate import rerank_depths
from clipvisionalign.retrieval.metrics import RESAMPLES, bootstrap_weights, percentile_interval
from clipvisionalign.search.calibrate import first_images
from clipvisionalign.search.rerank_margin import count_unsure, measure_margins, recall_contributions, reranked_positions
from clipvisionalign.study.foils import HalfWeights
from clipvisionalign.study.units import image_units
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.pair_weights import get_pair_weights, set_pair_weights

#: Captions that are searched for at most, drawn at random: the fusion takes a millisecond for a pair.
MAX_CAPTIONS = 2000
_BOUNDS = (-300.0, 300.0)


def measure_frontier(aligner: Aligner, data: CaptionedImages, halves: HalfWeights | None = None) -> dict[str, Any]:
    """Measure re-ranking of fixed numbers of hits, and of those within margins.

    Args:
        aligner: A model that re-ranks; its weights of pair scores are restored.
        data: The gallery.
        halves: By these weights the captions of each half are scored as the other half chose; None for the model's.

    Returns:
        "captions" (their number), "depth" (hits that are re-ranked at most), "fixed" (for each number of "candidates",
        from 0 for vectors alone, its "recall_sum": recall at 1, 5 and 10 of captions to images, added up, in percent),
        "margins" (for each "margin" the mean number of "images" that are re-ranked, the share of "queries" of which any
        are, and "recall_sum"), and "chosen" where the gallery can be halved: both "margins", "images", "queries",
        "recall_sum", and its differences to all of the depth and to vectors alone, "against_deepest" and
        "against_vectors", with their intervals.
    """
    scorer = aligner.pair_scorer(data.images, data.captions)
    images, captions = scorer.image_vectors.numpy(), scorer.caption_vectors.numpy()
    drawn = np.sort(np.random.default_rng(0).permutation(len(captions))[:MAX_CAPTIONS])
    owners = np.asarray(data.caption_image)[drawn]
    cosines, numbers, own = first_images(images, captions[drawn], owners)
    # The half of each caption's image, in whose choice of weights it has no part.
    half = np.array([-1 if halves is None else halves.half[data.images[owner]] for owner in owners.tolist()])
    scores, own_weights = np.empty(cosines.shape), get_pair_weights(aligner)
    for each in np.unique(half).tolist():
        rows = half == each
        if halves is not None:
            set_pair_weights(aligner, halves.weights[1 - each])
        pairs = numbers[rows].ravel(), np.repeat(drawn[rows], numbers.shape[1])
        scores[rows] = np.asarray(scorer(*pairs), dtype=np.float64).reshape(numbers[rows].shape)
    set_pair_weights(aligner, own_weights)
    depth = cosines.shape[1]

    def positions(counts: np.ndarray | int) -> np.ndarray:
        return reranked_positions(scores, own, np.broadcast_to(counts, len(own)))

    fixed = [
        {"candidates": count, "recall_sum": recall_sum(positions(count), depth)}
        for count in (0, *(each for each in rerank_depths(depth) if each > 1))
    ]
    curve = [row._asdict() for row in measure_margins(cosines, scores, own).curve]
    frontier = {"captions": len(drawn), "depth": depth, "fixed": fixed, "margins": curve}
    chosen = _chosen_margins(data, owners, cosines, scores, own)
    if chosen is None:
        return frontier
    margins, counts = chosen
    after = positions(counts)
    unit = image_units(data)[owners]
    return frontier | {
        "chosen": {
            "margins": margins,
            "images": float(counts.mean()),
            "queries": float((counts > 0).mean()),
            "recall_sum": recall_sum(after, depth),
            "against_deepest": recall_difference(after, positions(depth), depth, unit),
            "against_vectors": recall_difference(after, own, depth, unit),
        }
    }


def _chosen_margins(
    data: CaptionedImages, owners: np.ndarray, cosines: np.ndarray, scores: np.ndarray, own: np.ndarray
) -> tuple[list[float], np.ndarray] | None:
    """The margins that half 0 and half 1 choose, and how many hits of each caption the other half's re-ranks."""
    halves = split_halves(data)
    if halves is None or cosines.shape[1] < 2:
        return None
    is_second = halves.image_half[owners] == 1
    if is_second.all() or not is_second.any():
        return None
    margins = [measure_margins(cosines[rows], scores[rows], own[rows]).margin for rows in (~is_second, is_second)]
    counts = np.where(is_second, count_unsure(cosines, margins[0]), count_unsure(cosines, margins[1]))
    return margins, counts


def recall_sum(positions: np.ndarray, depth: int) -> float:
    """Recall at 1, 5 and 10, added up.

    Args:
        positions: (M,) of the own images, from 0; `depth` for one that is not among the first hits.
        depth: Number of first hits.

    Returns:
        The sum in percent.

    >>> recall_sum(np.array([0, 3, 8, 32]), 32)
    150.0
    """
    return float(recall_contributions(positions, depth).mean())


def recall_difference(
    positions: np.ndarray, reference: np.ndarray, depth: int, unit: np.ndarray
) -> dict[str, float | None]:
    """The difference of two sums of recall on the same captions, with a paired bootstrap over units.

    Args:
        positions: (M,) see `recall_sum`.
        reference: (M,) of the other.
        depth: Number of first hits.
        unit: (M,) unit of each caption's image: what is drawn together.

    Returns:
        "value", "low" and "high", in percent.
    """
    gain = recall_contributions(positions, depth) - recall_contributions(reference, depth)
    _, unit = np.unique(unit, return_inverse=True)
    units = int(unit.max()) + 1
    weights = bootstrap_weights(units, RESAMPLES, 0)
    samples = (weights @ np.bincount(unit, gain, units)) / (weights @ np.bincount(unit, minlength=units))
    return percentile_interval(samples, units, _BOUNDS).to_dict()


def query_milliseconds(frontier: dict[str, Any], caption: float, thousand_pairs: float) -> dict[str, Any]:
    """The frontier with the milliseconds of a search: its caption encoded, and what is re-ranked of it scored.

    Args:
        frontier: What `measure_frontier` returned.
        caption: Milliseconds of one caption.
        thousand_pairs: Milliseconds of 1,000 pairs.

    Returns:
        The same with "ms_per_query" in each row of "fixed" and "margins" and in "chosen".
    """

    def timed(row: dict[str, Any], images: float) -> dict[str, Any]:
        return row | {"ms_per_query": round(caption + thousand_pairs * images / 1000.0, 4)}

    rows: dict[str, Sequence[dict[str, Any]]] = {
        "fixed": [timed(row, row["candidates"]) for row in frontier["fixed"]],
        "margins": [timed(row, row["images"]) for row in frontier["margins"]],
    }
    chosen = {"chosen": timed(frontier["chosen"], frontier["chosen"]["images"])} if "chosen" in frontier else {}
    return frontier | rows | chosen
