"""Weights between a fine-tuned model and the one that it started from.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv:2109.01903 (WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipvisionalign.models.aligner import PAIR_SCORER_PREFIXES

#: The largest temperature that a model may learn: between two limits, the higher one clips neither.
_LIMIT = "max_log_scale"


def interpolate_weights(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Weights between two models: (1 - alpha) base + alpha tuned, of each tensor, computed in float64.

    - Temperatures are learned as logarithms, so that a blended scale is a geometric mean; no rank of a dual encoder
      depends on it.
    - Running means and variances of batch norms are interpolated as weights are. Those of a pretrained batch norm are
      the same in both, as training keeps them. Where both are different the result is an approximation: the statistics
      of the blended network would have to be measured.
    - Integers (positions, counts of batches) and tensors that the base lacks (late interaction, fusion) are the tuned
      model's.

    Args:
        tuned: tensors of the fine-tuned model, by name.
        base: tensors of the other one; names that the tuned model lacks are not used.
        alpha: 0 for the base, 1 for the tuned model, each to the last bit.

    Returns:
        The tensors of the tuned model's names, in its dtypes.

    Raises:
        ValueError: alpha is not between 0 and 1, or a tensor has another shape in the base.

    >>> interpolate_weights({"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}, 0.25)
    {'w': tensor([1.2500])}
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha:g}: has to be from 0 (the base) to 1 (the fine-tuned model)")
    blended = {}
    for name, own in tuned.items():
        other = base.get(name)
        if other is None or not own.is_floating_point():
            blended[name] = own.clone()
            continue
        if other.shape != own.shape:
            raise ValueError(f"{name}: {tuple(own.shape)} in the fine-tuned model, {tuple(other.shape)} in the base")
        if name == _LIMIT:
            blended[name] = torch.maximum(own, other.to(own.dtype))
        elif alpha in (0.0, 1.0):
            # As it is, where the other one may not be finite.
            blended[name] = (own if alpha else other.to(own.dtype)).clone()
        else:
            blended[name] = ((1.0 - alpha) * other.double() + alpha * own.double()).to(own.dtype)
    return blended


def unshared_names(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """The tensors by which two models are not of one architecture: those that one lacks, or that have another shape.

    Late interaction and fusion do not count: a fine-tuned model may have them on top of a base without.

    Args:
        tuned: tensors of the tuned model, by name.
        base: tensors of the base.

    Returns:
        Their names; none where the two are of one architecture.
    """
    shared = {name for name in tuned if name in base and base[name].shape == tuned[name].shape}
    return sorted(name for name in {*tuned, *base} - shared if not name.startswith(PAIR_SCORER_PREFIXES))
