"""The forward pass of both towers: from a batch to the vectors of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.batch import Batch
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures
from clipvisionalign.models.text_tower import CaptionFeatures
from clipvisionalign.training.contrastive import DualEncoderLoss
from clipvisionalign.training.feature_cache import CaptionFeatureCache, ImageFeatureCache


class PrecomputedFeatures(NamedTuple):
    """What frozen towers give for a batch, where it is on disk. captions: in the batch's order."""

    images: ImageFeatures | None = None
    captions: CaptionFeatures | None = None


#: Precomputed outputs of a batch.
FeatureProvider = Callable[[Batch], PrecomputedFeatures]


class TowerOutputs(NamedTuple):
    """What the towers give.

    images: None for a call without images; captions: group by group; scale: 1 / temperature; bias: that of a sigmoid
    loss, else 0.
    """

    images: ImageEmbeddings | None
    captions: list[CaptionEmbeddings]
    scale: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors that a loss may have gradients for, in one order."""
        all_tensors = [*(self.images or ()), *(tensor for group in self.captions for tensor in group[:2])]
        return [tensor for tensor in (*all_tensors, self.scale, self.bias) if tensor is not None]

    def detached(self) -> TowerOutputs:
        """The same values as leaves of their own, to take gradients up to."""
        images = None if self.images is None else ImageEmbeddings(*map(_leaf, self.images))
        captions = [CaptionEmbeddings(_leaf(g.vectors), _leaf(g.tokens), g.mask) for g in self.captions]
        return TowerOutputs(images, captions, _leaf(self.scale), _leaf(self.bias))


def _leaf(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_()


class Towers(nn.Module):
    """Both towers with their heads, each in its dtype: all that a step does before its loss.

    dtypes: those of the image tower and of the text tower.
    """

    def __init__(self, aligner: Aligner, loss_of: DualEncoderLoss, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.aligner, self.loss_of, self.dtypes = aligner, loss_of, dtypes

    def forward(
        self, batch: Batch, precomputed: PrecomputedFeatures, images: bool = True, captions: bool = True
    ) -> TowerOutputs:
        """The states of a batch; what is not precomputed goes through its tower."""
        aligner, device = self.aligner, self.aligner.device.type
        image_dtype, text_dtype = self.dtypes
        embed_image_features, groups = None, []
        if images:
            with torch.autocast(device, image_dtype, enabled=image_dtype != torch.float32):
                features = precomputed.images
                if features is None:
                    assert batch.pixels is not None
                    features = aligner.image_tower(batch.pixels)
                embed_image_features = aligner.embed_image_features(features)
            if aligner.late is None:
                embed_image_features = ImageEmbeddings(embed_image_features.vectors, None)
        if captions:
            with torch.autocast(device, text_dtype, enabled=text_dtype != torch.float32):
                if precomputed.captions is None:
                    groups = [aligner.embed_caption_group(group) for group in batch.captions]
                else:
                    groups = [aligner.embed_caption_features(precomputed.captions, group) for group in batch.captions]
        bias = self.loss_of.bias_of(aligner.logit_bias)
        bias = torch.zeros((), device=aligner.device) if bias is None else bias * 1.0
        return TowerOutputs(embed_image_features, groups, aligner.scale(), bias)


@dataclass
class FeatureLookup:
    """Precomputed outputs for a batch.

    image_features: of images, each seen in a view drawn at random; caption_features: what the text tower gives for all
    training captions.
    """

    image_features: ImageFeatureCache | None
    caption_features: CaptionFeatureCache | None
    device: torch.device

    def __call__(self, batch: Batch) -> PrecomputedFeatures:
        """The cached outputs for a batch, images in a random view; None for a tower that is not cached."""
        images, captions = None, None
        if self.image_features is not None:
            views = torch.randint(self.image_features.views, (len(batch),))
            images = self.image_features(batch.image_index, views, self.device)
        if self.caption_features is not None and batch.caption_index is not None:
            captions = self.caption_features(batch.caption_index, self.device)
        return PrecomputedFeatures(images, captions)
