"""Which of transformers' encoders can encode captions, with which attention and how many positions.

BERT and its kin take this project's `attention`, and sliding windows with it. All others run transformers' own
attention, and are checked when they are built (`check_encoder`), since a name is no proof: a caption's vector has to
come from all of its tokens, and from no other caption. docs/models.md has the families.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Where captions are cut if the settings do not tell, for a text tower by name.
DEFAULT_MAX_TOKENS = 128

#: Encoders that learn a table of positions and scale and mask their scores, nothing else, in every layer alike.
BERT_FAMILY = frozenset({
    "albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta",
    "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip

#: Encoders that count positions from the padding token's number on, as RoBERTa does.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip

#: What a refusal names instead.
ENCODER_HINT = "name a bidirectional encoder, such as distilbert-base-uncased"

#: Tokens of the shorter caption that `check_encoder` reads, and how many more the longer one has.
_CHECKED, _PADDING = 6, 3

#: Share of the largest output that rounding may change, in float32. What a token or padding does is far above.
_TOLERANCE = 1e-4


def supports_custom_attention(encoder_config: Any) -> bool:
    """Whether all layers of an encoder are dense, bidirectional, and can be given `attention`.

    Args:
        encoder_config: Its config of transformers.

    Returns:
        Whether they are.
    """
    import transformers

    model_class: Any = transformers.MODEL_MAPPING.get(type(encoder_config), None)
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    return (
        encoder_config.model_type in BERT_FAMILY
        and bool(getattr(model_class, "_supports_attention_backend", False))
        and not getattr(encoder_config, "is_decoder", False)
        and getattr(encoder_config, "position_embedding_type", None) in (None, "absolute")
    )


def max_positions(encoder_config: Any, encoder: Any = None) -> int:
    """Number of tokens that an encoder has positions for.

    Args:
        encoder_config: Its config of transformers.
        encoder: The encoder itself, if it is built, whose table decides; None to go by the config.

    Returns:
        The number; sys.maxsize where positions are not counted.
    """
    rows = getattr(encoder_config, "max_position_embeddings", None) or 0
    if rows <= 0:
        return sys.maxsize
    return rows - (_offset_from_config(encoder_config) if encoder is None else position_offset(encoder))


def position_offset(encoder: Any) -> int:
    """Rows of an encoder's table of positions that no token uses: those up to the padding's.

    Args:
        encoder: The encoder.

    Returns:
        The number of rows; 0 where there is no padding row.
    """
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _offset_from_config(encoder_config: Any) -> int:
    """`position_offset` without the encoder."""
    if encoder_config.model_type not in _POSITIONS_AFTER_PADDING:
        return 0
    if getattr(encoder_config, "position_embedding_type", None) not in (None, "absolute"):
        return 0
    # MPNet has 1 for its padding whatever its config has.
    return 2 if encoder_config.model_type == "mpnet" else encoder_config.pad_token_id + 1


def check_is_encoder(encoder_config: Any, source: Any) -> None:
    """Refuse a model that is no encoder by its own config.

    Args:
        encoder_config: Its config of transformers.
        source: Its name or folder, for the message.

    Raises:
        ValueError: It has a decoder.
    """
    if getattr(encoder_config, "is_encoder_decoder", False):
        raise ValueError(
            f"{source}: '{encoder_config.model_type}' is an encoder with a decoder, which generates text; "
            f"{ENCODER_HINT}"
        )


def check_vocabulary(encoder: Any, tokenizer: Any, source: Any) -> None:
    """Refuse a tokenizer that does not fit its encoder.

    Args:
        encoder: The encoder.
        tokenizer: The tokenizer.
        source: Their name or folder, for the message.

    Raises:
        ValueError: The tokenizer has ids without an embedding.
    """
    try:
        embedding_count = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
        token_ids = tokenizer.get_vocab().values()
    except (AttributeError, NotImplementedError):
        # CANINE reads characters: neither has a table.
        return
    highest = max(token_ids, default=0)
    if embedding_count is not None and highest >= embedding_count:
        raise ValueError(
            f"{source}: the tokenizer numbers tokens up to {highest}, but the encoder '{encoder.config.model_type}' "
            f"has embeddings for {embedding_count} only; give it the tokenizer that it was trained with"
        )


@torch.no_grad()
def check_encoder(encoder: Any, pad: int, source: Any) -> int:
    """Run an encoder on two small captions and refuse one that cannot encode captions.

    The encoder's mode and all random states are left as they are.

    Args:
        encoder: The encoder.
        pad: Id of the padding token.
        source: Its name or folder, for the message.

    Returns:
        W, width of its outputs.

    Raises:
        ValueError: It needs more than a caption, returns no vector for each token, is causal, or padding changes its
            outputs.
    """
    model_type, training = encoder.config.model_type, encoder.training
    # The first is padded to the length of the second; they begin with the same token.
    ids = _two_captions(encoder, pad)
    mask = torch.ones_like(ids)
    mask[0, _CHECKED:] = 0
    short = ids[:1, :_CHECKED]
    encoder.eval()
    try:
        with preserve_rng_state():
            alone = _last_states(encoder, short, torch.ones_like(short))
            padded = _last_states(encoder, ids, mask)
    except Exception as error:
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
        raise ValueError(f"{source}: '{model_type}' does not read captions alone: {reason}; {ENCODER_HINT}") from None
    finally:
        encoder.train(training)
    if alone is None or padded is None or alone.shape[:2] != short.shape or padded.shape[:2] != ids.shape:
        raise ValueError(f"{source}: '{model_type}' gives no last hidden state for each token; {ENCODER_HINT}")
    if _nearly_equal(padded[0, 0], padded[1, 0]):
        raise ValueError(
            f"{source}: '{model_type}' is causal: a token sees none that follows it, so that its vectors are "
            "no mean of a "
            f"caption; {ENCODER_HINT}"
        )
    if not _nearly_equal(padded[0, :_CHECKED], alone[0]):
        raise ValueError(
            f"{source}: '{model_type}' gives a padded caption other vectors than the same caption alone: they "
            "would depend "
            f"on the captions beside it; {ENCODER_HINT}"
        )
    return alone.shape[-1]


def _last_states(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Last hidden states (b, T, W), or None for a model without."""
    states = getattr(encoder(input_ids=ids, attention_mask=mask), "last_hidden_state", None)
    return states if isinstance(states, Tensor) and states.ndim == 3 else None


def _two_captions(encoder: Any, pad: int) -> Tensor:
    """Tokens of two captions that begin alike (2, T), the first of them padded.

    Words from the middle of the vocabulary, away from its special tokens.
    """
    size = getattr(encoder.config, "vocab_size", None)
    size = size if isinstance(size, int) and size > 2 else 1000
    tokens = [number for number in range(size // 2, min(size // 2 + _CHECKED + 2, size)) if number != pad]
    longer = [tokens[0], *(tokens[(k + 1) % len(tokens)] for k in range(1, _CHECKED + _PADDING))]
    return torch.tensor([[tokens[k % len(tokens)] for k in range(_CHECKED)] + [pad] * _PADDING, longer])


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding. What is no number equals nothing."""
    return bool((a - b).abs().max() <= _TOLERANCE * torch.maximum(a.abs().max(), b.abs().max()))


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the generators of PyTorch (CPU), NumPy and Python at the end of a block.

    Yields:
        Nothing.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
