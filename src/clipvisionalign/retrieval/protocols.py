"""The methods that a model provides to be measured and audited, as types; no class of this project is required.

A model answers `DualEncoder`, `PairModel`, or both. Vectors and scores may be tensors, arrays or lists of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np


class DualEncoder(Protocol):
    """One vector an image and one a caption, each depending on that image or that caption alone."""

    def encode_images(self, images: Sequence[Any], /) -> Any:
        """Encode images.

        Args:
            images: N images, in any form that the model takes.

        Returns:
            Vectors (N, D); they need not have unit length: they are compared by dot products.
        """

    def encode_captions(self, captions: Sequence[str], /) -> Any:
        """Encode captions.

        Args:
            captions: M captions.

        Returns:
            Vectors (M, D) of the images' width.
        """


class PairModel(Protocol):
    """One score a pair, which may depend on the image and the caption of the pair, and on nothing else."""

    def score(self, images: Sequence[Any], captions: Sequence[str], /) -> Any:
        """Score every image with every caption.

        Args:
            images: N images, in any form that the model takes.
            captions: M captions.

        Returns:
            Scores (N, M); a higher one is a better match.
        """


class ScoredPairs(Protocol):
    """The images and captions of a gallery, encoded once, of which any pairs can be scored.

    Attributes:
        image_vectors: (N, D), as the dual encoder gives them.
        caption_vectors: (M, D), as the dual encoder gives them.
    """

    image_vectors: Any
    caption_vectors: Any

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray, /) -> Any:
        """Score pairs.

        Args:
            image_index: (Q,) numbers of images, from 0.
            caption_index: (Q,) numbers of captions, from 0.

        Returns:
            (Q,) score of image `image_index[q]` with caption `caption_index[q]`.
        """


class Reranker(DualEncoder, Protocol):
    """A dual encoder that also scores pairs, to re-rank its first candidates."""

    def pair_scorer(self, images: Sequence[Any], captions: Sequence[str], /) -> ScoredPairs:
        """Encode images and captions once, to score pairs of them.

        Args:
            images: N images, in any form that the model takes.
            captions: M captions.

        Returns:
            The vectors of the gallery, and scores of any of its pairs.
        """


#: Anything that can be measured. A model whose attribute `scores_all_pairs` is true is measured by `score`, though it
#: encodes as well.
RetrievalModel: TypeAlias = DualEncoder | PairModel


def can_encode(model: object) -> TypeGuard[DualEncoder]:
    """Whether a model gives one vector an image and one a caption.

    Args:
        model: Any object.

    Returns:
        Whether it has the attributes `encode_images` and `encode_captions`; neither is called.
    """
    return hasattr(model, "encode_images") and hasattr(model, "encode_captions")


def can_score(model: object) -> TypeGuard[PairModel]:
    """Whether a model gives one score a pair.

    Args:
        model: Any object.

    Returns:
        Whether it has the attribute `score`; it is not called.
    """
    return hasattr(model, "score")


def can_rerank(model: object) -> TypeGuard[Reranker]:
    """Whether a model gives vectors and, for pairs of them, scores.

    Args:
        model: Any object.

    Returns:
        Whether it has `encode_images`, `encode_captions` and `pair_scorer`; none is called.
    """
    return can_encode(model) and hasattr(model, "pair_scorer")
