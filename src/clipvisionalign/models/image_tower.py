"""The picture tower: any timm backbone by name -> one pooled vector and the patches of each image.

timm backbones answer the same few calls, so one thin tower serves them all: feature maps (B, C, h, w) and sequences
(B, P, C) both leave as patches (B, P, C), and the pooled vector is the backbone's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.models.weights import EMBEDDED_IMAGE, find_image_weights, match_by_order, read_tensors
from clipvisionalign.pictures import PictureInput


@dataclass
class ImageTowerConfig:
    """Which timm backbone sees the pictures.

    Args:
        name: any timm backbone: tf_efficientnet_lite0 (installed with its weights), resnet50, fastvit_t8, ...
        weights: "auto" (an installed package, the hub's cache), "random", or a path to a file in timm's layout.
        size: pixels on a side of the square that the tower sees; 0 for the backbone's own.
    """

    name: str = EMBEDDED_IMAGE
    weights: str = "auto"
    size: int = 0


class ImageFeatures(NamedTuple):
    """What the picture tower gives. pooled: (B, C); patches: (B, P, C)."""

    pooled: Tensor
    patches: Tensor


class ImageTower(nn.Module):
    """A timm backbone without its classifier. Raises ValueError for an unknown name, and WeightsNotFound."""

    def __init__(self, config: ImageTowerConfig, load_weights: bool = True) -> None:
        super().__init__()
        import timm

        self.config = config
        if not timm.is_model(config.name):
            near = timm.list_models(f"*{config.name.split('_')[0]}*")[:5]
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"timm knows no backbone '{config.name}'{hint} (timm.list_models() lists all)")
        found = find_image_weights(config.name, config.weights) if load_weights else None
        # Built with its classifier, as a published file has one, which goes after the weights are in.
        sized: dict[str, Any] = {"img_size": config.size} if config.size and "vit" in config.name else {}
        backbone: Any = timm.create_model(config.name, pretrained=False, **sized)
        if found is not None:
            tensors = read_tensors(found.path)
            names = backbone.state_dict()
            state = match_by_order(tensors, names, found.path) if found.by_order else tensors
            _load_all_but_classifier(backbone, dict(state), str(found.path))
        backbone.reset_classifier(0)
        self.backbone = backbone
        self.input = _picture_input(backbone, config)
        self.width, self.patches = self._measure()

    def _measure(self) -> tuple[int, int]:
        """Width of the vectors and number of patches, seen on a blank picture."""
        training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            features = self(torch.zeros(1, 3, self.input.size, self.input.size))
        self.backbone.train(training)
        return features.pooled.shape[-1], features.patches.shape[1]

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """pixels (B, 3, S, S), bytes or scaled -> pooled (B, C), patches (B, P, C)."""
        return self.features_of(self.feature_map(pixels))

    def feature_map(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> the backbone's last features, in whatever order of axes it has them."""
        pixels = self.input.scaled(pixels).contiguous(memory_format=torch.channels_last)
        return self.backbone.forward_features(pixels)

    def features_of(self, features: Tensor) -> ImageFeatures:
        """What `feature_map` gives -> pooled (B, C), patches (B, P, C)."""
        pooled = self.backbone.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            # timm says in which order a map's axes stand; most are (B, C, h, w), Swin's are (B, h, w, C).
            last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            patches = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        else:
            patches = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        return ImageFeatures(pooled, patches)


def _load_all_but_classifier(backbone: nn.Module, state: dict[str, Tensor], path: str) -> None:
    classifier = backbone.default_cfg.get("classifier", ())  # type: ignore[union-attr, operator]
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of this backbone: {str(error).splitlines()[1].strip()}") from None
    missing = [key for key in missing if not key.startswith(heads)]
    if missing or unexpected:
        told = f"missing {missing[:3]}, unknown {list(unexpected)[:3]}"
        raise ValueError(f"{path}: not the weights of this backbone: {told}")


def _picture_input(backbone: Any, config: ImageTowerConfig) -> PictureInput:
    own = backbone.pretrained_cfg
    return PictureInput(config.size or own["input_size"][-1], tuple(own["mean"]), tuple(own["std"]))
