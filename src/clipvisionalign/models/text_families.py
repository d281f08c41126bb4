"""Which of transformers' encoders can read captions, and how: whose attention runs, how many positions there are.

BERT and its kin take this project's `attention`, and sliding windows with it. All others run transformers' own
attention, and are checked when they are built (`check_encoder`), since a name tells little: a caption's vector has to
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

#: Encoders that learn a table of positions and scale and mask their scores, nothing else, in every layer alike.
BERT_KIN = frozenset({
    "albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta",
    "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip

#: Encoders that count positions from the padding token's number on, as RoBERTa does.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip

#: What a refusal names instead.
WAY_OUT = "name a bidirectional encoder, such as distilbert-base-uncased"

#: Tokens of the shorter caption that `check_encoder` reads, and how many more the longer one has.
_CHECKED, _PADDING = 6, 3

#: Share of the largest output that rounding may change, in float32. What a token or padding does is far above.
_ROUNDING = 1e-4


def takes_attention(shape: Any) -> bool:
    """Whether all layers of an encoder of these settings are dense, bidirectional, and can be given `attention`."""
    import transformers

    kind: Any = transformers.MODEL_MAPPING.get(type(shape), None)
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    return (
        shape.model_type in BERT_KIN
        and bool(getattr(kind, "_supports_attention_backend", False))
        and not getattr(shape, "is_decoder", False)
        and getattr(shape, "position_embedding_type", None) in (None, "absolute")
    )


def positions_of(shape: Any, encoder: Any = None) -> int:
    """Tokens that an encoder of these settings has positions for; sys.maxsize where it counts none.

    encoder: the encoder itself, if it is built, whose table then tells where the positions begin.
    """
    rows = getattr(shape, "max_position_embeddings", None) or 0
    if rows <= 0:
        return sys.maxsize
    return rows - (_offset_by_name(shape) if encoder is None else position_offset(encoder))


def position_offset(encoder: Any) -> int:
    """Rows of an encoder's table of positions that no token stands on: those up to the padding's."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _offset_by_name(shape: Any) -> int:
    """`position_offset` without the encoder."""
    if shape.model_type not in _POSITIONS_AFTER_PADDING:
        return 0
    if getattr(shape, "position_embedding_type", None) not in (None, "absolute"):
        return 0
    # MPNet has 1 for its padding whatever its config has.
    return 2 if shape.model_type == "mpnet" else shape.pad_token_id + 1


def refuse_by_config(shape: Any, source: Any) -> None:
    """Raises ValueError for models that are no encoders by their own settings."""
    if getattr(shape, "is_encoder_decoder", False):
        raise ValueError(
            f"{source}: '{shape.model_type}' is an encoder with a decoder, which generates text; {WAY_OUT}"
        )


def check_vocabulary(encoder: Any, tokenizer: Any, source: Any) -> None:
    """Raises ValueError where the tokenizer has numbers that the encoder has no embedding for."""
    try:
        known = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
        numbers = tokenizer.get_vocab().values()
    except (AttributeError, NotImplementedError):
        # CANINE reads characters: neither has a table.
        return
    highest = max(numbers, default=0)
    if known is not None and highest >= known:
        raise ValueError(
            f"{source}: the tokenizer numbers tokens up to {highest}, but the encoder '{encoder.config.model_type}' "
            f"has embeddings for {known} only; give it the tokenizer that it was trained with"
        )


@torch.no_grad()
def check_encoder(encoder: Any, pad: int, source: Any) -> int:
    """Read two small captions, and return the width W of what comes of them.

    pad: the tokenizer's number for padding. Leaves the encoder's mode and all random states as they are. Raises
    ValueError, naming the model type, for an encoder that needs more than a caption, that gives no vector for each
    token, in which a token sees none that follows it, or in which padding changes what a caption gives.
    """
    kind, training = encoder.config.model_type, encoder.training
    # The first is padded to the length of the second; they begin with the same token.
    ids = _two_captions(encoder, pad)
    mask = torch.ones_like(ids)
    mask[0, _CHECKED:] = 0
    one = ids[:1, :_CHECKED]
    encoder.eval()
    try:
        with kept_random_states():
            alone = _last_states(encoder, one, torch.ones_like(one))
            padded = _last_states(encoder, ids, mask)
    except Exception as error:
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
        raise ValueError(f"{source}: '{kind}' does not read captions alone: {reason}; {WAY_OUT}") from None
    finally:
        encoder.train(training)
    if alone is None or padded is None or alone.shape[:2] != one.shape or padded.shape[:2] != ids.shape:
        raise ValueError(f"{source}: '{kind}' gives no last hidden state for each token; {WAY_OUT}")
    if _same(padded[0, 0], padded[1, 0]):
        raise ValueError(
            f"{source}: '{kind}' is causal: a token sees none that follows it, so that its vectors are no mean of a "
            f"caption; {WAY_OUT}"
        )
    if not _same(padded[0, :_CHECKED], alone[0]):
        raise ValueError(
            f"{source}: '{kind}' gives a padded caption other vectors than the same caption alone: they would depend "
            f"on the captions beside it; {WAY_OUT}"
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
    words = [number for number in range(size // 2, min(size // 2 + _CHECKED + 2, size)) if number != pad]
    longer = [words[0], *(words[(k + 1) % len(words)] for k in range(1, _CHECKED + _PADDING))]
    return torch.tensor([[words[k % len(words)] for k in range(_CHECKED)] + [pad] * _PADDING, longer])


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding. What is no number equals nothing."""
    return bool((a - b).abs().max() <= _ROUNDING * torch.maximum(a.abs().max(), b.abs().max()))


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Whatever draws at random inside, the generators of PyTorch (CPU), NumPy and Python are as before behind it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
