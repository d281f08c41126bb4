"""Selection on dev, and dev figures that are independent of it.

Chosen are the epoch whose weights are the run's model, and what the late score and the fusion's correction count
beside the dual encoder's score. The run's model has what all of dev chooses; that model's own dev figures are in-sample
for it. The figures of a run (results.json, ranks.npz) are cross-fitted (`halves`): the queries of one half, over the
whole gallery, by the epoch and the weights that the other half chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clipvisionalign.retrieval.evaluate import Evaluation, depth_rows
from clipvisionalign.retrieval.metrics import RESAMPLES, metrics_of_ranks, rsum_gain
from clipvisionalign.retrieval.rerank import RerankResult
from clipvisionalign.training.best_epoch import BestEpoch
from clipvisionalign.training.dev_scores import DevScores, RankingResult
from clipvisionalign.training.halves import DevHalves
from clipvisionalign.training.pair_weights import PAIR_WEIGHTS, PairWeights, set_pair_weights


class DevChoice(NamedTuple):
    """What one gallery chooses, and how its model ranks the whole.

    Attributes:
        epoch: Number of the epoch.
        weights: The weights of a pair's parts.
        ranking: The ranks over the whole gallery.
        model_available: Whether its epoch's model is there; else the ranks are of the run's model.
    """

    epoch: int
    weights: PairWeights
    ranking: RankingResult
    model_available: bool = True


def cross_fit(
    scores_of: Callable[[int], DevScores | None], best: Sequence[BestEpoch], halves: DevHalves | None
) -> tuple[DevScores, list[DevChoice]]:
    """Choose by all of dev, then by each half.

    Args:
        scores_of: Gives the model of an epoch on dev; None where it is not there: then the run's model stands for it.
        best: The best epochs by all of dev, then by each half.
        halves: The halves; None where dev cannot be halved.

    Returns:
        The run's model, with the weights that all of dev chooses, and the choices: that of all of dev first.
    """
    shipped = scores_of(best[0].epoch)
    assert shipped is not None
    weights = shipped.choose(shipped.full_gallery())
    choices = [DevChoice(best[0].epoch, weights, shipped.rank(weights))]
    for half, part in enumerate(halves.parts if halves else ()):
        epoch = best[1 + half].epoch if len(best) > 1 + half else 0
        own_scores = shipped if epoch == best[0].epoch else scores_of(epoch)
        scores = own_scores or shipped
        weights = scores.choose(part)
        same = scores is shipped and weights == choices[0].weights
        choices.append(
            DevChoice(epoch, weights, choices[0].ranking if same else scores.rank(weights), own_scores is not None)
        )
    set_pair_weights(shipped.model.aligner, choices[0].weights)
    return shipped, choices


def combine_halves(halves: DevHalves, chosen_by_0: RankingResult, chosen_by_1: RankingResult) -> RankingResult:
    """Cross-fitted ranks at every depth.

    Args:
        halves: The halves of dev.
        chosen_by_0: The ranks of what half 0 chose.
        chosen_by_1: The ranks of what half 1 chose.

    Returns:
        The ranks of each half's queries by what the other half chose.

    Raises:
        ValueError: The two have other numbers of depths.
    """
    dual = None
    if chosen_by_0.dual is not None and chosen_by_1.dual is not None:
        dual = halves.combine(chosen_by_0.dual, chosen_by_1.dual)
    depths = [
        RerankResult(a.candidates, halves.combine(a.ranks, b.ranks), a.scored_pairs, a.seconds)
        for a, b in zip(chosen_by_0.depths, chosen_by_1.depths, strict=True)
    ]
    return RankingResult(halves.combine(chosen_by_0.ranks, chosen_by_1.ranks), dual, depths)


def make_evaluation(scores: DevScores, ranking: RankingResult, resamples: int = RESAMPLES) -> Evaluation:
    """The figures of ranks; a re-ranking's gain is paired, from the same ranks.

    Args:
        scores: The model on the gallery.
        ranking: The ranks over the whole gallery.
        resamples: Of the bootstrap, for the intervals; 0 for none.

    Returns:
        The figures.
    """
    owners, unit = scores.positives.caption_image, scores.positives.identity
    metrics = metrics_of_ranks(ranking.ranks, owners, resamples, unit=unit)
    if ranking.dual is None:
        return Evaluation(metrics, equal_captions=scores.equal_captions)
    return Evaluation(
        metrics,
        metrics_of_ranks(ranking.dual, owners, resamples, unit=unit),
        scores.candidates,
        rsum_gain(ranking.ranks, ranking.dual, owners, resamples, unit=unit),
        depth_rows(scores.with_timings(ranking.depths), owners),
        scores.equal_captions,
    )


def choices_to_dict(
    choices: Sequence[DevChoice],
    scores: DevScores,
    halves: DevHalves | None,
    best_by: str,
    with_init: str | None = None,
    trained_on: str | None = None,
    selected: str = "epoch and weights",
) -> dict[str, Any]:
    """The block "chosen" of results.json: what was chosen where, and the run's model on the dev that chose it.

    Args:
        choices: Those of all of dev, then of each half.
        scores: The run's model on dev.
        halves: The halves; None where dev cannot be halved.
        best_by: What the epoch was chosen by.
        with_init: What `init_selection_note` gives.
        trained_on: That a run that it starts from was trained on these images; None where it was not.
        selected: What each half selected.

    Returns:
        Values that JSON can hold.
    """
    result: dict[str, Any] = {"by": "halves" if halves else "all of dev", "epoch_by": best_by}
    result["figures"] = (
        f"cross-fitted: each half's queries by the {selected} that the other half chose"
        if halves else "in-sample: dev is too small to be halved, what was chosen on it is measured on it"
    )  # fmt: skip
    if with_init:
        result["with_init"] = with_init
        result["figures"] += f"; but {with_init}"
    if trained_on:
        result["init_trained_on"] = trained_on
        result["figures"] += f"; but {trained_on}"
    if halves:
        result["halves"] = halves.to_dict()
    result["epoch"] = {"model": choices[0].epoch, "halves": [each.epoch for each in choices[1:]]}
    if scores.late is not None:
        kinds = ("late", "fusion") if scores.fusion is not None else ("late",)
        result["weights"] = {
            kind: {
                "model": getattr(choices[0].weights, kind),
                "halves": [getattr(c.weights, kind) for c in choices[1:]],
            }
            for kind in kinds
        }
        result["weights_tried"] = list(PAIR_WEIGHTS)
    missing = [number for number, each in enumerate(choices[1:]) if not each.model_available]
    if missing:
        result["in_sample_epoch"] = {"of_halves": missing, "why": "the model that they chose was not kept"}
        which = " and ".join(map(str, missing))
        result["figures"] += (
            f"; but the epoch of half {which} is all of dev's, since the model that it chose was not kept: "
        )
        result["figures"] += "in-sample as far as that goes"
    result["model_in_sample"] = make_evaluation(scores, choices[0].ranking).to_dict()
    return result
