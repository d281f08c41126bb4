"""Outputs of an image tower, or of its first blocks, that are kept on disk: read for the images of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.backbone_parts import EarlyFeatures
from clipvisionalign.models.heads import ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures


class _FeatureCache:
    """What reads arrays of N images in V views."""

    rows: np.ndarray | None

    def select(self, rows: np.ndarray) -> None:
        """Take images at other places from now on: for a data set from which some images were left out.

        Args:
            rows: (n,) places among the cached images; image i is the one at `rows[i]`.
        """
        self.rows = rows

    def _read(self, array: np.ndarray, index: Tensor, view: Tensor, device: torch.device) -> Tensor:
        """Some images of an array, each in one view, in float32."""
        rows = index.numpy() if self.rows is None else self.rows[index.numpy()]
        return torch.from_numpy(array[rows, view.numpy()].astype(np.float32)).to(device)


@dataclass
class ImageFeatureCache(_FeatureCache):
    """Features of N images in V views.

    Attributes:
        folder: Where they are.
        pooled: (N, V, C) float16, on disk.
        patches: (N, V, P, C) float16, on disk.
        failures: Reasons, by the number of each image that could not be decoded.
        rows: (n,) numbers of the images that are taken, see `select`; None for all.
    """

    folder: Path
    pooled: np.ndarray
    patches: np.ndarray
    failures: dict[int, str]
    rows: np.ndarray | None = None

    @property
    def views(self) -> int:
        """The number of cached views of each image."""
        return self.pooled.shape[1]

    @property
    def nbytes(self) -> int:
        """The space on disk."""
        return self.pooled.nbytes + self.patches.nbytes

    def __call__(self, index: Tensor, view: Tensor, device: torch.device) -> ImageFeatures:
        """The features of some images, each in one view.

        Args:
            index: (B,) numbers of the images.
            view: (B,) numbers of their views.
            device: Where the features go.

        Returns:
            Pooled (B, C) and patches (B, P, C), float32.
        """
        return ImageFeatures(*(self._read(array, index, view, device) for array in (self.pooled, self.patches)))


@dataclass
class EarlyFeatureCache(_FeatureCache):
    """Outputs of the first blocks of an image tower for N images in V views.

    Attributes:
        folder: Where they are.
        features: (N, V, h, w, C) or (N, V, P, C) float16, on disk.
        blocks: Number of blocks.
        failures: Reasons, by the number of each image that could not be decoded.
        rows: (n,) numbers of the images that are taken, see `select`; None for all.
    """

    folder: Path
    features: np.ndarray
    blocks: int
    failures: dict[int, str]
    rows: np.ndarray | None = None

    @property
    def views(self) -> int:
        """The number of cached views of each image."""
        return self.features.shape[1]

    @property
    def nbytes(self) -> int:
        """The space on disk."""
        return self.features.nbytes

    def __call__(self, index: Tensor, view: Tensor, device: torch.device) -> EarlyFeatures:
        """The outputs for some images, each in one view.

        Args:
            index: (B,) numbers of the images.
            view: (B,) numbers of their views.
            device: Where they go.

        Returns:
            (B, C, h, w), channels last, or (B, P, C), float32, with the number of blocks.
        """
        features = self._read(self.features, index, view, device)
        return EarlyFeatures(features.permute(0, 3, 1, 2) if features.ndim == 4 else features, self.blocks)


AnyFeatureCache = ImageFeatureCache | EarlyFeatureCache


def embed_cached(aligner: Aligner, features: ImageFeatures | EarlyFeatures) -> ImageEmbeddings:
    """Images in the common space, from outputs on disk.

    Args:
        aligner: The model.
        features: What a cache has of them.

    Returns:
        Their embeddings.
    """
    whole = aligner.image_tower(features) if isinstance(features, EarlyFeatures) else features
    return aligner.embed_image_features(whole)
