"""Checks that a pair's score does not depend on other inputs or earlier calls.

Scores of one pair may differ by what the rounding of the model's dtype can do to them, or by a hundredth of the
scores' spread, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clipvisionalign.retrieval.audit.answers import ScoreQuery, ScoreTable, dot_product_scores
from clipvisionalign.retrieval.audit.report import Finding
from clipvisionalign.retrieval.protocols import DualEncoder
from clipvisionalign.retrieval.ties import NumericArray, as_vectors

#: A pair's scores may differ by this share of the scores' spread for the order in which a machine adds up.
SCORE_TOLERANCE = 1e-2


def _max_change(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0.0))


def _check_unchanged(change: float, table: ScoreTable, what: str, reason: str) -> Finding:
    """change: the largest of a pair's score; table: what it is held against; reason: where it is too large."""
    spread = max(float(np.std(table.scores)), 1e-6 * float(np.abs(table.scores).max(initial=0.0)))
    tolerance, tolerance_source = max(
        (SCORE_TOLERANCE * spread, "1 % of the scores' spread"), (table.rounding, f"rounding in {table.dtype_name}")
    )
    passed = bool(change <= tolerance)
    message = (
        f"{what} {'stays the same' if passed else 'does not stay the same'}: a score changes by at most {change:.2g}"
    )
    message += f", {'within' if passed else 'above'} the tolerance of {tolerance:.2g} ({tolerance_source})"
    return Finding(passed, change, message if passed else f"{message}: {reason}")


def check_batch_independence(
    ask: ScoreQuery,
    score_together: Callable[[], ScoreTable],
    images: list[Any],
    captions: list[str],
    rng: np.random.Generator,
) -> Finding:
    """Whether scores are the same all together, in another order, and alone.

    Sixteen pairs are asked alone, at most: eight drawn at random, and the same eight images with the captions at their
    own position.

    Args:
        ask: Returns the model's scores of images with captions.
        score_together: Returns the scores of all images with all captions.
        images: N images.
        captions: N captions.
        rng: Source of randomness; it is advanced.

    Returns:
        The finding; its figure is the largest change of a score.
    """
    scores = score_together().scores
    rows, columns = rng.permutation(len(images)), rng.permutation(len(captions))
    shuffled = ask([images[i] for i in rows], [captions[c] for c in columns])
    worst = _max_change(scores[np.ix_(rows, columns)], shuffled.scores)
    for i, c in zip(rows[:8], columns[:8], strict=False):
        for image, caption in ((i, c), (i, i % len(captions))):
            single_score = ask([images[image]], [captions[caption]]).scores[0, 0]
            worst = max(worst, abs(float(single_score - scores[image, caption])))
    kind = "scores" if shuffled.images is None else "vectors"
    reason = f"its {kind} depend on what else is in the batch, as with batch norm in training or int8 ranges of a batch"
    return _check_unchanged(worst, score_together(), "a pair's score, alone or in any batch and order,", reason)


def check_history_independence(model: DualEncoder, images: list[Any], captions: list[str]) -> Finding:
    """Whether vectors are the same after other inputs: captions after other images, images once more.

    Args:
        model: The model.
        images: N images.
        captions: N captions.

    Returns:
        The finding; its figure is the largest change of a score.

    Raises:
        ValueError: The model returns another number of vectors.
    """

    def vectors(some_images: list[Any]) -> tuple[NumericArray, NumericArray]:
        left = as_vectors(model.encode_images(some_images), "image")
        right = as_vectors(model.encode_captions(captions), "caption")
        if len(left.values) != len(some_images) or len(right.values) != len(captions):
            expected = f"{len(some_images)} images and {len(captions)} captions"
            raise ValueError(f"gave {len(left.values)} and {len(right.values)} vectors for {expected}")
        return left, right

    half = max(1, len(images) // 2)
    left, right = vectors(images)
    left_again, right_again = vectors(images[::-1][:half])
    table = dot_product_scores(left, right)
    worst = max(
        _max_change(table.scores, dot_product_scores(left, right_again).scores),
        _max_change(table.scores[::-1][:half], dot_product_scores(left_again, right).scores),
    )
    reason = "its vectors depend on what was encoded before"
    return _check_unchanged(
        worst, table, "a caption's vector, after other images than its own, and an image's,", reason
    )


def check_gallery_size_independence(
    ask: ScoreQuery, score_together: Callable[[], ScoreTable], images: list[Any], captions: list[str]
) -> Finding:
    """Whether scores are the same with fewer images than captions, and with more.

    Args:
        ask: Returns the model's scores of images with captions.
        score_together: Returns the scores of all images with all captions.
        images: N images.
        captions: N captions.

    Returns:
        The finding; its figure is the largest change of a score.
    """
    scores = score_together().scores
    few = max(2, len(images) // 3)
    tall, wide = ask(images, captions[:few]), ask(images[-few:], captions)
    worst = max(_max_change(scores[:, :few], tall.scores), _max_change(scores[-few:], wide.scores))
    reason = "it depends on how many others are asked"
    return _check_unchanged(
        worst, score_together(), "a score among N images and M captions, N and M unrelated,", reason
    )
