"""Chinese CLIP in transformers' layout (Yang et al., arXiv:2211.01335): CLIP's image tower, and a BERT for captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipvisionalign.models.pretrained.clip import clip_image_tower
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedTextTower,
)
from clipvisionalign.models.pretrained.transformers_layout import load_model, projected_parts, save_model
from clipvisionalign.models.tokenizer import load_tokenizer

MODEL_TYPES = ("chinese_clip",)


class ChineseCLIPTextTower(PretrainedTextTower):
    """A BERT: the first token, without BERT's pooler."""

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text model.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W) and tokens (b, T, W).
        """
        tokens = self._run(ids, mask, keeps_tokens=True)
        return tokens[:, 0], tokens

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the text model, its last layer for the first token alone.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W).
        """
        return self._run(ids, mask, keeps_tokens=False)[:, 0]

    def _run(self, ids: Tensor, mask: Tensor, keeps_tokens: bool) -> Tensor:
        options = self._first_token_options(ids, keeps_tokens)
        return self.encoder(input_ids=ids, attention_mask=mask, **options).last_hidden_state


def text_tower(encoder: nn.Module, config: Any, folder: Path) -> ChineseCLIPTextTower:
    """The text tower around a model's text encoder.

    Args:
        encoder: The encoder; `nn.Identity` for a tower that only tokenises.
        config: transformers' settings of the whole model.
        folder: Where its tokenizer is.

    Returns:
        The tower.
    """
    text = config.text_config
    return ChineseCLIPTextTower(
        encoder, load_tokenizer(folder), folder, text.hidden_size, text.max_position_embeddings, pooling="first"
    )


def load(folder: Path, config: Any, load_weights: bool) -> DualEncoderParts:
    """The parts of a ChineseCLIPModel; see `families.load_dual_encoder`.

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

    model = load_model(transformers.ChineseCLIPModel, config, folder, load_weights)
    image_tower = clip_image_tower(model, config, folder)
    return projected_parts(model, "chinese_clip", image_tower, text_tower(model.text_model, config, folder))


def save(state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write a ChineseCLIPModel; see `families.save_dual_encoder`.

    Args:
        state: The tensors of an aligner, under the aligner's names.
        config: transformers' settings of the model.
        folder: Where config.json and the weights are written.

    Raises:
        ValueError: There are tensors that are not this model's, or some are missing.
    """
    import transformers

    save_model(transformers.ChineseCLIPModel, config, state, folder)
