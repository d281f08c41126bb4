"""results.json of a run: cross-fitted figures of the saved model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import TOWER_CACHE_LIMITS, TowerOutputCache
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval.evaluate import RANKS_FILE
from clipvisionalign.training.best_epoch import half_model_folder
from clipvisionalign.training.config import FreezingConfig, RunConfig, keeps_last_epoch
from clipvisionalign.training.cross_fit import choices_to_dict, combine_halves, cross_fit, make_evaluation
from clipvisionalign.training.dev_scores import DevScores
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.init_run import InitRun
from clipvisionalign.training.pair_weights import PAIR_WEIGHTS
from clipvisionalign.training.state import TrainProgress
from clipvisionalign.training.validation import DevGallery, DistributedAligner

logger = logging.getLogger(__name__)


def can_cache_encodings(config: FreezingConfig, data: CaptionedImages) -> bool:
    """Whether what a run's towers give for a data set can be kept in memory.

    Args:
        config: What the run trains.
        data: The data set.

    Returns:
        Whether it is the same in every epoch, and little enough.
    """
    frozen = config.freeze in ("both", "all") and config.peft == "none"
    return frozen and len(data) <= TOWER_CACHE_LIMITS[0] and len(data.captions) <= TOWER_CACHE_LIMITS[1]


def evaluate_run(
    config: RunConfig, progress: TrainProgress, dev: DevGallery, out: Path, distributed: Distributed,
    encodings_cache: TowerOutputCache | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What results.json holds: cross-fitted figures of the whole dev gallery, what was chosen, and the run's own model.

    Every process calls this. It sets the model's weights of a pair's parts, and saves them and the ranks in the run
    folder.

    Args:
        config: The settings of the run.
        progress: The best epochs.
        dev: The dev gallery, as it was measured after each epoch.
        out: The run folder.
        distributed: The processes that share the work.
        encodings_cache: As in `train`.

    Returns:
        Values that JSON can hold.
    """

    # What stays the same in every epoch is computed once for the models that dev and its halves choose.
    run_cache = (encodings_cache or TowerOutputCache()) if can_cache_encodings(config.freezing, dev.data) else None

    def scores_of(epoch: int) -> DevScores | None:
        folder = out if epoch == progress.best_epoch else half_model_folder(out, epoch)
        if not distributed.run_on_main(folder.is_dir):
            return None
        aligner = distributed.run_on_all(lambda: load_aligner(folder, str(distributed.device)))
        aligner.show_progress, aligner.tower_cache = distributed.is_main, run_cache
        candidates = config.model.fusion.candidates if aligner.fusion is not None else 0
        return DevScores(DistributedAligner(aligner, distributed), dev.data, candidates)

    halves = dev.halves
    scores, choices = cross_fit(scores_of, progress.chosen, halves)
    weights = [chosen.weights for chosen in choices]
    by_halves = f", by the halves {' and '.join(f'{each.late:g}' for each in weights[1:])}" if halves else ""
    if scores.late is not None:
        more = f", the fusion's correction {weights[0].fusion:g} times" if scores.fusion is not None else ""
        if more and halves:
            more += f", by the halves {' and '.join(f'{each.fusion:g}' for each in weights[1:])}"
        counts = f"{weights[0].late:g} times{by_halves}{more}"
        logger.info(f"the late score counts {counts}, chosen on dev from {PAIR_WEIGHTS}")
        distributed.run_on_main(lambda: scores.model.aligner.save(out))
    ranked = combine_halves(halves, choices[1].ranking, choices[2].ranking) if halves else choices[0].ranking
    evaluation = make_evaluation(scores, ranked)
    distributed.run_on_main(lambda: evaluation.save_ranks(out / RANKS_FILE))
    best_by = "last epoch" if keeps_last_epoch(config) else config.best_by
    header = {"run": str(out), "data": config.data, "split": "dev", **dev.data.texts_entry}

    def init_run() -> InitRun:
        # A run from before this was recorded finds it out now.
        return InitRun.load(out) or InitRun.of(out, config.init, Path(config.init), dev.data)

    init = distributed.run_on_main(init_run) if config.init else InitRun("", "")
    chosen = choices_to_dict(choices, scores, halves, best_by, init.chosen_on, init.trained_on)
    return header | evaluation.to_dict() | {"chosen": chosen}
