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
from clipvisionalign.models.tokenizer import load_tokenizer

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

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        """Run the vision transformer, its last layer for the class token alone.

        Args:
            pixels: (B, 3, S, S) as `image_transform` returns them.

        Returns:
            Pooled (B, C).
        """
        return self._run(pixels, keeps_tokens=False).pooler_output

    def feature_map(self, pixels: Tensor) -> Tensor:
        """Run the vision transformer.

        Args:
            pixels: (B, 3, S, S) as `image_transform` returns them.

        Returns:
            (B, 1 + P, C) tokens, before any pooling.
        """
        return self._run(pixels, keeps_tokens=True).last_hidden_state

    def _run(self, pixels: Tensor, keeps_tokens: bool) -> Any:
        """transformers' output; with `keeps_tokens` all of its tokens are of use, else only the pooled one."""
        options: dict[str, Any] = {}
        if self._takes_rows:
            # `shape[0]` and not `len`, which an export to ONNX would take for a constant.
            rows = torch.zeros(pixels.shape[0], dtype=torch.long, device=pixels.device)
            options = {"pooled_rows": rows, "keeps_tokens": keeps_tokens}
        return self.backbone(pixel_values=self.image_transform.normalize(pixels), **options)

    def pool(self, features: Tensor) -> Tensor:
        """Take the class token, after the last layer norm.

        Args:
            features: (B, 1 + P, C) tokens.

        Returns:
            (B, C).
        """
        return self.backbone.post_layernorm(features[:, 0])

    def pool_each(self, patches: Tensor) -> Tensor:
        """Apply the class token's layer norm to patches.

        Args:
            patches: (B, P, C).

        Returns:
            (B, P, C).
        """
        return self.backbone.post_layernorm(patches)


class CLIPTextTower(PretrainedTextTower):
    """CLIP's causal text transformer: the end-of-text token after the last layer norm."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text transformer.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding; it is not used, as nothing of a causal caption attends to what is
                behind it.

        Returns:
            Pooled (b, W) and tokens (b, T, W).
        """
        options: dict[str, Any] = {}
        if self.window:
            options = {"pooled_position": self._pooled_position(ids)}
        elif self._takes_rows:
            options = {"pooled_rows": self._pooled_position(ids), "keeps_tokens": True}
        output = self.encoder(input_ids=ids, **options)
        return output.pooler_output, output.last_hidden_state

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the text transformer, its last layer for the end-of-text token alone.

        Args:
            ids: (b, T) token ids.
            mask: (b, T), not used, as by `encode`.

        Returns:
            Pooled (b, W).
        """
        if self.window or not self._takes_rows:
            return self.encode(ids, mask)[0]
        return self.encoder(input_ids=ids, pooled_rows=self._pooled_position(ids)).pooler_output

    def _pooled_position(self, ids: Tensor) -> Tensor:
        """(b, T) -> (b,), the place of the end-of-text token, as transformers finds it."""
        eos = self.encoder.config.eos_token_id
        return ids.argmax(dim=-1) if eos == 2 else first_match(ids, eos)

    def use_window(self, window: int) -> None:
        """Let a token see `window` tokens in front of it, and the end-of-text token all.

        Args:
            window: At least 1.

        Raises:
            ValueError: It is smaller.
        """
        import transformers

        if window < 1:
            raise ValueError(f"--model.text_tower.window {window}: a causal window needs a token or more")
        transformers.AttentionInterface.register(CAUSAL_WINDOW, _windowed)
        self.encoder.config._attn_implementation = CAUSAL_WINDOW
        self.encoder.config.attention_window = self.window = window

    def position_table(self) -> nn.Embedding:
        """The table of learned positions.

        Returns:
            (T, W).
        """
        return self.encoder.embeddings.position_embedding

    def set_position_table(self, table: nn.Embedding) -> None:
        """Replace `position_table`.

        Args:
            table: (T', W).
        """
        embeddings = self.encoder.embeddings
        embeddings.position_embedding = table
        embeddings.position_ids = torch.arange(table.num_embeddings)[None]
        self.encoder.config.max_position_embeddings = table.num_embeddings


def clip_image_tower(model: Any, config: Any, folder: Path) -> CLIPImageTower:
    """The image tower of a model whose vision model is CLIP's.

    Args:
        model: transformers' own model.
        config: Its settings.
        folder: Where its preprocessor_config.json is.

    Returns:
        The tower.

    Raises:
        ValueError: The preprocessing is one that is not known.
    """
    vision = config.vision_config
    transform = transform_from_processor(processor_settings(folder), folder, vision.image_size)
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return CLIPImageTower(model.vision_model, transform, vision.hidden_size, num_patches, prefix_tokens=1)


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> CLIPTextTower:
    """The text tower around a model's text encoder.

    Args:
        encoder: The encoder; `nn.Identity` for a tower that only tokenises.
        config: transformers' settings of the whole model.
        folder: Where its tokenizer is.

    Returns:
        The tower.
    """
    text = config.text_config
    return CLIPTextTower(encoder, load_tokenizer(folder), folder, text.hidden_size, text.max_position_embeddings)


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a CLIPModel; see `families.load_dual_encoder`.

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

    model = load_model(transformers.CLIPModel, config, folder, load_weights)
    image_tower = clip_image_tower(model, config, folder)
    return projected_parts(model, "clip", image_tower, text_tower(model.text_model, config, folder))


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a CLIPModel; see `families.save_dual_encoder`.

    Args:
        state: The tensors of an aligner, under the aligner's names.
        config: transformers' settings of the model.
        folder: Where config.json and the weights are written.

    Raises:
        ValueError: There are tensors that are not this model's, or some are missing.
    """
    import transformers

    # Positions for longer captions are a setting of the layout.
    config.text_config.max_position_embeddings = len(state["text_tower.encoder.embeddings.position_embedding.weight"])
    save_model(transformers.CLIPModel, config, state, folder)
