"""What is chosen on dev, and dev figures that did not take part in choosing.

Chosen are the epoch whose weights are the run's model, and what the late score and the fusion's correction count
beside the dual encoder's score. The run's model has what all of dev chooses; that model's own dev figures are in-sample
for it. The figures of a run (results.json, ranks.npz) are cross-fitted (`halves`): the queries of one half, over the
whole gallery, by the epoch and the weights that the other half chooses.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, text_id
from clipvisionalign.data.hashes import changed_keys, dataset_hashes
from clipvisionalign.data.run_data import is_unfinished
from clipvisionalign.files import atomic_write
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.run_files import CONFIG_FILE, IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.retrieval.equal_captions import count_equal_captions
from clipvisionalign.retrieval.evaluate import Evaluation, depth_rows, rerank_depths
from clipvisionalign.retrieval.metrics import RESAMPLES, metrics_of_ranks, rsum_gain
from clipvisionalign.retrieval.ranks import PositiveRanks, ranks_of_scores, ranks_of_vectors
from clipvisionalign.retrieval.rerank import Candidates, RerankResult, rerank_at_depths
from clipvisionalign.training.halves import DevHalves, GallerySubset, positives_of
from clipvisionalign.training.validation import DistributedAligner

#: What the late score and the fusion's correction may count beside the dual encoder's score; 0 leaves them out.
PAIR_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)

#: In the folder of a run that is not finished: models that a half of dev chose, where all of dev chose another.
HALF_MODELS = "half-models"


# --- the epoch -------------------------------------------------------------------------------------------------------


@dataclass
class BestEpoch:
    """The best epoch so far by one gallery (all of dev, or a half), each with its own patience.

    score: more is better. stopped: its patience is at an end; what comes later is not looked at.
    """

    score: float = -math.inf
    epoch: int = 0
    stopped: bool = False

    def update(self, epoch: int, score: float, patience: int, always: bool = False) -> None:
        """Take note of an epoch; on a tie the earlier stays. always: the last epoch is the best, whatever its score."""
        if self.stopped:
            return
        # What is no number is worse than any.
        if always or not self.epoch or score > self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.score, self.epoch = score, epoch
        else:
            self.stopped = epoch - self.epoch >= patience


def save_chosen_models(
    out: Path, save: Callable[[Path], None], epoch: int, saved_epoch: int, best: Sequence[BestEpoch]
) -> None:
    """After an epoch: the run folder holds the model that all of dev chooses, and beside it what only a half does.

    save: writes the model of this epoch into a folder. before: the epoch whose model the run folder holds, 0 for none.
    best: of all of dev, then of each half. What stands in the run folder is set aside before it is replaced, so that a
    run that is cut off anywhere still has, or makes again, what its checkpoint speaks of. Raises OSError.
    """
    chosen = best[0].epoch
    for other in {each.epoch for each in best[1:]} - {chosen}:
        target = half_model_folder(out, other)
        if other == epoch:
            _write_folder(target, save)
        elif other == saved_epoch and not target.is_dir():
            _write_folder(target, lambda folder: _copy_model(out, folder))
    if chosen == epoch:
        save(out)


def prune_models(out: Path, best: Sequence[BestEpoch]) -> None:
    """Remove models that no half chooses any longer."""
    chosen_names = {half_model_folder(out, each.epoch).name for each in best[1:] if each.epoch != best[0].epoch}
    for folder in (out / HALF_MODELS).glob("*"):
        if folder.name not in chosen_names:
            shutil.rmtree(folder)
    if not chosen_names:
        shutil.rmtree(out / HALF_MODELS, ignore_errors=True)


def half_model_folder(out: Path, epoch: int) -> Path:
    """Where the model of an epoch is kept that only a half chooses; `load_aligner` opens it."""
    return out / HALF_MODELS / f"epoch-{epoch:04d}"


def _write_folder(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, sync=False) as folder:
        folder.mkdir()
        write(folder)


def _copy_model(source: Path, target: Path) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        shutil.copy2(source / name, target / name)
    for name in (TEXT_FOLDER, IMAGE_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


# --- the weights of a pair's parts -----------------------------------------------------------------------------------


class PairWeights(NamedTuple):
    """What the late score and the fusion's correction count beside the dual encoder's score."""

    late: float = 0.0
    fusion: float = 0.0


def get_pair_weights(aligner: Aligner) -> PairWeights:
    """What a model has."""
    late, fusion = (0.0 if part is None else float(part.weight) for part in (aligner.late, aligner.fusion))
    return PairWeights(late, fusion)


def set_pair_weights(aligner: Aligner, weights: PairWeights) -> None:
    """Give a model these weights, as far as it has such parts."""
    if aligner.late is not None:
        aligner.late.weight.fill_(weights.late)
    if aligner.fusion is not None:
        aligner.fusion.weight.fill_(weights.fusion)


class RankingResult(NamedTuple):
    """Ranks over the whole gallery: the model's own; for one that re-ranks also its dual encoder's, and by depth."""

    ranks: PositiveRanks
    dual: PositiveRanks | None
    depths: list[RerankResult]


class DevScores:
    """What one model makes of a gallery: every image, caption and pair is computed once, whatever weights are tried.

    candidates: how many are re-ranked, 0 for a model without a fusion.
    """

    def __init__(self, model: DistributedAligner, data: CaptionedImages, candidates: int) -> None:
        self.model, self.late, self.fusion = model, model.aligner.late, model.aligner.fusion
        self.positives = positives_of(data)
        self.equal_captions = count_equal_captions([text_id(caption) for caption in data.captions], self.positives)
        self.candidates = candidates
        #: Pairs that were scored, sorted, and their parts.
        self._scored = np.empty(0, dtype=np.int64), np.empty((0, 3), dtype=np.float32)
        self._timed_results: list[RerankResult] = []
        if self.late is None:
            self.image_vectors = model.encode_images(data.images).numpy()
            self.caption_vectors = model.encode_captions(data.captions).numpy()
            return
        self.scorer = model.pair_scorer(data.images, data.captions)
        self.image_vectors, self.caption_vectors = (
            self.scorer.image_vectors.numpy(),
            self.scorer.caption_vectors.numpy(),
        )
        if self.fusion is None:
            self.late.weight.fill_(1.0)
            self._dual = (self.image_vectors @ self.caption_vectors.T) * model.aligner.scale().item()
            self._late = self.scorer.score_matrix().numpy() - self._dual
        else:
            # Timed with every pair new; the weights are tried on what is known then.
            _, self._timed_results = self._rerank(PairWeights())

    def full_gallery(self) -> GallerySubset:
        """The whole gallery."""
        return GallerySubset.of(np.ones(len(self.image_vectors), dtype=bool), self.positives)

    def choose(self, part: GallerySubset) -> PairWeights:
        """The weights with the best rsum in a part as a gallery of its own, on a tie the smaller: what shows no gain is
        not trusted. A model without a late score has nothing to choose.

        The towers have seen the training captions many times and are surer there than on new pictures, so that the
        weights cannot be learned with them. A re-ranking looks at the same share of a part as of the whole.
        """
        if self.late is None:
            return PairWeights()
        if self.fusion is None:
            block = np.ix_(part.images, part.captions)
            dual, late = self._dual[block], self._late[block]
            grid = [PairWeights(weight) for weight in PAIR_WEIGHTS]

            def ranks(weights: PairWeights) -> PositiveRanks:
                return ranks_of_scores(dual + np.float32(weights.late) * late, part.positives)
        else:
            count = max(1, round(self.candidates * len(part.images) / len(self.image_vectors)))
            candidates = Candidates.of(
                self.image_vectors[part.images], self.caption_vectors[part.captions], part.positives, count
            )
            images, captions = candidates.index
            components = self._pair_components(part.images[images], part.captions[captions])
            grid = [PairWeights(late, fusion) for late in PAIR_WEIGHTS for fusion in PAIR_WEIGHTS]

            def ranks(weights: PairWeights) -> PositiveRanks:
                return candidates.ranks(components @ np.array([1.0, *weights], dtype=np.float32))

        def rsum(weights: PairWeights) -> float:
            return metrics_of_ranks(ranks(weights), part.positives.caption_image, resamples=0).rsum.value

        return max(grid, key=lambda weights: (rsum(weights), -sum(weights)))

    def rank(self, weights: PairWeights) -> RankingResult:
        """The whole gallery by these weights, as `retrieval.evaluate` ranks it."""
        if self.late is None:
            return RankingResult(
                ranks_of_vectors(self.image_vectors, self.caption_vectors, self.positives, self.model.worker_shard),
                None,
                [],
            )
        set_pair_weights(self.model.aligner, weights)
        if self.fusion is None:
            return RankingResult(ranks_of_scores(self.scorer.score_matrix(), self.positives), None, [])
        dual_ranks, results = self._rerank(weights)
        return RankingResult(results[-1].ranks, dual_ranks, results)

    def with_timings(self, depths: Sequence[RerankResult]) -> list[RerankResult]:
        """Depths with the pairs and seconds that they took when no pair was known."""
        return [
            RerankResult(d.candidates, d.ranks, t.scored_pairs, t.seconds)
            for d, t in zip(depths, self._timed_results, strict=True)
        ]

    def _rerank(self, weights: PairWeights) -> tuple[PositiveRanks, list[RerankResult]]:
        counts = np.array([1.0, *weights], dtype=np.float32)
        depths = rerank_depths(self.candidates)
        return rerank_at_depths(
            self.image_vectors,
            self.caption_vectors,
            self.positives,
            lambda i, c: self._pair_components(i, c) @ counts,
            depths,
        )

    def _pair_components(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """The parts of pairs' scores (Q, 3), each pair computed once."""
        keys = images * len(self.caption_vectors) + captions
        scored_keys, components = self._scored
        new = np.setdiff1d(keys, scored_keys)
        if len(new):
            fresh = self.scorer.components(new // len(self.caption_vectors), new % len(self.caption_vectors))
            order = np.argsort(np.concatenate([scored_keys, new]), kind="stable")
            scored_keys, components = (
                np.concatenate([scored_keys, new])[order],
                np.concatenate([components, fresh])[order],
            )
            self._scored = scored_keys, components
        return components[np.searchsorted(scored_keys, keys)]


# --- the figures -----------------------------------------------------------------------------------------------------


class DevChoice(NamedTuple):
    """What one gallery chooses, and how its model ranks the whole. here: whether its epoch's model is there."""

    epoch: int
    weights: PairWeights
    ranking: RankingResult
    model_available: bool = True


def cross_fit(
    scores_of: Callable[[int], DevScores | None], best: Sequence[BestEpoch], halves: DevHalves | None
) -> tuple[DevScores, list[DevChoice]]:
    """The run's model, and what is chosen by all of dev, then by each half.

    scores_of: the model of an epoch on dev, None where it is not there: then the run's model stands for it.
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
    """Cross-fitted ranks at every depth. first, second: by what half 0 and half 1 chose."""
    dual = None
    if chosen_by_0.dual is not None and chosen_by_1.dual is not None:
        dual = halves.combine(chosen_by_0.dual, chosen_by_1.dual)
    depths = [
        RerankResult(a.candidates, halves.combine(a.ranks, b.ranks), a.scored_pairs, a.seconds)
        for a, b in zip(chosen_by_0.depths, chosen_by_1.depths, strict=True)
    ]
    return RankingResult(halves.combine(chosen_by_0.ranks, chosen_by_1.ranks), dual, depths)


def make_evaluation(scores: DevScores, ranking: RankingResult, resamples: int = RESAMPLES) -> Evaluation:
    """The figures of ranks, with intervals; a re-ranking's gain is paired, from the same ranks."""
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
) -> dict[str, Any]:
    """The block "chosen" of results.json: what was chosen where, and the run's model on the dev that chose it.

    with_init: what `init_selection_note` gives; trained_on: that a run that it starts from was trained on these images.
    """
    result: dict[str, Any] = {"by": "halves" if halves else "all of dev", "epoch_by": best_by}
    result["figures"] = (
        "cross-fitted: each half's queries by the epoch and weights that the other half chose"
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


def nothing_chosen(chosen: dict[str, Any], epochs: int) -> bool:
    """Whether a run's block "chosen" is of a run of which, and of those that it starts from, nothing was chosen on dev.
    epochs: after how many it was measured, 0 where that is not known."""
    return bool(chosen) and _one_epoch(chosen, epochs) and not {"weights", "with_init", "init_trained_on"} & set(chosen)


def _one_epoch(chosen: dict[str, Any], epochs: int) -> bool:
    """Whether there was no choice between epochs: there is one, or the last was taken in any case."""
    return epochs == 1 or chosen.get("epoch_by") == "last epoch"


def _epochs_measured(run: Path) -> int:
    """After how many epochs a run was measured on dev; 0 where that is not known."""
    kept = run / "metrics.jsonl"
    return kept.read_text(encoding="utf-8").count('"dev": {') if kept.is_file() else 0


def in_sample_note(run: Path, data: CaptionedImages) -> str | None:
    """What a figure of a run on these images has to be read with, where they are the dev images that it was chosen by;
    None where nothing was chosen on them."""
    results = run / "results.json"
    differing = changed_dev_parts(run, data)
    if not set(differing) <= {"partners"}:
        return None
    saved_results = json.loads(results.read_text()) if results.is_file() else {}
    chosen = saved_results.get("chosen", {})
    what = "" if chosen and _one_epoch(chosen, _epochs_measured(run)) else "epoch"
    what = " and ".join(filter(None, [what, "weights of its pairs' parts" if "weights" in chosen else ""]))
    if chosen and not what:
        return chosen.get("with_init")
    if not chosen:
        what = (
            "epoch" if is_unfinished(run) else "epoch (and, with a late interaction, the weights of its pairs' parts)"
        )
    message = f"by these images was chosen: the run's {what}; its figure on them is in-sample"
    if chosen.get("by") == "halves" and not differing:
        message += f"; cross-fitted, its rsum is {saved_results['rsum']['value']:.1f} (results.json)"
    return message


def init_selection_note(init: Path, data: CaptionedImages) -> str | None:
    """Why a run that starts from another (`--init`) is not cross-fitted on these dev images: the other one's epoch was
    chosen by all of them, where its halves would have chosen another. None where that is not so."""
    if not set(changed_dev_parts(init, data)) <= {"partners"}:
        return None
    if not (init / "results.json").is_file():
        return f"it starts from {init}, which was not finished: its epoch so far may have been chosen by these images"
    chosen = json.loads((init / "results.json").read_text()).get("chosen", {})
    epochs = chosen.get("epoch", {})
    same = chosen.get("by") == "halves" and set(epochs.get("halves", [])) <= {epochs.get("model")}
    if "with_init" not in chosen and chosen and (same or chosen.get("epoch_by") == "last epoch"):
        return None
    return f"it starts from {init}, whose epoch was chosen by all of these images: in-sample as far as that goes"


def changed_dev_parts(run: Path, data: CaptionedImages) -> list[str]:
    """In what the dev images of a run differ from these: "captions", "partners", "pictures"; all where nothing is
    known."""
    data_file = run / "data.json"
    dev = json.loads(data_file.read_text()).get("dev", {}) if data_file.is_file() else {}
    if "contents" in dev:
        return changed_keys(dev["contents"], dataset_hashes(data))
    # A run from before contents were recorded: pictures by their sizes.
    return [] if dev.get("fingerprint") == data.fingerprint() else ["captions", "partners", "pictures"]
