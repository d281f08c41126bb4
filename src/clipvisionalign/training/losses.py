"""Losses: what is asked of the scores of a batch.

Captions of one image (or identity) are partners of it, never negatives: `partners` says which, (B, M).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(logits: Tensor, partners: Tensor) -> Tensor:
    """Symmetric contrastive loss with many partners. logits, partners: (B, M) -> scalar.

    Each true pair is told from the negatives of its row, and from those of its column; other partners of the same row
    or column stand in neither. With one caption per image this is CLIP's loss (Radford et al., arXiv:2103.00020); the
    sum over partners outside the logarithm is that of Khosla et al., arXiv:2004.11362, equation 2.
    """
    return (_one_way(logits, partners) + _one_way(logits.T, partners.T)) / 2


def _one_way(logits: Tensor, partners: Tensor) -> Tensor:
    """Mean over rows of the mean over a row's partners of -log(true / (true + negatives))."""
    negatives = logits.masked_fill(partners, -torch.inf).logsumexp(dim=1, keepdim=True)
    terms = F.softplus(negatives - logits).masked_fill(~partners, 0.0)
    return (terms.sum(dim=1) / partners.sum(dim=1).clamp(min=1)).mean()


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
