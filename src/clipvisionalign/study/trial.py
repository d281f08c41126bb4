"""A trial of a study: trained and measured once; finished work is not repeated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

from clipvisionalign.batch import TruncationStats
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.log import leave_out
from clipvisionalign.models.aligner import Aligner, TowerOutputCache
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.device import library_versions
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval.audit import MIN_SAMPLE, AuditReport, audit
from clipvisionalign.retrieval.evaluate import RANKS_FILE, Evaluation, evaluate
from clipvisionalign.retrieval.metrics import RESAMPLES
from clipvisionalign.study.config import Trial
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.documents import CurvesDocument, TrialMeasurements, TruncationDocument
from clipvisionalign.study.foils import HalfWeights, foil_accuracy
from clipvisionalign.study.frontier import measure_frontier
from clipvisionalign.study.gaps import is_begun
from clipvisionalign.study.measurements import (
    MEASUREMENTS_FILE,
    has_ranks,
    load_measurements,
    measurement_inputs,
    study_ranks_file,
)
from clipvisionalign.study.seal import record_measurement
from clipvisionalign.study.trial_checks import refuse_other_base
from clipvisionalign.training.data_checks import check_data_unchanged
from clipvisionalign.training.ineffective_settings import NO_EFFECT
from clipvisionalign.training.results import can_cache_encodings
from clipvisionalign.training.train import resume, train

logger = logging.getLogger(__name__)


def train_trial(trial: Trial, *, tower_caches: dict[str, TowerOutputCache] | None = None) -> None:
    """Train a trial, or resume it where it was stopped; a finished one stays.

    A dev split that changed is measured again (`measure_trial`). What `train` raises is raised as well.

    Args:
        trial: The trial.
        tower_caches: As in `measure_trial`.

    Raises:
        DataError: A finished one was trained on other data than is there now.
        FileExistsError: A finished one stands on another base.
        ValueError: Its settings are refused.
    """
    refuse_other_base(trial, logger.info)
    if (trial.folder / "results.json").is_file():
        try:
            check_data_unchanged(trial.folder, trial.config.dataset, splits=("train",))
        except json.JSONDecodeError as error:
            reason = f"what it was trained on cannot be read ({error}); put back a whole one, or remove {trial.folder}"
            raise ValueError(f"{trial.folder / 'data.json'}: {reason}") from None
        logger.info(f"{trial.folder}: finished already")
    elif is_begun(trial):
        resume(trial.folder, encodings_cache=_tower_cache(trial, tower_caches))
    else:
        # A study's settings are those of all its variants: what has no effect on one is another's.
        with leave_out(lambda record: record.getMessage().startswith(NO_EFFECT)):
            train(trial.config, encodings_cache=_tower_cache(trial, tower_caches))


def _tower_cache(
    trial: Trial, tower_caches: dict[str, TowerOutputCache] | None, purpose: str = ""
) -> TowerOutputCache | None:
    """What is remembered of the cell's towers, if they are frozen; None where each cell may have its own.

    purpose: what is asked, where the batches of something else would change the last digits.
    """
    config, model = trial.config, trial.config.model
    has_random_tower = "random" in (model.image_tower.weights, model.text_tower.weights)
    # Drawn at random, a tower is another one for each seed.
    if tower_caches is None or config.init or has_random_tower:
        return None
    sparse, pairs = model.design == "sparse", model.design in ("late", "cross")
    towers: tuple[Any, ...] = (model.image_tower, model.text_tower, sparse, model.positions)
    if model.pretrained:
        # Patches of its image tower are pooled for designs that score pairs.
        towers += (model.pretrained, pairs)
    return tower_caches.setdefault(repr((*towers, config.device, purpose)), TowerOutputCache())


def measure_trial(
    trial: Trial,
    context: StudyContext,
    *,
    tower_caches: dict[str, TowerOutputCache] | None = None,
) -> TrialMeasurements:
    """Measure all of a trained trial but time and memory: audit, ranks, minimal pairs.

    Args:
        trial: A trained trial.
        context: The data, minimal pairs and settings that it is measured with.
        tower_caches: Outputs of frozen towers in other trials, by their settings; used and added to.

    Returns:
        What is kept in the trial's folder, with its inputs under "asked". Measurements that are current are not
        repeated.
    """
    path, split, eval_data = trial.folder / MEASUREMENTS_FILE, context.plan.split, context.eval_data
    inputs = measurement_inputs(trial, context)
    kept = load_measurements(trial, inputs, logger.info)
    if kept is not None:
        return kept
    record_measurement(context.study, trial.folder.name, inputs["model"])
    train_results = read_json(trial.folder / "results.json", f"remove {trial.folder}, to train it again")
    aligner = load_aligner(trial.folder, trial.config.device)
    aligner.show_progress = True
    # Before anything else is asked, as a model that had been shown positives could give those back; and by the
    # towers each time: that they always give the same is a part of what is checked.
    checks = audit_aligner(aligner, context)
    selection = {name: value for name, value in train_results.get("chosen", {}).items() if name != "model_in_sample"}
    cacheable = can_cache_encodings(trial.config.freezing, eval_data)
    aligner.tower_cache = _tower_cache(trial, tower_caches) if cacheable else None
    metrics: dict[str, Any] = train_results
    evaluation: Evaluation | None = None
    if not _dev_is_measured(trial, context):
        # Not cross-fitted: this is the run's own model.
        selection = selection if split != "dev" else {}
        evaluation = evaluate_aligner(aligner, eval_data)
        metrics = evaluation.to_dict()
    halves = HalfWeights.of(eval_data, selection) if split == "dev" else None
    # In every cell the same batches: those of halves would not be.
    aligner.tower_cache = _tower_cache(trial, tower_caches, "minimal pairs") if cacheable and split != "dev" else None
    # Not asked for: what it takes to find other figures is another model or other data. But reported.
    measured_by = [library_versions()]
    if evaluation is None and (trained_by := _trained_by(trial.folder)) not in measured_by:
        measured_by.append(trained_by)
    measurements: dict[str, Any] = {
        "asked": inputs,
        "measured_by": measured_by,
        **{name: train_results[name] for name in ("training_seconds", "steps", "best_epoch")},
        **{name: metrics[name] for name in ("images", "captions", "candidates", "gain", "depths") if name in metrics},
        "audit": checks.to_dict(),
        "chosen": selection,
        "composition": {name: foil_accuracy(aligner, pairs, halves) for name, pairs in context.pairs.items()},
        **_frontier(trial, context, aligner, halves),
        "curves": read_curves(trial.folder),
    }
    # What is there is of something else, and stays until there is more: but none of it may stand beside new figures,
    # whenever this is cut off.
    path.unlink(missing_ok=True)
    study_ranks_file(trial.folder, split).unlink(missing_ok=True)
    if evaluation is not None:
        evaluation.save_ranks(study_ranks_file(trial.folder, split))
    write_json(path, measurements)
    return cast(TrialMeasurements, measurements)


def audit_aligner(aligner: Aligner, context: StudyContext) -> AuditReport:
    """The audit of a model on what a study's trials are measured on.

    Args:
        aligner: The model.
        context: The data and the plan's number of images.

    Returns:
        The checks.
    """
    data = context.eval_data
    return audit(
        aligner, data.images, data.captions, data.caption_image, data.image_identity, context.overlap,
        max(context.plan.measure.audit_images, MIN_SAMPLE), caption_group=data.shared_text_ids,
    )  # fmt: skip


def _frontier(trial: Trial, context: StudyContext, aligner: Aligner, halves: HalfWeights | None) -> dict[str, Any]:
    """ "frontier" of a variant's first seed, where its design scores pairs."""
    data = context.eval_data
    if aligner.late is None or trial.seed != context.plan.seeds[0] or len(data) < 2:
        return {}
    return {"frontier": measure_frontier(aligner, data, halves)}


def _dev_is_measured(trial: Trial, context: StudyContext) -> bool:
    """Whether the training has measured the split already and kept the ranks: dev, unless it has changed since."""
    return (
        context.plan.split == "dev"
        and has_ranks(trial.folder / RANKS_FILE)
        and _dev_contents(trial.folder) == dataset_hashes(context.eval_data)
    )


def evaluate_aligner(aligner: Aligner, data: CaptionedImages, resamples: int = RESAMPLES) -> Evaluation:
    """Measure a model as a study measures its trials.

    Args:
        aligner: The model.
        data: The gallery.
        resamples: Number of bootstrap resamples; 0 computes no intervals.

    Returns:
        The figures of both directions, and the ranks behind them.
    """
    candidates = aligner.config.fusion.candidates if aligner.fusion is not None else 0
    return evaluate(
        aligner, data.images, data.captions, data.caption_image, data.image_identity, candidates, resamples,
        caption_group=data.shared_text_ids,
    )  # fmt: skip


def _trained_by(folder: Path) -> dict[str, str]:
    """The versions that a run was begun with, by which its dev figures are; none where they were not kept."""
    try:
        return dict(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _dev_contents(folder: Path) -> dict[str, str] | None:
    """The contents of the dev split that a training has measured; None if unknown."""
    try:
        return json.loads((folder / "data.json").read_text(encoding="utf-8"))["dev"].get("contents")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def count_truncated_captions(folder: Path, eval_data: CaptionedImages, split: str) -> TruncationDocument:
    """How many captions a run's `max_tokens` cuts, as its training has counted, and of the split measured.

    Args:
        folder: The run folder.
        eval_data: The split that is measured.
        split: Its name.

    Returns:
        Counts by split.
    """
    data_file = folder / "data.json"
    data_info = json.loads(data_file.read_text()) if data_file.is_file() else {}
    counted = data_info.get("cut_captions", {})
    tokenizer = open_tokenizer(folder)
    splits = {name: counts for name, counts in counted.items() if name != "max_tokens"}
    # A run from before they were counted has none, and dev may have other captions by now.
    if split not in splits or (split == "dev" and data_info["dev"].get("contents") != dataset_hashes(eval_data)):
        splits[split] = TruncationStats.from_tokens(tokenizer.tokenize(eval_data.captions)).to_dict()
    return {"max_tokens": tokenizer.max_tokens, "splits": splits}


def read_curves(folder: Path) -> CurvesDocument:
    """The training's loss, dev loss and dev rsum after each epoch, from metrics.jsonl; none where it cannot be read.

    Args:
        folder: The run folder.

    Returns:
        The figures by name.
    """
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        # Those without a loss are of the model that the run started from.
        ends = [line for line in lines if "dev" in line and "train_loss" in line]
    except (OSError, ValueError, TypeError):
        ends = []
    return {
        "step": [line["step"] for line in ends],
        "loss": [line["train_loss"] for line in ends],
        "rsum": [line["dev"]["rsum"]["value"] for line in ends],
        "dev_loss": [line.get("dev_loss") for line in ends],
    }
