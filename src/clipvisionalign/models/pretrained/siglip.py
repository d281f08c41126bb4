"""SigLIP in transformers' layout (Zhai et al., arXiv:2303.15343), SigLIP 2's checkpoints of fixed size, and its NaFlex
checkpoints, which take images of any shape (Tschannen et al., arXiv:2502.14786).

The caption is read in both directions, padded to a fixed length; the vector is of the last place, which is padding for
all but the longest captions. The image's patches are pooled by attention from one learned query.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipvisionalign.models.image_tower import ImageFeatures
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedImageHead,
    PretrainedImageTower,
    PretrainedTextTower,
    pool_alone,
)
from clipvisionalign.models.pretrained.transformers_layout import load_model, save_model
from clipvisionalign.models.pretrained.transforms import (
    PatchTransform,
    processor_settings,
    transform_from_processor,
)
from clipvisionalign.models.tokenizer import load_tokenizer

MODEL_TYPES = ("siglip", "siglip2")


class SiglipImageTower(PretrainedImageTower):
    """SigLIP's vision transformer with its pooling by attention."""

    def pool(self, features: Tensor) -> Tensor:
        """Pool patches by attention.

        Args:
            features: (B, P, C) patches.

        Returns:
            (B, C).
        """
        return self.backbone.head(features)

    def pool_each(self, patches: Tensor) -> Tensor:
        """Pool each patch alone.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        return pool_alone(self.backbone.head, patches)


class NaFlexImageTower(SiglipImageTower):
    """The vision transformer of SigLIP 2's NaFlex checkpoints: patches of images of any shape, padded."""

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Encode images of any shape.

        Args:
            pixels: (B, 1 + P, 3 patch^2) packed patches, see `PatchTransform`.

        Returns:
            Pooled (B, C) and patches (B, P, C); no patches (B, 0, C) unless `pools_patches`.
        """
        patches, mask, grids = self.image_transform.unpack(pixels)  # type: ignore[attr-defined]
        output = self.backbone(pixel_values=patches, pixel_attention_mask=mask.int(), spatial_shapes=grids)
        if not self.pools_patches:
            return self.without_patches(output.pooler_output)
        tokens = output.last_hidden_state
        # Padding takes the place of the first patch, which changes no best match and is of no other use.
        tokens = torch.where(mask[..., None], tokens, tokens[:, :1])
        return ImageFeatures(output.pooler_output, self.pool_each(tokens))

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Refuse: the grid of patches differs from image to image.

        Args:
            pixels: Packed patches.

        Returns:
            Nothing: it always raises.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.config.name}: a model that takes images of any shape (NaFlex) has no map of one grid to show; "
            "SigLIP 2's models of fixed size have"
        )


class SiglipTextTower(PretrainedTextTower):
    """SigLIP's bidirectional text transformer: the last place, through a linear layer."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text transformer and its linear layer.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding; used where the tokenizer gives one.

        Returns:
            Pooled (b, D) and tokens (b, T, W).
        """
        output = self._run(ids, mask, keeps_tokens=True)
        return output.pooler_output, output.last_hidden_state

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the text transformer, its last layer for the last place alone, and its linear layer.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding; used where the tokenizer gives one.

        Returns:
            Pooled (b, D).
        """
        return self._run(ids, mask, keeps_tokens=False).pooler_output

    def _run(self, ids: Tensor, mask: Tensor, keeps_tokens: bool) -> Any:
        """transformers' output; with `keeps_tokens` all of its tokens are of use, else only the last."""
        options: dict[str, Any] = {}
        if "attention_mask" in getattr(self.tokenizer, "model_input_names", ()):
            options["attention_mask"] = self.word_mask(ids, mask)
        if self._takes_rows:
            options |= {"pooled_rows": torch.full_like(ids[:, 0], ids.shape[1] - 1), "keeps_tokens": keeps_tokens}
        return self.encoder(input_ids=ids, **options)

    def token_projection(self, text_head: nn.Module) -> tuple[Tensor, Tensor]:
        """The linear layer behind the last place, and what narrows the common space.

        Args:
            text_head: The projection of the pooled vector; `nn.Identity` where the common space is the model's own.

        Returns:
            Weight (D, W) and bias (D,).
        """
        weight, bias = self.encoder.head.weight, self.encoder.head.bias
        if isinstance(text_head, nn.Linear):
            weight, bias = text_head.weight @ weight, text_head.weight @ bias
        return weight, bias


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> SiglipTextTower:
    """The text tower around a model's text encoder.

    Args:
        encoder: The encoder; `nn.Identity` for a tower that only tokenises.
        config: transformers' settings of the whole model.
        folder: Where its tokenizer is.

    Returns:
        The tower.
    """
    text = config.text_config
    return SiglipTextTower(
        encoder, load_tokenizer(folder), folder, text.hidden_size, text.max_position_embeddings, fixed_length=True
    )


def common_width(config: Any) -> int:
    """The width of the common space.

    Args:
        config: transformers' settings of the model.

    Returns:
        D, how many numbers its vectors have.
    """
    return int(config.text_config.projection_size or config.text_config.hidden_size)


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a SiglipModel or Siglip2Model; see `families.load_dual_encoder`.

    Args:
        folder: The model's folder.
        config: transformers' settings of it.
        load_weights: Whether to read the weights; else they are random, to be replaced.

    Returns:
        The parts.

    Raises:
        WeightsNotFound: There are no weights.
        ValueError: The weights are not this model's, or how it takes images is not known.
    """
    import transformers

    is_naflex = config.model_type == "siglip2"
    model = load_model(
        transformers.Siglip2Model if is_naflex else transformers.SiglipModel, config, folder, load_weights
    )
    vision = config.vision_config
    settings = processor_settings(folder)
    image_tower: PretrainedImageTower
    if is_naflex:
        transform = PatchTransform(
            mean=tuple(settings.get("image_mean", (0.5,) * 3)),
            std=tuple(settings.get("image_std", (0.5,) * 3)),
            patch=settings.get("patch_size", vision.patch_size),
            max_patches=settings.get("max_num_patches", vision.num_patches),
            interpolation={2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 2), "bilinear"),
        )
        image_tower = NaFlexImageTower(model.vision_model, transform, vision.hidden_size, transform.max_patches)
    else:
        image_tower = SiglipImageTower(
            model.vision_model,
            transform_from_processor(settings, folder, vision.image_size),
            vision.hidden_size,
            (vision.image_size // vision.patch_size) ** 2,
        )
    return DualEncoderParts(
        family="siglip2 (NaFlex)" if is_naflex else "siglip",
        image_tower=image_tower,
        text_tower=text_tower(model.text_model, config, folder),
        image_head=PretrainedImageHead(nn.Identity()),
        text_head=nn.Identity(),
        width=common_width(config),
        log_scale=model.logit_scale.item(),
        logit_bias=model.logit_bias.item(),
    )


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a SiglipModel or Siglip2Model; see `families.save_dual_encoder`.

    Args:
        state: The tensors of an aligner, under the aligner's names.
        config: transformers' settings of the model.
        folder: Where config.json and the weights are written.

    Raises:
        ValueError: There are tensors that are not this model's, or some are missing.
    """
    import transformers

    model_class = transformers.Siglip2Model if config.model_type == "siglip2" else transformers.SiglipModel
    save_model(model_class, config, state, folder)
