"""CLIP in transformers' layout (Radford et al., arXiv:2103.00020), and all models of its class: MetaCLIP, LAION's, ...

The caption is read causally and pooled at its end-of-text token, so that padding behind it has no part in the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipvisionalign.models.causal_attention import causal_attention
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedImageTower,
    PretrainedTextTower,
    first_match,
)
from clipvisionalign.models.pretrained.transformers_layout import load_model, projected_parts, save_model
from clipvisionalign.models.pretrained.transforms import processor_settings, transform_from_processor
from clipvisionalign.models.text_tower import load_tokenizer

MODEL_TYPES = ("clip",)


#: Under this name CLIP's text transformer calls `causal_attention`.
CAUSAL_WINDOW = "clipvisionalign-causal-window"


def _windowed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, pooled_position: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`causal_attention` as transformers calls it: q, k, v (b, H, T, d) -> (b, T, H, d)."""
    window = module.config.attention_window
    return causal_attention(query, key, value, window, pooled_position, dropout).transpose(1, 2), None


class CLIPImageTower(PretrainedImageTower):
    """CLIP's vision transformer: the class token after the last layer norm."""

    @property
    def last_block(self) -> nn.Module:
        """The last block of the vision transformer."""
        return self.backbone.encoder.layers[-1]

    def pool(self, features: Tensor) -> Tensor:
        """Tokens (B, 1 + P, C) -> the class token (B, C)."""
        return self.backbone.post_layernorm(features[:, 0])

    def pool_each(self, patches: Tensor) -> Tensor:
        """Patches (B, P, C) -> (B, P, C), after the class token's layer norm."""
        return self.backbone.post_layernorm(patches)


class CLIPTextTower(PretrainedTextTower):
    """CLIP's causal text transformer: the end-of-text token after the last layer norm."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b, T) -> pooled (b, W), tokens (b, T, W); padding needs no mask behind a causal caption."""
        options = {"pooled_position": self._pooled_position(ids)} if self.window else {}
        output = self.encoder(input_ids=ids, **options)
        return output.pooler_output, output.last_hidden_state

    def _pooled_position(self, ids: Tensor) -> Tensor:
        """(b, T) -> (b,), the place of the end-of-text token, as transformers finds it."""
        eos = self.encoder.config.eos_token_id
        return ids.argmax(dim=-1) if eos == 2 else first_match(ids, eos)

    def use_window(self, window: int) -> None:
        """Let a token see `window` tokens in front of it, and the end-of-text token all."""
        import transformers

        if window < 1:
            raise ValueError(f"--model.text_tower.window {window}: a causal window needs a token or more")
        transformers.AttentionInterface.register(CAUSAL_WINDOW, _windowed)
        self.encoder.config._attn_implementation = CAUSAL_WINDOW
        self.encoder.config.attention_window = self.window = window

    def position_table(self) -> nn.Embedding:
        """The table of learned positions, (T, W)."""
        return self.encoder.embeddings.position_embedding

    def set_position_table(self, table: nn.Embedding) -> None:
        """Replace `position_table`."""
        embeddings = self.encoder.embeddings
        embeddings.position_embedding = table
        embeddings.position_ids = torch.arange(table.num_embeddings)[None]
        self.encoder.config.max_position_embeddings = table.num_embeddings


def clip_image_tower(model: Any, config: Any, folder: Path) -> CLIPImageTower:
    """The image tower of a model whose vision model is CLIP's."""
    vision = config.vision_config
    transform = transform_from_processor(processor_settings(folder), folder, vision.image_size)
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return CLIPImageTower(model.vision_model, transform, vision.hidden_size, num_patches, prefix_tokens=1)


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> CLIPTextTower:
    """The text tower around a model's text encoder."""
    text = config.text_config
    return CLIPTextTower(encoder, load_tokenizer(folder), folder, text.hidden_size, text.max_position_embeddings)


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a CLIPModel; see `families.load_dual_encoder`."""
    import transformers

    model = load_model(transformers.CLIPModel, config, folder, load_weights)
    image_tower = clip_image_tower(model, config, folder)
    return projected_parts(model, "clip", image_tower, text_tower(model.text_model, config, folder))


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a CLIPModel; see `families.save_dual_encoder`."""
    import transformers

    # Positions for longer captions are a setting of the layout.
    config.text_config.max_position_embeddings = len(state["text_tower.encoder.embeddings.position_embedding.weight"])
    save_model(transformers.CLIPModel, config, state, folder)
