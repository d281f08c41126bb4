"""Models between a base and a run, each measured, and the choice among them.

What is chosen on a gallery is not measured on it: as for the epoch of a run, each half of dev chooses alpha, and the
queries of the other half are measured with it over the whole gallery (`training/halves.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipvisionalign.adaptation.galleries import Gallery
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training.cross_fit import combine_halves
from clipvisionalign.training.dev_scores import DevScores, RankingResult
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.halves import DevHalves, GallerySubset
from clipvisionalign.training.pair_weights import PairWeights, get_pair_weights
from clipvisionalign.training.validation import DistributedAligner

#: 0 for the base, 1 for the run (Wortsman et al., arXiv:2109.01903, figure 1, has the same steps).
DEFAULT_ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))

#: The share of the base's rsum on other data that a chosen model keeps at least.
DEFAULT_KEEP = 0.9


@dataclass(frozen=True)
class GalleryRanking:
    """How a model ranks one gallery.

    Attributes:
        rankings: by the pair weights that all of dev chooses, then by those of each of its halves, over the whole
            gallery.
        rsums: of the whole gallery, then of each half as a gallery of its own: what a choice looks at.
    """

    rankings: tuple[RankingResult, ...]
    rsums: tuple[float, ...]


@dataclass(frozen=True)
class AlphaPoint:
    """One model of the curve.

    Attributes:
        alpha: 0 for the base, 1 for the run.
        weights: of the late score and the fusion, chosen by all of dev, then by each half.
        galleries: how it ranks the run's own gallery, then the foreign ones.
    """

    alpha: float
    weights: tuple[PairWeights, ...]
    galleries: tuple[GalleryRanking, ...]


def measure_point(
    alpha: float, aligner: Aligner, galleries: Sequence[Gallery], distributed: Distributed,
    weights: Sequence[PairWeights] | None = None, candidates: int = 0,
) -> AlphaPoint:  # fmt: skip
    """Measure one model on all galleries, each encoded once.

    Args:
        alpha: where it is between base and run.
        aligner: the model.
        galleries: the run's own, then foreign ones.
        distributed: this process.
        weights: of a pair's parts; None chooses them on the own gallery and on each half of it.
        candidates: how many are re-ranked by a model with a fusion.

    Returns:
        The model's point of the curve.
    """
    chosen = None if weights is None else tuple(weights)
    rankings = []
    own_halves = galleries[0].halves
    for gallery in galleries:
        scores = DevScores(DistributedAligner(aligner, distributed), gallery.part, candidates)
        whole = scores.full_gallery()
        if chosen is None:
            parts = [whole, *(own_halves.parts if own_halves else ())]
            chosen = tuple(scores.choose(part) for part in parts)
        rankings.append(_rank_gallery(scores, whole, gallery.halves, chosen))
    assert chosen is not None
    return AlphaPoint(alpha, chosen, tuple(rankings))


def _rank_gallery(
    scores: DevScores, whole: GallerySubset, halves: DevHalves | None, chosen: tuple[PairWeights, ...]
) -> GalleryRanking:
    # A gallery that cannot be halved is looked at whole by both halves of the run's own.
    parts = [whole, *(halves.parts if halves else (whole, whole))][: len(chosen)]
    by_weights = {weights: scores.rank(weights) for weights in dict.fromkeys(chosen)}
    rsums = tuple(scores.rsum_of_part(part, weights) for part, weights in zip(parts, chosen, strict=True))
    return GalleryRanking(tuple(by_weights[weights] for weights in chosen), rsums)


def measure_as_it_is(
    aligner: Aligner, galleries: Sequence[Gallery], distributed: Distributed, choices: int, candidates: int = 0
) -> AlphaPoint:
    """Measure a model with the pair weights that it has.

    Args:
        aligner: the model.
        galleries: the run's own, then foreign ones.
        distributed: this process.
        choices: how many choices the other points of the curve have.
        candidates: how many are re-ranked by a model with a fusion.

    Returns:
        A point as theirs, the same by each choice; its alpha is 0.
    """
    return measure_point(0.0, aligner, galleries, distributed, [get_pair_weights(aligner)] * choices, candidates)


def choose_alpha(
    alphas: Sequence[float], own: Sequence[float], foreign: Sequence[Sequence[float]], base: Sequence[float],
    keep: float = DEFAULT_KEEP,
) -> int:  # fmt: skip
    """The position of the best alpha: the highest own rsum among those that keep enough of the base's foreign rsum.

    Args:
        alphas: (A,) in ascending order.
        own: (A,) rsum on the run's own data.
        foreign: for each foreign data set (A,) rsum.
        base: for each foreign data set the base's rsum.
        keep: the share of the base's rsum that has to be kept on every foreign data set.

    Returns:
        On a tie the smaller alpha: what shows no gain is not trusted. Where no alpha keeps enough, which can only be
        where the run has parts that the base lacks, the one that keeps most.

    >>> choose_alpha([0, 0.5, 1], [100, 180, 200], [[300, 280, 150]], [300], keep=0.9)
    1
    """
    kept = [min((curve[i] / max(of_base, 1e-9) for curve, of_base in zip(foreign, base, strict=True)), default=1.0)
            for i in range(len(alphas))]  # fmt: skip
    enough = [index for index, share in enumerate(kept) if share >= keep]
    if not enough:
        return max(range(len(alphas)), key=lambda index: (kept[index], -index))
    return max(enough, key=lambda index: (own[index], -index))


def choices_of_curve(curve: Sequence[AlphaPoint], base: AlphaPoint, keep: float) -> list[int]:
    """What all of dev chooses, then each half.

    Args:
        curve: the models, in ascending order of alpha.
        base: the base by itself.
        keep: the share of the base's rsum that has to be kept on every foreign data set.

    Returns:
        Positions in the curve.
    """
    alphas = [point.alpha for point in curve]
    return [
        choose_alpha(
            alphas,
            [point.galleries[0].rsums[which] for point in curve],
            [
                [point.galleries[number].rsums[which] for point in curve]
                for number in range(1, len(base.galleries))
            ],
            [gallery.rsums[which] for gallery in base.galleries[1:]],
            keep,
        )
        for which in range(len(base.weights))
    ]  # fmt: skip


def cross_fitted(points: Sequence[AlphaPoint], number: int, halves: DevHalves | None) -> RankingResult:
    """How what was chosen ranks a gallery: the queries of each half by what the other half chose.

    Args:
        points: chosen by all of dev, then by each half where it has halves.
        number: of the gallery.
        halves: its halves; without, what all of dev chose ranks it.

    Returns:
        The ranks of the whole gallery.
    """
    rankings = [point.galleries[number].rankings[which] for which, point in enumerate(points)]
    if len(rankings) < 3 or halves is None:
        return rankings[0]
    return combine_halves(halves, rankings[1], rankings[2])
