"""The last layer of a transformer for the one token that is pooled: of transformers' models, whose layers are in
`pooled_layers.py`, and of open_clip's."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def take_pooled_rows(model: Any) -> bool:
    """Let the last layer of a model of transformers be run for the pooled token alone, where that is known how.

    Args:
        model: A text or vision model, or `nn.Identity` in a tower that only tokenises; it is changed itself, its
            weights and their names are not.

    Returns:
        Whether it takes `pooled_rows`, (B,) places of the pooled tokens.
    """
    if not hasattr(model, "encoder"):
        return False
    # Here, as it imports the models of transformers.
    from clipvisionalign.models.pretrained.pooled_layers import pool_last_layer

    return pool_last_layer(model)


def take_pooled_block(transformer: Any) -> bool:
    """The same for a transformer of open_clip, where its last block is the usual one.

    Args:
        transformer: open_clip's `Transformer`; it is changed itself, its weights and their names are not.

    Returns:
        Whether `run_pooled` runs it.
    """
    blocks: Any = getattr(transformer, "resblocks", None)
    if not blocks or not transformer.batch_first:
        return False
    from clipvisionalign.models.pretrained.pooled_block import pool_last_block

    return pool_last_block(blocks[-1])


def run_pooled(
    transformer: Any, x: Tensor, rows: Tensor, attention_mask: Tensor | None = None, keeps_tokens: bool = False
) -> Tensor:
    """Run a transformer of open_clip whose last block pools.

    Args:
        transformer: One that `take_pooled_block` took.
        x: (B, T, C) embedded tokens.
        rows: (B,) the place of the token that is pooled.
        attention_mask: (T, T) or (B H, T, T), what is added to the scores; None for nothing.
        keeps_tokens: Whether the outputs of the other tokens are needed as well.

    Returns:
        (B, T, C); as of `PooledLayer`.
    """
    *blocks, last = transformer.resblocks
    for block in blocks:
        x = block(x, attn_mask=attention_mask)
    return last(x, attn_mask=attention_mask, pooled_rows=rows, keeps_tokens=keeps_tokens)
