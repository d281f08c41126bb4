"""Projection heads, from the towers' features to the common space.

The image's vector is a linear map of the backbone's own pooled vector plus an attention pooling over its patches, whose
positions are learned: a caption also describes where a thing is in the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.models.image_tower import ImageFeatures, ImageTower


class ImageEmbeddings(NamedTuple):
    """An image in the common space. vectors: (B, D) unit length; patches: (B, P, D), None where nobody asks."""

    vectors: Tensor
    patches: Tensor | None


class CaptionEmbeddings(NamedTuple):
    """Captions in the common space. vectors: (b, D) unit length; tokens: (b, T, W) or None; mask: (b, T)."""

    vectors: Tensor
    tokens: Tensor | None
    mask: Tensor


#: Heads of the pooling over an image's patches, which share out the width of the common space.
HEADS = 8


class ImageHead(nn.Module):
    """From an image tower's features to the common space: a map of the pooled vector plus a pooling of the patches."""

    def __init__(self, tower: ImageTower, width: int, dropout: float, heads: int = HEADS) -> None:
        super().__init__()
        self.pooled, self.patch = (
            nn.Sequential(nn.LayerNorm(input_width), nn.Dropout(dropout), nn.Linear(input_width, width))
            for input_width in (tower.width, tower.patch_width)
        )
        self.position = nn.Parameter(torch.randn(tower.num_patches, width) * 0.02)
        self.weights = nn.Linear(width, heads)
        self.value = nn.Linear(width, width)
        # Every patch counts alike at the start.
        nn.init.zeros_(self.weights.weight)
        self.heads = heads

    def forward(self, features: ImageFeatures) -> ImageEmbeddings:
        """Pooled features and patches of a tower -> unit vectors (B, D) and projected patches (B, P, D)."""
        patches = self.patch(features.patches) + self.position
        weights = self.weights(patches).softmax(dim=1)
        values = self.value(patches).unflatten(-1, (self.heads, -1))
        pooled = torch.einsum("bph,bphd->bhd", weights, values).flatten(1)
        return ImageEmbeddings(F.normalize((self.pooled(features.pooled) + pooled).float(), dim=-1), patches)
