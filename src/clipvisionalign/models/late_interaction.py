"""Late interaction: a caption's tokens against an image's patches, by the sum of best matches.

Between one vector a side and full fusion: tokens and patches are encoded apart, each side alone, and meet in cosines
only. A pair's score is the sum over the caption's tokens of each one's best cosine among the image's patches, under
weights that a caption gives its own tokens; they sum to 1, so that a long caption scores as high as a short one.

- Padding has no weight: it adds nothing, whatever it holds.
- Pruning keeps the tokens of the greatest weight: smaller storage, fewer products.

Sources: ColBERT (Khattab and Zaharia, arXiv:2004.12832) for the sum of best matches; FILIP (Yao et al.,
arXiv:2111.07783) for patches; Wang et al., arXiv:2203.07111, for the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Where a learned log of 1 / temperature is held after each step: a hair below log 100, so that the limit of the scale
#: itself, which has no gradient above it, is never reached.
MAX_LOG_SCALE = 4.60517

#: Cosines that `maxsim` holds at a time: 64 MiB in float32.
COSINES_PER_BLOCK = 1 << 24


@dataclass
class LateConfig:
    """How tokens meet patches in the designs `late` and `cross`.

    Args:
        width: numbers of a token's and of a patch's vector.
        temperature: where the learned temperature of the late score starts.
        keep_tokens: tokens of a caption that count in scoring, those of the greatest weight; 0 for all.
    """

    width: int = 128
    temperature: float = 0.05
    keep_tokens: int = 0


class LateTokens(NamedTuple):
    """The tokens of captions in the late interaction.

    Attributes:
        vectors: (b, T, E) unit length.
        weights: (b, T) sum to 1, 0 on padding.
        mask: (b, T) bool, false on padding.
        positions: (b, T) position of each token in its caption; None where none is left out.
    """

    vectors: Tensor
    weights: Tensor
    mask: Tensor
    positions: Tensor | None = None

    def select(self, index: Tensor | slice) -> LateTokens:
        """Some of the captions.

        Args:
            index: Numbers of the captions, or a slice.

        Returns:
            Their tokens, in that order.
        """
        positions = None if self.positions is None else self.positions[index]
        return LateTokens(self.vectors[index], self.weights[index], self.mask[index], positions)


class LateInteraction(nn.Module):
    """Projects tokens and patches for the late interaction, and weighs the tokens.

    Args:
        config: Its settings.
        token_width: W, width of the text tower's tokens.
        patch_width: D, width of the patches in the common space.
    """

    def __init__(self, config: LateConfig, token_width: int, patch_width: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Linear(token_width, config.width)
        self.patch = nn.Linear(patch_width, config.width)
        self.token_weight = nn.Linear(token_width, 1)
        # Every token counts alike at the start.
        nn.init.zeros_(self.token_weight.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        #: What the late score counts beside the dual encoder's; chosen on dev.
        self.weight: Tensor
        self.register_buffer("weight", torch.ones(()))

    def scale(self) -> Tensor:
        """1 / temperature of the late score, at most 100.

        Returns:
            A scalar, with a gradient.
        """
        return self.log_scale.exp().clamp(max=100.0)

    def project_tokens(self, tokens: Tensor, mask: Tensor) -> LateTokens:
        """Project and weigh tokens; in evaluation only the `keep_tokens` of greatest weight are kept.

        Args:
            tokens: (b, T, W).
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Their vectors and weights.
        """
        projected, keep = self.project_all_tokens(tokens, mask), self.config.keep_tokens
        return prune_tokens(projected, keep) if keep and not self.training else projected

    def project_all_tokens(self, tokens: Tensor, mask: Tensor) -> LateTokens:
        """Project and weigh tokens, all of them whatever `keep_tokens` is.

        Args:
            tokens: (b, T, W).
            mask: (b, T) 1 on tokens, 0 on padding.

        Returns:
            Their vectors and weights.
        """
        mask = mask.bool()
        vectors = F.normalize(self.token(tokens).float(), dim=-1)
        weights = self.token_weight(tokens).squeeze(-1).float().masked_fill(~mask, -torch.inf)
        return LateTokens(vectors, weights.softmax(dim=-1), mask)

    def project_patches(self, patches: Tensor) -> Tensor:
        """Project patches.

        Args:
            patches: (B, P, D).

        Returns:
            (B, P, E) unit length.
        """
        return F.normalize(self.patch(patches).float(), dim=-1)

    def matches(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """What each token of a pair finds among its image's patches, for a fusion to start from.

        Args:
            tokens: (Q, T, W), padding too.
            patches: (Q, P, E) unit vectors of each pair's image.

        Returns:
            (Q, T, 2): the best cosine, and the mean cosine under the softmax of all.
        """
        vectors = F.normalize(self.token(tokens).float(), dim=-1)
        cosines = vectors @ patches.transpose(1, 2)
        shares = (cosines * self.scale()).softmax(dim=-1)
        return torch.stack([cosines.amax(dim=-1), (cosines * shares).sum(dim=-1)], dim=-1)


def prune_tokens(tokens: LateTokens, keep: int) -> LateTokens:
    """The tokens of the greatest weights, in their order; the first of those of equal weight.

    Args:
        tokens: Unit vectors and weights of the tokens of M captions.
        keep: Number of tokens to keep of each caption.

    Returns:
        The kept tokens; their weights sum to 1.
    """
    if keep >= tokens.weights.shape[1]:
        return tokens
    # `topk` takes any of equal weights, as all are of a late interaction that has not learned yet.
    index = tokens.weights.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values
    weights = tokens.weights.gather(1, index)
    vectors = tokens.vectors.gather(1, index[..., None].expand(-1, -1, tokens.vectors.shape[-1]))
    return LateTokens(vectors, weights / weights.sum(dim=1, keepdim=True), tokens.mask.gather(1, index), index)


def prune_weights(weights: Tensor, keep: int) -> Tensor:
    """The weights that `prune_tokens` leaves, each at its own position, by comparisons alone: for graphs of any length.

    Args:
        weights: (b, T) weights of the tokens.
        keep: Number of tokens to keep of each caption; 0 for all.

    Returns:
        (b, T) 0 for a token that is left out; they sum to 1.
    """
    if not keep:
        return weights
    own, others = weights[:, :, None], weights[:, None, :]
    position = torch.arange(weights.shape[1], device=weights.device)
    earlier = position[None, :] < position[:, None]
    rank = ((others > own) | ((others == own) & earlier)).sum(dim=-1)
    masked = torch.where(rank < keep, weights, 0.0)
    return masked / masked.sum(dim=1, keepdim=True)


def maxsim(patches: Tensor, tokens: LateTokens, block: int = COSINES_PER_BLOCK) -> Tensor:
    """The score of every image with every caption (MaxSim).

    Each token contributes the cosine of its best patch, by the token's weight.

    Args:
        patches: (N, P, E) unit vectors, from `LateInteraction.project_patches`.
        tokens: Unit vectors and weights of the tokens of M captions.
        block: Number of cosines that are computed at a time.

    Returns:
        (N, M) from -1 to 1.

    Source: Khattab and Zaharia, "ColBERT", arXiv:2004.12832; with image patches Yao et al., "FILIP", arXiv:2111.07783.

    >>> tokens = LateTokens(torch.eye(2)[None], torch.tensor([[0.5, 0.5]]), torch.ones(1, 2))
    >>> maxsim(torch.eye(2)[None], tokens).item(), maxsim(torch.eye(2)[None, :1], tokens).item()
    (1.0, 0.5)
    """
    images, captions = len(patches), len(tokens.weights)
    cosines_per_pair = patches.shape[1] * tokens.weights.shape[1]
    width = max(1, min(captions, block // cosines_per_pair))
    height = max(1, block // (cosines_per_pair * width))
    columns = []
    for start in range(0, captions, width):
        chunk = tokens.select(slice(start, start + width))
        blocks = [_maxsim_block(patches[row : row + height], chunk) for row in range(0, images, height)]
        columns.append(torch.cat(blocks))
    return torch.cat(columns, dim=1)


def maxsim_pairs(patches: Tensor, tokens: LateTokens) -> Tensor:
    """The scores of Q pairs: image 0 with caption 0, image 1 with caption 1, and so on.

    Args:
        patches: (Q, P, E) unit vectors, from `LateInteraction.project_patches`.
        tokens: Unit vectors and weights of the tokens of Q captions.

    Returns:
        (Q,) from -1 to 1.
    """
    best = (patches @ tokens.vectors.transpose(1, 2)).amax(dim=1)
    return (best * tokens.weights).sum(dim=-1)


def _maxsim_block(patches: Tensor, tokens: LateTokens) -> Tensor:
    images, patch_count, width = patches.shape
    # One matrix product of all patches with all tokens; the best patch is then the maximum along an outer axis.
    cosines = patches.reshape(-1, width) @ tokens.vectors.reshape(-1, width).T
    best = cosines.view(images, patch_count, -1).amax(dim=1)
    return (best.view(images, *tokens.weights.shape) * tokens.weights).sum(dim=-1)
