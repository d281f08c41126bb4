"""All images and captions that a loss is taken over, of all processes, and which captions belong to which images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipvisionalign.batch import are_positives, positive_mask


@dataclass
class GatheredBatch:
    """All images and captions that a loss is taken over, and which of them are this process's own.

    Attributes:
        images: (B, D) unit vectors.
        captions: (M, D) unit vectors.
        identity: (B,) numbers; equal to `caption_identity` where a caption belongs to an image.
        caption_identity: (M,) numbers.
        own_images: The rows of this process.
        own_captions: The rows of this process.
        world_size: Number of processes.
        caption_text: (M,) equal for equal captions; None where those belong to their own images only.
        true_texts: (K, 2) with it, see `clipvisionalign.batch.positive_mask`.
    """

    images: Tensor
    captions: Tensor
    identity: Tensor
    caption_identity: Tensor
    own_images: slice = field(default_factory=lambda: slice(None))
    own_captions: slice = field(default_factory=lambda: slice(None))
    world_size: int = 1
    caption_text: Tensor | None = None
    true_texts: Tensor | None = None

    def positive_mask(self, images: slice = slice(None), captions: slice = slice(None)) -> Tensor:
        """Which captions belong to which images.

        Args:
            images: Some of the B images.
            captions: Some of the M captions.

        Returns:
            (images, captions) bool.
        """
        text = None if self.caption_text is None else self.caption_text[captions]
        return positive_mask(self.identity[images], self.caption_identity[captions], text, self.true_texts)

    def are_positives(self, images: Tensor, captions: Tensor) -> Tensor:
        """Whether captions belong to images, pair by pair.

        Args:
            images: (Q,) numbers of images.
            captions: (Q,) numbers of captions.

        Returns:
            (Q,) bool.
        """
        text = None if self.caption_text is None else self.caption_text[captions]
        return are_positives(self.identity[images], self.caption_identity[captions], text, self.true_texts)

    def count_positives(self) -> int:
        """Number of true pairs, without a matrix of all pairs.

        Returns:
            The number.
        """
        if self.caption_text is not None and self.true_texts is not None:
            # An image and a text that is true of it: as many pairs as there are captions of that text.
            texts, counts = self.caption_text.unique(return_counts=True)
            identities, images = self.identity.unique(return_counts=True)
            true = self.true_texts.unique(dim=0)
            table = [
                (values, multiplicity, torch.searchsorted(values, keys.contiguous()).clamp(max=len(values) - 1), keys)
                for values, multiplicity, keys in ((identities, images, true[:, 0]), (texts, counts, true[:, 1]))
            ]
            each = [
                multiplicity[position] * (values[position] == keys) for values, multiplicity, position, keys in table
            ]
            return int((each[0] * each[1]).sum())
        caption_identities, counts = self.caption_identity.unique(return_counts=True)
        positions = torch.searchsorted(caption_identities, self.identity).clamp(max=len(caption_identities) - 1)
        return int((counts[positions] * (caption_identities[positions] == self.identity)).sum())
