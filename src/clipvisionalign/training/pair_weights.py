"""Weights of the late score and of the fusion's correction beside the dual encoder's score."""

from __future__ import annotations

from typing import NamedTuple

from clipvisionalign.models.aligner import Aligner

#: What the late score and the fusion's correction may count beside the dual encoder's score; 0 leaves them out.
PAIR_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)


class PairWeights(NamedTuple):
    """Weights of the late score and of the fusion's correction beside the dual encoder's score.

    Attributes:
        late: Weight of the late score; 0 leaves it out.
        fusion: Weight of the correction; 0 leaves it out.
    """

    late: float = 0.0
    fusion: float = 0.0


def get_pair_weights(aligner: Aligner) -> PairWeights:
    """The weights of a model.

    Args:
        aligner: The model.

    Returns:
        The weights, 0 for what the design does not have.
    """
    late, fusion = (0.0 if part is None else float(part.weight) for part in (aligner.late, aligner.fusion))
    return PairWeights(late, fusion)


def set_pair_weights(aligner: Aligner, weights: PairWeights) -> None:
    """Set the weights of a model, as far as its design has such parts.

    Args:
        aligner: The model; it is changed itself.
        weights: The weights.
    """
    if aligner.late is not None:
        aligner.late.weight.fill_(weights.late)
    if aligner.fusion is not None:
        aligner.fusion.weight.fill_(weights.fusion)
