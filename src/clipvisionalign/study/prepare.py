"""A plan as it is carried out in a folder, and the refusal of one that does not fit what the folder holds."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clipvisionalign.data.run_data import is_data_of_run, recognised
from clipvisionalign.data.sealed_split import SEAL_FILE
from clipvisionalign.files import PARTIAL_SUFFIX
from clipvisionalign.study.added_seeds import with_begun_seeds
from clipvisionalign.study.config import Drawing, Plan, trial_folder
from clipvisionalign.study.folder import BUDGET_FILE, LOCK, PLAN_FILE, SCENES_FOLDER
from clipvisionalign.study.kept_report import trials_with_results
from clipvisionalign.study.plan_checks import check_plan
from clipvisionalign.study.plan_file import read_kept_plan
from clipvisionalign.study.report.build import read_report
from clipvisionalign.study.tower_commits import PINNED_TOWERS_FILE
from clipvisionalign.study.trial_checks import recorded_layout
from clipvisionalign.study.zero_shot import add_zero_shot

logger = logging.getLogger(__name__)


def prepare_plan(plan: Plan, study: Path) -> Plan:
    """The plan as it is carried out.

    Args:
        plan: As it was read.
        study: The study's folder.

    Returns:
        The plan with what the folder records.

    Raises:
        PlanError: It cannot be carried out.
        FileExistsError: The folder holds something that is no study.
    """
    if plan.data and plan.scenes:
        logger.info(f"no effect of 'scenes' and 'drawing': the data set is {plan.data}")
        plan = replace(plan, scenes=0, drawing=Drawing())
    plan = with_begun_seeds(add_zero_shot(plan), study)
    check_plan(plan)
    # What a call has left that was stopped before its plan was kept.
    leftover_names = {
        f"{name}{suffix}"
        for name in (SCENES_FOLDER, PLAN_FILE, BUDGET_FILE, PINNED_TOWERS_FILE, LOCK, SEAL_FILE)
        for suffix in ("", PARTIAL_SUFFIX)
    }
    is_study = not study.exists() or (study / PLAN_FILE).is_file()
    if not is_study and (not study.is_dir() or {path.name for path in study.iterdir()} - leftover_names):
        raise FileExistsError(f"{study}: is there already and no study; give another --out")
    _refuse_leaving_out(plan, study)
    _refuse_other_split(plan, study)
    if plan.budget.same == "seconds" and (idle := _ignored_settings(plan)):
        logger.info(f"no effect of {', '.join(idle)}: every variant trains for {plan.budget.seconds:g} seconds")
    return in_recorded_layout(plan, study)


def in_recorded_layout(plan: Plan, study: Path) -> Plan:
    """A plan that leaves the layout open, with the one that the study's own runs read the data set in, where that is
    taken for another by now: which is reported. Not for a budget of seconds, whose steps are kept by all settings, nor
    where dev is of another data set, which has a layout of its own.

    Args:
        plan: The plan.
        study: The study's folder.

    Returns:
        The plan, with that layout or as it is.
    """
    if plan.layout != "auto" or not plan.data or plan.budget.same == "seconds" or plan.settings.get("dev_data"):
        return plan
    runs = [trial_folder(study, name, seed) for seed in plan.seeds for name in plan.variants]
    recorded = {layout for run in runs if (layout := recorded_layout(run)) and is_data_of_run(run, plan.data)}
    now = recognised(plan.data)
    if len(recorded) != 1 or not now or now in recorded:
        return plan
    (layout,) = recorded
    logger.info(f"{plan.data} is read as '{layout}', as the study's runs were; by itself it is taken for '{now}'")
    return replace(plan, layout=layout)


def _refuse_leaving_out(plan: Plan, study: Path) -> None:
    """Raises FileExistsError where the study's earlier plan, or its report, has cells that this one leaves out, and
    they have been begun: the report would lack them, and the plan that they are of would be lost."""
    begun: list[tuple[str, int]] = []
    shown: list[tuple[str, int]] = []
    # One that is damaged names no cells.
    with suppress(OSError, ValueError):
        kept = read_kept_plan(study / PLAN_FILE)
        cells = [(name, seed) for seed in kept.seeds for name in kept.variants]
        begun = [cell for cell in cells if (trial_folder(study, *cell) / "config.yaml").is_file()]
    # One that is not there, or cannot be read, shows none.
    with suppress(ValueError):
        shown = sorted(trials_with_results(read_report(study)))
    asked = {(name, seed) for name in plan.variants for seed in plan.seeds}
    if left := [cell for cell in dict.fromkeys([*begun, *shown]) if cell not in asked]:
        named = ", ".join(f"{name}-{seed}" for name, seed in left)
        raise FileExistsError(
            f"{study}: this plan leaves out {named}, which the study has; the report would lack them: give the whole "
            f"plan, which is {study / PLAN_FILE}, or another --out, or remove their runs and the report"
        )


def _refuse_other_split(plan: Plan, study: Path) -> None:
    """Raises FileExistsError where the study has a report of another split, which this one would take the place of."""
    with suppress(ValueError):
        report = read_report(study)
        split = report["results"].get("split", plan.split)
        if split != plan.split and trials_with_results(report):
            raise FileExistsError(
                f"{study}: its report is of the split '{split}', and '{plan.split}' is asked for, whose report would "
                f"take its place: give another --out, or remove {study / 'report.json'}"
            )


def _ignored_settings(plan: Plan) -> list[str]:
    """Settings that a budget of seconds takes the place of, by their keys."""
    settings_by_key = {"settings": plan.settings}
    settings_by_key |= {f"variants.{name}.settings": variant.settings for name, variant in plan.variants.items()}
    return [
        f"{key}.{name}" for key, settings in settings_by_key.items() for name in ("epochs", "steps") if name in settings
    ]
