"""Dense and sliding-window attention behind one function.

The window is Longformer's (Beltagy, Peters and Cohan, arXiv:2004.05150): a token sees `window` // 2 tokens on either
side; the first token is global, it sees all and is seen by all.

Today both are PyTorch's scaled-dot-product attention under a mask: exact, and for the length of captions quick. Nothing
outside this file knows how it is done.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sliding_window(length: int, window: int, device: torch.device | None = None) -> Tensor:
    """Which token sees which: (T, T) bool, True within `window` // 2 on either side, and in the first row and column.

    Raises ValueError for a window under 2.
    """
    if window < 2:
        raise ValueError(f"a sliding window needs 2 tokens or more, not {window}")
    place = torch.arange(length, device=device)
    seen = (place[:, None] - place[None, :]).abs() <= window // 2
    seen[:1, :] = True
    seen[:, :1] = True
    return seen


def attention_mask(mask: Tensor, window: int = 0) -> Tensor:
    """Padding and window in one mask for `attend`: (b, T) of 1 and 0 -> (b, 1, 1 or T, T) bool, True where seen."""
    padding = mask.bool()[:, None, None, :]
    if not window:
        return padding
    return padding & sliding_window(mask.shape[1], window, mask.device)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention. q: (B, T, D); k, v: (B, S, D) -> (B, T, D). mask: True where seen, (B, 1 or H, T, S)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
