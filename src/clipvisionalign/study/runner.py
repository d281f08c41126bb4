"""Carries out a plan: trains every trial, measures all alike, and writes the report.

What is finished is never done again: a study that was stopped resumes when its command is given
again. A cell that fails is recorded with its reason, and the rest continues; the next call tries it again.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.allocator import reused_memory
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.files import atomic_write
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.study.added_seeds import with_next_seed
from clipvisionalign.study.assemble import assemble_report
from clipvisionalign.study.budget import recorded_steps, save_steps, steps_by_variant
from clipvisionalign.study.config import Plan, Trial, data_source, trials_of
from clipvisionalign.study.data import (
    StudyContext,
    check_possible,
    minimal_pairs_of,
    open_study_data,
    remove_scenes_if_refused,
    split_overlap,
)
from clipvisionalign.study.folder import PLAN_FILE, SCENES_FOLDER, report_held, study_held
from clipvisionalign.study.gaps import Gaps, measurements_hash
from clipvisionalign.study.kept_report import merge_with_earlier, read_earlier_report, replace_report
from clipvisionalign.study.plan_file import plan_text, read_kept_plan
from clipvisionalign.study.power import power_of_plan
from clipvisionalign.study.prepare import in_recorded_layout, prepare_plan
from clipvisionalign.study.report.build import TO_WRITE, add_gaps, check_installed, read_report
from clipvisionalign.study.seal import check_sealed_split, refuse_to_open, seal_block, seal_study
from clipvisionalign.study.startable import refuse_unstartable
from clipvisionalign.study.time_estimate import estimate_seconds, steps_in_time, time_variants
from clipvisionalign.study.tower_commits import pin_tower_commits
from clipvisionalign.study.trial_checks import refuse_changed_data, refuse_other_settings
from clipvisionalign.study.trials import measure_trials, train_trials

logger = logging.getLogger(__name__)

#: The part of a report that a caller adds.
ADDED_PART = "what is added to the report"


@reused_memory()
def run_study(
    plan: Plan,
    out: str | Path,
    *,
    extend_report: Callable[[dict[str, Any]], None] | None = None,
    sealed: bool = False,
    like: str = "",
) -> dict[str, Any]:
    """Carry out a plan.

    Args:
        plan: The plan.
        out: The study's folder; what is finished there is kept.
        extend_report: Adds to the report before it is written.
        sealed: Whether the plan is sealed before its first training; a study that is sealed stays so.
        like: A study by whose spread it is logged what this one can show; "" for its own, or a published one.

    Returns:
        What its report.json holds.

    Raises:
        ValueError: The plan cannot be carried out.
        DataError: The data cannot be used.
        FileExistsError: Runs with other settings stand in the way.
        Held: Another process carries out the study.
    """
    study = Path(out)
    # Before anything is trained.
    check_installed((*TO_WRITE, "nltk", "scipy"))
    plan = prepare_plan(plan, study)
    if sealed:
        check_sealed_split(plan)
    with study_held(study):
        refuse_unstartable(plan, trials_of(plan, study))
        return _carry_out(plan, study, extend_report, sealed, like)


def _carry_out(
    plan: Plan, study: Path, extend_report: Callable[[dict[str, Any]], None] | None, sealed: bool, like: str
) -> dict[str, Any]:
    """The report of a study that this process holds."""
    start = time.perf_counter()
    with remove_scenes_if_refused(study):
        data = open_study_data(plan, study, study / SCENES_FOLDER)
        eval_data = data.split(plan.split)
        context = StudyContext(plan, study, data, eval_data, minimal_pairs_of(plan, eval_data), split_overlap(data))
        check_possible(context)
        refuse_changed_data(trials_of(plan, study))
        _log_power(plan, study, eval_data, like)
        steps = steps_by_variant(plan, trials_of(plan, study), study, eval_data)
        trials = pin_tower_commits(trials_of(plan, study, steps), study)
        # From here on it is this plan's study.
        study.mkdir(parents=True, exist_ok=True)
        sealed = seal_study(plan, study, data, trials, sealed)
        save_steps(plan, study, steps)
        _write_plan(plan, study)
    gaps = Gaps(study)
    # What frozen towers give of an image or a caption is the same in all trials.
    tower_caches: dict[str, TowerOutputCache] = {}
    trained: list[Trial] = []
    to_train = trials
    while True:
        trained += train_trials(to_train, gaps, tower_caches=tower_caches)
        if sealed:
            refuse_to_open(study, trials, gaps)
        logger.info("--- figures, audits, minimal pairs ---")
        measured = measure_trials(context, trained, gaps, tower_caches=tower_caches)
        more = with_next_seed(plan, measured, eval_data)
        if more is None:
            break
        plan, context = more, replace(context, plan=more)
        trials = pin_tower_commits(trials_of(plan, study, steps), study)
        to_train = [trial for trial in trials if trial.seed == plan.seeds[-1]]
        _write_plan(plan, study)
    report = assemble_report(context, trials, measured, gaps)
    if extend_report is not None:
        gaps.try_part(ADDED_PART, extend_report, report)
        add_gaps(report, gaps)
    with report_held(study, waits=True):
        replace_report(study, report)
    logger.info(f"{study}: report.html, report.json, figures/, tables/ ({(time.perf_counter() - start) / 60:.1f} min)")
    return report


def _write_plan(plan: Plan, study: Path) -> None:
    with atomic_write(study / PLAN_FILE) as aside:
        aside.write_text(plan_text(plan), encoding="utf-8")


def _log_power(plan: Plan, study: Path, eval_data: CaptionedImages, like: str) -> None:
    for line in power_of_plan(plan, study, eval_data, like):
        logger.info(line)


def read_study_report(out: str | Path) -> dict[str, Any]:
    """The report of a study's folder as far as the study has come: nothing is trained or measured for it.

    Args:
        out: The study's folder.

    Returns:
        The report.json that is there, where it was made from all that is measured; else a new one from the trials'
        figures, with what is missing shown as such.

    Raises:
        ValueError: There is neither a report nor a study with its data.
    """
    study = Path(out)
    if not study.is_dir() or not (study / PLAN_FILE).is_file():
        return read_report(study)
    before = read_earlier_report(study)
    # One that names no measurements is an earlier version's, or a published one, which has none beside it.
    if before is not None and before.get("made_from", "") == measurements_hash(study):
        # A look at a sealed split changes no measurement.
        return {**before, "seal": seal} if (seal := seal_block(study)) else before
    gaps = Gaps(study)
    try:
        context, trials = open_kept_study(study, gaps)
    except DataNotThereError as error:
        if before is None:
            raise
        logger.info(f"{error}; the report is as it was made before")
        return before
    logger.info(f"{study}: the report is made from what has been measured so far")
    report = assemble_report(context, trials, measure_trials(context, trials, gaps), gaps)
    return merge_with_earlier(study, before, report, gaps)


class DataNotThereError(ValueError):
    """The data set of a study's figures is not where it was."""


def open_kept_study(study: Path, gaps: Gaps | None = None) -> tuple[StudyContext, list[Trial]]:
    """A study as far as it has come, to read what was measured; nothing is measured.

    Args:
        study: The study's folder.
        gaps: Takes minimal pairs that cannot be made; None for none.

    Returns:
        What its trials are measured on, and the trials.

    Raises:
        DataNotThereError: Its data set is not there.
        ValueError: The plan or the data cannot be read.
    """
    plan = in_recorded_layout(read_kept_plan(study / PLAN_FILE), study)
    source = Path(data_source(plan, study))
    if not source.exists():
        raise DataNotThereError(f"{study}: its figures are of the data set {source}, which is not there: put it back")
    data = open_study_data(plan, study, study / SCENES_FOLDER)
    eval_data = data.split(plan.split)
    pairs = (gaps or Gaps(study)).try_part("minimal pairs", minimal_pairs_of, plan, eval_data) or {}
    return StudyContext(plan, study, data, eval_data, pairs, split_overlap(data), True), trials_of(plan, study)


def estimate_study_time(plan: Plan, out: str | Path, *, like: str = "") -> dict[str, float]:
    """How long a study will take, in seconds by what they go into, from a few steps of each variant.

    Nothing is written; what `run_study` would refuse is refused.

    Args:
        plan: The plan.
        out: The study's folder.
        like: As in `run_study`.

    Returns:
        Seconds by what they go into.
    """
    study = Path(out)
    plan = prepare_plan(plan, study)
    refuse_unstartable(plan, trials_of(plan, study))
    with tempfile.TemporaryDirectory() as folder:
        scenes_folder = study / SCENES_FOLDER if (study / SCENES_FOLDER).exists() else Path(folder) / SCENES_FOLDER
        data = open_study_data(plan, study, scenes_folder)
        eval_data = data.split(plan.split)
        check_possible(
            StudyContext(plan, study, data, eval_data, minimal_pairs_of(plan, eval_data), split_overlap(data))
        )
        trials = trials_of(plan, study)
        refuse_changed_data(trials)
        _log_power(plan, study, eval_data, like)
        known_steps = recorded_steps(plan, trials, study)
        for trial in trials_of(plan, study, known_steps):
            if plan.budget.same == "pictures" or trial.variant in known_steps:
                refuse_other_settings(trial)
        source = plan.data or str(scenes_folder)
        timings = time_variants(
            [replace(trial, config=replace(trial.config, data=source)) for trial in trials], eval_data
        )
    if plan.budget.same == "seconds":
        steps = {
            name: known_steps.get(name) or steps_in_time(plan.budget.seconds, each) for name, each in timings.items()
        }
        trials = trials_of(plan, study, steps)
    return estimate_seconds(plan, trials, timings, data.split_sizes()["train"], eval_data)
