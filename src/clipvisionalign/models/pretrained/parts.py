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

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.pretrained.image_parts import PretrainedImageHead, PretrainedImageTower
from clipvisionalign.models.pretrained.last_layer import take_pooled_rows
from clipvisionalign.models.text_tower import CaptionFeatures, TextTowerConfig
from clipvisionalign.models.tokenizer import tokenize_captions
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
        self._takes_rows = take_pooled_rows(encoder)

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.get_input_embeddings()

    def vocabulary(self) -> dict[str, int]:
        """Each token's number."""
        return self.tokenizer.get_vocab()

    #: Tokens in front of it that a token sees; 0 for all.
    window = 0

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have an embedding."""
        return self.input_embeddings().num_embeddings  # type: ignore[return-value]

    def limit_tokens(self, max_tokens: int) -> None:
        """Cut captions after so many tokens.

        Args:
            max_tokens: Tokens of a caption, with special ones; at most those that the encoder has positions for.
        """
        self.max_tokens = min(max_tokens, self.max_positions)
        self.config = replace(self.config, max_tokens=self.max_tokens)

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Token ids of each caption with its special tokens.

        Args:
            captions: M captions.

        Returns:
            A list of ids for each caption, cut after `max_tokens`; padded only if `fixed_length`. Its attribute
            `num_truncated` is the number of captions that were cut.
        """
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
        """Which tokens are of the caption itself.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 where a shorter caption of the group is padded.

        Returns:
            (b, T) 1 on tokens of the caption, 0 on any padding, the family's own included; `mask` itself unless
            `fixed_length`.
        """
        if not self.fixed_length:
            return mask
        is_padding = ids == self.pad
        if getattr(self.tokenizer, "eos_token_id", None) == self.pad:
            # The first of them ends the caption.
            is_padding = is_padding & (is_padding.cumsum(dim=1) > 1)
        return (~is_padding).to(mask.dtype)

    def forward(self, ids: Tensor, mask: Tensor, want_tokens: bool = True) -> CaptionFeatures:
        """Encode captions.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 where a shorter caption of the group is padded.
            want_tokens: Whether the outputs of all tokens are returned.

        Returns:
            Pooled (b, W), tokens (b, T, W) or None, and `word_mask`.
        """
        pooled, tokens = self.encode(ids, mask) if want_tokens else (self.encode_pooled(ids, mask), None)
        return CaptionFeatures(pooled, tokens, self.word_mask(ids, mask))

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder; each family implements it.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W) and tokens (b, T, W), before the projection.
        """
        raise NotImplementedError

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the encoder for the pooled vector alone; a family that can spare work implements it.

        Args:
            ids: (b, T) token ids.
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Pooled (b, W), as `encode` returns it.
        """
        return self.encode(ids, mask)[0]

    def _first_token_options(self, ids: Tensor, keeps_tokens: bool) -> dict[str, Any]:
        """What has an encoder run its last layer for the first token alone; empty where its layers are not known."""
        if not self._takes_rows:
            return {}
        return {"pooled_rows": torch.zeros_like(ids[:, 0]), "keeps_tokens": keeps_tokens}

    def position_table(self) -> nn.Embedding | None:
        """The table of learned positions.

        Returns:
            (T, W); None where it is not one that can be replaced.
        """
        return None

    def set_position_table(self, table: nn.Embedding) -> None:
        """Replace `position_table`; a family that has one implements it.

        Args:
            table: (T', W).
        """
        raise NotImplementedError

    def use_window(self, window: int) -> None:
        """Restrict attention to a sliding window.

        Args:
            window: Tokens in front of it that a token attends to; the pooled token attends to all.

        Raises:
            ValueError: The tower has no sliding-window variant.
        """
        raise ValueError(f"{self.config.name}: its text tower cannot be given sliding windows; CLIP's can")

    def token_projection(self, text_head: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The linear map from a token to the common space.

        Args:
            text_head: The projection of the pooled vector.

        Returns:
            Weight (D, W) and bias (D,); None where the map is not linear.
        """
        if isinstance(text_head, nn.Linear):
            weight = text_head.weight
            return weight, torch.zeros(len(weight)) if text_head.bias is None else text_head.bias
        return None

    def save(self, folder: Path) -> None:
        """Copy config, tokenizer and preprocessing of the whole dual encoder, as its publisher has them.

        Weights are not copied.

        Args:
            folder: Where they are written; it is made if it is not there.

        Raises:
            FileNotFoundError: The folder that the model was opened from is gone.
        """
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


#: Beginnings of the names of an aligner's parts, and of the same in transformers' dual encoders.
TRANSFORMERS_NAMES = {
    "image_tower.backbone.": "vision_model.", "text_tower.encoder.": "text_model.",
    "image_head.projection.": "visual_projection.", "text_head.": "text_projection.",
    "log_scale": "logit_scale", "logit_bias": "logit_bias",
}  # fmt: skip


def rename_tensors(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under other names.

    Args:
        state: Tensors by name.
        names: The beginning of a name, and what takes its place; the first that fits counts.

    Returns:
        The same tensors; one whose name has none of these beginnings keeps it.
    """
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def common_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the common space that an aligner's tensors project images to.

    Args:
        state: Tensors by the aligner's names.

    Returns:
        The width; None for a head without weights.
    """
    prefix = "image_head.projection."
    weights = [tensor for name, tensor in state.items() if name.startswith(prefix) and name.endswith("weight")]
    return len(weights[-1]) if weights else None


def fit_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a library's model, in its shapes.

    Args:
        state: Tensors under the library's names.
        expected: The tensors of the library's model.
        kind: What the library's model is called.

    Returns:
        The tensors of `state`, reshaped.

    Raises:
        ValueError: The library's model has no place for a tensor, lacks one, or has it in another size.
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
    """Pool each patch as if it were alone.

    Args:
        pool: From a sequence (B, T, C) to (B, C).
        patches: (B, P, C).

    Returns:
        (B, P, C), each as `pool` leaves a sequence (1, 1, C) of it.
    """
    return pool(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])


def first_match(ids: Tensor, token: int) -> Tensor:
    """The first position of a token in each row.

    Args:
        ids: (b, T) token ids.
        token: The id that is searched.

    Returns:
        (b,) positions from 0; 0 also where there is none.
    """
    return (ids == token).to(torch.int).argmax(dim=-1)
