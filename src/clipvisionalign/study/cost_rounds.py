"""Rounds of time and memory of a study's variants, each in a fresh process, kept with their conditions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.data.hashes import dataset_hashes, run_hash
from clipvisionalign.json_io import write_json
from clipvisionalign.progress import progress
from clipvisionalign.study.config import Trial
from clipvisionalign.study.cost import current_conditions, select_same_conditions
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.documents import CostDocument
from clipvisionalign.study.gaps import Gaps, NotMeasuredError, error_reason
from clipvisionalign.study.measurements import read_if_current, why_not_kept
from clipvisionalign.study.profile import combine_rounds, profile_run

logger = logging.getLogger(__name__)


def first_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The first trial of each variant.

    Args:
        trials: The trials in their order.

    Returns:
        By variant.
    """
    trial_by_variant: dict[str, Trial] = {}
    for trial in trials:
        trial_by_variant.setdefault(trial.variant, trial)
    return trial_by_variant


def measure_cost_rounds(context: StudyContext, finished: Sequence[Trial], gaps: Gaps) -> dict[str, CostDocument]:
    """Time and memory of each variant's first finished run, in fresh processes that take turns.

    Of a variant whose process fails the rounds that did not fail count. What was measured on another machine, or with
    other versions, is measured again; where nothing is measured it is taken, and reported.

    Args:
        context: What the trials are measured on.
        finished: The trials that are trained.
        gaps: Takes those that cannot be measured.

    Returns:
        Figures by variant.
    """
    plan, eval_data, folder = context.plan, context.eval_data, context.study / "costs"
    trial_by_variant = first_trials(finished)
    schedule = [(round_number, name) for round_number in range(plan.measure.rounds) for name in trial_by_variant]
    brief = {"brief": plan.measure.brief}
    current = {} if context.read_only else current_conditions()
    contents = {**dataset_hashes(eval_data), **brief}
    inputs = {
        name: {"model": run_hash(trial.folder), **contents, **current} for name, trial in trial_by_variant.items()
    }
    said: dict[tuple[int, str], list[str]] = {round_number: [] for round_number in schedule}
    saved = {
        (round_number, name): read_if_current(
            folder / f"{name}-{round_number}.json", inputs[name],
            said[round_number, name].append if context.read_only else logger.info, f"time and memory of {name}",
        )
        for round_number, name in schedule
    }  # fmt: skip
    if not context.read_only and any(cost is None for cost in saved.values()):
        logger.info("--- time and memory, each in a fresh process ---")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in trial_by_variant}
    reasons: dict[str, list[str]] = {name: [] for name in trial_by_variant}
    for round_number, name in progress(schedule, "time and memory", len(schedule), None in saved.values()):
        cost = saved[round_number, name]
        if cost is None and context.read_only:
            reasons[name].append(error_reason(NotMeasuredError(why_not_kept(said[round_number, name]))))
        elif cost is None:
            try:
                cost = _profile_round(
                    context, trial_by_variant[name], folder / f"{name}-{round_number}.json", inputs[name]
                )
            except Exception as error:
                reasons[name].append(error_reason(error))
        if cost is not None:
            rounds[name].append(cost)
    rounds, omitted_rounds = select_same_conditions(rounds, [*contents, "model"])
    for name, others in omitted_rounds.items():
        reasons[name] += ["measured under other conditions than the rest: left out"] * others
    for name, failed in reasons.items():
        if failed:
            target = f"{name}, {len(failed)} of {plan.measure.rounds} rounds"
            gaps.add_missing("time and memory", "; ".join(dict.fromkeys(failed)), target)
    costs = {
        name: gaps.try_part("time and memory", combine_rounds, variant_rounds, target=name)
        for name, variant_rounds in rounds.items()
        if variant_rounds
    }
    return {name: cost for name, cost in costs.items() if cost is not None}


def _profile_round(context: StudyContext, trial: Trial, path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """One round of a run's time and memory, kept in a file."""
    path.parent.mkdir(exist_ok=True)
    config = trial.config
    cost = profile_run(trial.folder, config.data, context.plan.split, config.layout, context.plan.measure.brief)
    cost = {"asked": inputs, **cost}
    write_json(path, cost)
    return cost
