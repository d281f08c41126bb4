"""Calibrating: conformity scores of captioned images or of judged queries, and what cut-offs keep of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipvisionalign.search.calibration import (
    LEVELS,
    Calibration,
    UncalibratedError,
    conformal_threshold,
    units_needed,
)
from clipvisionalign.search.rerank_margin import MARGIN_DEPTH

#: Cosines in memory at a time.
MAX_COSINES = 8_000_000
#: Random splits into two halves over which what is kept is measured.
MEASURED_SPLITS = 20
#: Captions whose best hit is worse than what all others surpass, and sizes of galleries for which that is measured.
WORST_SHARE, GALLERY_SIZES = 0.01, (50, 100, 200, 500, 1000, 2000, 5000)


def calibrate_captions(
    images: np.ndarray, captions: np.ndarray, owners: np.ndarray, aligner: str = "",
    calibrated_on: dict[str, Any] | None = None, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Calibrate on captioned images.

    Args:
        images: (N, D) unit length.
        captions: (M, D) unit length.
        owners: (M,) the number of each caption's image.
        aligner: Fingerprint of the model.
        calibrated_on: What is kept of where they are from.
        seed: Of the splits over which what cut-offs keep is measured.

    Returns:
        The calibration.

    Raises:
        UncalibratedError: There are too few images for the lowest of `LEVELS`.
    """
    needed, count = units_needed(LEVELS[0]), len(np.unique(owners))
    if count < needed:
        raise UncalibratedError(
            f"{count:,} images with captions; a promise of {LEVELS[0]:g} needs {needed:,} to calibrate on, one of "
            f"{LEVELS[-1]:g} needs {units_needed(LEVELS[-1]):,}"
        )
    scores = np.einsum("md,md->m", captions, images[owners]).astype(np.float32)
    about = {"images": count, "captions": len(captions)} | (calibrated_on or {})
    calibration = Calibration(scores, owners, aligner, about)
    measured = measure_levels(calibration, images, captions, seed)
    return replace(calibration, measured=measured, best=best_of_galleries(images, captions, owners, seed))


def measure_levels(
    calibration: Calibration, images: np.ndarray, captions: np.ndarray, seed: int = 0
) -> list[dict[str, Any]]:
    """What cut-offs of one half keep of the other, and how long its answers are, over random halves.

    Args:
        calibration: Of these images and captions.
        images: (N, D) unit length.
        captions: (M, D) unit length, in the order of the calibration's scores.
        seed: Of the splits.

    Returns:
        For each of `LEVELS` that has enough images: "level", "threshold", "answer_length" (mean number of the N images
        that reach the cut-off), "kept" (mean over splits, with the 95 % interval over images).
    """
    rng, unit_numbers = np.random.default_rng(seed), np.unique(calibration.units)
    unit = np.searchsorted(unit_numbers, calibration.units)
    weight = 1.0 / np.bincount(unit)[unit]
    levels = [level for level in LEVELS if len(unit_numbers) >= units_needed(level)]
    kept = np.zeros((len(levels), len(unit_numbers)))
    for _ in range(MEASURED_SPLITS):
        half = rng.permutation(len(unit_numbers)) % 2
        for test in (0, 1):
            is_test = half[unit] == test
            for position, level in enumerate(levels):
                cut = conformal_threshold(calibration.scores[~is_test], unit[~is_test], level)
                reached = is_test & (calibration.scores >= cut)
                kept[position] += np.bincount(unit, weight * reached, len(unit_numbers))
    kept /= MEASURED_SPLITS
    cuts = [calibration.threshold(level) for level in levels]
    lengths = answer_lengths(images, captions, cuts)
    return [
        {"level": level, "threshold": cut, "answer_length": float((weight * length).sum() / len(unit_numbers)),
         "kept": _mean_interval(share)}
        for level, cut, length, share in zip(levels, cuts, lengths, kept, strict=True)
    ]  # fmt: skip


def answer_lengths(images: np.ndarray, captions: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """How many images reach cut-offs, for each of several queries.

    Args:
        images: (N, D) unit length.
        captions: (M, D) unit length.
        cuts: L cosines.

    Returns:
        (L, M) counts.
    """
    lengths = np.empty((len(cuts), len(captions)), dtype=np.int64)
    for rows, cosines in _cosine_chunks(images, captions):
        for position, cut in enumerate(cuts):
            lengths[position, rows] = (cosines >= cut).sum(axis=1)
    return lengths


def best_of_galleries(
    images: np.ndarray, captions: np.ndarray, owners: np.ndarray, seed: int = 0
) -> list[tuple[int, float]]:
    """What the best hits of captions surpass, in galleries of several sizes that hold their own images.

    Args:
        images: (N, D) unit length.
        captions: (M, D) unit length.
        owners: (M,) the number of each caption's image.
        seed: Of the drawing of the galleries.

    Returns:
        For each of `GALLERY_SIZES` up to N the cosine that all but `WORST_SHARE` of the captions reach.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    sizes = [size for size in GALLERY_SIZES if size <= len(images)]
    best = np.empty((len(sizes), len(captions)))
    for rows, cosines in _cosine_chunks(images, captions):
        own = cosines[np.arange(len(cosines)), owners[rows]]
        for position, size in enumerate(sizes):
            best[position, rows] = np.maximum(own, cosines[:, order[:size]].max(axis=1))
    return [(size, float(np.quantile(each, WORST_SHARE))) for size, each in zip(sizes, best, strict=True)]


def first_images(
    images: np.ndarray, captions: np.ndarray, owners: np.ndarray, depth: int = MARGIN_DEPTH
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first images of each caption.

    Args:
        images: (N, D) unit length.
        captions: (M, D) unit length.
        owners: (M,) the number of each caption's image.
        depth: Number of images, at most all.

    Returns:
        (M, K) their cosines, best first, (M, K) their numbers, and (M,) the position of the own image, K where it is
        not among them.
    """
    depth = min(depth, len(images))
    cosines = np.empty((len(captions), depth))
    numbers = np.empty((len(captions), depth), dtype=np.int64)
    for rows, table in _cosine_chunks(images, captions):
        numbers[rows] = np.argsort(-table, axis=1, kind="stable")[:, :depth]
        cosines[rows] = np.take_along_axis(table, numbers[rows], axis=1)
    is_own = numbers == np.asarray(owners)[:, None]
    return cosines, numbers, np.where(is_own.any(axis=1), is_own.argmax(axis=1), depth)


def calibrate_judged(
    images: np.ndarray, queries: np.ndarray | Sequence[np.ndarray], relevant: Sequence[Sequence[int]],
    aligner: str = "", judged: str = "judged queries",
) -> Calibration:  # fmt: skip
    """Calibrate an index on queries of which all relevant images are known.

    A query is the unit; each of its relevant images weighs as one of them, so that the mean share of the relevant
    images that reach the cut-off is promised. Queries without a relevant image have no part in it; they are counted.

    Args:
        images: (N, D) vectors of the index.
        queries: (Q, D) vectors of the queries.
        relevant: For each query the rows of its relevant images.
        aligner: Fingerprint of the model.
        judged: Name of the file of judgements.

    Returns:
        The calibration.

    Raises:
        UncalibratedError: Too few queries have a relevant image: 50 are needed.
    """
    positions = [query for query, rows in enumerate(relevant) for _ in rows]
    rows = [row for each in relevant for row in each]
    needed, count = units_needed(0.9), len(set(positions))
    if count < needed:
        raise UncalibratedError(
            f"{judged}: {count:,} judged queries with a relevant image; a promise of 0.9 needs {needed:,}, one of 0.95 "
            f"needs {units_needed(0.95):,}"
        )
    scores = np.einsum("md,md->m", np.asarray(queries)[positions], images[rows]).astype(np.float32)
    about = {"judged": judged, "queries": count, "without_relevant": len(relevant) - count, "images": len(rows)}
    return Calibration(scores, np.array(positions), aligner, about)


def _cosine_chunks(images: np.ndarray, captions: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines of some captions at a time with all images."""
    size = max(1, MAX_COSINES // max(1, len(images)))
    for start in range(0, len(captions), size):
        rows = slice(start, min(start + size, len(captions)))
        yield rows, captions[rows] @ images.T


def _mean_interval(values: np.ndarray) -> dict[str, float]:
    """The mean with its 95 % interval over units, within 0 and 1."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}
