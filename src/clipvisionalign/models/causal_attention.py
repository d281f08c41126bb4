"""Causal sliding-window attention: a token sees those in front of it, as far as the window reaches.

The variant of Longformer's windows (Beltagy, Peters and Cohan, arXiv:2004.05150) for encoders that read from left to
right, such as CLIP's. A token that the caption's vector is pooled from can see all tokens in front of it; being the
last, it is seen by none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipvisionalign.models.attention import gather_rows, is_global, scatter_rows

#: Queries of a block, at least.
QUERY_BLOCK = 64


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int = 0, pooled_position: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys in front of each query, itself included.

    Time and memory grow with T x window.

    Args:
        q: (B, H, T, d).
        k: (B, H, T, d).
        v: (B, H, T, d).
        window: Tokens in front of it that a token attends to; 0 for all.
        pooled_position: (B,) position of the token that attends to all tokens in front of it; None for none.
        dropout: Share of the attention weights that is dropped during training.

    Returns:
        (B, H, T, d).

    Source: Beltagy, Peters and Cohan, "Longformer", arXiv:2004.05150, for the window; here it is one-sided.

    >>> x = torch.ones(1, 2, 3, 4)
    >>> causal_attention(x, x, x, window=1).shape
    torch.Size([1, 2, 3, 4])
    """
    length = q.shape[2]
    if window and torch.compiler.is_exporting():
        # A graph is of any length: one table under a mask.
        step = _positions(0, length, q)[:, None] - _positions(0, length, q)[None]
        mask = ((step >= 0) & (step <= window))[None]
        if pooled_position is not None:
            mask = mask | (is_global(pooled_position[:, None], length)[:, :, None] & (step >= 0)[None])
        return F.scaled_dot_product_attention(q, k, v, mask[:, None], dropout)
    if not window or length - 1 <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    outputs = []
    block = max(QUERY_BLOCK, window // 2)
    for start in range(0, length, block):
        stop = min(start + block, length)
        low = max(0, start - window)
        step = _positions(start, stop, q)[:, None] - _positions(low, stop, q)[None]
        mask = (step >= 0) & (step <= window)
        keys, values = k[:, :, low:stop], v[:, :, low:stop]
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, mask, dropout).transpose(1, 2))
    out = torch.cat(outputs, dim=1).transpose(1, 2)
    if pooled_position is None:
        return out
    index = pooled_position[:, None]
    query = gather_rows(q, index)
    mask = (_positions(0, length, q)[None] <= index)[:, None, None]
    return scatter_rows(out, F.scaled_dot_product_attention(query, k, v, mask, dropout), index)


def _positions(start: int, stop: int, like: Tensor) -> Tensor:
    return torch.arange(start, stop, device=like.device)
