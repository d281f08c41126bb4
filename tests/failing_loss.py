"""A loss that fails once a training has begun, and not in the step of two images that is tried before."""

from __future__ import annotations

from torch import Tensor


def of_more_than_two(images: Tensor, captions: Tensor, partners: Tensor) -> Tensor:
    if len(images) > 2:
        raise OSError("no space left for the loss")
    return (images @ captions.T).masked_select(partners).mean()
