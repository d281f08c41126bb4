"""A backbone in two parts: its first blocks, whose outputs can be kept while the rest is trained.

The first blocks of a convolutional network have the largest maps and the most general features: most of the time of a
training step is theirs, and fine-tuning changes them least (Yosinski et al., arXiv:1411.1792).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class EarlyFeatures(NamedTuple):
    """What the first blocks of a backbone give, in place of pixels.

    Attributes:
        features: (B, ...), in the backbone's own order of axes.
        blocks: Number of blocks that the images went through.
    """

    features: Tensor
    blocks: int

    def __len__(self) -> int:
        return len(self.features)


class BackboneParts(NamedTuple):
    """How a backbone goes from pixels to its last features: one part after the other.

    Attributes:
        stem: What comes before the blocks.
        stem_parameters: Parameters of the backbone itself that the stem adds, such as those of positions.
        blocks: The blocks.
        tail: What comes after them.
        inner: Modules without parameters that a function of the stem calls.
    """

    stem: list[Callable[[Tensor], Tensor]]
    stem_parameters: list[nn.Parameter]
    blocks: list[nn.Module]
    tail: list[nn.Module]
    inner: list[nn.Module]

    def early(self, pixels: Tensor, count: int) -> Tensor:
        """The stem and the first blocks.

        Args:
            pixels: (B, 3, S, S), normalised.
            count: Number of blocks.

        Returns:
            Their output.
        """
        parts: list[Callable[[Tensor], Tensor]] = [*self.stem, *self.blocks[:count]]
        for part in parts:
            pixels = part(pixels)
        return pixels

    def late(self, features: Tensor, count: int) -> Tensor:
        """The other blocks and what comes after them.

        Args:
            features: What `early` returns.
            count: Number of blocks that they went through.

        Returns:
            The last features of the backbone.
        """
        for part in (*self.blocks[count:], *self.tail):
            features = part(features)
        return features

    def early_modules(self, count: int) -> list[nn.Module]:
        """The modules of the stem and of the first blocks.

        Args:
            count: Number of blocks.

        Returns:
            The modules.
        """
        parts = (*self.stem, *self.inner, *self.blocks[:count])
        return [part for part in parts if isinstance(part, nn.Module)]

    def early_parameters(self, count: int) -> list[nn.Parameter]:
        """The parameters that `early` depends on.

        Args:
            count: Number of blocks.

        Returns:
            The parameters.
        """
        modules = self.early_modules(count)
        return [*self.stem_parameters, *(each for module in modules for each in module.parameters())]


class Division(NamedTuple):
    """How a backbone is divided.

    Attributes:
        number: Of the ways that are known.
        own: Names of its own parameters that come before the blocks.
    """

    number: int
    own: tuple[str, ...]


def divide_backbone(backbone: Any, name: str) -> Division:
    """How a timm backbone is divided: EfficientNets and MobileNets, ResNets, and vision transformers are.

    Args:
        backbone: Without its classifier.
        name: Of the backbone, for messages.

    Returns:
        The division, for `backbone_parts`.

    Raises:
        ValueError: It is another kind of backbone.

    >>> import timm
    >>> backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    >>> parts = backbone_parts(backbone, divide_backbone(backbone, "tf_efficientnet_lite0"))
    >>> len(parts.stem), len(parts.blocks), len(parts.tail)
    (2, 7, 2)
    """
    for number, parts in enumerate(_possible_parts(backbone, ())):
        if parts.blocks and _is_equal(backbone, parts):
            used = _used_early(backbone, parts)
            known = {id(each) for each in parts.early_parameters(1)}
            own = tuple(name for name in used if "." not in name)
            if all(name in own or id(parameter) in known for name, parameter in used.items()):
                return Division(number, own)
    raise ValueError(
        f"--freeze_blocks: {name} is not divided into blocks here, as EfficientNets, MobileNets, ResNets and vision "
        "transformers are: freeze its layers by name (--freeze_layers), or all of it (--freeze image)"
    )


def backbone_parts(backbone: Any, division: Division) -> BackboneParts:
    """The parts of a backbone.

    Args:
        backbone: The backbone.
        division: What `divide_backbone` returned for it.

    Returns:
        Its parts, as they are by now.
    """
    return list(_possible_parts(backbone, division.own))[division.number]


def _possible_parts(backbone: Any, own: tuple[str, ...]) -> Iterator[BackboneParts]:
    """Divisions by the names that timm gives parts; which one is right is seen by what it computes. own: as of
    `Division`."""
    added = [getattr(backbone, name) for name in own]

    def having(*names: str) -> list[Any]:
        return [getattr(backbone, name) for name in names if getattr(backbone, name, None) is not None]

    layers = having("layer1", "layer2", "layer3", "layer4")
    if layers:
        yield BackboneParts(having("conv1", "bn1", "act1", "maxpool"), added, layers, [], [])
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.Sequential):
        return
    if hasattr(backbone, "conv_stem"):
        for tail in (("conv_head", "bn2"), ()):
            yield BackboneParts(having("conv_stem", "bn1"), added, list(blocks), having(*tail), [])
    if hasattr(backbone, "patch_embed") and hasattr(backbone, "_pos_embed"):
        stem = having("patch_embed", "_pos_embed", "patch_drop", "norm_pre")
        yield BackboneParts(stem, added, list(blocks), having("norm"), having("pos_drop"))


def _blank(backbone: Any) -> Tensor:
    """An image of the backbone's size (1, 3, H, W)."""
    parameter = next(backbone.parameters())
    side = backbone.pretrained_cfg["input_size"][-1]
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or (side, side)
    pixels = torch.linspace(-1, 1, 3 * size[0] * size[1]).reshape(1, 3, *size)
    return pixels.to(parameter.device, parameter.dtype)


@contextmanager
def _as_it_encodes(backbone: Any) -> Iterator[None]:
    """In evaluation mode and float32; each module's own mode comes back."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.autocast(next(backbone.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _used_early(backbone: Any, parts: BackboneParts) -> dict[str, nn.Parameter]:
    """The parameters, by name, that the output of the stem and the first block depends on."""
    parameters = dict(backbone.named_parameters())
    frozen = [each for each in parameters.values() if not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _as_it_encodes(backbone):
            output = parts.early(_blank(backbone), 1).sum()
            gradients = torch.autograd.grad(output, list(parameters.values()), allow_unused=True)
    finally:
        for each in frozen:
            each.requires_grad_(False)
    named = zip(parameters.items(), gradients, strict=True)
    return {name: parameter for (name, parameter), gradient in named if gradient is not None}


@torch.no_grad()
def _is_equal(backbone: Any, parts: BackboneParts) -> bool:
    """Whether the parts, one after the other, are the backbone."""
    pixels = _blank(backbone)
    try:
        with _as_it_encodes(backbone):
            whole = backbone.forward_features(pixels)
            divided = parts.late(parts.early(pixels, 1), 1)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    if not isinstance(whole, Tensor) or whole.shape != divided.shape:
        return False
    return torch.allclose(whole, divided, atol=1e-4, equal_nan=True)
