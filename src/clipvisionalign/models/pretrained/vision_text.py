"""VisionTextDualEncoderModel of transformers: any vision model and any text model that give a pooled vector, such as
clip-italian, or LiT (Zhai et al., arXiv:2111.07991)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipvisionalign.models.pretrained.clip import CLIPImageTower
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedImageTower,
    PretrainedTextTower,
    pool_alone,
)
from clipvisionalign.models.pretrained.transformers_layout import load_model, projected_parts, save_model
from clipvisionalign.models.pretrained.transforms import processor_settings, transform_from_processor
from clipvisionalign.models.text_families import max_positions
from clipvisionalign.models.tokenizer import load_tokenizer

#: Text models whose pooler reads the first token alone.
POOL_FIRST = ("bert", "roberta", "xlm-roberta")
MODEL_TYPES = ("vision-text-dual-encoder",)


class PooledImageTower(PretrainedImageTower):
    """A vision model of transformers with a `pooler` over its last hidden states."""

    @property
    def last_block(self) -> nn.Module | None:
        """The last block of the vision model; poolers of transformers' vision models read the class token."""
        blocks = next((m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) > 1), None)
        return None if blocks is None else blocks[-1]

    def pool(self, features: Tensor) -> Tensor:
        """Pool tokens as the vision model does.

        Args:
            features: (B, prefix + P, C) tokens.

        Returns:
            (B, C).
        """
        return self.backbone.pooler(features)

    def pool_each(self, patches: Tensor) -> Tensor:
        """Pool each patch alone.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        return pool_alone(self.backbone.pooler, patches)


class PooledTextTower(PretrainedTextTower):
    """A text model of transformers with a pooled output of its own."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text model and its pooler.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W) and tokens (b, T, W).
        """
        output = self._run(ids, mask, keeps_tokens=True)
        return output.pooler_output, output.last_hidden_state

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the text model, its last layer for the token that is pooled alone, and its pooler.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W).
        """
        return self._run(ids, mask, keeps_tokens=False).pooler_output

    def _run(self, ids: Tensor, mask: Tensor, keeps_tokens: bool) -> Any:
        """transformers' output; with `keeps_tokens` all of its tokens are of use, else only the pooled one."""
        pools_first = self.encoder.config.model_type in POOL_FIRST
        options = self._first_token_options(ids, keeps_tokens) if pools_first else {}
        return self.encoder(input_ids=ids, attention_mask=mask, **options)


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> PooledTextTower:
    """The text tower around a model's text encoder.

    Args:
        encoder: The encoder; `nn.Identity` for a tower that only tokenises.
        config: transformers' settings of the whole model.
        folder: Where its tokenizer is.

    Returns:
        The tower.
    """
    text = config.text_config
    positions = max_positions(text, None if isinstance(encoder, nn.Identity) else encoder)
    return PooledTextTower(encoder, load_tokenizer(folder), folder, text.hidden_size, positions)


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a VisionTextDualEncoderModel; see `families.load_dual_encoder`.

    Args:
        folder: The model's folder.
        config: transformers' settings of it.
        load_weights: Whether to read the weights; else they are random, to be replaced.

    Returns:
        The parts.

    Raises:
        WeightsNotFound: There are no weights.
        ValueError: The weights are not this model's, or its vision or text model gives no pooled vector.
    """
    import transformers

    model = load_model(transformers.VisionTextDualEncoderModel, config, folder, load_weights)
    text, vision = config.text_config, config.vision_config
    transform = transform_from_processor(processor_settings(folder), folder, vision.image_size)
    is_clip = vision.model_type == "clip_vision_model"
    if not is_clip and getattr(model.vision_model, "pooler", None) is None:
        raise ValueError(f"{folder}: the vision model '{vision.model_type}' gives no pooled vector of its tokens")
    if getattr(model.text_model, "pooler", None) is None and text.model_type != "clip_text_model":
        raise ValueError(f"{folder}: the text model '{text.model_type}' gives no pooled vector of its tokens")
    tower_class = CLIPImageTower if is_clip else PooledImageTower
    with torch.no_grad():
        blank = torch.zeros(1, 3, transform.size, transform.size)
        tokens = model.vision_model.eval()(pixel_values=blank).last_hidden_state
    if tokens.ndim != 3:
        raise ValueError(f"{folder}: the vision model '{vision.model_type}' gives a map and not tokens: not supported")
    num_patches = (transform.size // vision.patch_size) ** 2
    image_tower = tower_class(
        model.vision_model, transform, vision.hidden_size, num_patches, tokens.shape[1] - num_patches
    )
    return projected_parts(model, "vision-text-dual-encoder", image_tower, text_tower(model.text_model, config, folder))


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a VisionTextDualEncoderModel; see `families.save_dual_encoder`.

    Args:
        state: The tensors of an aligner, under the aligner's names.
        config: transformers' settings of the model.
        folder: Where config.json and the weights are written.

    Raises:
        ValueError: There are tensors that are not this model's, or some are missing.
    """
    import transformers

    save_model(transformers.VisionTextDualEncoderModel, config, state, folder)
