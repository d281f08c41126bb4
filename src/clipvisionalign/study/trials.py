"""Trains and measures all trials of a study; a failed one is recorded, and the others continue."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from clipvisionalign.files import Held
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.progress import progress
from clipvisionalign.study.aggregate import TrialResult, check_gallery
from clipvisionalign.study.config import Trial
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.gaps import (
    FAILED,
    NOT_MEASURED,
    NOT_TRAINED,
    UNFINISHED,
    Gaps,
    error_reason,
    read_failures,
    training_state,
)
from clipvisionalign.study.measurements import load_measurements, load_trial_ranks, measurement_inputs, why_not_kept
from clipvisionalign.study.trial import measure_trial, train_trial

logger = logging.getLogger(__name__)

#: How the reason of a cell begins whose measuring failed, and not its training.
MEASURING_PREFIX = "measuring: "


def measure_trials(
    context: StudyContext,
    trials: Sequence[Trial],
    gaps: Gaps,
    *,
    tower_caches: dict[str, TowerOutputCache] | None = None,
) -> list[TrialResult]:
    """Measure the trials that are trained.

    Args:
        context: What they are measured on.
        trials: All trials.
        gaps: Takes those that are not trained, or cannot be measured.
        tower_caches: Outputs of frozen towers, by tower, to be used and added to; None for none.

    Returns:
        The trials that have results.
    """
    trial_results = []
    for trial in progress(trials, "measuring runs", len(trials), not context.read_only):
        state = training_state(trial)
        try:
            if state is not None:
                gaps.states[trial.variant, trial.seed] = state
                continue
            if context.read_only:
                messages: list[str] = []
                measurements = load_measurements(trial, measurement_inputs(trial, context), messages.append)
                if measurements is None:
                    gaps.states[trial.variant, trial.seed] = _unmeasured_state(trial, messages)
                    continue
            else:
                measurements = measure_trial(trial, context, tower_caches=tower_caches)
            result = TrialResult(trial.variant, trial.seed, measurements, load_trial_ranks(trial, context.plan.split))
            check_gallery(result, context.eval_data)
        except Exception as error:
            reason = f"{MEASURING_PREFIX}{error_reason(error)}"
            logger.info(f"{trial.folder.name}: FAILED: {reason}")
            if context.read_only:
                gaps.states[trial.variant, trial.seed] = (FAILED, reason)
            else:
                gaps.record_failure(trial, reason)
            continue
        trial_results.append(result)
        if not context.read_only:
            gaps.clear_failure(trial)
    return trial_results


def _unmeasured_state(trial: Trial, messages: Sequence[str]) -> tuple[str, str]:
    """State and reason of a trained cell without figures of this data."""
    reason = read_failures(trial.folder.parent.parent).get(trial.folder.name, "")
    # Why a training failed does not apply to a cell that is trained by now.
    if reason.startswith(MEASURING_PREFIX):
        return FAILED, reason
    return NOT_MEASURED, why_not_kept(messages) or "trained, and not measured yet"


def train_trials(trials: list[Trial], gaps: Gaps, *, tower_caches: dict[str, TowerOutputCache]) -> list[Trial]:
    """Train what is not finished.

    Args:
        trials: All trials.
        gaps: Takes those that fail.
        tower_caches: Outputs of frozen towers, by tower, to be used and added to.

    Returns:
        The trials that are trained.
    """
    trained: list[Trial] = []
    held_by_others: set[str] = set()
    start = time.perf_counter()
    number_trained = 0
    for number, trial in enumerate(trials, 1):
        unfinished = [
            unfinished_trial
            for unfinished_trial in trials[number - 1 :]
            if not (unfinished_trial.folder / "results.json").is_file()
        ]
        eta = ""
        if number_trained and unfinished:
            minutes = (time.perf_counter() - start) / number_trained * len(unfinished) / 60
            eta = f", about {minutes:.0f} min of training left"
        logger.info(f"--- {trial.variant}, seed {trial.seed}: cell {number} of {len(trials)}{eta} ---")
        was_finished = (trial.folder / "results.json").is_file()
        base = Path(trial.config.init).name if trial.config.init else ""
        if base in held_by_others:
            held_by_others.add(trial.folder.name)
            gaps.left(trial, NOT_TRAINED, f"it stands on {base}, which another process trains")
        elif base and not (Path(trial.config.init) / "results.json").is_file():
            gaps.record_failure(trial, f"it stands on {base}, which failed")
        else:
            try:
                if not was_finished:
                    gaps.clear_failure(trial)
                train_trial(trial, tower_caches=tower_caches)
                trained.append(trial)
                number_trained += not was_finished
                continue
            except Held as error:
                held_by_others.add(trial.folder.name)
                gaps.left(trial, UNFINISHED, str(error))
            except Exception as error:
                gaps.record_failure(trial, f"{type(error).__name__}: {error}".splitlines()[0])
        state, reason = gaps.states[trial.variant, trial.seed]
        logger.info(f"{trial.folder.name}: {state.upper()}: {reason}; the rest continues")
    return trained
