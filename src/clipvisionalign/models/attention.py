"""Dense, sliding-window, and sliding-window-with-global-tokens attention behind one function, `attention`.

The window is Longformer's (Beltagy, Peters and Cohan, arXiv:2004.05150): a token sees `window` // 2 tokens on either
side of it; a global token sees all and is seen by all.

All kernels compute the same thing. Which one runs is decided here, from lengths, window, dtype and device:

- `_fused`: PyTorch's scaled-dot-product attention under a mask, where sequences are short against their window, and in
  a graph that is exported.
- `_banded`: the same over blocks of queries, each with the keys that its windows reach: time and memory grow with the
  length, not with its square.
- `_plain`: two matrix products and a softmax, for short sequences in half precision on a CPU, where the fused kernel's
  backward takes about eight times as long (AVX-512, PyTorch 2.14).
- `_flex`: FlexAttention on a GPU (Dong et al., arXiv:2412.05496).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipvisionalign.models.dropout import drop

Kernel = Literal["fused", "plain", "banded", "flex"]

#: Scores of one head and one sequence up to which `_plain` keeps the whole table.
PLAIN_MAX_SCORES = 256 * 256

#: Queries of a block of `_banded` at least: more waste scores outside of the band, fewer have more calls to pay for.
MIN_QUERY_BLOCK = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    window: int = 0,
    global_positions: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that each query attends to.

    Args:
        q: (B, H, T, d).
        k: (B, H, S, d).
        v: (B, H, S, d).
        mask: (B, S), true on tokens, false on padding; None without padding.
        window: Number of neighbouring tokens that a token attends to, half of them on either side; 0 for all. Requires
            T = S.
        global_positions: (B, G) positions of tokens that attend to all tokens and that all tokens attend to; -1 where a
            sequence has fewer.
        dropout: Share of the attention weights that is dropped during training.

    Returns:
        (B, H, T, d). The output of a padded query has no meaning, but is finite.

    Raises:
        ValueError: The window is smaller than 2.

    Source: Vaswani et al., arXiv:1706.03762; windows and global tokens: Beltagy et al., "Longformer", arXiv:2004.05150.

    >>> x = torch.ones(1, 2, 3, 4)
    >>> attention(x, x, x).shape
    torch.Size([1, 2, 3, 4])
    """
    if window and window < 2:
        raise ValueError(f"a sliding window needs 2 tokens or more, not {window}")
    mask = None if mask is None else mask.bool()
    kernel = choose_kernel(q, k, window, dropout)
    if kernel == "banded":
        return _banded(q, k, v, mask, window, global_positions, dropout)
    if kernel == "flex":
        return _flex(q, k, v, mask, window, global_positions, compiled=True)
    attention_mask = None if mask is None else mask[:, None, None, :]
    if window_covers(q.shape[2], window):
        window = 0
    if window:
        attention_mask = _window_mask(mask, q.shape[2], window, global_positions, q)
    return (_plain if kernel == "plain" else _fused)(q, k, v, attention_mask, dropout)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`attention` over vectors in which the heads are concatenated.

    Args:
        q: (B, T, D).
        k: (B, S, D).
        v: (B, S, D).
        heads: Number H of heads, which divides D.
        mask: (B, S), true on tokens, false on padding; None without padding.

    Returns:
        (B, T, D).

    >>> attend(torch.ones(1, 3, 8), torch.ones(1, 5, 8), torch.ones(1, 5, 8), heads=2).shape
    torch.Size([1, 3, 8])
    """
    return join_heads(attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), mask))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split concatenated heads.

    Args:
        x: (B, T, D).
        heads: Number H of heads, which divides D.

    Returns:
        (B, H, T, D / H), a view.
    """
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Concatenate heads; the inverse of `split_heads`.

    Args:
        x: (B, H, T, d).

    Returns:
        (B, T, H d).
    """
    return x.transpose(1, 2).flatten(2)


def window_covers(length: int, window: int) -> bool:
    """Whether every token attends to every other, so that the window changes nothing.

    In an export, whose lengths are open, only where there is no window.

    Args:
        length: Number T of tokens.
        window: Number of neighbouring tokens, half of them on either side; 0 for all.

    Returns:
        Whether it does.

    >>> window_covers(5, 8), window_covers(6, 8)
    (True, False)
    """
    return not window or (not torch.compiler.is_exporting() and length - 1 <= window // 2)


def choose_kernel(q: Tensor, k: Tensor, window: int, dropout: float = 0.0) -> Kernel:
    """Which kernel computes `attention` for these tensors.

    Args:
        q: (B, H, T, d), of which shape, dtype and device count.
        k: (B, H, S, d).
        window: As in `attention`.
        dropout: As in `attention`.

    Returns:
        Its name.
    """
    if torch.compiler.is_exporting():
        # A graph that is written is of any length, for any device: a table under a mask is right for all of them.
        return "fused"
    length, on_cpu = k.shape[2], q.device.type == "cpu"
    if length > _mask_length_limit(window) and not window_covers(length, window):
        # FlexAttention drops nothing out, and runs well on NVIDIA's and AMD's devices only.
        return "flex" if q.device.type == "cuda" and not dropout else "banded"
    if on_cpu and q.dtype != torch.float32 and q.shape[2] * length <= PLAIN_MAX_SCORES:
        return "plain"
    return "fused"


def find_global_positions(global_attention_mask: Tensor) -> Tensor | None:
    """The positions of global tokens.

    Args:
        global_attention_mask: (B, T) bool, true on global tokens.

    Returns:
        (B, G) in ascending order, -1 where a sequence has fewer than G; None if no sequence has any.

    >>> find_global_positions(torch.tensor([[True, False, True], [False, True, False]]))
    tensor([[ 0,  2],
            [ 1, -1]])
    """
    count = int(global_attention_mask.sum(dim=1).max()) if global_attention_mask.numel() else 0
    if not count:
        return None
    sorted_mask = torch.sort(global_attention_mask.byte(), dim=1, descending=True, stable=True)
    return sorted_mask.indices[:, :count].masked_fill(sorted_mask.values[:, :count] == 0, -1)


def is_global(global_positions: Tensor, length: int) -> Tensor:
    """Which tokens are global; the inverse of `find_global_positions`.

    Args:
        global_positions: (B, G), -1 for none.
        length: Number T of tokens.

    Returns:
        (B, T) bool.
    """
    return (torch.arange(length, device=global_positions.device) == global_positions[:, :, None]).any(dim=1)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _fused(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, dropout: float) -> Tensor:
    if dropout and q.device.type == "cpu" and q.dtype == torch.float32:
        # PyTorch has no fused kernel for it there, and drops out slowly.
        return _plain(q, k, v, attention_mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)


def _plain(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, dropout: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attention_mask is not None:
        # Not minus infinity: a row that is masked as a whole would be no number.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return drop(scores.softmax(dim=-1), dropout).to(v.dtype) @ v


def _banded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int, global_positions: Tensor | None, dropout: float
) -> Tensor:
    """Blocks of queries, one after the other, each with the keys that its windows reach and the global ones in front.

    Scores: T x (block + window) a head, less at both ends, and those of one block at a time.
    """
    batch, _, length, _ = q.shape
    half, block = window // 2, max(MIN_QUERY_BLOCK, window // 4)
    index = None if global_positions is None else global_positions.clamp(min=0)
    is_token = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
    if global_positions is not None and index is not None:
        # A global token is seen as such, by all, and not once more through the windows around it.
        is_token = is_token & ~is_global(global_positions, length)
        global_front = gather_rows(k, index), gather_rows(v, index)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        low, high = max(0, start - half), min(length, stop + half)
        step = torch.arange(low, high, device=q.device) - torch.arange(start, stop, device=q.device)[:, None]
        # A query of padding may have only padding around it: it sees itself, since a softmax over nothing is no number.
        attention_mask = (is_token[:, None, low:high] & (step.abs() <= half)) | (step == 0)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        if global_positions is not None:
            keys, values = torch.cat([global_front[0], keys], dim=2), torch.cat([global_front[1], values], dim=2)
            attention_mask = torch.cat(
                [(global_positions >= 0)[:, None, :].expand(-1, stop - start, -1), attention_mask], dim=2
            )
        outputs.append(_fused(q[:, :, start:stop], keys, values, attention_mask[:, None], dropout).transpose(1, 2))
    # (B, T, H, d), the order in which the heads are joined afterwards.
    out = torch.cat(outputs, dim=1).transpose(1, 2)
    if global_positions is None or index is None:
        return out
    return scatter_rows(
        out,
        _fused(gather_rows(q, index), k, v, None if mask is None else mask[:, None, None], dropout),
        global_positions,
    )


def scatter_rows(x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Replace some rows of a tensor.

    Args:
        x: (B, H, T, d); without gradients it is changed itself.
        rows: (B, H, G, d).
        positions: (B, G) where they go; those at -1 are ignored.

    Returns:
        (B, H, T, d).
    """
    batch, slot = (positions >= 0).nonzero(as_tuple=True)
    changed = x.transpose(1, 2)
    if torch.is_grad_enabled():
        changed = changed.clone(memory_format=torch.contiguous_format)
    changed[batch, positions[batch, slot]] = rows.transpose(1, 2)[batch, slot].to(x.dtype)
    return changed.transpose(1, 2)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor.

    Args:
        x: (B, H, T, d).
        index: (B, G) positions, none negative.

    Returns:
        (B, H, G, d).
    """
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def take_row(states: Tensor, rows: Tensor) -> Tensor:
    """One token of each sequence.

    Args:
        states: (B, T, C).
        rows: (B,) its place.

    Returns:
        (B, 1, C).
    """
    return states.gather(1, rows[:, None, None].expand(-1, 1, states.shape[-1]))


def put_row(states: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """Replace one token of each sequence.

    Args:
        states: (B, T, C).
        rows: (B,) its place.
        row: (B, 1, C) what takes it.

    Returns:
        (B, T, C).
    """
    return states.scatter(1, rows[:, None, None].expand(-1, 1, states.shape[-1]), row.to(states.dtype))


def _mask_length_limit(window: int) -> int:
    """The length up to which a whole table of scores under a mask is quicker than bands."""
    return 3 * window // 2 + 64


def _window_mask(
    mask: Tensor | None, length: int, window: int, global_positions: Tensor | None, like: Tensor
) -> Tensor:
    """Which query sees which key, as a table: (B or 1, 1, T, T) bool."""
    position = torch.arange(length, device=like.device)
    step = (position[:, None] - position[None, :]).abs()
    attention_mask = (step <= window // 2)[None]
    if global_positions is not None:
        is_global_token = is_global(global_positions, length)
        attention_mask = attention_mask | is_global_token[:, None, :] | is_global_token[:, :, None]
    if mask is not None:
        attention_mask = (attention_mask & mask[:, None, :]) | (step == 0)
    return attention_mask[:, None]


_compiled: Any = None


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int, global_positions: Tensor | None, compiled: bool
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    global _compiled
    batch, _, length, _ = q.shape
    half = window // 2
    is_token = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
    is_global_token = torch.zeros_like(is_token) if global_positions is None else is_global(global_positions, length)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i - j).abs() <= half
        return (is_token[b, j] & (near | is_global_token[b, i] | is_global_token[b, j])) | (i == j)

    block_mask = create_block_mask(mask_mod, batch, None, length, length, device=q.device.type)
    if not compiled:
        return flex_attention(q, k, v, block_mask=block_mask)
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled(q, k, v, block_mask=block_mask)
