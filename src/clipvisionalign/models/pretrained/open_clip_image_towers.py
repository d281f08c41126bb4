"""Image towers of open_clip's models: its own vision transformers and ResNets, and timm's backbones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipvisionalign.images import ImageTransform
from clipvisionalign.models.image_tower import timm_patches
from clipvisionalign.models.pretrained.last_layer import run_pooled, take_pooled_block
from clipvisionalign.models.pretrained.parts import PretrainedImageTower, pool_alone


class OpenClipViT(PretrainedImageTower):
    """open_clip's `VisionTransformer`, its projection taken off."""

    #: Whether the last block can be run for the class token alone, and that is what is pooled.
    pools_last = False

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Run the transformer.

        Args:
            pixels: (B, 3, S, S).

        Returns:
            (B, 1 + P, C) tokens.
        """
        return self._run(pixels, keeps_tokens=True)

    def _run(self, pixels: Tensor, keeps_tokens: bool) -> Tensor:
        """(B, 1 + P, C) tokens; without `keeps_tokens` only the class token is of use, where it is what is pooled."""
        visual = self.backbone
        embedded = visual._embeds(self.image_transform.normalize(pixels))
        if not self.pools_last:
            return visual.transformer(embedded)
        # `shape[0]` and not `len`, which an export to ONNX would take for a constant.
        rows = torch.zeros(pixels.shape[0], dtype=torch.long, device=pixels.device)
        return run_pooled(visual.transformer, embedded, rows, keeps_tokens=keeps_tokens)

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        """Run the transformer, its last block for the class token alone where that is what is pooled.

        Args:
            pixels: (B, 3, S, S).

        Returns:
            Pooled (B, C).
        """
        return self.pool(self._run(pixels, keeps_tokens=False))

    @property
    def last_block(self) -> nn.Module | None:
        """The last block, where the class token alone is pooled."""
        visual = self.backbone
        return visual.transformer.resblocks[-1] if visual.attn_pool is None and visual.pool_type == "tok" else None

    def pool(self, features: Tensor) -> Tensor:
        """Pool as the model was trained to.

        Args:
            features: (B, 1 + P, C) tokens.

        Returns:
            (B, C).
        """
        return self.backbone._pool(features)[0]

    def pool_each(self, patches: Tensor) -> Tensor:
        """Pool each patch alone.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        if self.backbone.attn_pool is None:
            return self.backbone.ln_post(patches)
        return pool_alone(lambda single: self.backbone._pool(single)[0], patches)


class OpenClipResNet(PretrainedImageTower):
    """open_clip's `ModifiedResNet` with its pooling by attention, which projects as well."""

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Run all layers.

        Args:
            pixels: (B, 3, S, S).

        Returns:
            (B, C, h, w).
        """
        visual = self.backbone
        x = visual.stem(self.image_transform.normalize(pixels))
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))

    def patches_in(self, features: Tensor) -> Tensor:
        """The patches of a feature map.

        Args:
            features: (B, C, h, w).

        Returns:
            (B, P, C), P = h w.
        """
        return features.flatten(2).transpose(1, 2)

    def pool(self, features: Tensor) -> Tensor:
        """Pool by attention, which projects as well.

        Args:
            features: (B, C, h, w).

        Returns:
            (B, D).
        """
        return self.backbone.attnpool(features)

    def pool_each(self, patches: Tensor) -> Tensor:
        """Apply the value and output projections of the pooling to each patch, as in MaskCLIP (Zhou et al.,
        arXiv:2112.01071).

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, D).
        """
        pooling = self.backbone.attnpool
        return pooling.c_proj(pooling.v_proj(patches))


class OpenClipTimm(PretrainedImageTower):
    """open_clip's `TimmModel`: a timm backbone, its head taken off."""

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Run the backbone.

        Args:
            pixels: (B, 3, S, S).

        Returns:
            (B, prefix + P, C) or (B, C, h, w).
        """
        return self.backbone.trunk.forward_features(self.image_transform.normalize(pixels))

    def patches_in(self, features: Tensor) -> Tensor:
        """The patches of a feature map.

        Args:
            features: As `feature_map` returns them.

        Returns:
            (B, P, C).
        """
        return timm_patches(self.backbone.trunk, features)

    @property
    def last_block(self) -> nn.Module | None:
        """The last block, where a class token alone is pooled."""
        trunk = self.backbone.trunk
        blocks = getattr(trunk, "blocks", None)
        return (
            blocks[-1] if isinstance(blocks, nn.Sequential) and getattr(trunk, "global_pool", "") == "token" else None
        )

    def pool(self, features: Tensor) -> Tensor:
        """Pool by the backbone's own head.

        Args:
            features: As `feature_map` returns them.

        Returns:
            (B, C).
        """
        return self.backbone.head(self.backbone.trunk.forward_head(features))

    def pool_each(self, patches: Tensor) -> Tensor:
        """Pool each patch alone.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        single, trunk = patches.flatten(0, 1), self.backbone.trunk
        if isinstance(getattr(trunk, "blocks", None), nn.Sequential) and hasattr(trunk, "patch_embed"):
            # A class token is pooled alone, or left out of a mean: the patch stands in for either.
            single = single[:, None].expand(-1, self.prefix_tokens + 1, -1)
        else:
            last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            single = single[:, None, None] if last else single[:, :, None, None]
        return self.pool(single).unflatten(0, patches.shape[:2])


def image_tower(visual: Any, transform: ImageTransform) -> tuple[PretrainedImageTower, nn.Module]:
    """The image tower and projection of an open_clip model.

    Args:
        visual: The model's `visual`, whose projection is taken off.
        transform: How images are prepared.

    Returns:
        The tower, and the projection; an identity where the tower projects by itself.

    Raises:
        ValueError: Its parts are not known.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer":
        projection: nn.Module = nn.Identity()
        if visual.proj is not None:
            projection = linear_of(visual.proj)
            visual.proj = None
        grid = visual.grid_size[0] * visual.grid_size[1]
        vit = OpenClipViT(visual, transform, visual.ln_post.normalized_shape[0], grid, prefix_tokens=1)
        vit.pools_last = vit.last_block is not None and take_pooled_block(visual.transformer)
        return vit, projection
    if kind == "ModifiedResNet":
        patches = len(visual.attnpool.positional_embedding) - 1
        tower = OpenClipResNet(visual, transform, visual.output_dim, patches)
        tower.raw_patch_width = visual.attnpool.positional_embedding.shape[1]
        return tower, nn.Identity()
    if kind != "TimmModel":
        raise ValueError(f"an image tower of the kind '{kind}' of open_clip is not known")
    projection = nn.Identity()
    if "pool" not in dict(visual.head.named_children()):
        projection, visual.head = visual.head, nn.Identity()
    timm_tower = OpenClipTimm(visual, transform, 0, 0, prefix_tokens=getattr(visual.trunk, "num_prefix_tokens", 0))
    visual.eval()
    with torch.no_grad():
        features = timm_tower.features_of(timm_tower.feature_map(torch.zeros(1, 3, transform.size, transform.size)))
    timm_tower.width = features.pooled.shape[1]
    timm_tower.num_patches, timm_tower.raw_patch_width = features.patches.shape[1], features.patches.shape[2]
    return timm_tower, projection


def linear_of(matrix: Tensor) -> nn.Linear:
    """A matrix as a layer.

    Args:
        matrix: (C, D).

    Returns:
        The layer x @ matrix, without bias.
    """
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False, device=matrix.device)
    with torch.no_grad():
        layer.weight.copy_(matrix.T)
    return layer
