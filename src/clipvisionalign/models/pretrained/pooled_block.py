"""open_clip's block for the one token that is pooled; see `last_layer.py`."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from clipvisionalign.models.attention import put_row, take_row


class PooledBlock(ResidualAttentionBlock):
    """open_clip's block, for all tokens or for one of each sequence."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        pooled_rows: Tensor | None = None,
        keeps_tokens: bool = False,
    ) -> Any:
        """Run the block.

        Args:
            q_x: (B, T, C).
            k_x: open_clip's, for attention to other tokens.
            v_x: The same.
            attn_mask: (T, T) or (B H, T, T), what is added to the scores; None for nothing.
            pooled_rows: As of `PooledLayer`.
            keeps_tokens: As of `PooledLayer`.

        Returns:
            (B, T, C); as of `PooledLayer`.
        """
        if pooled_rows is None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        length, heads = q_x.shape[1], self.attn.num_heads
        normed = self.ln_1(q_x)
        mask = attn_mask
        if mask is not None and mask.ndim == 2:
            mask = mask[pooled_rows].repeat_interleave(heads, dim=0)[:, None]
        elif mask is not None:
            mask = take_row(mask, pooled_rows.repeat_interleave(heads))
        attended = self.attention(q_x=take_row(normed, pooled_rows), k_x=normed, v_x=normed, attn_mask=mask)
        states = take_row(q_x, pooled_rows) + self.ls_1(attended)
        states = states + self.ls_2(self.mlp(self.ln_2(states)))
        if not keeps_tokens:
            return states.expand(-1, length, -1)
        return put_row(super().forward(q_x, attn_mask=attn_mask), pooled_rows, states)


def pool_last_block(block: nn.Module) -> bool:
    """Let a block be run for the pooled token alone.

    Args:
        block: The last one; it is changed itself.

    Returns:
        Whether it is one of open_clip's usual ones.
    """
    if type(block) is ResidualAttentionBlock:
        block.__class__ = PooledBlock
    return type(block) is PooledBlock
