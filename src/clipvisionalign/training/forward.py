"""The towers' part of a step: from a batch to the vectors that a loss is taken over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.batch import Batch
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionStates, ImageStates
from clipvisionalign.models.image_tower import ImageFeatures
from clipvisionalign.models.text_tower import CaptionFeatures
from clipvisionalign.training.feature_cache import CaptionCache, FeatureCache
from clipvisionalign.training.losses import PairLoss


class Known(NamedTuple):
    """What frozen towers give for a batch, where it is on disk. captions: in the batch's order."""

    images: ImageFeatures | None = None
    captions: CaptionFeatures | None = None


#: What is known of a batch.
Knows = Callable[[Batch], Known]


class States(NamedTuple):
    """What the towers give. images: None for a call without pictures; captions: group by group; scale: 1 / temperature;
    bias: that of a sigmoid loss, else 0."""

    images: ImageStates | None
    captions: list[CaptionStates]
    scale: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors that a loss may have gradients for, in one order."""
        found = [*(self.images or ()), *(tensor for group in self.captions for tensor in group[:2])]
        return [tensor for tensor in (*found, self.scale, self.bias) if tensor is not None]

    def detached(self) -> States:
        """The same values as leaves of their own, to take gradients up to."""
        images = None if self.images is None else ImageStates(*map(_leaf, self.images))
        captions = [CaptionStates(_leaf(g.vectors), _leaf(g.tokens), g.mask) for g in self.captions]
        return States(images, captions, _leaf(self.scale), _leaf(self.bias))


def _leaf(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_()


class Towers(nn.Module):
    """Both towers with their heads, each in its number format: all that a step does before its loss.

    formats: those of the picture tower and of the text tower.
    """

    def __init__(self, aligner: Aligner, loss_of: PairLoss, formats: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.aligner, self.loss_of, self.formats = aligner, loss_of, formats

    def forward(self, batch: Batch, known: Known, images: bool = True, captions: bool = True) -> States:
        """The states of a batch; what is not known goes through its tower."""
        aligner, device = self.aligner, self.aligner.device.type
        image_format, text_format = self.formats
        found, groups = None, []
        if images:
            with torch.autocast(device, image_format, enabled=image_format != torch.float32):
                features = known.images
                if features is None:
                    assert batch.pixels is not None
                    features = aligner.image_tower(batch.pixels)
                found = aligner.image_states(features)
            if aligner.late is None:
                found = ImageStates(found.vectors, None)
        if captions:
            with torch.autocast(device, text_format, enabled=text_format != torch.float32):
                if known.captions is None:
                    groups = [aligner.caption_states(group) for group in batch.captions]
                else:
                    groups = [aligner.states_of(known.captions, group) for group in batch.captions]
        bias = self.loss_of.bias if hasattr(self.loss_of, "bias") else torch.zeros((), device=aligner.device)
        return States(found, groups, aligner.scale(), bias * 1.0)


@dataclass
class Knowledge:
    """What is known of a batch without its towers. features: of pictures, each seen in a view drawn at random;
    captions: what the text tower gives for all training captions."""

    features: FeatureCache | None
    captions: CaptionCache | None
    device: torch.device

    def __call__(self, batch: Batch) -> Known:
        images, captions = None, None
        if self.features is not None:
            views = torch.randint(self.features.views, (len(batch),))
            images = self.features(batch.image_index, views, self.device)
        if self.captions is not None and batch.caption_index is not None:
            captions = self.captions(batch.caption_index, self.device)
        return Known(images, captions)
