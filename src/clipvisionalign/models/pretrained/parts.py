"""What a pretrained dual encoder is made of: two towers and their heads, as an `Aligner` takes them.

A family subclasses the two towers where its library's model differs; everything else is shared.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.heads import ImageEmbeddings
from clipvisionalign.models.image_tower import ImageFeatures, ImageTowerConfig
from clipvisionalign.models.text_tower import CaptionFeatures, TextTowerConfig, tokenize_captions
from clipvisionalign.models.weights import WeightsOrigin

#: What is copied into a run folder, so that it needs nothing else: all of a model's folder but weights.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.codes")


@dataclass
class DualEncoderParts:
    """A pretrained dual encoder in the parts of an `Aligner`.

    Attributes:
        family: name of the family, for messages.
        image_tower: pixels -> `ImageFeatures`.
        text_tower: tokens -> `CaptionFeatures`.
        image_head: `ImageFeatures` -> `ImageEmbeddings`.
        text_head: pooled (b, W) -> (b, D), not yet of unit length.
        width: D, width of the common space.
        log_scale: the learned log of 1 / temperature.
        logit_bias: what is added to the scaled cosines, None for a family without.
    """

    family: str
    image_tower: PretrainedImageTower
    text_tower: PretrainedTextTower
    image_head: PretrainedImageHead
    text_head: nn.Module
    width: int
    log_scale: float
    logit_bias: float | None = None


class PretrainedImageTower(nn.Module):
    """The image tower of a pretrained dual encoder; answers the calls of `ImageTower`.

    Args:
        backbone: the library's vision model, without projection.
        image_transform: from an image to what `backbone` takes.
        width: C, width of the pooled vector.
        num_patches: P.
        prefix_tokens: tokens in front of the patches, such as a class token.
    """

    def __init__(
        self, backbone: nn.Module, image_transform: ImageTransform, width: int, num_patches: int, prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.image_transform = image_transform
        self.width = self.raw_patch_width = width
        self.num_patches, self.prefix_tokens = num_patches, prefix_tokens
        self.config = ImageTowerConfig()
        self.origin = WeightsOrigin("files", "")
        #: Whether patches leave as the pooled vector does, ready for the head; else as the last layer has them.
        self.pools_patches = False

    @property
    def patch_width(self) -> int:
        """Numbers of a patch's vector, as it leaves."""
        return self.width if self.pools_patches else self.raw_patch_width

    @property
    def last_block(self) -> nn.Module | None:
        """The last block of a tower that is pooled from a class token alone: before it, patches still have a part in
        the vector. None where the pooling itself reads the patches."""
        return None

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Pixels, as `image_transform` gives them (B, ...) -> pooled (B, C), patches (B, P, C)."""
        return self.features_of(self.feature_map(pixels))

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> the last layer's tokens (B, prefix + P, C)."""
        return self.backbone(pixel_values=self.image_transform.normalize(pixels)).last_hidden_state

    def features_of(self, features: Tensor) -> ImageFeatures:
        """What `feature_map` gives -> pooled (B, C), patches (B, P, C)."""
        patches = self.patches_in(features)
        return ImageFeatures(self.pool(features), self.pool_each(patches) if self.pools_patches else patches)

    def patches_in(self, features: Tensor) -> Tensor:
        """What `feature_map` gives -> its patches (B, P, C)."""
        return features[:, self.prefix_tokens :]

    def pool(self, features: Tensor) -> Tensor:
        """Tokens (B, prefix + P, C) -> pooled (B, C)."""
        raise NotImplementedError

    def pool_each(self, patches: Tensor) -> Tensor:
        """Patches (B, P, C) -> (B, P, C), each as `pool` would leave it if the image were this patch alone."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Nothing: the text tower saves the files of both."""


class PretrainedTextTower(nn.Module):
    """The text tower of a pretrained dual encoder with its tokenizer; answers the calls of `TextTower`.

    Args:
        encoder: the library's text model, without projection.
        tokenizer: a transformers tokenizer.
        source: the model's folder, whose small files are saved with a run.
        width: W, width of the pooled vector and of the tokens.
        max_positions: tokens that the encoder has positions for.
        fixed_length: whether every caption is padded to `max_positions`, since padding takes part in its vector.
        pooling: how tokens become one vector, for messages.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        source: Path,
        width: int,
        max_positions: int,
        fixed_length: bool = False,
        pooling: str = "last",
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.tokenizer, self.source = tokenizer, source
        self.width, self.fixed_length, self.pooling = width, fixed_length, pooling
        self.pad: int = getattr(tokenizer, "pad_token_id", None) or 0
        self.max_positions = min(max_positions, getattr(tokenizer, "model_max_length", max_positions))
        self.max_tokens = self.max_positions
        self.config = TextTowerConfig(max_tokens=self.max_tokens)
        self.origin = WeightsOrigin("files", "")

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.get_input_embeddings()

    #: Tokens in front of it that a token sees; 0 for all.
    window = 0

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have an embedding."""
        return self.input_embeddings().num_embeddings  # type: ignore[return-value]

    def limit_tokens(self, max_tokens: int) -> None:
        """Cut captions after `max_tokens` tokens, if that is less than the encoder's positions."""
        self.max_tokens = min(max_tokens, self.max_positions)
        self.config = replace(self.config, max_tokens=self.max_tokens)

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Token ids of each caption with its special tokens, long ones cut; padded only if `fixed_length`."""
        tokens = tokenize_captions(self.tokenizer, captions, self.max_tokens)
        if not self.fixed_length:
            return tokens
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        padded = []
        for ids in tokens:
            padding = [self.pad] * (self.max_positions - len(ids))
            padded.append(padding + ids if left else ids + padding)
        return TokenizedCaptions(padded, tokens.num_truncated)

    def word_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (b, T), as grouped -> (b, T), 1 on tokens of the caption, 0 on any padding."""
        if not self.fixed_length:
            return mask
        is_padding = ids == self.pad
        if getattr(self.tokenizer, "eos_token_id", None) == self.pad:
            # The first of them ends the caption.
            is_padding = is_padding & (is_padding.cumsum(dim=1) > 1)
        return (~is_padding).to(mask.dtype)

    def forward(self, ids: Tensor, mask: Tensor, want_tokens: bool = True) -> CaptionFeatures:
        """ids, mask (b, T) -> pooled (b, W), tokens (b, T, W) if they are wanted, mask of the caption's own tokens."""
        pooled, tokens = self.encode(ids, mask)
        return CaptionFeatures(pooled, tokens if want_tokens else None, self.word_mask(ids, mask))

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask (b, T) -> pooled (b, W), tokens (b, T, W)."""
        raise NotImplementedError

    def position_table(self) -> nn.Embedding | None:
        """The table of learned positions, (T, W); None where it is not one that can be replaced."""
        return None

    def set_position_table(self, table: nn.Embedding) -> None:
        """Replace `position_table`."""
        raise NotImplementedError

    def use_window(self, window: int) -> None:
        """Let a token see `window` tokens in front of it, and the pooled token all. Raises ValueError where the tower
        cannot."""
        raise ValueError(f"{self.config.name}: its text tower cannot be given sliding windows; CLIP's can")

    def token_projection(self, text_head: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The linear map from a token to the common space, weight (D, W) and bias (D,); None where it is not linear."""
        if isinstance(text_head, nn.Linear):
            weight = text_head.weight
            return weight, torch.zeros(len(weight)) if text_head.bias is None else text_head.bias
        return None

    def save(self, folder: Path) -> None:
        """Config, tokenizer and preprocessing of the whole dual encoder, as its publisher has them, without weights."""
        if not self.source.is_dir():
            raise FileNotFoundError(
                f"{self.source}: is gone, with the tokenizer and preprocessing that a run needs: put it back"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in SMALL_FILES:
            for file in sorted(self.source.glob(pattern)):
                # A table of weights in parts would announce weights that are not there.
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)


class PretrainedImageHead(nn.Module):
    """From an image tower's features to the common space, by the model's own projection.

    Args:
        projection: (..., C) -> (..., D).
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        #: Whether patches are projected too, for a design that scores pairs.
        self.projects_patches = False

    def forward(self, features: ImageFeatures) -> ImageEmbeddings:
        """Pooled features and patches of a tower -> unit vectors (B, D), and patches (B, P, D) where they are used."""
        patches = self.projection(features.patches) if self.projects_patches else None
        return ImageEmbeddings(F.normalize(self.projection(features.pooled).float(), dim=-1), patches)


#: Beginnings of the names of an aligner's parts, and of the same in transformers' dual encoders.
TRANSFORMERS_NAMES = {
    "image_tower.backbone.": "vision_model.", "text_tower.encoder.": "text_model.",
    "image_head.projection.": "visual_projection.", "text_head.": "text_projection.",
    "log_scale": "logit_scale", "logit_bias": "logit_bias",
}  # fmt: skip


def rename_tensors(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under other names: `names` maps the beginning of a name to what takes its place."""
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def fit_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a library's model, in its shapes.

    Args:
        state: tensors under the library's names.
        expected: the tensors of the library's model.
        kind: what the library's model is called.

    Raises ValueError for a tensor that the library's model has no place for, lacks, or has in another size.
    """
    if extra := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{kind} has no place for {len(extra)} tensors of this model, such as {extra[0]}")
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"this model lacks {len(missing)} tensors of {kind}, such as {missing[0]}")
    for name, tensor in state.items():
        if tensor.numel() != expected[name].numel():
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in this model, and {tuple(expected[name].shape)} in {kind}"
            )
    return {name: tensor.reshape(expected[name].shape) for name, tensor in state.items()}


def pool_alone(pool: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Patches (B, P, C) -> (B, P, C), each as `pool` leaves a sequence (B, 1, C) of it alone."""
    return pool(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])


def first_match(ids: Tensor, token: int) -> Tensor:
    """(b, T) -> (b,), the first place of a token; 0 where there is none."""
    return (ids == token).to(torch.int).argmax(dim=-1)
