"""The text tower: any transformers encoder by name, with its own tokenizer -> one pooled vector and the tokens.

`self` is the encoder as it is. `sparse` is Longformer as published, or sliding windows over the same encoder and the
same weights, so that a comparison can hold everything else fixed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.models.attention import attention_mask
from clipvisionalign.models.weights import EMBEDDED_TEXT, find_text_folder


@dataclass
class TextTowerConfig:
    """Which transformers encoder reads the captions.

    Args:
        name: a folder, all-MiniLM-L6-v2 (installed with its weights), or a hub name in the local cache.
        weights: "auto", "random", or a folder in transformers' layout.
        attention: "dense" as the encoder is, or "sliding" for windows with the first token global (Longformer has its
            own windows either way).
        window: tokens that a token sees under "sliding", half of them on either side.
        pooling: "mean" over the tokens, "first" token, or "auto": first for Longformer, else mean.
        max_tokens: longer captions are cut; never above what the encoder has positions for.
        dropout: dropout of the encoder while training; below 0 for the encoder's own.
    """

    name: str = EMBEDDED_TEXT
    weights: str = "auto"
    attention: Literal["dense", "sliding"] = "dense"
    window: int = 8
    pooling: Literal["auto", "mean", "first"] = "auto"
    max_tokens: int = 128
    dropout: float = -1.0


class CaptionFeatures(NamedTuple):
    """What the text tower gives. pooled: (b, W); tokens: (b, T, W); mask: (b, T), 1 on tokens and 0 on padding."""

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class TextTower(nn.Module):
    """A transformers encoder with its tokenizer. Raises WeightsNotFound, and ValueError for a folder of another form.

    folder: where config.json and the tokenizer lie; None to find them by the config's name. With `load_weights` False
    the weights come later (from an aligner's own file).
    """

    def __init__(self, config: TextTowerConfig, folder: Path | None = None, load_weights: bool = True) -> None:
        super().__init__()
        if config.attention == "sliding" and config.window < 2:
            raise ValueError(f"a sliding window needs 2 tokens or more, not {config.window}")
        self.config = config
        source = folder or find_text_folder(config.name, config.weights)
        self.encoder = _build_encoder(source, config, load_weights and config.weights != "random")
        self.tokenizer = _load_tokenizer(source)
        shape = self.encoder.config
        self.width: int = shape.hidden_size
        self.is_longformer = shape.model_type == "longformer"
        self.pooling = config.pooling if config.pooling != "auto" else "first" if self.is_longformer else "mean"
        # RoBERTa and its heirs count positions from the padding token's number on.
        offset = shape.pad_token_id + 1 if shape.model_type in ("longformer", "roberta", "xlm-roberta") else 0
        self.max_tokens = min(config.max_tokens, shape.max_position_embeddings - offset)
        self.pad: int = self.tokenizer.pad_token_id or 0

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokenizer's numbers for each caption, its special tokens included, none padded."""
        if not len(captions):
            return []
        tokens = self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens, padding=False)
        return tokens["input_ids"]

    def forward(self, ids: Tensor, mask: Tensor) -> CaptionFeatures:
        """ids, mask (b, T) -> pooled (b, W), tokens (b, T, W)."""
        if self.is_longformer:
            first = torch.zeros_like(mask)
            first[:, 0] = 1
            out = self.encoder(input_ids=ids, attention_mask=mask, global_attention_mask=first)
        elif self.config.attention == "sliding":
            seen = attention_mask(mask, self.config.window)
            out = self.encoder(input_ids=ids, attention_mask=seen)
        else:
            out = self.encoder(input_ids=ids, attention_mask=mask)
        tokens = out.last_hidden_state
        return CaptionFeatures(pool(tokens, mask, self.pooling), tokens, mask)

    def save(self, folder: Path) -> None:
        """Config and tokenizer, without weights, in transformers' layout."""
        self.encoder.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def pool(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """tokens (b, T, W) -> (b, W): the first token, or the mean over those that are not padding."""
    if pooling == "first":
        return tokens[:, 0]
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1)


def _build_encoder(source: Path, config: TextTowerConfig, load_weights: bool) -> Any:
    import transformers

    # Its report on a pooler that nobody asked for, and its progress bars, tell our users nothing.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = json.loads((source / "config.json").read_text()).get("model_type", "")
    longformer = kind == "longformer"
    options: dict[str, Any] = {} if longformer else {"attn_implementation": "sdpa"}
    shape = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if config.dropout >= 0:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(shape, name):
                setattr(shape, name, config.dropout)
    if load_weights:
        encoder = transformers.AutoModel.from_pretrained(source, config=shape, local_files_only=True, **options)
    else:
        encoder = transformers.AutoModel.from_config(shape, **options)
    if getattr(encoder, "pooler", None) is not None:
        # BERT's pooler was trained for sentence pairs; the projection head takes its place.
        encoder.pooler = None
    return encoder.float()


def _load_tokenizer(source: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
