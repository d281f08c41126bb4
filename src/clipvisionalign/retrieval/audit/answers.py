"""Asking a model for a table of scores, whichever way it answers, and the number format of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.protocols import RetrievalModel, can_encode, can_score
from clipvisionalign.retrieval.ties import (
    ARITHMETIC,
    NARROW,
    Alike,
    Numbers,
    lengths_of,
    lowest_tying,
    numbers_of,
    product_rounding,
    vectors_of,
)


@dataclass(frozen=True)
class _Table:
    """What a model answered of N images and M captions.

    scores: (N, M) float64; bar: (N, M) what another pair has to score to tie with a pair or to stand before it; format:
    the model's number format; rounding: by how much that can change a score; images, captions: the vectors, if any.
    """

    scores: np.ndarray
    bar: np.ndarray
    format: str
    rounding: float
    images: Numbers | None = None
    captions: Numbers | None = None

    def ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, M) twice: each pair's caption among all captions for its image, and its image among all images.

        1 is the first, ties count against the pair, and captions of one image are not left out.
        """
        images, captions = self.scores.shape
        same_image, same_caption = _alike(self.images, images), _alike(self.captions, captions)
        forth = [((self.scores >= self.bar[:, [c]]) | same_caption[c]).sum(axis=1) for c in range(captions)]
        back = [((self.scores >= self.bar[i]) | same_image[i][:, None]).sum(axis=0) for i in range(images)]
        return np.stack(forth, axis=1), np.stack(back)


def _alike(vectors: Numbers | None, number: int) -> np.ndarray:
    """Which of a table's vectors are one vector, as `ties` says (number, number); none where there are no vectors."""
    if vectors is None:
        return np.zeros((number, number), dtype=bool)
    a, b = np.indices((number, number)).reshape(2, -1)
    return Alike(vectors, lengths_of(vectors.values))(a, b).reshape(number, number)


#: ask(images, captions) -> the table of their scores
_Ask = Callable[[Sequence[Any], Sequence[str]], _Table]


class _Answers:
    """Asks a model for a table of scores, whichever way it answers; a table of another form is told as an error."""

    def __init__(self, model: RetrievalModel) -> None:
        self.model: Any = model
        self.encodes = can_encode(model)
        self.scores = can_score(model)
        if not (self.encodes or self.scores):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to audit")

    def ways(self) -> list[tuple[str, _Ask]]:
        """Every way in which the model answers, each asked on its own."""
        ways: list[tuple[str, _Ask]] = []
        if self.encodes:
            ways.append(("vectors", self.by_vectors))
        if self.scores:
            ways.append(("score", self.by_score))
        return ways

    def by_vectors(self, images: Sequence[Any], captions: Sequence[str]) -> _Table:
        left = vectors_of(self.model.encode_images(images), "image")
        right = vectors_of(self.model.encode_captions(captions), "caption")
        table = _products(left, right)
        _check_form(table.scores, len(images), len(captions))
        return table

    def by_score(self, images: Sequence[Any], captions: Sequence[str]) -> _Table:
        numbers = numbers_of(self.model.score(images, captions))
        _check_form(numbers.values, len(images), len(captions))
        scores = numbers.values.astype(np.float64)
        name, rounding = _narrowest_format(numbers)
        largest = float(np.abs(scores).max(initial=0.0))
        return _Table(scores, lowest_tying(scores, numbers.rounding), name, 2 * rounding * largest)


def _products(images: Numbers, captions: Numbers) -> _Table:
    """The table of two tables of vectors. Raises ValueError for vectors of different widths."""
    width = images.values.shape[1]
    if width != captions.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, caption vectors {captions.values.shape[1]}")
    scores = images.values.astype(np.float64) @ captions.values.astype(np.float64).T
    sizes = np.outer(lengths_of(images.values), lengths_of(captions.values))
    exact = product_rounding(width)
    name, rounding = max((_format_of_vectors(images), _format_of_vectors(captions)), key=lambda found: found[1])
    # Either vector may be another one by the rounding of its format, and still counts as the same: `ties.Alike`.
    reach = (2 * rounding + exact) * float(sizes.max(initial=0.0))
    return _Table(scores, scores - exact * sizes, name, reach, images, captions)


def _check_form(scores: np.ndarray, images: int, captions: int) -> None:
    if scores.shape != (images, captions):
        raise ValueError(f"gave {scores.shape} for {images} images and {captions} captions")
    if not np.isfinite(scores).all():
        raise ValueError("gave scores that are not finite")


def _narrowest_format(numbers: Numbers) -> tuple[str, float]:
    """The narrowest format that holds all of the numbers exactly, and its rounding as in `numbers_of`.

    A model that computes in bfloat16 and then gives float32 has rounded as bfloat16 does.
    """
    if not numbers.format.startswith("float"):
        return numbers.format, numbers.rounding
    single = np.ascontiguousarray(numbers.values, dtype=np.float32)
    if not (single == numbers.values).all():
        return numbers.format, numbers.rounding
    if not (single.view(np.uint32) & 0xFFFF).any():
        return "bfloat16", NARROW["bfloat16"]
    with np.errstate(over="ignore"):
        half = single.astype(np.float16)
    if (half == single).all():
        return "float16", NARROW["float16"]
    return "float32", ARITHMETIC * float(np.finfo(np.float32).eps)


def _format_of_vectors(vectors: Numbers) -> tuple[str, float]:
    """`_narrowest_format`, also of vectors that were computed in bfloat16 and brought to unit length in more digits."""
    name, rounding = _narrowest_format(vectors)
    rows = [row / np.abs(row).max() for row in vectors.values[:2].astype(np.float64) if row.any()]
    if rounding >= NARROW["float16"] or vectors.values.shape[1] < 8 or not rows:
        return name, rounding
    # bfloat16 has 128 numbers between powers of 2: one of them was the largest, which tells what all were divided by.
    for row in rows:
        scaled = row * (1.0 + np.arange(128) / 128)[:, None]
        mantissa, power = np.frexp(scaled)
        rounded = np.ldexp(np.round(256 * mantissa) / 256, power)
        close = np.abs(scaled - rounded) <= 4 * float(np.finfo(np.float32).eps) * np.abs(scaled)
        # Steps of one size for large and small numbers are those of whole numbers, int8's for one.
        whole = np.abs(128 * scaled - np.round(128 * scaled)) <= 1e-4
        if whole.all(axis=1).any() or not close.all(axis=1).any():
            return name, rounding
    return "bfloat16", NARROW["bfloat16"]
