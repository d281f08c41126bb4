"""Does a model score a true caption above its twin? Any model that answers as in `evaluate` can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipvisionalign.retrieval.evaluate import as_array, can_encode
from clipvisionalign.retrieval.ranks import TIE_FLOAT32


def outscored(model: Any, images: Sequence[Any], true: Sequence[str], twins: Sequence[str]) -> np.ndarray:
    """Whether image i with true caption i outscores image i with twin i: (P,) of 1, 0, and 0.5 for a tie.

    A model that sees no difference, a bag of words say, gets exactly the half that chance would give it. Asks
    `score_pairs(images, captions, image index, caption index)` where a model has it, else the cosines of its vectors,
    else `score`.
    """
    count = len(images)
    if not count:
        return np.empty(0)
    index = np.concatenate([np.arange(count), np.arange(count)])
    captions = [*true, *twins]
    if hasattr(model, "score_pairs"):
        scores = as_array(model.score_pairs(images, captions, index, np.arange(2 * count)))
    elif can_encode(model):
        left, right = as_array(model.encode_images(images)), as_array(model.encode_captions(captions))
        scores = np.einsum("pd,pd->p", left[index].astype(np.float64), right.astype(np.float64))
    else:
        some = [as_array(model.score([image], pair))[0] for image, *pair in zip(images, true, twins, strict=True)]
        scores = np.array(some).T.reshape(-1)
    if scores.shape != (2 * count,) or not np.isfinite(scores).all():
        raise ValueError(f"{type(model).__name__} should give {2 * count} finite scores, not {scores.shape}")
    gap = scores[:count].astype(np.float64) - scores[count:]
    tie = TIE_FLOAT32 * float(np.abs(scores).max(initial=0.0))
    return np.where(np.abs(gap) <= tie, 0.5, (gap > 0).astype(np.float64))
