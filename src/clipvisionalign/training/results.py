"""What results.json of a run holds: cross-fitted figures of the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import REMEMBERED, Remembered
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval.evaluate import RANKS
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.cross_fit import (
    PAIR_WEIGHTS,
    DevScores,
    chosen_dict,
    cross_fitted,
    evaluation_of,
    half_model,
    stitched,
)
from clipvisionalign.training.dev import DevGallery, Shared
from clipvisionalign.training.init_run import InitRun
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.records import Say
from clipvisionalign.training.state import Place


def can_be_remembered(config: RunConfig, data: CaptionedImages) -> bool:
    """Whether what a run's towers give for a data set is the same in every epoch, and little enough to be kept in
    memory."""
    frozen = config.freeze in ("both", "all") and config.peft == "none"
    return frozen and len(data) <= REMEMBERED[0] and len(data.captions) <= REMEMBERED[1]


def measure(
    config: RunConfig, where: Place, dev: DevGallery, out: Path, processes: Processes, say: Say,
    known: Remembered | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What results.json holds: cross-fitted figures of the whole dev gallery, what was chosen, and the run's own model
    on dev. Sets the model's weights of a pair's parts. Shared out over processes. known: as `remembered` in `train`."""

    # What stays the same in every epoch is computed once for the models that dev and its halves choose.
    remembered = (known or Remembered()) if can_be_remembered(config, dev.data) else None

    def scores_of(epoch: int) -> DevScores | None:
        folder = out if epoch == where.best_epoch else half_model(out, epoch)
        if not processes.first_does(folder.is_dir):
            return None
        aligner = processes.each(lambda: load_aligner(folder, str(processes.device)))
        aligner.show_progress, aligner.remembered = processes.first, remembered
        candidates = config.model.fusion.candidates if aligner.fusion is not None else 0
        return DevScores(Shared(aligner, processes), dev.data, candidates)

    halves = dev.halves
    scores, found = cross_fitted(scores_of, where.chosen, halves)
    weights = [chosen.weights for chosen in found]
    by_halves = f", by the halves {' and '.join(f'{each.late:g}' for each in weights[1:])}" if halves else ""
    if scores.late is not None:
        more = f", the fusion's correction {weights[0].fusion:g} times" if scores.fusion is not None else ""
        if more and halves:
            more += f", by the halves {' and '.join(f'{each.fusion:g}' for each in weights[1:])}"
        say(f"the late score counts {weights[0].late:g} times{by_halves}{more}, chosen on dev from {PAIR_WEIGHTS}")
        processes.first_does(lambda: scores.model.aligner.save(out))
    ranked = stitched(halves, found[1].ranked, found[2].ranked) if halves else found[0].ranked
    measured = evaluation_of(scores, ranked)
    processes.first_does(lambda: measured.save_ranks(out / RANKS))
    best_by = "last epoch" if config.freeze == "all" else config.best_by
    about = {"run": str(out), "data": config.data, "split": "dev"}

    def init_run() -> InitRun:
        # A run from before this was recorded finds it out now.
        return InitRun.load(out) or InitRun.of(out, config.init, Path(config.init), dev.data)

    init = processes.first_does(init_run) if config.init else InitRun("", "")
    chosen = chosen_dict(found, scores, halves, best_by, init.chosen_on, init.trained_on)
    return about | measured.to_dict() | {"chosen": chosen}
