"""A common space narrower than a pretrained model's own: one linear map behind both heads, folded into them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from clipvisionalign.models.pretrained.parts import DualEncoderParts


@torch.no_grad()
def reduce_width(parts: DualEncoderParts, width: int, directions: Tensor | None = None) -> None:
    """Narrow the common space of a dual encoder.

    A head that ends in a linear layer gets a narrower one, so that the model has no layer more than before; a head of
    another kind is followed by a new linear layer without bias.

    Args:
        parts: of a model of width D; its heads and `width` are replaced.
        width: below D.
        directions: (width, D), the map from the model's vectors to narrower ones, see `principal_directions`; None for
            the first numbers of a vector, to be replaced by the weights of a run.

    Raises:
        ValueError: The width is above the model's own.
    """
    check_width(width, parts.width, parts.text_tower.config.name)
    directions = torch.eye(width, parts.width) if directions is None else directions
    parts.image_head.projection = _followed_by(parts.image_head.projection, directions)
    parts.text_head = _followed_by(parts.text_head, directions)
    parts.width = width


def check_width(width: int, own: int, model: str) -> None:
    """Check that a common space is to be made narrower, not wider.

    Args:
        width: The width that is asked for.
        own: D, the model's own.
        model: What a message calls the model.

    Raises:
        ValueError: The width is above the model's own.
    """
    if width > own:
        raise ValueError(
            f"--model.width {width}: {model} has vectors of {own} numbers, and a common space can be made narrower "
            "only; leave it out for the model's own"
        )


def principal_directions(images: Tensor, captions: Tensor, width: int) -> tuple[Tensor, float]:
    """The directions in which two sets of vectors have most of their dot products.

    They are the principal components about zero, not about the mean: the truncated singular value decomposition of the
    uncentred vectors leaves the dot products among them as near to what they were as any linear map of that width can,
    in the sum of their squared differences (Eckart and Young, 1936). The components about the mean would keep the
    vectors' differences instead, and lose the part of their dot products that lies in the mean. Images and captions
    count alike, whatever their number.

    Args:
        images: (N, D) unit vectors.
        captions: (M, D) unit vectors.
        width: d, number of directions, at most D.

    Returns:
        Orthonormal rows (d, D), float32, and the share of the squared dot products between images and captions that is
        left: 1 - |S - S'|^2 / |S|^2 of the tables S (N, M) with all and S' with these directions.

    >>> directions, explained = principal_directions(torch.eye(3)[:2], torch.eye(3)[:2], 2)
    >>> directions.abs().sum(dim=0).tolist(), explained
    ([1.0, 1.0, 0.0], 1.0)
    """
    image_moments, caption_moments = _second_moments(images), _second_moments(captions)
    _, components = torch.linalg.eigh(image_moments + caption_moments)
    directions = components.flip(1)[:, :width].T
    # What is lost of the table is X (I - P) Y^T, whose squared norm is the trace below, without the table itself.
    rest = torch.eye(len(image_moments), dtype=torch.float64) - directions.T @ directions
    lost = (rest @ image_moments @ rest * caption_moments).sum() / (image_moments * caption_moments).sum()
    return directions.float(), 1.0 - float(lost.clamp(0.0, 1.0))


def _second_moments(vectors: Tensor) -> Tensor:
    """(N, D) -> the mean of their outer products (D, D), in float64."""
    return vectors.double().T @ vectors.double() / len(vectors)


def _followed_by(head: nn.Module, directions: Tensor) -> nn.Module:
    """A head (..., C) -> (..., D), then `directions` (d, D), in as few layers as that takes."""
    if isinstance(head, nn.Linear):
        return _folded(head, directions)
    if isinstance(head, nn.Sequential) and len(head) and isinstance(head[-1], nn.Linear):
        narrow = copy.deepcopy(head)
        narrow[-1] = _folded(head[-1], directions)
        return narrow
    layer = nn.Linear(directions.shape[1], len(directions), bias=False)
    layer.weight.copy_(directions)
    return layer if isinstance(head, nn.Identity) else nn.Sequential(head, layer)


def _folded(layer: nn.Linear, directions: Tensor) -> nn.Linear:
    """A linear layer (C -> D) and then `directions` (d, D), as one layer (C -> d)."""
    directions = directions.to(layer.weight)
    folded = nn.Linear(layer.in_features, len(directions), bias=layer.bias is not None)
    folded.weight.copy_((directions.double() @ layer.weight.double()).float())
    if layer.bias is not None:
        folded.bias.copy_(directions @ layer.bias)
    return folded
