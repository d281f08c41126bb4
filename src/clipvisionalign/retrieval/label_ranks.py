"""The rank of each image's class among all classes, and the class that competes with it; ties count against the model.

What is a tie is defined in `ties`, as for the ranks of captions. Scores are computed in blocks of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.ranks import SCORES_PER_BLOCK, RankCounter, true_scores
from clipvisionalign.retrieval.ties import (
    NumericArray,
    VectorEquality,
    as_numeric_array,
    as_vectors,
    dot_product_error,
    tie_thresholds,
    vector_norms,
)

#: scores(first image, last image) -> (images, classes)
_LabelScores = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class LabelRanks:
    """Ranks of the true classes.

    Attributes:
        labels: (N,) number of each image's class.
        ranks: (N,) rank of that class among all classes, from 1.
        predictions: (N,) the class that is ranked first: the true one where its rank is 1, else the best of the others.
    """

    labels: np.ndarray
    ranks: np.ndarray
    predictions: np.ndarray


def label_ranks_of_vectors(image_vectors: Any, class_vectors: Any, labels: Any) -> LabelRanks:
    """Rank each image's class by dot products of vectors.

    Args:
        image_vectors: (N, D) array or tensor of any floating-point dtype and device.
        class_vectors: (C, D) of the same kinds.
        labels: (N,) number of each image's class, from 0.

    Returns:
        The ranks.

    Raises:
        ValueError: Shapes do not fit, labels are out of range, or vectors are not finite.

    >>> label_ranks_of_vectors(np.eye(3), np.eye(3), [0, 1, 1]).ranks.tolist()
    [1, 1, 3]
    """
    images, classes = as_vectors(image_vectors, "image"), as_vectors(class_vectors, "class")
    width = images.values.shape[1]
    if width != classes.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, class vectors {classes.values.shape[1]}")
    label = check_labels(labels, len(images.values), len(classes.values))
    image_norms, class_norms = vector_norms(images.values), vector_norms(classes.values)
    relative_error = dot_product_error(width)
    right = classes.values.astype(np.float64).T

    def scores(first: int, last: int) -> np.ndarray:
        # What rounding can do to a score is added to it, and taken from that of the true class.
        slack = relative_error * image_norms[first:last, None] * class_norms[None, :]
        return images.values[first:last].astype(np.float64) @ right + slack

    sizes = image_norms * class_norms[label]
    threshold = true_scores(images, classes, np.arange(len(label)), label) - relative_error * sizes
    # Classes that are one vector up to the rounding of its format score alike within this.
    format_error = classes.rounding / (1.0 - classes.rounding)
    counter = RankCounter(
        np.arange(len(label)), label, threshold, threshold - format_error * sizes, len(label),
        VectorEquality(classes, class_norms),
    )  # fmt: skip
    return _rank_labels(scores, label, counter, len(classes.values))


def label_ranks_of_scores(scores: Any, labels: Any) -> LabelRanks:
    """Rank each image's class by a table of scores.

    Args:
        scores: (N, C) array or tensor; its dtype defines ties.
        labels: (N,) number of each image's class, from 0.

    Returns:
        The ranks.

    Raises:
        ValueError: Another shape, labels out of range, or scores that are not finite.

    >>> label_ranks_of_scores([[0.1, 0.9], [0.5, 0.5]], [1, 1]).ranks.tolist()
    [1, 2]
    """
    table = as_numeric_array(scores)
    if table.values.ndim != 2:
        raise ValueError(f"scores should be (images, classes), not {table.values.shape}")
    label = check_labels(labels, *table.values.shape)
    if not np.isfinite(table.values).all():
        raise ValueError("some scores of images and classes are not finite numbers")
    threshold = tie_thresholds(table.values[np.arange(len(label)), label].astype(np.float64), table.rounding)
    counter = RankCounter(np.arange(len(label)), label, threshold, threshold, len(label))
    return _rank_labels(
        lambda first, last: table.values[first:last].astype(np.float64), label, counter, table.values.shape[1]
    )


def check_labels(labels: Any, images: int, classes: int) -> np.ndarray:
    """Check labels.

    Args:
        labels: (N,) number of each image's class, from 0.
        images: Number N of images.
        classes: Number C of classes.

    Returns:
        The labels as an array (N,) of int64.

    Raises:
        ValueError: There are fewer than two classes, or labels are not one class number for each image.
    """
    label = np.asarray(labels)
    if classes < 2:
        raise ValueError(f"{classes} classes: nothing to decide between")
    if not images or label.shape != (images,) or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(
            f"labels should be {images} class numbers, one for each image, not {label.dtype} {label.shape}"
        )
    if label.min() < 0 or label.max() >= classes:
        raise ValueError(f"labels name classes {label.min()} to {label.max()}, but there are {classes} classes")
    return label.astype(np.int64)


def _rank_labels(scores: _LabelScores, label: np.ndarray, counter: RankCounter, classes: int) -> LabelRanks:
    """Count, for each image, the classes that score at least as high as its own, and find the best of the others."""
    best_other = np.empty(len(label), dtype=np.int64)
    step = max(1, SCORES_PER_BLOCK // classes)
    for first in range(0, len(label), step):
        last = min(first + step, len(label))
        block = scores(first, last)
        block[np.arange(last - first), label[first:last]] = -np.inf
        best_other[first:last] = block.argmax(axis=1)
        counter.count_negatives(block, slice(first, last), 0, queries_are_rows=True)
    ranks = counter.ranks[:, 0]
    return LabelRanks(label, ranks, np.where(ranks == 1, label, best_other))


def mean_template_scores(table: NumericArray, templates: int) -> NumericArray:
    """Average the scores of each class's captions.

    Args:
        table: Scores (N, C x T), those of a class's T captions beside each other.
        templates: Number T of captions of a class.

    Returns:
        Their means (N, C), which tie as the scores do.
    """
    images, captions = table.values.shape
    means = np.empty((images, captions // templates))
    step = max(1, SCORES_PER_BLOCK // captions)
    for first in range(0, images, step):
        block = table.values[first : first + step].astype(np.float64)
        means[first : first + step] = block.reshape(len(block), -1, templates).mean(axis=2)
    return NumericArray(means, table.dtype_name, table.rounding)
