"""Chinese CLIP in transformers' layout (Yang et al., arXiv:2211.01335): CLIP's image tower, and a BERT for captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipvisionalign.models.pretrained.clip import clip_image_tower
from clipvisionalign.models.pretrained.parts import (
    TRANSFORMERS_NAMES,
    DualEncoderParts,
    PretrainedImageHead,
    PretrainedTextTower,
    rename_tensors,
)
from clipvisionalign.models.pretrained.transformers_layout import load_model, read_tokenizer, save_model

MODEL_TYPES = ("chinese_clip",)


class ChineseCLIPTextTower(PretrainedTextTower):
    """A BERT: the first token, without BERT's pooler."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask (b, T) -> pooled (b, W), tokens (b, T, W)."""
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return tokens[:, 0], tokens


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> ChineseCLIPTextTower:
    """The text tower around a model's text encoder."""
    text = config.text_config
    return ChineseCLIPTextTower(
        encoder, read_tokenizer(folder), folder, text.hidden_size, text.max_position_embeddings, pooling="first"
    )


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a ChineseCLIPModel; see `families.load_dual_encoder`."""
    import transformers

    model = load_model(transformers.ChineseCLIPModel, config, folder, load_weights)
    return DualEncoderParts(
        family="chinese_clip",
        image_tower=clip_image_tower(model, config, folder),
        text_tower=text_tower(model.text_model, config, folder),
        image_head=PretrainedImageHead(model.visual_projection),
        text_head=model.text_projection,
        width=config.projection_dim,
        log_scale=model.logit_scale.item(),
    )


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a ChineseCLIPModel; see `families.save_dual_encoder`."""
    import transformers

    save_model(transformers.ChineseCLIPModel, config, rename_tensors(state, TRANSFORMERS_NAMES), folder)
