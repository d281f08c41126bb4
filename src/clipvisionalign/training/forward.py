"""The forward pass of both towers: from a batch to the vectors of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.batch import Batch
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.backbone_parts import EarlyFeatures
from clipvisionalign.models.heads import CaptionEmbeddings, ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures
from clipvisionalign.models.text_tower import CaptionFeatures
from clipvisionalign.training.cached_features import AnyFeatureCache, embed_cached
from clipvisionalign.training.caption_features import CaptionFeatureCache
from clipvisionalign.training.contrastive import DualEncoderLoss


class PrecomputedFeatures(NamedTuple):
    """Outputs of frozen towers for a batch.

    Attributes:
        images: Features of the B images, or what the image tower's first blocks gave; None if it has to run as a whole.
        captions: Outputs for the M captions, in the batch's order; None if the text tower has to run.
    """

    images: ImageFeatures | EarlyFeatures | None = None
    captions: CaptionFeatures | None = None


#: Precomputed outputs of a batch.
FeatureProvider = Callable[[Batch], PrecomputedFeatures]


class TowerOutputs(NamedTuple):
    """Outputs of both towers and heads for a batch.

    Attributes:
        images: Images in the common space; None for a call without images.
        captions: Captions in the common space, group by group.
        scale: 1 / temperature, a scalar.
        bias: Bias of a sigmoid loss; else 0.
    """

    images: ImageEmbeddings | None
    captions: list[CaptionEmbeddings]
    scale: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors that a loss may have gradients for.

        Returns:
            The tensors, always in one order.
        """
        all_tensors = [*(self.images or ()), *(tensor for group in self.captions for tensor in group[:2])]
        return [tensor for tensor in (*all_tensors, self.scale, self.bias) if tensor is not None]

    def detached(self) -> TowerOutputs:
        """The same values as leaves, up to which gradients are computed.

        Returns:
            Outputs without a graph.
        """
        images = None if self.images is None else ImageEmbeddings(*map(_leaf, self.images))
        captions = [CaptionEmbeddings(_leaf(g.vectors), _leaf(g.tokens), g.mask) for g in self.captions]
        return TowerOutputs(images, captions, _leaf(self.scale), _leaf(self.bias))


def _leaf(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_()


class Towers(nn.Module):
    """Both towers with their heads, each in its dtype: everything that a step does before its loss.

    Args:
        aligner: The model.
        loss_of: The loss, whose bias is among the outputs.
        dtypes: Dtype of the image tower and of the text tower.
    """

    def __init__(self, aligner: Aligner, loss_of: DualEncoderLoss, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.aligner, self.loss_of, self.dtypes = aligner, loss_of, dtypes

    def forward(
        self, batch: Batch, precomputed: PrecomputedFeatures, images: bool = True, captions: bool = True
    ) -> TowerOutputs:
        """Encode a batch; what is not precomputed goes through its tower.

        Args:
            batch: The batch.
            precomputed: Outputs of frozen towers.
            images: Whether images are encoded.
            captions: Whether captions are encoded.

        Returns:
            The outputs.
        """
        aligner, device = self.aligner, self.aligner.device.type
        image_dtype, text_dtype = self.dtypes
        embed_image_features, groups = None, []
        if images:
            with torch.autocast(device, image_dtype, enabled=image_dtype != torch.float32):
                features = precomputed.images
                if features is None:
                    assert batch.pixels is not None
                    features = aligner.image_tower(batch.pixels)
                embed_image_features = embed_cached(aligner, features)
            if aligner.late is None:
                embed_image_features = ImageEmbeddings(embed_image_features.vectors, None)
        if captions:
            with torch.autocast(device, text_dtype, enabled=text_dtype != torch.float32):
                if precomputed.captions is None:
                    groups = aligner.embed_caption_groups(batch.captions)
                else:
                    groups = [aligner.embed_caption_features(precomputed.captions, group) for group in batch.captions]
        bias = self.loss_of.bias_of(aligner.logit_bias)
        bias = torch.zeros((), device=aligner.device) if bias is None else bias * 1.0
        return TowerOutputs(embed_image_features, groups, aligner.scale(), bias)


@dataclass
class FeatureLookup:
    """Precomputed outputs of frozen towers for a batch.

    Attributes:
        image_features: Features of all training images in several views, by the image tower or its first blocks; None
            if neither is cached.
        caption_features: Outputs for all training captions; None if the text tower is not cached.
        device: Where they are needed.
    """

    image_features: AnyFeatureCache | None
    caption_features: CaptionFeatureCache | None
    device: torch.device

    def __call__(self, batch: Batch) -> PrecomputedFeatures:
        """The cached outputs for a batch, each image in a view that is drawn at random.

        Args:
            batch: The batch.

        Returns:
            The outputs; None for a tower that is not cached, and for captions of a stream.
        """
        images, captions = None, None
        if self.image_features is not None:
            views = torch.randint(self.image_features.views, (len(batch),))
            images = self.image_features(batch.image_index, views, self.device)
        if self.caption_features is not None and batch.caption_index is not None:
            captions = self.caption_features(batch.caption_index, self.device)
        return PrecomputedFeatures(images, captions)
