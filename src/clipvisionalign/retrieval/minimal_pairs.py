"""Minimal pairs: whether a model scores a true caption above its foil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipvisionalign.argument_checks import check_lists
from clipvisionalign.retrieval.protocols import can_encode
from clipvisionalign.retrieval.ranks import true_scores
from clipvisionalign.retrieval.ties import VectorEquality, as_numeric_array, as_vectors, dot_product_error, vector_norms


def score_minimal_pairs(model: Any, images: Sequence[Any], true: Sequence[str], foils: Sequence[str]) -> np.ndarray:
    """Whether a model scores each true caption above its foil.

    A model that ignores the difference, such as a bag of words, gets exactly one half. Scores come from
    `score_pairs(images, captions, image index, caption index)` where a model has it, else from the dot products of its
    vectors, else from `score`; `retrieval.ties` defines ties.

    Args:
        model: An object with one of these interfaces.
        images: P images, in any form that the model takes.
        true: P captions, each true of its image.
        foils: P captions, each false of its image.

    Returns:
        (P,) 1 where the true caption scores higher, 0 where the foil does, 0.5 for a tie.

    Raises:
        TypeError: One string is given where a list is required.
        ValueError: The model returns another number of scores, or non-finite ones.

    >>> class BagOfWords:
    ...     encode_images = staticmethod(lambda images: np.ones((len(images), 2)))
    ...     encode_captions = staticmethod(lambda captions: np.array([[len(each.split()), 1.0] for each in captions]))
    >>> score_minimal_pairs(BagOfWords(), ["1.jpg"], ["a dog bites a man"], ["a man bites a dog"])
    array([0.5])
    """
    check_lists(images, true)
    check_lists(captions=foils)
    count = len(images)
    if not count:
        return np.empty(0)
    index = np.concatenate([np.arange(count), np.arange(count)])
    captions = [*true, *foils]
    if not hasattr(model, "score_pairs") and can_encode(model):
        return _by_vectors(model.encode_images(images), model.encode_captions(captions))
    if hasattr(model, "score_pairs"):
        pair_scores = as_numeric_array(model.score_pairs(images, captions, index, np.arange(2 * count)))
    else:
        rows = [as_numeric_array(model.score([image], pair)) for image, *pair in zip(images, true, foils, strict=True)]
        pair_scores = as_numeric_array([row.values[0] for row in rows])
        pair_scores = replace(pair_scores, rounding=max(row.rounding for row in rows))
        pair_scores = replace(pair_scores, values=pair_scores.values.T.reshape(-1))
    scores = pair_scores.values.astype(np.float64)
    if scores.shape != (2 * count,) or not np.isfinite(scores).all():
        raise ValueError(f"{type(model).__name__} should give {2 * count} finite scores, not {scores.shape}")
    gap = scores[:count] - scores[count:]
    magnitude = np.maximum(np.abs(scores[:count]), np.abs(scores[count:]))
    return np.where(np.abs(gap) <= pair_scores.rounding * magnitude, 0.5, (gap > 0).astype(np.float64))


def _by_vectors(image_vectors: Any, caption_vectors: Any) -> np.ndarray:
    """`score_minimal_pairs` by the product of an image's vector (P, D) with those of its caption and of its foil (2 P,
    D)."""
    left, right = as_vectors(image_vectors, "image"), as_vectors(caption_vectors, "caption")
    index = np.arange(len(left.values))
    count = len(index)
    if right.values.shape != (2 * count, left.values.shape[1]):
        raise ValueError(f"{2 * count} captions of the images' width should have vectors, not {right.values.shape}")
    gap = true_scores(left, right, index, index) - true_scores(left, right, index, index + count)
    lengths = vector_norms(right.values)
    tolerance = (
        dot_product_error(left.values.shape[1]) * vector_norms(left.values) * (lengths[:count] + lengths[count:])
    )
    tie = (np.abs(gap) <= tolerance) | VectorEquality(right, lengths)(index, index + count)
    return np.where(tie, 0.5, (gap > 0).astype(np.float64))
