"""Cross-attention between a caption's tokens and an image's patches -> a score for that pair.

- The fused score is the dual encoder's score plus a weight times a correction. The correction's last layer starts at
  zero, so that re-ranking starts as the dual encoder's own order and cannot start worse. The weight is chosen on dev
  after training: a correction that is too sure of itself on new images is trusted less.
- An image's keys and values are projected once per image and reused for every caption that is scored against it.
- A pair's score depends on that pair alone; every candidate, the true one included, takes the same way through here.

Sources: LXMERT (Tan and Bansal, arXiv:1908.07490) for the blocks; ALBEF (Li et al., arXiv:2107.07651) for scoring a
pair from the fused first token and for hard negatives from the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipvisionalign.models.attention import attend, split_heads
from clipvisionalign.models.dropout import Dropout


@dataclass
class FusionConfig:
    """How captions attend to images in the design `cross`.

    Args:
        layers: pairs of a self block and a cross block.
        heads: attention heads.
        width: width of the fused tokens.
        dropout: after each attention and in each feed-forward part, while training.
        candidates: how many of the dual encoder's first candidates are re-ranked in an evaluation.
    """

    layers: int = 2
    heads: int = 4
    width: int = 256
    dropout: float = 0.1
    candidates: int = 32


class FeedForward(nn.Module):
    """The token-wise part of a block.

    Args:
        width: Width of a token.
        dropout: Share that is dropped during training.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and add its input.

        Args:
            x: (..., D).

        Returns:
            (..., D).
        """
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class SelfBlock(nn.Module):
    """The caption's tokens attend to each other.

    Args:
        width: D, width of a token.
        heads: Number of attention heads.
        dropout: Share that is dropped during training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the layer and add its input.

        Args:
            x: (Q, T, D).
            mask: (Q, T) true on tokens, false on padding.

        Returns:
            (Q, T, D).
        """
        y = self.norm(x)
        k, v = self.key_value(y).chunk(2, dim=-1)
        return x + self.dropout(self.out(attend(self.query(y), k, v, self.heads, mask)))


class CrossBlock(nn.Module):
    """The caption's tokens attend to the image's patches.

    Args:
        width: D, width of a token.
        heads: Number of attention heads.
        dropout: Share that is dropped during training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        """Apply the layer and add its input.

        Args:
            x: (Q, T, D).
            key_value: (Q, P, 2 D), from `key_value(patches)`.

        Returns:
            (Q, T, D).
        """
        k, v = key_value.chunk(2, dim=-1)
        return x + self.dropout(self.out(attend(self.query(self.norm(x)), k, v, self.heads)))

    def weights(self, x: Tensor, key_value: Tensor) -> Tensor:
        """How much each token attends to each patch.

        Args:
            x: (Q, T, D).
            key_value: (Q, P, 2 D), from `key_value(patches)`.

        Returns:
            (Q, T, P), mean over heads; each row sums to 1.
        """
        q = split_heads(self.query(self.norm(x)), self.heads)
        k = split_heads(key_value.chunk(2, dim=-1)[0], self.heads)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)


class Fusion(nn.Module):
    """Corrections of pairs' scores, by cross-attention from caption tokens to image patches.

    Args:
        config: Its settings.
        token_width: W, width of the text tower's tokens.
        patch_width: Width of the patches in the common space.

    Source: Tan and Bansal, "LXMERT", arXiv:1908.07490; Li et al., "ALBEF", arXiv:2107.07651.
    """

    def __init__(self, config: FusionConfig, token_width: int, patch_width: int) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.tokens_in = nn.Linear(token_width, width)
        self.matches_in = nn.Linear(2, width)
        self.patches_in = nn.Sequential(nn.Linear(patch_width, width), nn.LayerNorm(width))
        self.self_blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(config.layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, heads, dropout) for _ in range(config.layers))
        self.feed_forwards = nn.ModuleList(FeedForward(width, dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.correction = nn.Linear(width, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        self.weight: Tensor
        self.register_buffer("weight", torch.ones(()))

    def project_patches(self, patch_tokens: Tensor) -> Tensor:
        """The keys and values of every layer, once for each image.

        Args:
            patch_tokens: (B, P, patch width).

        Returns:
            (B, L, P, 2 D).
        """
        patches = self.patches_in(patch_tokens)
        return torch.stack([block.key_value(patches) for block in self.cross_blocks], dim=1)  # type: ignore[operator]

    def forward(self, tokens: Tensor, mask: Tensor, key_values: Tensor, matches: Tensor) -> Tensor:
        """Corrections of the pairs' scores; 0 for all before the first step of training.

        Args:
            tokens: (Q, T, W) of each pair's caption.
            mask: (Q, T) true on tokens, false on padding.
            key_values: (Q, L, P, 2 D) of each pair's image.
            matches: (Q, T, 2) what the late interaction finds for each token.

        Returns:
            (Q,) before their weight.
        """
        return self._run(tokens, mask, key_values, matches)[0]

    def attention_maps(self, tokens: Tensor, mask: Tensor, key_values: Tensor, matches: Tensor) -> Tensor:
        """How much each token attends to each patch.

        Args:
            tokens: As in `forward`.
            mask: As in `forward`.
            key_values: As in `forward`.
            matches: As in `forward`.

        Returns:
            (Q, T, P), mean over layers and heads.
        """
        maps: list[Tensor] = []
        self._run(tokens, mask, key_values, matches, maps)
        return torch.stack(maps).mean(dim=0)

    def _run(
        self, tokens: Tensor, mask: Tensor, key_values: Tensor, matches: Tensor, maps: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The corrections (Q,) and the last states (Q, T, D); what each layer attends to goes into `maps`."""
        x = self.tokens_in(tokens) + self.matches_in(matches.to(tokens.dtype))
        blocks = zip(self.self_blocks, self.cross_blocks, self.feed_forwards, strict=True)
        for layer, (self_block, cross_block, feed_forward) in enumerate(blocks):
            x = self_block(x, mask)
            if maps is not None:
                maps.append(cross_block.weights(x, key_values[:, layer]))  # type: ignore[operator]
            x = feed_forward(cross_block(x, key_values[:, layer]))
        return self.correction(self.norm(x[:, 0])).squeeze(-1), x
