"""Projection heads, from the towers' features to the common space.

The image's vector is a linear map of the backbone's own pooled vector plus an attention pooling over its patches, whose
positions are learned: a caption also describes where a thing is in the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.models.dropout import Dropout
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower


class ImageEmbeddings(NamedTuple):
    """Images in the common space.

    Attributes:
        vectors: (B, D) unit length.
        patches: (B, P, D), not of unit length; None where no design uses them.
    """

    vectors: Tensor
    patches: Tensor | None


class CaptionEmbeddings(NamedTuple):
    """Captions in the common space.

    Attributes:
        vectors: (b, D) unit length.
        tokens: (b, T, W) outputs of the text tower; None for designs that compare vectors only.
        mask: (b, T) 1 on tokens of the caption, 0 on padding.
    """

    vectors: Tensor
    tokens: Tensor | None
    mask: Tensor


#: Heads of the pooling over an image's patches, which share out the width of the common space.
HEADS = 8


class ImageHead(nn.Module):
    """From an image tower's features to the common space: a map of the pooled vector plus a pooling of the patches.

    Args:
        tower: The image tower, whose widths and number of patches are used.
        width: D, width of the common space, a multiple of `heads`.
        dropout: Share of the features that is dropped during training.
        heads: Number of heads of the pooling.
    """

    def __init__(self, tower: ImageTower, width: int, dropout: float, heads: int = HEADS) -> None:
        super().__init__()
        self.pooled, self.patch = (
            nn.Sequential(nn.LayerNorm(input_width), Dropout(dropout), nn.Linear(input_width, width))
            for input_width in (tower.width, tower.patch_width)
        )
        self.position = nn.Parameter(torch.randn(tower.num_patches, width) * 0.02)
        self.weights = nn.Linear(width, heads)
        self.value = nn.Linear(width, width)
        # Every patch counts alike at the start.
        nn.init.zeros_(self.weights.weight)
        self.heads = heads

    def forward(self, features: ImageFeatures) -> ImageEmbeddings:
        """Project features to the common space.

        Args:
            features: Pooled (B, C) and patches (B, P, C').

        Returns:
            Unit vectors (B, D) and projected patches (B, P, D).
        """
        patches = self.patch(features.patches) + self.position
        weights = self.weights(patches).softmax(dim=1)
        values = self.value(patches).unflatten(-1, (self.heads, -1))
        pooled = torch.einsum("bph,bphd->bhd", weights, values).flatten(1)
        return ImageEmbeddings(F.normalize((self.pooled(features.pooled) + pooled).float(), dim=-1), patches)
