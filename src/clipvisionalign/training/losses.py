"""Losses: what is asked of the scores of a batch.

Each takes image vectors (B, D), caption vectors (M, D) and partners (B, M), all of them unit vectors, and gives a
scalar. Captions of one image (or identity) are partners of it, never negatives; `partners` says which. A loss of one's
own is a function of these three; `--loss.name package.module:function` names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class LossConfig:
    """What the dual encoder is trained with.

    Args:
        name: "softmax" (CLIP's, with many partners), "sigmoid" (SigLIP), "hardest" (VSE++), "hard_weighted" (softmax in
            which harder negatives count more), or "package.module:function" of one's own.
        margin: by how much "hardest" wants a true pair above the hardest wrong one, in cosine.
        beta: how much more harder negatives count in "hard_weighted"; 0 is softmax.
        smoothing: share of each answer that "softmax" spreads over all candidates.
        bias: where the learned bias of "sigmoid" starts.
        learn_temperature: whether the temperature is learned, or stays where it starts.
    """

    name: str = "softmax"
    margin: float = 0.2
    beta: float = 0.5
    smoothing: float = 0.0
    bias: float = -10.0
    learn_temperature: bool = True


class PairLoss(nn.Module):
    """The loss that a config names, with what it learns itself. Raises ValueError for an unknown name."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.own: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        if config.name == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(config.bias))
        elif config.name not in ("softmax", "hardest", "hard_weighted"):
            self.own = _own_loss(config.name)

    def forward(self, images: Tensor, captions: Tensor, partners: Tensor, scale: Tensor) -> Tensor:
        """images: (B, D), captions: (M, D), unit vectors; partners: (B, M); scale: 1 / temperature -> scalar."""
        config = self.config
        if self.own is not None:
            return self.own(images, captions, partners)
        cosines = images @ captions.T
        if config.name == "sigmoid":
            return sigmoid_loss(cosines * scale + self.bias, partners)
        if config.name == "hardest":
            return hardest_negative_loss(cosines, partners, config.margin)
        if config.name == "hard_weighted":
            return hard_weighted_loss(cosines * scale, partners, config.beta)
        return contrastive_loss(cosines * scale, partners, config.smoothing)


def _own_loss(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not callable(found):
        raise ValueError(
            f"--loss.name {name}: neither softmax, sigmoid, hardest or hard_weighted, nor a function that can be "
            "imported as package.module:function"
        )
    return found


def contrastive_loss(logits: Tensor, partners: Tensor, smoothing: float = 0.0) -> Tensor:
    """Symmetric contrastive loss with many partners. logits, partners: (B, M) -> scalar.

    Each true pair is told from the negatives of its row, and from those of its column; other partners of the same row
    or column stand in neither. With one caption per image this is CLIP's loss (Radford et al., arXiv:2103.00020); the
    sum over partners outside the logarithm is that of Khosla et al., arXiv:2004.11362, equation 2. `smoothing` is the
    share of the answer that goes to all of a pair's candidates alike (Szegedy et al., arXiv:1512.00567, section 7).
    """
    return (_softmax_way(logits, partners, smoothing) + _softmax_way(logits.T, partners.T, smoothing)) / 2


def _softmax_way(logits: Tensor, partners: Tensor, smoothing: float) -> Tensor:
    """Mean over rows of the mean over a row's partners of -log(true / (true + negatives))."""
    negatives = logits.masked_fill(partners, -torch.inf).logsumexp(dim=1, keepdim=True)
    terms = F.softplus(negatives - logits)
    if smoothing:
        count = (~partners).sum(dim=1, keepdim=True)
        mean = (logits.masked_fill(partners, 0.0).sum(dim=1, keepdim=True) + logits) / (count + 1)
        terms = (1 - smoothing) * terms + smoothing * (torch.logaddexp(negatives, logits) - mean)
    return _mean_over_partners(terms, partners)


def _mean_over_partners(terms: Tensor, partners: Tensor) -> Tensor:
    terms = terms.masked_fill(~partners, 0.0)
    return (terms.sum(dim=1) / partners.sum(dim=1).clamp(min=1)).mean()


def sigmoid_loss(logits: Tensor, partners: Tensor) -> Tensor:
    """Every pair is a question of its own: partners or not. logits, partners: (B, M) -> scalar, a mean over captions.

    Source: Zhai et al., "SigLIP", arXiv:2303.15343, equation 1; its logits are cosine / temperature + bias.
    """
    signs = partners.to(logits.dtype) * 2 - 1
    return F.softplus(-signs * logits).sum() / logits.shape[1]


def hardest_negative_loss(cosines: Tensor, partners: Tensor, margin: float) -> Tensor:
    """Hinge of each true pair against its image's hardest wrong caption and its caption's hardest wrong image.

    cosines, partners: (B, M) -> scalar, a mean over true pairs. Source: Faghri et al., "VSE++", arXiv:1707.05612,
    equation 6.
    """
    wrong = cosines.masked_fill(partners, -torch.inf)
    by_row = (margin - cosines + wrong.amax(dim=1, keepdim=True)).clamp(min=0)
    by_column = (margin - cosines + wrong.amax(dim=0, keepdim=True)).clamp(min=0)
    return (by_row + by_column).masked_fill(~partners, 0.0).sum() / partners.sum()


def hard_weighted_loss(logits: Tensor, partners: Tensor, beta: float) -> Tensor:
    """Symmetric contrastive loss in which a negative counts by exp(beta x logit), 1 on average; beta 0 is softmax.

    logits, partners: (B, M) -> scalar. Source: Robinson et al., arXiv:2010.04592, section 4 (without its correction for
    false negatives, since partners are known).
    """
    return (_weighted_way(logits, partners, beta) + _weighted_way(logits.T, partners.T, beta)) / 2


def _weighted_way(logits: Tensor, partners: Tensor, beta: float) -> Tensor:
    wrong = logits.masked_fill(partners, -torch.inf)
    # log of: sum over negatives of w exp(logit), w = n exp(beta logit) / sum of exp(beta logit); no gradient through w.
    weights = (beta * wrong.detach()).masked_fill(partners, -torch.inf).log_softmax(dim=1)
    count = (~partners).sum(dim=1, keepdim=True).to(logits.dtype)
    negatives = (wrong + weights).logsumexp(dim=1, keepdim=True) + count.log()
    return _mean_over_partners(F.softplus(negatives - logits), partners)


@torch.no_grad()
def sample_hard_negatives(logits: Tensor, partners: Tensor, count: int) -> Tensor:
    """For each row, `count` different negatives drawn by the dual encoder's own probability. (B, M) -> (B, count).

    Harder ones come up more often (ALBEF, Li et al., arXiv:2107.07651, section 3.2). Drawn without replacement by the
    Gumbel-max trick (Kool, van Hoof and Welling, arXiv:1903.06059). A row with fewer negatives than `count` raises
    ValueError.
    """
    if int((~partners).sum(dim=1).min()) < count:
        raise ValueError(f"a batch too small to find {count} negatives for every row")
    gumbel = -torch.empty_like(logits).exponential_().log()
    return (logits + gumbel).masked_fill(partners, -torch.inf).topk(count, dim=1).indices
