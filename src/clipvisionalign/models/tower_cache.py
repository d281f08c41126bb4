"""Outputs of frozen towers, kept where the same images and captions come again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from clipvisionalign.images import ImageSource
from clipvisionalign.models.image_tower import ImageFeatures

#: Images and captions that are remembered at most: half a GiB of features each.
TOWER_CACHE_LIMITS = 4000, 20_000


@dataclass
class TowerOutputCache:
    """Outputs of frozen towers.

    Attributes:
        images: Features by the image: its path, its bytes, or the Pillow object.
        captions: Pooled (W,) and tokens (T, W) by the caption's tokens.
    """

    images: dict[ImageSource, ImageFeatures] = field(default_factory=dict)
    captions: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
