"""A budget of seconds: the number of steps of each variant, measured once and kept."""

from __future__ import annotations

import logging
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.study.config import Plan, Trial, trials_of
from clipvisionalign.study.folder import BUDGET_FILE
from clipvisionalign.study.time_estimate import StepTiming, steps_in_time, time_variants
from clipvisionalign.study.trial_checks import settings_hash

logger = logging.getLogger(__name__)


def steps_by_variant(plan: Plan, trials: list[Trial], study: Path, eval_data: CaptionedImages) -> dict[str, int]:
    """The number of steps that each variant's seconds pay for; measured once, and kept.

    Args:
        plan: The plan.
        trials: Its trials.
        study: The study's folder.
        eval_data: The data set by which a step is timed.

    Returns:
        Steps by variant; empty for a budget of images.

    Raises:
        FileExistsError: Runs are there that were given other seconds, or none.
    """
    steps = recorded_steps(plan, trials, study)
    unknown = [trial for trial in trials if trial.variant not in steps and trial.config.epochs]
    if plan.budget.same == "pictures" or not unknown:
        return steps
    logger.info("--- how many steps the budget pays for ---")
    timings: dict[str, StepTiming] = time_variants(unknown, eval_data)
    return steps | {name: steps_in_time(plan.budget.seconds, each) for name, each in timings.items()}


def recorded_steps(plan: Plan, trials: list[Trial], study: Path) -> dict[str, int]:
    """The steps that are kept of variants with these settings.

    Args:
        plan: The plan.
        trials: Its trials.
        study: The study's folder.

    Returns:
        Steps by variant; empty for a budget of images.

    Raises:
        FileExistsError: Runs are there that were given other seconds, or none.
    """
    if plan.budget.same == "pictures":
        return {}
    path = study / BUDGET_FILE
    saved = read_json(path) if path.is_file() else {"steps": {}}
    # Those of an earlier version do not record what they are of.
    saved_settings, same = saved.get("settings", {}), saved.get("seconds") == plan.budget.seconds
    steps: dict[str, int] = {}
    for trial in trials:
        name = trial.variant
        if not trial.config.epochs:
            # A model as it is takes no time.
            continue
        if same and name in saved["steps"] and saved_settings.get(name) in (None, settings_hash(trial)):
            steps[name] = saved["steps"][name]
        elif (trial.folder / "config.yaml").is_file():
            saved_text = f"{saved['seconds']:g} seconds" if not same and "seconds" in saved else "another budget"
            requested_text = f"{plan.budget.seconds:g} seconds"
            message = f"was trained with {saved_text} or other settings, and {requested_text} are asked for"
            raise FileExistsError(f"{trial.folder}: {message}; give another --out, or remove it")
    return steps


def save_steps(plan: Plan, study: Path, steps: dict[str, int]) -> None:
    """Keep the steps of variants, beside those of variants that another call left out.

    Args:
        plan: The plan.
        study: The study's folder.
        steps: Steps by variant; nothing is written for none.
    """
    if not steps:
        return
    path = study / BUDGET_FILE
    saved = read_json(path) if path.is_file() else {}
    before = saved if saved.get("seconds") == plan.budget.seconds else {}
    settings_by_variant = {trial.variant: settings_hash(trial) for trial in trials_of(plan, study)}
    content = {
        "seconds": plan.budget.seconds,
        "steps": before.get("steps", {}) | steps,
        "settings": before.get("settings", {}) | settings_by_variant,
    }
    if content != saved:
        write_json(path, content)
