"""Calls of a model for a score matrix, by each of its interfaces, and the dtype of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.protocols import RetrievalModel, can_encode, can_score
from clipvisionalign.retrieval.ties import (
    ARITHMETIC_EPS_FACTOR,
    HALF_PRECISION_EPS,
    NumericArray,
    VectorEquality,
    as_numeric_array,
    as_vectors,
    dot_product_error,
    tie_thresholds,
    vector_norms,
)


@dataclass(frozen=True)
class ScoreTable:
    """The scores of N images with M captions.

    Attributes:
        scores: (N, M) float64.
        tie_threshold: (N, M) what another pair has to score to tie with a pair, or to precede it.
        dtype_name: The narrowest dtype that holds all outputs of the model exactly.
        rounding: The largest change of a score that rounding in that dtype can cause.
        images: The vectors (N, D) that the scores are products of; None of a model that only scores pairs.
        captions: The vectors (M, D) likewise.
    """

    scores: np.ndarray
    tie_threshold: np.ndarray
    dtype_name: str
    rounding: float
    images: NumericArray | None = None
    captions: NumericArray | None = None

    def ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """The rank of every pair, true or not; ties count against it, and captions of one image are not left out.

        Returns:
            (N, M) rank of the caption among all captions for the image, and (N, M) rank of the image among all images
            for the caption, both from 1.
        """
        images, captions = self.scores.shape
        same_image, same_caption = _equal_vectors(self.images, images), _equal_vectors(self.captions, captions)
        i2t_ranks = [
            ((self.scores >= self.tie_threshold[:, [c]]) | same_caption[c]).sum(axis=1) for c in range(captions)
        ]
        t2i_ranks = [
            ((self.scores >= self.tie_threshold[i]) | same_image[i][:, None]).sum(axis=0) for i in range(images)
        ]
        return np.stack(i2t_ranks, axis=1), np.stack(t2i_ranks)


def _equal_vectors(vectors: NumericArray | None, size: int) -> np.ndarray:
    """Which of a table's vectors are one vector, by `ties` (number, number); none where there are no vectors."""
    if vectors is None:
        return np.zeros((size, size), dtype=bool)
    a, b = np.indices((size, size)).reshape(2, -1)
    return VectorEquality(vectors, vector_norms(vectors.values))(a, b).reshape(size, size)


#: ask(images, captions) -> the table of their scores
ScoreQuery = Callable[[Sequence[Any], Sequence[str]], ScoreTable]


class ModelScores:
    """Scores of a model by each of its interfaces; outputs of another form are an error.

    Args:
        model: An object with `encode_images` and `encode_captions`, with `score`, or with both.

    Raises:
        TypeError: It has neither.
    """

    def __init__(self, model: RetrievalModel) -> None:
        self.model: Any = model
        self.has_encoders = can_encode(model)
        self.has_score = can_score(model)
        if not (self.has_encoders or self.has_score):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to audit")

    def interfaces(self) -> list[tuple[str, ScoreQuery]]:
        """The model's interfaces, each as a function that returns scores.

        Returns:
            ("vectors", function) and ("score", function), as far as the model has them.
        """
        ways: list[tuple[str, ScoreQuery]] = []
        if self.has_encoders:
            ways.append(("vectors", self.score_by_vectors))
        if self.has_score:
            ways.append(("score", self.score_by_pairs))
        return ways

    def score_by_vectors(self, images: Sequence[Any], captions: Sequence[str]) -> ScoreTable:
        """Scores by the dot product of the model's vectors.

        Args:
            images: N images.
            captions: M captions.

        Returns:
            The scores.

        Raises:
            ValueError: The vectors have another number, another width or non-finite values.
        """
        left = as_vectors(self.model.encode_images(images), "image")
        right = as_vectors(self.model.encode_captions(captions), "caption")
        table = dot_product_scores(left, right)
        _check_scores(table.scores, len(images), len(captions))
        return table

    def score_by_pairs(self, images: Sequence[Any], captions: Sequence[str]) -> ScoreTable:
        """Scores by the model's own `score`.

        Args:
            images: N images.
            captions: M captions.

        Returns:
            The scores.

        Raises:
            ValueError: The scores have another shape or non-finite values.
        """
        numbers = as_numeric_array(self.model.score(images, captions))
        _check_scores(numbers.values, len(images), len(captions))
        scores = numbers.values.astype(np.float64)
        name, rounding = _narrowest_format(numbers)
        largest = float(np.abs(scores).max(initial=0.0))
        return ScoreTable(scores, tie_thresholds(scores, numbers.rounding), name, 2 * rounding * largest)


def dot_product_scores(images: NumericArray, captions: NumericArray) -> ScoreTable:
    """The scores of two tables of vectors.

    Args:
        images: (N, D).
        captions: (M, D).

    Returns:
        The scores, computed in float64.

    Raises:
        ValueError: The widths differ.
    """
    width = images.values.shape[1]
    if width != captions.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, caption vectors {captions.values.shape[1]}")
    scores = images.values.astype(np.float64) @ captions.values.astype(np.float64).T
    sizes = np.outer(vector_norms(images.values), vector_norms(captions.values))
    exact = dot_product_error(width)
    name, rounding = max(
        (_narrowest_vector_format(images), _narrowest_vector_format(captions)),
        key=lambda vector_format: vector_format[1],
    )
    # Either vector may be another one by the rounding of its format, and still counts as the same:
    # `ties.VectorEquality`.
    max_rounding = (2 * rounding + exact) * float(sizes.max(initial=0.0))
    return ScoreTable(scores, scores - exact * sizes, name, max_rounding, images, captions)


def _check_scores(scores: np.ndarray, images: int, captions: int) -> None:
    if scores.shape != (images, captions):
        raise ValueError(f"gave {scores.shape} for {images} images and {captions} captions")
    if not np.isfinite(scores).all():
        raise ValueError("gave scores that are not finite")


def _narrowest_format(numbers: NumericArray) -> tuple[str, float]:
    """The narrowest format that holds all of the numbers exactly, and its rounding as in `as_numeric_array`.

    A model that computes in bfloat16 and then gives float32 has rounded as bfloat16 does.
    """
    if not numbers.dtype_name.startswith("float"):
        return numbers.dtype_name, numbers.rounding
    single = np.ascontiguousarray(numbers.values, dtype=np.float32)
    if not (single == numbers.values).all():
        return numbers.dtype_name, numbers.rounding
    if not (single.view(np.uint32) & 0xFFFF).any():
        return "bfloat16", HALF_PRECISION_EPS["bfloat16"]
    with np.errstate(over="ignore"):
        half = single.astype(np.float16)
    if (half == single).all():
        return "float16", HALF_PRECISION_EPS["float16"]
    return "float32", ARITHMETIC_EPS_FACTOR * float(np.finfo(np.float32).eps)


def _narrowest_vector_format(vectors: NumericArray) -> tuple[str, float]:
    """`_narrowest_format`, also of vectors that were computed in bfloat16 and brought to unit length in more digits."""
    name, rounding = _narrowest_format(vectors)
    rows = [row / np.abs(row).max() for row in vectors.values[:2].astype(np.float64) if row.any()]
    if rounding >= HALF_PRECISION_EPS["float16"] or vectors.values.shape[1] < 8 or not rows:
        return name, rounding
    # bfloat16 has 128 numbers between powers of 2: one of them was the largest, which gives the common divisor.
    for row in rows:
        scaled = row * (1.0 + np.arange(128) / 128)[:, None]
        mantissa, power = np.frexp(scaled)
        rounded = np.ldexp(np.round(256 * mantissa) / 256, power)
        close = np.abs(scaled - rounded) <= 4 * float(np.finfo(np.float32).eps) * np.abs(scaled)
        # Steps of one size for large and small numbers are those of whole numbers, int8's for one.
        is_integer = np.abs(128 * scaled - np.round(128 * scaled)) <= 1e-4
        if is_integer.all(axis=1).any() or not close.all(axis=1).any():
            return name, rounding
    return "bfloat16", HALF_PRECISION_EPS["bfloat16"]
