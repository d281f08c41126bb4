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
        """Images -> vectors (N, D)."""

    def encode_captions(self, captions: Sequence[str], /) -> Any:
        """Captions -> vectors (M, D)."""


class PairModel(Protocol):
    """One score a pair, which may depend on the image and the caption of the pair, and on nothing else."""

    def score(self, images: Sequence[Any], captions: Sequence[str], /) -> Any:
        """Images and captions -> the scores of all pairs (N, M)."""


class ScoredPairs(Protocol):
    """The images and captions of a gallery, encoded once, of which any pairs can be scored.

    image_vectors: (N, D); caption_vectors: (M, D); both as the dual encoder gives them.
    """

    image_vectors: Any
    caption_vectors: Any

    def __call__(self, image_index: np.ndarray, caption_index: np.ndarray, /) -> Any:
        """Numbers of images (Q,) and of captions (Q,) -> the scores of these pairs (Q,)."""


class Reranker(DualEncoder, Protocol):
    """A dual encoder that also scores pairs, to re-rank its first candidates."""

    def pair_scorer(self, images: Sequence[Any], captions: Sequence[str], /) -> ScoredPairs:
        """Encode images and captions once, to score pairs of them."""


#: Anything that can be measured. A model whose attribute `scores_all_pairs` is true is measured by `score`, though it
#: encodes as well.
RetrievalModel: TypeAlias = DualEncoder | PairModel


def can_encode(model: object) -> TypeGuard[DualEncoder]:
    """Whether a model gives one vector an image and one a caption."""
    return hasattr(model, "encode_images") and hasattr(model, "encode_captions")


def can_score(model: object) -> TypeGuard[PairModel]:
    """Whether a model gives one score a pair."""
    return hasattr(model, "score")


def can_rerank(model: object) -> TypeGuard[Reranker]:
    """Whether a model gives vectors and, for pairs of them, scores."""
    return can_encode(model) and hasattr(model, "pair_scorer")
