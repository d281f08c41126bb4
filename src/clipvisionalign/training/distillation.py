"""Distillation from the model that a run starts from, so that it keeps what that model has learned.

Beside the contrastive loss, each training image's and caption's vector is kept near its vector in the model before the
first step: on the new data alone, none of the data that the model was trained on before is needed. The idea is learning
without forgetting (Li and Hoiem, arXiv:1606.09282); that the distance is taken between features, and not between
predictions, is LDIFS (Mukhoti et al., arXiv:2308.13320), whose squared distance of unit vectors is 2 - 2 cos.

The vectors of the start are computed once, of the images without augmentation, and stay in the run's folder until it is
finished: a run that is resumed reads those, and no second model is in memory while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import Batch
from clipvisionalign.training.gathered_batch import GatheredBatch

#: The vectors of the start, in the folder of a run that is not finished.
START_VECTORS = "start-vectors"
#: The files there.
START_FILES = ("images", "captions")


@dataclass(frozen=True)
class StartVectors:
    """Vectors of the training split by the model that a run starts from.

    Args:
        images: (N, D) unit vectors, on disk; zeros for an image that cannot be decoded.
        captions: (M, D) unit vectors, on disk.
    """

    images: np.ndarray
    captions: np.ndarray

    @classmethod
    def open(cls, run: Path) -> StartVectors:
        """The vectors that `write_start_vectors` has written into a run folder.

        Args:
            run: The run folder.

        Returns:
            The vectors, read from the disk as they are used.

        Raises:
            OSError: They are not there.
        """
        try:
            return cls(*(np.load(run / START_VECTORS / f"{kind}.npy", mmap_mode="r") for kind in START_FILES))
        except (OSError, ValueError) as error:
            raise OSError(
                f"{run / START_VECTORS}: the vectors that --distill keeps near cannot be read ({error}); train again "
                "with another --out"
            ) from None

    def of_batch(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The vectors of a batch.

        Args:
            batch: B images with M captions.
            device: Where they go.

        Returns:
            (B, D) of images, and (M, D) of captions, group by group.
        """
        assert batch.caption_index is not None
        captions = batch.caption_index[batch.order.to(batch.caption_index.device)]
        rows = (self.images, batch.image_index), (self.captions, captions)
        images, texts = (torch.from_numpy(np.asarray(vectors[index.cpu().numpy()])) for vectors, index in rows)
        return images.to(device), texts.to(device)


@dataclass(frozen=True)
class Distillation:
    """The loss that keeps vectors near those of the start.

    Args:
        weight: Weight beside the contrastive loss.
        start: The vectors of the start.
    """

    weight: float
    start: StartVectors

    def loss(self, gallery: GatheredBatch, batches: Sequence[Batch]) -> Tensor:
        """The part of the loss that this process's own images and captions have, without the weight.

        Args:
            gallery: The vectors of all processes, B images and M captions.
            batches: The chunks that this process's own of them come from.

        Returns:
            A scalar; over all processes these add up to half the mean of 1 - cos over B images, and half that over M
            captions.
        """
        parts = zip(*(self.start.of_batch(batch, gallery.images.device) for batch in batches), strict=True)
        images, captions = (torch.cat(part) for part in parts)
        image_terms = cosine_distance(gallery.images[gallery.own_images], images)
        caption_terms = cosine_distance(gallery.captions[gallery.own_captions], captions)
        return (image_terms.sum() / len(gallery.images) + caption_terms.sum() / len(gallery.captions)) / 2


def cosine_distance(vectors: Tensor, start: Tensor) -> Tensor:
    """1 - cos of vectors and their counterparts.

    Args:
        vectors: (Q, D) unit vectors.
        start: (Q, D) unit vectors; zeros have a distance of 1, and no gradient.

    Returns:
        (Q,), from 0 to 2.

    >>> cosine_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([0., 1.])
    """
    return 1 - (vectors * start).sum(dim=1)
