"""The image tower: any timm backbone by name -> one pooled vector and the patches of each image.

timm backbones answer the same few calls, so one thin tower serves them all: feature maps (B, C, h, w) and sequences
(B, P, C) both leave as patches (B, P, C), and the pooled vector is the backbone's own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.images import ImageTransform
from clipvisionalign.models.backbone_parts import (
    BackboneParts,
    Division,
    EarlyFeatures,
    backbone_parts,
    divide_backbone,
)
from clipvisionalign.models.image_weights import (
    EMBEDDED_IMAGE,
    ImageWeights,
    find_image_config,
    find_image_weights,
    resolve_backbone,
)
from clipvisionalign.models.weight_files import match_by_order, read_tensors
from clipvisionalign.models.weights import WeightsOrigin


@dataclass
class ImageTowerConfig:
    """Which timm backbone sees the images.

    Args:
        name: any timm backbone: tf_efficientnet_lite0 (installed with its weights), tf_efficientnet_lite1 or
            tf_efficientnet_lite2 (with clipvisionalign[towers]), resnet50, resnet50.a1_in1k, fastvit_t8, ...; or a
            repository that timm can build, as hf-hub:OWNER/NAME.
        weights: "auto" (an installed package, the hub's cache, the hub), "random", or a path to a file in timm's
            layout.
        size: pixels on a side of the square that the tower sees; 0 for the backbone's own.
        blocks: how many of the backbone's blocks an image goes through, for one that has them (EfficientNet, vision
            transformers); 0 for all. Earlier ones cost less, see finer patches, with less semantic content.
        revision: branch, tag or commit of the hub's repository; "" for the main branch. A run records the commit.
        mirrored: see each image as it is and mirrored, and take the mean of both pooled vectors: it finds more, and
            images take twice as long. A tower that is trained sees training images once, as they vary.
    """

    name: str = EMBEDDED_IMAGE
    weights: str = "auto"
    size: int = 0
    revision: str = ""
    blocks: int = 0
    mirrored: bool = False


class ImageFeatures(NamedTuple):
    """The outputs of an image tower.

    Attributes:
        pooled: (B, C).
        patches: (B, P, C'), of the same width for most backbones.
    """

    pooled: Tensor
    patches: Tensor


class ImageTower(nn.Module):
    """A timm backbone without its classifier.

    Args:
        config: Its settings.
        load_weights: Whether pretrained weights are loaded; else they are random, to be replaced by those of a run.
        folder: Where `save` wrote what the backbone is built from, where timm's name alone is not enough; None
            otherwise.

    Raises:
        WeightsNotFound: There are no weights of that name here or on the hub.
        ValueError: The name is unknown, weights do not fit, or the backbone does not take images of the given size.
    """

    def __init__(self, config: ImageTowerConfig, load_weights: bool = True, folder: Path | None = None) -> None:
        super().__init__()
        self.config = config
        source = resolve_backbone(config.name, config.revision)
        weights = find_image_weights(config.name, config.weights, config.revision) if load_weights else None
        #: Where the weights came from.
        self.origin = WeightsOrigin("random", config.name) if weights is None else weights.origin
        #: The config.json of a repository that timm has no name for.
        self.published_config: dict[str, Any] | None = None
        if not source.architecture:
            file = folder / "config.json" if folder is not None and not load_weights else None
            if file is None:
                file = weights.path.with_name("config.json") if weights is not None and weights.published else None
            if file is None:
                file, origin = find_image_config(config.name, config.revision)
                self.origin = origin if weights is None else weights.origin
            self.published_config = json.loads(file.read_text(encoding="utf-8"))
        if self.origin.revision:
            self.config = replace(config, revision=self.origin.revision)
        # Built with its classifier, as a published file has one, which goes after the weights are in.
        backbone = _build_backbone(source.architecture, self.published_config, config, weights)
        if weights is not None and not weights.published:
            tensors = read_tensors(weights.path)
            names = backbone.state_dict()
            state = dict(match_by_order(tensors, names, weights.path) if weights.by_order else tensors)
            if config.size:
                state = _resample_weights(backbone, state, config)
            _load_all_but_classifier(backbone, state, str(weights.path))
        _drop_classifier(backbone, config)
        if config.blocks:
            _keep_first_blocks(backbone, config)
        self.backbone = backbone
        self._division: Division | None = None
        self.image_transform = _image_transform(backbone, config)
        #: Width of the pooled vector, number of patches, width of a patch.
        self.width, self.num_patches, self.patch_width = self._measure_shapes()

    def save(self, folder: Path) -> None:
        """Write what the backbone is built from, without weights; nothing where timm's name alone is enough.

        Args:
            folder: Where config.json is written; it is made if it is not there.
        """
        if self.published_config is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(self.published_config, indent=2) + "\n", encoding="utf-8")

    def _measure_shapes(self) -> tuple[int, int, int]:
        """Width of the pooled vector, number of patches and their width, seen on a blank image.

        Raises ValueError where the backbone does not take it.
        """
        training, size = self.backbone.training, self.image_transform.size
        self.backbone.eval()
        try:
            with torch.no_grad():
                features = self(torch.zeros(1, 3, size, size))
            if features.pooled.ndim != 2 or features.patches.ndim != 3 or not features.patches.shape[1]:
                raise ValueError("it gives no pooled vector with the patches that it is of")
        except Exception as error:
            if self.config.size:
                native_size = self.backbone.pretrained_cfg["input_size"][-1]
                requested = f"{size} x {size} pixels; its own size is {native_size}, for --model.image_tower.size 0"
                raise ValueError(f"{self.config.name}: does not take {requested}: {_first_line(error)}") from None
            raise ValueError(f"{self.config.name}: is no image tower: {_first_line(error)}") from None
        finally:
            self.backbone.train(training)
        return features.pooled.shape[-1], features.patches.shape[1], features.patches.shape[2]

    def forward(self, pixels: Tensor | EarlyFeatures) -> ImageFeatures:
        """Encode images.

        Args:
            pixels: (B, 3, S, S) uint8, or scaled; or what the first blocks gave, from which on they are encoded.

        Returns:
            Pooled (B, C) and patches (B, P, C').
        """
        if isinstance(pixels, EarlyFeatures):
            return self.features_of(self.parts().late(*pixels))
        return self.both_ways(self.features_of(self.feature_map(pixels)), pixels)

    def both_ways(self, features: ImageFeatures, pixels: Tensor) -> ImageFeatures:
        """The features of images with those of their mirror, where the tower is `mirrored` and not in training.

        Args:
            features: Of the images as they are.
            pixels: The images, as `forward` takes them.

        Returns:
            The mean of both pooled vectors; the patches stay as they are, since they stand for places of the image.
        """
        if not self.config.mirrored or self.training:
            return features
        mirrored = self.features_of(self.feature_map(pixels.flip(-1)))
        return features._replace(pooled=(features.pooled + mirrored.pooled) / 2)

    def parts(self) -> BackboneParts:
        """The parts of the backbone.

        Returns:
            Its stem, blocks and what comes after them.

        Raises:
            ValueError: It is a backbone that is not divided.
        """
        if self._division is None:
            self._division = divide_backbone(self.backbone, self.config.name)
        return backbone_parts(self.backbone, self._division)

    def early_features(self, pixels: Tensor, blocks: int) -> EarlyFeatures:
        """Encode images by the first blocks alone.

        Args:
            pixels: (B, 3, S, S) uint8, or scaled.
            blocks: Number of blocks.

        Returns:
            What `forward` takes in place of the pixels.
        """
        pixels = self.image_transform.normalize(pixels).contiguous(memory_format=torch.channels_last)
        return EarlyFeatures(self.parts().early(pixels, blocks), blocks)

    def feature_map(self, pixels: Tensor) -> Tensor:
        """The last features of the backbone.

        Args:
            pixels: (B, 3, S, S) uint8, or scaled.

        Returns:
            The features, in the backbone's own order of axes.
        """
        pixels = self.image_transform.normalize(pixels).contiguous(memory_format=torch.channels_last)
        return self.backbone.forward_features(pixels)

    def features_of(self, features: Tensor) -> ImageFeatures:
        """Pool the last features.

        Args:
            features: As `feature_map` returns them.

        Returns:
            Pooled (B, C) and patches (B, P, C').

        Raises:
            TypeError: The backbone returns several tensors.
        """
        if not isinstance(features, Tensor):
            raise TypeError("it gives its features in several tensors")
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return ImageFeatures(pooled, timm_patches(self.backbone, features))


def timm_patches(backbone: Any, features: Tensor) -> Tensor:
    """The patches among the features of a timm backbone.

    Args:
        backbone: The backbone, which has the order of its axes.
        features: What its `forward_features` returns: (B, C, h, w), (B, h, w, C) or (B, prefix + P, C).

    Returns:
        (B, P, C).
    """
    if features.ndim != 4:
        return features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    # timm has the order of a map's axes; most are (B, C, h, w), Swin's are (B, h, w, C).
    is_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    return features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)


def _keep_first_blocks(backbone: Any, config: ImageTowerConfig) -> None:
    """Leave out all blocks but the first ones, and what stands between the last one and the pooling.

    Raises ValueError for a backbone without so many blocks.
    """
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.Sequential):
        raise ValueError(
            f"{config.name}: has no blocks to take {config.blocks} of; leave --model.image_tower.blocks out"
        )
    if not 0 < config.blocks <= len(blocks):
        raise ValueError(f"{config.name}: has {len(blocks)} blocks, and not {config.blocks}")
    if config.blocks == len(blocks):
        return
    backbone.blocks = blocks[: config.blocks]
    for name in ("conv_head", "norm_head", "bn2"):
        if hasattr(backbone, name):
            setattr(backbone, name, nn.Identity())


def _build_backbone(
    architecture: str, published: dict[str, Any] | None, config: ImageTowerConfig, weights: ImageWeights | None
) -> Any:
    """A backbone as timm builds it, with the weights of a published file, which timm's own loader reads."""
    import timm

    options: dict[str, Any] = {}
    if published is not None:
        # Two forms are about: with the weights' record in a part of its own, or flat.
        architecture = published.get("architecture", "")
        if not timm.is_model(architecture):
            raise ValueError(f"{config.name}: timm builds no '{architecture}', which its config.json names")
        options = {
            "pretrained_cfg": dict(published.get("pretrained_cfg", published)),
            **published.get("model_args", {}),
        }
        if "num_classes" in published:
            options["pretrained_cfg"]["num_classes"] = published["num_classes"]
    published_weights = weights is not None and weights.published
    if published_weights:
        assert weights is not None
        # timm's hub files are tensors alone, whatever custom format the same weights once came in.
        overlay = {"file": str(weights.path), "custom_load": False, "source": None}
        if "pretrained_cfg" in options:
            options["pretrained_cfg"] |= overlay
        else:
            options["pretrained_cfg_overlay"] = overlay
    try:
        return _create(architecture, published_weights, config.size, options)
    except Exception as error:
        if published_weights:
            assert weights is not None
            reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
            raise ValueError(f"{weights.path}: not the weights of this backbone: {reason}") from None
        at = f" of {config.size} x {config.size} pixels; leave --model.image_tower.size out" if config.size else ""
        raise ValueError(f"{config.name}: timm builds no such backbone{at}: {_first_line(error)}") from None


def _create(architecture: str, pretrained: bool, size: int, options: dict[str, Any]) -> Any:
    """timm's model for images of `size` pixels; a backbone that needs no size beforehand is given none."""
    import timm

    if size:
        try:
            return timm.create_model(architecture, pretrained=pretrained, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(architecture, pretrained=pretrained, **options)


def _resample_weights(backbone: nn.Module, state: dict[str, Tensor], config: ImageTowerConfig) -> dict[str, Tensor]:
    """Weights that depend on the image's size (positions) as the backbone needs them: timm resamples them, as it does
    when it loads what it has published. Raises ValueError where it cannot."""
    filter_fn = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if filter_fn is not None:
        try:
            state = filter_fn(state, backbone)
        except Exception as error:
            message = f"timm cannot resample its weights for {config.size} x {config.size} pixels: {_first_line(error)}"
            raise ValueError(f"{config.name}: {message}; leave --model.image_tower.size out") from None
    model_state = backbone.state_dict()
    classifier_prefixes = _classifier_prefixes(backbone)
    mismatched = [
        name
        for name, tensor in state.items()
        if name in model_state and model_state[name].shape != tensor.shape and not name.startswith(classifier_prefixes)
    ]
    if mismatched:
        message = f"{mismatched[0]} has another shape at {config.size} x {config.size} pixels, or is another backbone's"
        raise ValueError(
            f"{config.name}: not the weights of this backbone: {message}; leave --model.image_tower.size out"
        )
    return state


def _drop_classifier(backbone: Any, config: ImageTowerConfig) -> None:
    try:
        backbone.reset_classifier(0)
    except Exception as error:
        raise ValueError(f"{config.name}: is no image tower, as it has no classifier: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """The first line of another library's error."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]


def _classifier_prefixes(backbone: nn.Module) -> tuple[str, ...]:
    """What the names of a classifier's tensors begin with."""
    classifier = backbone.default_cfg.get("classifier", ())  # type: ignore[union-attr, operator]
    return tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))


def _load_all_but_classifier(backbone: nn.Module, state: dict[str, Tensor], path: str) -> None:
    classifier_prefixes = _classifier_prefixes(backbone)
    state = {key: value for key, value in state.items() if not key.startswith(classifier_prefixes)}
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of this backbone: {str(error).splitlines()[1].strip()}") from None
    missing = [key for key in missing if not key.startswith(classifier_prefixes)]
    if missing or unexpected:
        message = f"missing {missing[:3]}, unknown {list(unexpected)[:3]}"
        raise ValueError(f"{path}: not the weights of this backbone: {message}")


def _image_transform(backbone: Any, config: ImageTowerConfig) -> ImageTransform:
    pretrained_cfg = backbone.pretrained_cfg
    return ImageTransform(
        config.size or pretrained_cfg["input_size"][-1], tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"])
    )
