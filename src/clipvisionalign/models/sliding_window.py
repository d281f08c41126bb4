"""The sliding-window variant of an encoder: this project's attention in transformers' encoders, and longer positions.

The encoder keeps its weights; each token sees a window, the first token all and all see it, and the learned positions
are repeated (`positions.py`), as are those of an encoder with its own attention that is to read longer captions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipvisionalign.models.attention import attention
from clipvisionalign.models.packed_captions import PackedCaptions
from clipvisionalign.models.positions import REPEATED_POSITIONS, Positions, extend_table
from clipvisionalign.models.text_families import position_offset

#: Under this name transformers' encoders call `attention`.
ATTENTION_NAME = "clipvisionalign"


def transformers_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, packed: PackedCaptions | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attention` as transformers' encoders call it, registered as `ATTENTION_NAME`.

    Args:
        module: The attention layer, whose config has "attention_window" where it is sliding.
        query: (b, H, T, d).
        key: (b, H, T, d).
        value: (b, H, T, d).
        attention_mask: (b, 1, 1, T) bool, false on padding; None for none.
        scaling: Factor of the scores; None for 1 / sqrt(d).
        dropout: Dropout of the attention weights.
        packed: Of captions in one row, b = 1, where each of them stands; None for a caption a row.

    Returns:
        The output (b, T, H, d), and None in the place of weights.
    """
    window = getattr(module.config, "attention_window", 0)
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    if scaling is not None:
        default_scaling = query.shape[-1] ** -0.5
        query = query if scaling == default_scaling else query * (scaling / default_scaling)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # No len(): a graph that is exported would be of this batch size alone.
        global_positions = torch.zeros(q.shape[0], 1, dtype=torch.long, device=q.device) if window else None
        return attention(q, k, v, mask, window, global_positions, dropout)

    if packed is not None:
        return packed.attend(attend, query, key, value), None
    return attend(query, key, value, mask).transpose(1, 2), None


@torch.no_grad()
def extend_positions(encoder: Any, length: int = REPEATED_POSITIONS, *, how: Positions = "repeated") -> None:
    """Give an encoder more positions; one that has as many is left as it is.

    Args:
        encoder: An encoder of transformers with learned positions, which is changed in place.
        length: Number of tokens that it gets positions for when they are repeated.
        how: As of `extend_table`.

    Raises:
        ValueError: It has no table of positions.
    """
    embeddings: Any = getattr(encoder, "embeddings", None)
    embedding = getattr(embeddings, "position_embeddings", None)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"an encoder of the kind '{encoder.config.model_type}' has no table of positions to extend")
    # RoBERTa's first rows stand for padding, and are not repeated.
    offset = position_offset(encoder)
    learned = embedding.weight[offset:]
    table = extend_table(learned, how, length)
    if len(table) == len(learned):
        return
    length = len(table)
    extended = nn.Embedding(offset + length, embedding.embedding_dim, padding_idx=embedding.padding_idx)
    extended.weight.copy_(torch.cat([embedding.weight[:offset], table]))
    embeddings.position_embeddings = extended
    encoder.config.max_position_embeddings = offset + length
    for name, fill in (
        ("position_ids", torch.arange(offset + length)),
        ("token_type_ids", torch.zeros(offset + length)),
    ):
        if hasattr(embeddings, name):
            embeddings.register_buffer(name, fill.long()[None], persistent=False)
