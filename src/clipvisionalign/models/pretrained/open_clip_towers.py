"""Text towers of open_clip's models: its own text transformers, and Hugging Face's text models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.batch import TokenizedCaptions
from clipvisionalign.models.pretrained.last_layer import run_pooled, take_pooled_block
from clipvisionalign.models.pretrained.open_clip_image_towers import linear_of
from clipvisionalign.models.pretrained.parts import PretrainedTextTower, first_match

#: Settings of a Hugging Face text model, beside open_clip's own in a run folder.
HF_CONFIG_FOLDER = "hf_text_config"


class OpenClipTextTower(PretrainedTextTower):
    """open_clip's `TextTransformer`, its projection taken off.

    Args:
        encoder: the text model.
        tokenizer: open_clip's tokenizer.
        source: the model's folder.
        width: W.
        context_length: tokens that the model was trained to take.
    """

    #: Whether the last block can be run for the end-of-text token alone.
    _pools_last = False

    def __init__(self, encoder: Any, tokenizer: Any, source: Path, width: int, context_length: int) -> None:
        is_trimmable = encoder.attn_mask is not None and encoder.cls_emb is None and encoder.pool_type in _TRIMMED
        super().__init__(
            encoder, getattr(tokenizer, "tokenizer", tokenizer), source, width, context_length,
            fixed_length=not is_trimmable, pooling=encoder.pool_type,
        )  # fmt: skip
        self.max_positions = self.max_tokens = context_length
        self.open_clip_tokenizer = tokenizer
        self.pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        # Not read from the encoder, which a copy for worker processes lacks.
        self._eos_id: int | None = encoder.eos_id if encoder.pool_type == "eos" else None
        self._pools_last = is_trimmable and take_pooled_block(encoder.transformer)

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.token_embedding

    def vocabulary(self) -> dict[str, int]:
        """Each token's number; open_clip's own tokenizer has it under another name than transformers'."""
        return self.tokenizer.get_vocab() if hasattr(self.tokenizer, "get_vocab") else dict(self.tokenizer.encoder)

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Tokenise by open_clip's own tokenizer, without the padding that no vector depends on.

        Args:
            captions: (M,) captions.

        Returns:
            Their token ids, cut at `max_tokens`, and how many tokens each lost.
        """
        if not len(captions):
            return TokenizedCaptions([])
        ids = self.open_clip_tokenizer(list(captions), context_length=self.max_tokens)
        lengths = self.lengths(ids)
        num_truncated = [
            self._token_count(caption) - length if length == self.max_tokens else 0
            for caption, length in zip(captions, lengths, strict=True)
        ]
        if self.fixed_length:
            padded = F.pad(ids, (0, self.max_positions - ids.shape[1]), value=self.pad)
            return TokenizedCaptions(padded.tolist(), num_truncated)
        return TokenizedCaptions(
            [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)], num_truncated
        )

    def lengths(self, ids: Tensor) -> list[int]:
        """Count the tokens of each caption up to its end-of-text token.

        Args:
            ids: (M, T) token ids, padded.

        Returns:
            (M,) numbers.
        """
        if self.fixed_length:
            return self.word_mask(ids, torch.ones_like(ids)).sum(dim=1).tolist()
        return (self._end(ids) + 1).tolist()

    def _end(self, ids: Tensor) -> Tensor:
        """(b, T) -> (b,), the place of the end-of-text token."""
        if self._eos_id is not None:
            return first_match(ids, self._eos_id)
        # onnxruntime has no argmax of 64-bit numbers.
        return ids.to(torch.int32).argmax(dim=-1)

    def _token_count(self, caption: str) -> int:
        tokenizer = self.open_clip_tokenizer
        if hasattr(tokenizer, "tokenizer"):
            return len(tokenizer.tokenizer(tokenizer.clean_fn(caption), truncation=False).input_ids)
        return len(tokenizer.encode(caption)) + 2

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text transformer.

        Args:
            ids: (b, T) token ids.
            mask: (b, T), not read: padding stands behind the end-of-text token.

        Returns:
            Pooled (b, W), and tokens (b, T, W).
        """
        text = self.encoder
        if self.fixed_length:
            tokens: list[Tensor] = []
            handle = text.transformer.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
            try:
                pooled = text(ids)
            finally:
                handle.remove()
            return pooled[0] if isinstance(pooled, tuple) else pooled, text.ln_final(tokens[0][:, : ids.shape[1]])
        return self._run(ids, keeps_tokens=True)

    def encode_pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the text transformer, its last block for the end-of-text token alone.

        Args:
            ids: (b, T) token ids.
            mask: (b, T), not read, as by `encode`.

        Returns:
            Pooled (b, W).
        """
        return self._run(ids, keeps_tokens=False)[0] if self._pools_last else self.encode(ids, mask)[0]

    def _run(self, ids: Tensor, keeps_tokens: bool) -> tuple[Tensor, Tensor]:
        """Pooled (b, W) and tokens (b, T, W), which are of use only with `keeps_tokens`."""
        text, length, end = self.encoder, ids.shape[1], self._end(ids)
        x, attention_mask = text._embeds(ids)
        attention_mask = attention_mask[..., :length, :length]
        if self._pools_last:
            x = run_pooled(text.transformer, x, end, attention_mask, keeps_tokens)
        else:
            x = text.transformer(x, attn_mask=attention_mask)
        x = text.ln_final(x)
        # `shape[0]` and not `len`, which an export to ONNX would take for a constant.
        return x[torch.arange(ids.shape[0], device=ids.device), end], x


#: Ways of pooling in which a causal caption's padding has no part.
_TRIMMED = ("argmax", "eos")


class OpenClipHuggingFaceTower(OpenClipTextTower):
    """open_clip's `HFTextEncoder`: a transformers encoder with open_clip's pooler, its projection taken off.

    Args:
        encoder: The text model.
        tokenizer: open_clip's tokenizer.
        source: The model's folder.
        width: W.
        context_length: Tokens that the model was trained to take.
    """

    def __init__(self, encoder: Any, tokenizer: Any, source: Path, width: int, context_length: int) -> None:
        PretrainedTextTower.__init__(
            self, encoder, tokenizer.tokenizer, source, width, context_length, pooling=type(encoder.pooler).__name__
        )
        self.max_positions = self.max_tokens = context_length
        self.open_clip_tokenizer = tokenizer
        # open_clip takes what is no padding for the caption.
        self.pad = encoder.config.pad_token_id

    def input_embeddings(self) -> nn.Module:
        """The table of the tokens' embeddings."""
        return self.encoder.transformer.get_input_embeddings()

    def lengths(self, ids: Tensor) -> list[int]:
        """Count the tokens of each caption.

        Args:
            ids: (M, T) token ids, padded.

        Returns:
            (M,) numbers.
        """
        return (ids != self.pad).sum(dim=1).tolist()

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text encoder.

        Args:
            ids: (b, T) token ids.
            mask: (b, T), 1 for tokens and 0 for padding.

        Returns:
            Pooled (b, W), and tokens (b, T, W).
        """
        output = self.encoder.transformer(input_ids=ids, attention_mask=mask)
        return self.encoder.pooler(output, mask), output.last_hidden_state

    def save(self, folder: Path) -> None:
        """Write open_clip's files, and the text model's settings, which open_clip itself asks the hub for.

        Args:
            folder: A run folder's folder for them.
        """
        super().save(folder)
        self.encoder.config.save_pretrained(folder / HF_CONFIG_FOLDER)


def text_tower(text: Any, tokenizer: Any, source: Path, context_length: int) -> tuple[OpenClipTextTower, nn.Module]:
    """The text tower and projection of an open_clip model.

    Args:
        text: The model's `text`, whose projection is taken off.
        tokenizer: open_clip's tokenizer.
        source: The model's folder.
        context_length: Tokens that the model was trained to take.

    Returns:
        The tower, and the projection; an identity where there is none.

    Raises:
        ValueError: Its parts are not known.
    """
    kind = type(text).__name__
    if kind == "HFTextEncoder":
        projection, text.proj = text.proj, nn.Identity()
        width = text.transformer.config.hidden_size
        return OpenClipHuggingFaceTower(text, tokenizer, source, width, context_length), projection
    if kind != "TextTransformer":
        raise ValueError(f"a text tower of the kind '{kind}' of open_clip is not known")
    projection = nn.Identity()
    if text.text_projection is not None:
        projection = (
            text.text_projection if isinstance(text.text_projection, nn.Linear) else linear_of(text.text_projection)
        )
        text.text_projection = None
    return OpenClipTextTower(text, tokenizer, source, text.width, context_length), projection
