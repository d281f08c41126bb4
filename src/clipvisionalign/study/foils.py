"""Minimal pairs of a trial: how often its model scores the true caption above the foil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.foils import MinimalPair
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.retrieval.minimal_pairs import score_minimal_pairs
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.pair_weights import PairWeights, get_pair_weights, set_pair_weights


@dataclass(frozen=True)
class HalfWeights:
    """The weights of pair scores that each half of dev chose.

    Attributes:
        half: 0 or 1 by image, the half that it is in.
        weights: The weights that half 0 and half 1 chose.
    """

    half: dict[Any, int]
    weights: list[PairWeights]

    @classmethod
    def of(cls, eval_data: CaptionedImages, selection: dict[str, Any]) -> HalfWeights | None:
        """The weights of a run.

        Args:
            eval_data: The dev split of the run.
            selection: What the run's results have as "chosen".

        Returns:
            The weights; None where nothing was chosen, or not by halves.
        """
        halves = split_halves(eval_data) if selection.get("by") == "halves" and "weights" in selection else None
        if halves is None:
            return None
        weights_by_kind = selection["weights"]
        weights = [
            PairWeights(**{kind: weights_by_kind[kind]["halves"][half] for kind in weights_by_kind}) for half in (0, 1)
        ]
        return cls(dict(zip(eval_data.images, halves.image_half.tolist(), strict=True)), weights)


def foil_accuracy(
    aligner: Aligner, pairs: Sequence[MinimalPair], halves: HalfWeights | None = None
) -> dict[str, list[float]]:
    """Whether true captions outscore their foils.

    Args:
        aligner: The model; its weights of pair scores are restored.
        pairs: The pairs.
        halves: By these weights images that took part in choosing are scored as the other half chose; None for the
            model's.

    Returns:
        By kind, for each pair 1, 0, or 0.5 for a tie.
    """
    if not pairs:
        return {}
    scorer, outcomes = _DedupedPairs(aligner), np.empty(len(pairs))
    half_of_pair = np.array([-1 if halves is None else halves.half.get(pair.image, -1) for pair in pairs])
    own_weights = get_pair_weights(aligner)
    for half in np.unique(half_of_pair).tolist():
        pair_list = [pairs[index] for index in np.flatnonzero(half_of_pair == half).tolist()]
        set_pair_weights(aligner, own_weights if half < 0 or halves is None else halves.weights[1 - half])
        outcomes[half_of_pair == half] = score_minimal_pairs(
            scorer, [p.image for p in pair_list], [p.caption for p in pair_list], [p.foil for p in pair_list]
        )
    set_pair_weights(aligner, own_weights)
    kinds = dict.fromkeys(pair.kind for pair in pairs)
    return {kind: [float(outcomes[i]) for i, pair in enumerate(pairs) if pair.kind == kind] for kind in kinds}


class _DedupedPairs:
    """An aligner asked for pairs: an image that is in several of them is encoded once."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    def score_pairs(
        self, images: Sequence[Any], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        position_by_image: dict[Any, int] = {}
        positions = np.array([position_by_image.setdefault(image, len(position_by_image)) for image in images])
        return self.aligner.score_pairs(list(position_by_image), captions, positions[image_index], caption_index)
