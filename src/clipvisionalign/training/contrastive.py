"""Losses over the scores of a batch.

Each takes image vectors (B, D), caption vectors (M, D) and positives (B, M), all of them unit vectors, and gives a
scalar. Captions of one image (or identity, or equal to one of them) are positives of it, never negatives; `positives`
is the mask of those. A custom loss is a function of these three; `--loss.name package.module:function` names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.training.gathered_batch import GatheredBatch

#: The built-in losses; tests of what holds for every loss run for each of these.
LOSSES = ("softmax", "sigmoid", "hardest", "hard_weighted")


@dataclass
class LossConfig:
    """What the dual encoder is trained with.

    Args:
        name: "softmax" (CLIP's, with many positives), "sigmoid" (SigLIP), "hardest" (VSE++), "hard_weighted" (softmax
            in which harder negatives count more), or a custom "package.module:function".
        margin: by how much "hardest" wants a true pair above the hardest wrong one, in cosine.
        beta: how much more harder negatives count in "hard_weighted"; 0 is softmax.
        smoothing: share of each answer that "softmax" spreads over all candidates.
        bias: where the learned bias of "sigmoid" starts; that of a pretrained model with a bias starts from its own.
        learn_temperature: whether the temperature is learned, or stays where it starts.
    """

    name: str = "softmax"
    margin: float = 0.2
    beta: float = 0.5
    smoothing: float = 0.0
    bias: float = -10.0
    learn_temperature: bool = True


#: Scores that a piece of a loss holds at a time, above which it comes in pieces: 32 MiB in float32.
MAX_CHUNK_SCORES = 1 << 23


class DualEncoderLoss(nn.Module):
    """The loss that a config names, with what it learns itself.

    Args:
        config: Its settings.
        model_has_bias: Whether the model has the bias of "sigmoid" itself, as SigLIP does, and passes it.

    Raises:
        ValueError: The name is unknown.
    """

    def __init__(self, config: LossConfig, model_has_bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.custom_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        if config.name == "sigmoid" and not model_has_bias:
            self.bias = nn.Parameter(torch.tensor([config.bias]))
        elif config.name not in LOSSES:
            self.custom_loss = _import_loss(config.name)

    def bias_of(self, model_bias: Tensor | None) -> Tensor | None:
        """The bias that is learned.

        Args:
            model_bias: The model's; None for a model without.

        Returns:
            This module's own, or the model's for "sigmoid"; None for a loss without.
        """
        if hasattr(self, "bias"):
            return self.bias
        return model_bias if self.config.name == "sigmoid" else None

    def forward(
        self, images: Tensor, captions: Tensor, positives: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            images: (B, D) unit vectors.
            captions: (M, D) unit vectors.
            positives: (B, M) bool.
            scale: 1 / temperature, a scalar; a custom loss is not given it.
            bias: Bias of "sigmoid" instead of this module's own; None for that.

        Returns:
            A scalar.
        """
        if self.custom_loss is not None:
            return self.custom_loss(images, captions, positives)
        cosines = images @ captions.T
        by_image, by_caption = self._divisors(len(images), len(captions), int(positives.sum()))
        loss = self._terms(cosines, positives, scale, bias).sum() / by_image
        if by_caption:
            loss = loss + self._terms(cosines.T, positives.T, scale, bias).sum() / by_caption
        return loss

    def chunks(self, gallery: GatheredBatch, scale: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
        """The loss of a gallery in parts, whose sum over all processes is the loss.

        Each part is the loss of some rows against all columns. The rows are this process's own, and no more than
        `MAX_CHUNK_SCORES` scores are held if the gradient of each part is computed before the next. A custom loss is
        not divided:
        every process computes all of it, and counts its share.

        Args:
            gallery: Vectors of all processes.
            scale: 1 / temperature, a scalar.
            bias: As in `forward`.

        Yields:
            Scalars.
        """
        images, captions = gallery.images, gallery.captions
        if self.custom_loss is not None:
            yield self.custom_loss(images, captions, gallery.positive_mask()) / gallery.world_size
            return
        if gallery.world_size == 1 and len(images) * len(captions) <= MAX_CHUNK_SCORES:
            yield self(images, captions, gallery.positive_mask(), scale, bias)
            return
        by_image, by_caption = self._divisors(len(images), len(captions), gallery.count_positives())
        for rows in _blocks(gallery.own_images, len(images), len(captions)):
            terms = self._terms(images[rows] @ captions.T, gallery.positive_mask(images=rows), scale, bias)
            yield terms.sum() / by_image
        if not by_caption:
            return
        for rows in _blocks(gallery.own_captions, len(captions), len(images)):
            terms = self._terms(captions[rows] @ images.T, gallery.positive_mask(captions=rows).T, scale, bias)
            yield terms.sum() / by_caption

    def _terms(self, cosines: Tensor, positives: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """What each row loses against all columns (rows,)."""
        config = self.config
        if config.name == "sigmoid":
            return sigmoid_terms(cosines * scale + (self.bias if bias is None else bias), positives)
        if config.name == "hardest":
            return hardest_terms(cosines, positives, config.margin)
        if config.name == "hard_weighted":
            return hard_weighted_terms(cosines * scale, positives, config.beta)
        return softmax_terms(cosines * scale, positives, config.smoothing)

    def _divisors(self, images: int, captions: int, pairs: int) -> tuple[float, float]:
        """What the sums of the images' and of the captions' terms are divided by; 0 for a loss of images' rows only."""
        if self.config.name == "sigmoid":
            return captions, 0
        # Without a true pair nothing is lost.
        return (max(pairs, 1),) * 2 if self.config.name == "hardest" else (2 * images, 2 * captions)


def _blocks(own_rows: slice, rows: int, columns: int) -> Iterator[slice]:
    first, last, _ = own_rows.indices(rows)
    step = max(1, MAX_CHUNK_SCORES // max(1, columns))
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _import_loss(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    module, _, function = name.partition(":")
    try:
        loss = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        loss = None
    if not callable(loss):
        raise ValueError(
            f"--loss.name {name}: neither {', '.join(LOSSES[:-1])} or {LOSSES[-1]}, nor a function that can be "
            "imported as package.module:function"
        )
    return loss


def contrastive_loss(logits: Tensor, positives: Tensor, smoothing: float = 0.0) -> Tensor:
    """Symmetric contrastive loss with several positives per row and column.

    Each true pair is distinguished from the negatives of its row, and from those of its column; other positives of the
    same row or column are excluded from both. With one caption per image this is CLIP's loss.

    Args:
        logits: (B, M) cosines divided by the temperature.
        positives: (B, M) bool, true where a caption belongs to an image.
        smoothing: Share of the target that is distributed over all candidates of a pair.

    Returns:
        A scalar.

    Source: Radford et al., arXiv:2103.00020; the sum over positives outside the logarithm is that of Khosla et al.,
    arXiv:2004.11362, equation 2.

    >>> contrastive_loss(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool))
    tensor(0.6931)
    """
    return (
        softmax_terms(logits, positives, smoothing).mean() + softmax_terms(logits.T, positives.T, smoothing).mean()
    ) / 2


def softmax_terms(logits: Tensor, positives: Tensor, smoothing: float) -> Tensor:
    """For each row the mean over its positives of -log(true / (true + negatives)).

    Args:
        logits: (rows, columns) cosines divided by the temperature.
        positives: (rows, columns) bool.
        smoothing: Share of the target that is distributed over all candidates of a pair (Szegedy et al.,
            arXiv:1512.00567, section 7).

    Returns:
        (rows,).
    """
    negatives = _mask_positives(logits, positives).logsumexp(dim=1, keepdim=True)
    terms = F.softplus(negatives - logits)
    if smoothing:
        count = (~positives).sum(dim=1, keepdim=True)
        mean = (logits.masked_fill(positives, 0.0).sum(dim=1, keepdim=True) + logits) / (count + 1)
        terms = (1 - smoothing) * terms + smoothing * (torch.logaddexp(negatives, logits) - mean)
    return _mean_over_positives(terms, positives)


def _mask_positives(logits: Tensor, positives: Tensor) -> Tensor:
    """The logits with those of positives at the lowest finite number: a row of positives alone has nothing to lose, and
    a gradient of zero, where one of minus infinity would have none."""
    return logits.masked_fill(positives, torch.finfo(logits.dtype).min)


def _mean_over_positives(terms: Tensor, positives: Tensor) -> Tensor:
    terms = terms.masked_fill(~positives, 0.0)
    return terms.sum(dim=1) / positives.sum(dim=1).clamp(min=1)


def sigmoid_terms(logits: Tensor, positives: Tensor) -> Tensor:
    """For each row the sum over all columns of a binary classification of the pair, positive or not.

    The loss is the sum of all rows divided by the number of captions.

    Args:
        logits: (rows, columns) cosine / temperature + bias.
        positives: (rows, columns) bool.

    Returns:
        (rows,).

    Source: Zhai et al., "SigLIP", arXiv:2303.15343, equation 1.

    >>> sigmoid_terms(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    tensor([0.6931])
    """
    signs = positives.to(logits.dtype) * 2 - 1
    return F.softplus(-signs * logits).sum(dim=1)


def hardest_terms(cosines: Tensor, positives: Tensor, margin: float) -> Tensor:
    """For each row the sum over its positives of the hinge against the hardest negative column.

    The loss is the sum over rows and columns divided by the number of true pairs.

    Args:
        cosines: (rows, columns).
        positives: (rows, columns) bool.
        margin: Difference in cosine from which on a pair has no loss.

    Returns:
        (rows,).

    Source: Faghri et al., "VSE++", arXiv:1707.05612, equation 6.

    >>> hardest_terms(torch.tensor([[0.9, 0.8]]), torch.tensor([[True, False]]), margin=0.2)
    tensor([0.1000])
    """
    wrong = cosines.masked_fill(positives, -torch.inf).amax(dim=1, keepdim=True)
    return (margin - cosines + wrong).clamp(min=0).masked_fill(~positives, 0.0).sum(dim=1)


def hard_weighted_terms(logits: Tensor, positives: Tensor, beta: float) -> Tensor:
    """`softmax_terms` with negatives weighted by exp(beta x logit), normalised to a mean of 1.

    Args:
        logits: (rows, columns) cosines divided by the temperature.
        positives: (rows, columns) bool.
        beta: Concentration on hard negatives; 0 is `softmax_terms`.

    Returns:
        (rows,).

    Source: Robinson et al., arXiv:2010.04592, section 4 (without its correction for false negatives, since positives
    are known).
    """
    wrong = _mask_positives(logits, positives)
    # log of: sum over negatives of w exp(logit), w = n exp(beta logit) / sum of exp(beta logit); no gradient through w.
    weights = _mask_positives(beta * wrong.detach(), positives).log_softmax(dim=1)
    count = (~positives).sum(dim=1, keepdim=True).to(logits.dtype)
    # A row of positives alone has nothing to lose, see `_mask_positives`.
    negatives = (wrong + weights).logsumexp(dim=1, keepdim=True) + count.clamp(min=1).log()
    return _mean_over_positives(F.softplus(negatives - logits), positives)


@torch.no_grad()
def sample_hard_negatives(logits: Tensor, positives: Tensor, count: int) -> Tensor:
    """Draw negatives of each row by the softmax of its logits, without replacement.

    Args:
        logits: (B, M).
        positives: (B, M) bool, which are never drawn.
        count: Number of negatives for each row.

    Returns:
        (B, count) column numbers, different within a row.

    Raises:
        ValueError: A row has fewer negatives.

    Source: Li et al., "ALBEF", arXiv:2107.07651, section 3.2; by the Gumbel-max trick, Kool, van Hoof and Welling,
    arXiv:1903.06059.
    """
    if int((~positives).sum(dim=1).min()) < count:
        raise ValueError(f"a batch too small to find {count} negatives for every row")
    gumbel = -torch.empty_like(logits).exponential_().log()
    return (logits + gumbel).masked_fill(positives, -torch.inf).topk(count, dim=1).indices
