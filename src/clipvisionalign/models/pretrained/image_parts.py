"""Image tower and image head of a pretrained dual encoder.

A family subclasses the tower where its library's model differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.images import ImageTransform
from clipvisionalign.models.heads import ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures, ImageTowerConfig
from clipvisionalign.models.pretrained.last_layer import take_pooled_rows
from clipvisionalign.models.weights import WeightsOrigin


class PretrainedImageTower(nn.Module):
    """The image tower of a pretrained dual encoder; answers the calls of `ImageTower`.

    Args:
        backbone: the library's vision model, without projection.
        image_transform: from an image to what `backbone` takes.
        width: C, width of the pooled vector.
        num_patches: P.
        prefix_tokens: tokens in front of the patches, such as a class token.
    """

    def __init__(
        self, backbone: nn.Module, image_transform: ImageTransform, width: int, num_patches: int, prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.image_transform = image_transform
        self.width = self.raw_patch_width = width
        self.num_patches, self.prefix_tokens = num_patches, prefix_tokens
        self.config = ImageTowerConfig()
        self.origin = WeightsOrigin("files", "")
        self._takes_rows = take_pooled_rows(backbone)
        #: Whether `forward` returns patches, pooled as the vector is and ready for the head, as designs that score
        #: pairs need them; else none.
        self.pools_patches = False

    @property
    def patch_width(self) -> int:
        """Width of a patch's vector as `forward` returns it."""
        return self.width if self.pools_patches else self.raw_patch_width

    @property
    def patch_count(self) -> int:
        """How many patches of an image `forward` returns: P, or 0."""
        return self.num_patches if self.pools_patches else 0

    @property
    def last_block(self) -> nn.Module | None:
        """The last block of a tower that is pooled from a class token alone: before it, patches still have a part in
        the vector. None where the pooling itself reads the patches."""
        return None

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Encode images.

        Args:
            pixels: (B, ...) as `image_transform` returns them.

        Returns:
            Pooled (B, C) and patches (B, P, C), not of unit length; no patches (B, 0, C) unless `pools_patches`.
        """
        if self.pools_patches:
            return self.features_of(self.feature_map(pixels))
        return self.without_patches(self.encode_pooled(pixels))

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        """Run the backbone for the pooled vector alone; a family that can spare work implements it.

        Args:
            pixels: (B, ...) as `image_transform` returns them.

        Returns:
            Pooled (B, C).
        """
        return self.pool(self.feature_map(pixels))

    def without_patches(self, pooled: Tensor) -> ImageFeatures:
        """Features of images whose patches nobody asked for.

        Args:
            pooled: (B, C).

        Returns:
            Them, and patches (B, 0, C).
        """
        return ImageFeatures(pooled, pooled.new_empty(pooled.shape[0], 0, self.raw_patch_width))

    def feature_map(self, pixels: Tensor) -> Tensor:
        """The outputs of the last layer.

        Args:
            pixels: (B, 3, S, S) as `image_transform` returns them.

        Returns:
            Tokens (B, prefix + P, C), before any pooling.
        """
        return self.backbone(pixel_values=self.image_transform.normalize(pixels)).last_hidden_state

    def features_of(self, features: Tensor) -> ImageFeatures:
        """Pool the outputs of the last layer.

        Args:
            features: (B, prefix + P, C) as `feature_map` returns them.

        Returns:
            Pooled (B, C) and patches (B, P, C).
        """
        patches = self.patches_in(features)
        return ImageFeatures(self.pool(features), self.pool_each(patches) if self.pools_patches else patches)

    def patches_in(self, features: Tensor) -> Tensor:
        """The patches among the outputs of the last layer.

        Args:
            features: (B, prefix + P, C) as `feature_map` returns them.

        Returns:
            (B, P, C), a view.
        """
        return features[:, self.prefix_tokens :]

    def pool(self, features: Tensor) -> Tensor:
        """Reduce the outputs of the last layer to one vector an image, as the family does; each family implements it.

        Args:
            features: (B, prefix + P, C).

        Returns:
            (B, C).
        """
        raise NotImplementedError

    def pool_each(self, patches: Tensor) -> Tensor:
        """Pool each patch as `pool` would if the image were this patch alone; each family implements it.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Do nothing: the text tower saves the files of both.

        Args:
            folder: Not used.
        """


class PretrainedImageHead(nn.Module):
    """From an image tower's features to the common space, by the model's own projection.

    Args:
        projection: (..., C) -> (..., D).
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        #: Whether patches are projected too, for a design that scores pairs.
        self.projects_patches = False

    def forward(self, features: ImageFeatures) -> ImageEmbeddings:
        """Project an image tower's features to the common space.

        Args:
            features: Pooled (B, C) and patches (B, P, C).

        Returns:
            Unit vectors (B, D), and patches (B, P, D), not of unit length, if `projects_patches`, else None.
        """
        patches = self.projection(features.patches) if self.projects_patches else None
        return ImageEmbeddings(F.normalize(self.projection(features.pooled).float(), dim=-1), patches)
