"""The text tower: any transformers encoder by name, with its own tokenizer -> one pooled vector and the tokens.

`self` is the encoder as it is. `sparse` is Longformer as published (`longformer.py`), or the sliding-window variant of
the same encoder: same weights, windows with the first token global, positions for 4,096 tokens, so that a comparison
can hold everything but the attention fixed. Encoders of BERT's kin call this project's `attention` for both; all others
run transformers' own attention, and have no sliding-window variant (`text_families.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.dropout import replace_dropout
from clipvisionalign.models.longformer import Longformer
from clipvisionalign.models.packed_captions import PACKABLE, PackedCaptions
from clipvisionalign.models.positions import Positions, positions_by_name
from clipvisionalign.models.sliding_window import ATTENTION_NAME, extend_positions, transformers_attention
from clipvisionalign.models.text_families import (
    DEFAULT_MAX_TOKENS,
    check_encoder,
    check_is_encoder,
    check_vocabulary,
    max_positions,
    position_offset,
    supports_custom_attention,
)
from clipvisionalign.models.text_weights import EMBEDDED_TEXT, find_text_weights
from clipvisionalign.models.tokenizer import load_tokenizer, tokenize_captions
from clipvisionalign.models.weights import WeightsOrigin


@dataclass
class TextTowerConfig:
    """Which transformers encoder reads the captions.

    Args:
        name: a folder, all-MiniLM-L6-v2 (installed with its weights), or a hub name: distilbert-base-uncased,
            allenai/longformer-base-4096, ...
        weights: "auto", "random", or a folder in transformers' layout.
        attention: "dense" as the encoder is, or "sliding" for windows with the first token global (Longformer has its
            own windows either way).
        window: tokens that a token sees under "sliding", half of them on either side.
        pooling: "mean" over the tokens, "first" token, or "auto": first for Longformer, else mean.
        max_tokens: longer captions are cut; never above what the encoder has positions for, which `positions` of the
            model makes more. Not given: 128, and for a pretrained dual encoder all of its positions.
        dropout: dropout of the encoder while training; below 0 for the encoder's own.
        revision: branch, tag or commit of the hub's repository; "" for the main branch. A run records the commit.
    """

    name: str = EMBEDDED_TEXT
    weights: str = "auto"
    attention: Literal["dense", "sliding"] = "dense"
    window: int = 8
    pooling: Literal["auto", "mean", "first"] = "auto"
    max_tokens: int | None = None
    dropout: float = -1.0
    revision: str = ""


class CaptionFeatures(NamedTuple):
    """The text tower's output for b captions.

    Attributes:
        pooled: (b, W), one vector a caption.
        tokens: (b, T, W), where they were asked for; else None.
        mask: (b, T), 0 on padding.
    """

    pooled: Tensor
    tokens: Tensor | None
    mask: Tensor


class TextTower(nn.Module):
    """A transformers encoder with its tokenizer.

    Args:
        config: The settings.
        folder: Where config.json and the tokenizer are; None to find them by the config's name.
        load_weights: Whether the encoder's weights are loaded; without, they come later, from an aligner's own file.
        positions: As of `extend_table`; "own" repeats them for sliding windows. An encoder that was saved has its
            positions already.

    Raises:
        WeightsNotFound: There is no such encoder.
        ValueError: The folder has another layout, the model is no bidirectional encoder, or it cannot be given the
            sliding windows or the positions that are asked for.
    """

    def __init__(
        self, config: TextTowerConfig, folder: Path | None = None, load_weights: bool = True,
        positions: Positions = "own",
    ) -> None:  # fmt: skip
        super().__init__()
        if config.attention == "sliding" and config.window < 2:
            raise ValueError(f"--model.text_tower.window {config.window}: a sliding window needs 2 tokens or more")
        self.config = config
        #: Where the weights came from.
        self.origin = WeightsOrigin("files", config.name)
        is_saved = folder is not None
        if folder is None:
            weights = find_text_weights(config.name, config.weights, config.revision)
            folder, self.origin = weights.folder, weights.origin
            if weights.origin.revision:
                self.config = replace(config, revision=weights.origin.revision)
        source = folder
        self.encoder = _build_encoder(source, config, load_weights and config.weights != "random")
        replace_dropout(self.encoder)
        if not is_saved:
            _extend_positions(self.encoder, config, positions, source)
        self.tokenizer = load_tokenizer(source)
        self.pad: int = self.tokenizer.pad_token_id or 0
        check_vocabulary(self.encoder, self.tokenizer, source)
        encoder_config = self.encoder.config
        has_known_width = isinstance(self.encoder, Longformer) or self._uses_custom_attention
        self.width: int = (
            encoder_config.hidden_size if has_known_width else check_encoder(self.encoder, self.pad, source)
        )
        longformer = isinstance(self.encoder, Longformer)
        self.pooling = config.pooling if config.pooling != "auto" else "first" if longformer else "mean"
        #: Tokens that the encoder has positions for.
        self.max_positions: int = max_positions(encoder_config, self.encoder)
        #: Whether the encoder's layers hand what their attention needs on to it; false once they did not.
        self.hands_layout_on = True
        self.max_tokens = min(config.max_tokens or DEFAULT_MAX_TOKENS, self.max_positions)

    @property
    def _uses_custom_attention(self) -> bool:
        """Whether the encoder calls this project's `attention`."""
        return self.encoder.config._attn_implementation == ATTENTION_NAME

    def word_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mask of the tokens that are of the caption, which the late interaction compares.

        Args:
            ids: (b, T) token numbers.
            mask: (b, T), 0 on padding.

        Returns:
            (b, T), 1 on those tokens: the mask itself.
        """
        return mask

    def input_embeddings(self) -> nn.Module:
        """The module with the embeddings of the tokens."""
        return self.encoder.get_input_embeddings()

    @property
    def window(self) -> Any:
        """Number of tokens that a token sees, in each layer where Longformer's differ; 0 for all."""
        return getattr(self.encoder.config, "attention_window", None) or 0

    def vocabulary(self) -> dict[str, int]:
        """The number of each token, by its text."""
        return self.tokenizer.get_vocab()

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have an embedding."""
        return self.encoder.config.vocab_size

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Tokenise captions, special tokens included; those longer than `max_tokens` are cut.

        Args:
            captions: M captions.

        Returns:
            The tokens of each caption, without padding, and how many were cut off.
        """
        return tokenize_captions(self.tokenizer, captions, self.max_tokens)

    def forward(self, ids: Tensor, mask: Tensor, want_tokens: bool = True) -> CaptionFeatures:
        """Encode captions.

        Args:
            ids: (b, T) token numbers, padded with `pad`.
            mask: (b, T), 0 on padding.
            want_tokens: Whether the tokens' vectors are returned as well.

        Returns:
            pooled (b, W), and tokens (b, T, W) where they are wanted.
        """
        if isinstance(self.encoder, Longformer):
            global_attention_mask = torch.zeros_like(mask)
            global_attention_mask[:, 0] = 1
            first_only = self.pooling == "first" and not want_tokens
            tokens = self.encoder(ids, mask, global_attention_mask, first_only=first_only)
        else:
            # Our attention takes the padding as it is, (b, 1, 1, T); transformers' own makes that of (b, T).
            attention_mask = mask.bool()[:, None, None] if self._uses_custom_attention else mask
            tokens = self.encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        pooled = pool(tokens, mask, self.pooling)
        return CaptionFeatures(pooled, tokens if want_tokens else None, mask)

    def packs(self) -> bool:
        """Whether `encode_groups` encodes all groups in one row: on a CPU under autocast, where that is faster."""
        # A tower that is compiled is called as it was compiled.
        return (
            self.hands_layout_on
            and self._uses_custom_attention
            and self.encoder.config.model_type in PACKABLE
            and next(self.parameters()).device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and self._compiled_call_impl is None
        )

    def encode_groups(self, groups: Sequence[tuple[Tensor, Tensor]], want_tokens: bool = True) -> list[CaptionFeatures]:
        """Encode groups of captions, all of them together where `packs`.

        Args:
            groups: Token ids and mask (b, T) of each group, padded at the end.
            want_tokens: As of `forward`.

        Returns:
            What `forward` returns for each group; the tokens' vectors are 0 on padding where it `packs`.
        """
        # A caption begins at its row's first place, and has a token.
        is_packed = bool(groups) and self.packs() and all(len(mask) and bool(mask[:, 0].all()) for _, mask in groups)
        if is_packed:
            packed = PackedCaptions(groups)
            positions = packed.positions + position_offset(self.encoder)
            row = self.encoder(input_ids=packed.ids, position_ids=positions, packed=packed).last_hidden_state[0]
            # In another version of transformers, whose layers do not hand the layout on, captions saw each other.
            is_packed = self.hands_layout_on = packed.was_used
        if not is_packed:
            return [self(ids, mask, want_tokens) for ids, mask in groups]
        return [
            CaptionFeatures(pool(tokens, mask, self.pooling), tokens if want_tokens else None, mask)
            for tokens, (_, mask) in zip(packed.unpack(row), groups, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Save config and tokenizer, without weights, in transformers' layout.

        Args:
            folder: The folder to write into.
        """
        self.encoder.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def pool(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool the vectors of tokens to one vector a caption.

    Args:
        tokens: (b, T, W).
        mask: (b, T), 0 on padding.
        pooling: "first" for the first token, "mean" for the mean over those that are not padding.

    Returns:
        (b, W).
    """
    if pooling == "first":
        return tokens[:, 0]
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1)


def _build_encoder(source: Path, config: TextTowerConfig, load_weights: bool) -> Any:
    import transformers

    silence_transformers()
    encoder_config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if config.dropout >= 0:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(encoder_config, name):
                setattr(encoder_config, name, config.dropout)
    if encoder_config.model_type == "longformer":
        encoder: Any = (
            Longformer.from_pretrained(source, encoder_config) if load_weights else Longformer(encoder_config)
        )
        if config.weights == "random":
            encoder.reset_parameters()
    else:
        transformers.AttentionInterface.register(ATTENTION_NAME, transformers_attention)
        auto_model, options = transformers.AutoModel, {}
        check_is_encoder(encoder_config, source)
        if supports_custom_attention(encoder_config):
            options = {"attn_implementation": ATTENTION_NAME}
        elif config.attention == "sliding":
            raise ValueError(
                f"{source}: an encoder of the kind '{encoder_config.model_type}' cannot be given sliding "
                "windows; those of "
                f"BERT's kin can, such as distilbert-base-uncased"
            )
        if encoder_config.model_type == "big_bird":
            # In blocks, it reads a long caption otherwise once it has read a short one.
            encoder_config.attention_type = "original_full"
        if load_weights:
            encoder = _load_published(auto_model, source, encoder_config, options)
        else:
            encoder = _from_config(auto_model, source, encoder_config, options)
        if config.attention == "sliding":
            encoder.config.attention_window = config.window
    if getattr(encoder, "pooler", None) is not None:
        # It was trained for sentence pairs; the projection head takes its place. Some encoders call it in any case.
        encoder.pooler = None if supports_custom_attention(encoder_config) else nn.Identity()
    return encoder.float()


def _extend_positions(encoder: Any, config: TextTowerConfig, positions: Positions, source: Path) -> None:
    """Give an encoder that is opened by its name the positions that it lacks. Raises ValueError where it cannot be."""
    encoder_config = encoder.config
    if not supports_custom_attention(encoder_config):
        if positions != "own":
            raise ValueError(
                f"{source}: the positions of an encoder of the kind '{encoder_config.model_type}' cannot be "
                f"{positions}: leave --model.positions out, or name one of BERT's kin, such as distilbert-base-uncased"
            )
        return
    # A run of before has the positions of its encoder alone, however long its captions were to be.
    how = positions_by_name(positions, config.attention == "sliding")
    if how != "own":
        extend_positions(encoder, how=how)


def _from_config(auto_model: Any, source: Path, encoder_config: Any, options: dict[str, Any]) -> Any:
    """transformers' model with random weights. Raises ValueError for settings that it builds no model of."""
    try:
        return auto_model.from_config(encoder_config, **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source}: transformers builds no '{encoder_config.model_type}' of its config.json: {reason}"
        ) from None


def _load_published(auto_model: Any, source: Path, encoder_config: Any, options: dict[str, Any]) -> Any:
    """transformers' model with the weights of a folder. Raises ValueError where they are not all of this model's."""
    try:
        encoder, report = auto_model.from_pretrained(
            source, config=encoder_config, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source}: weights that cannot be read, or are not this model's: {reason}") from None
    # transformers initialises what is missing at random, silently.
    expected = {name for name, _ in encoder.named_parameters() if "pooler" not in name}
    missing = sorted(expected & set(report["missing_keys"]))
    if missing:
        raise ValueError(
            f"{source}: not the weights of this encoder: {len(missing)} tensors are missing: {missing[:3]}"
        )
    # Heads of other tasks are left behind; layers that the config does not count are not.
    layers = {kind for kind in map(layer_pattern, expected) if "#" in kind}
    prefix = f"{encoder.base_model_prefix}."
    extra = sorted(name for name in report["unexpected_keys"] if layer_pattern(name).removeprefix(prefix) in layers)
    if extra:
        raise ValueError(
            f"{source}: weights of more layers than its config.json counts: {len(extra)} tensors, such as {extra[0]}"
        )
    return encoder


def layer_pattern(name: str) -> str:
    """A parameter's name with # for the number of its layer.

    Args:
        name: Such as "encoder.layer.0.output.dense.weight".

    Returns:
        Such as "encoder.layer.#.output.dense.weight".
    """
    return re.sub(r"\.\d+\.", ".#.", name)


def silence_transformers() -> None:
    """Let transformers print errors alone: its reports on tensors and numbers that nobody asked for, and progress bars
    of its own, do not help our users."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
