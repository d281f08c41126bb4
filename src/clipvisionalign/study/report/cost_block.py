"""The block "cost" of report.json: what each variant costs to train and to search with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.study.aggregate import TrialResult
from clipvisionalign.study.config import Plan, trial_folder
from clipvisionalign.study.documents import (
    CostDocument,
    TrainingQuantity,
)
from clipvisionalign.study.frontier import query_milliseconds


def pairs_per_query(name: str, trial_results: Sequence[TrialResult], eval_data: CaptionedImages) -> int:
    """The number of pairs that a query scores: the whole gallery, or the candidates that are re-ranked.

    Args:
        name: The variant.
        trial_results: The finished trials.
        eval_data: The split that was measured.

    Returns:
        The number of images that one caption is scored with.
    """
    return next(
        (result.measurements.get("candidates", 0) for result in trial_results if result.variant == name), 0
    ) or len(eval_data)


def cost_block(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult], eval_data: CaptionedImages,
    costs: Mapping[str, CostDocument], steps: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The block "cost" of a report: each variant's measurement, with its training and the time of a query.

    Args:
        plan: The plan of the study.
        study: Its folder.
        trial_results: The finished trials.
        eval_data: The split that was measured.
        costs: Time and memory of each variant, as measured.
        steps: The training steps of each variant, see `training_totals`.

    Returns:
        By variant: what was measured, "training_seconds", "training_steps", "trained_under" and "ms_per_query"
        (milliseconds, over all rounds and in each).
    """
    trained_under = _training_conditions(plan, study, trial_results)
    seconds = training_totals(plan, study, trial_results, "training_seconds")
    return {
        name: {
            **cost,
            "training_seconds": seconds.get(name),
            "training_steps": steps.get(name),
            "trained_under": trained_under.get(name, []),
            **_query_cost(cost, pairs_per_query(name, trial_results, eval_data)),
        }
        for name, cost in costs.items()
    }


def _query_cost(cost: CostDocument, pairs: int) -> dict[str, Any]:
    """ "ms_per_query", one caption encoded and scored with so many images, and the same in each of the rounds."""

    def query_ms(caption: float, thousand: float) -> float:
        return round(caption + thousand * pairs / 1000, 4)

    rounds: list[Any] = [
        {**each, "ms_per_query": query_ms(each["caption_latency_ms"], each["ms_per_1000_pairs"])}
        if {"caption_latency_ms", "ms_per_1000_pairs"} <= set(each) else each
        for each in cost.get("rounds", [])
    ]  # fmt: skip
    caption_and_pairs = cost["caption_latency_ms"]["p50"], cost["ms_per_1000_pairs"]["median"]
    return {"ms_per_query": query_ms(*caption_and_pairs), "rounds": rounds}


def frontier_block(
    trial_results: Sequence[TrialResult], costs: Mapping[str, CostDocument]
) -> dict[str, dict[str, Any]]:
    """The block "frontier" of a report: what re-ranking some hits of a search finds, and the time that it takes.

    Args:
        trial_results: The finished trials.
        costs: Time and memory of each variant, as measured.

    Returns:
        By variant what its first such trial has, with "seed", and "ms_per_query" where time was measured.
    """
    block: dict[str, dict[str, Any]] = {}
    for result in trial_results:
        frontier, cost = result.measurements.get("frontier"), costs.get(result.variant)
        if frontier is None or result.variant in block:
            continue
        if cost is not None:
            frontier = query_milliseconds(
                frontier, cost["caption_latency_ms"]["p50"], cost["ms_per_1000_pairs"]["median"]
            )
        block[result.variant] = {"seed": result.seed} | frontier
    return block


def base_total(
    plan: Plan, study: Path, result: TrialResult, trial_results: Sequence[TrialResult], quantity: TrainingQuantity
) -> float:
    """The seconds or steps of all trainings that a trial stands on, one base after another.

    Args:
        plan: The plan of the study.
        study: Its folder, in which bases that are not among the finished trials are looked up.
        result: The trial, whose own training is not counted.
        trial_results: The finished trials.
        quantity: "training_seconds" or "steps".

    Returns:
        The sum; 0 for a trial without a base.
    """
    own_totals = {(each.variant, each.seed): float(each.measurements[quantity]) for each in trial_results}
    total, base = 0.0, plan.variants[result.variant].base
    while base:
        results = trial_folder(study, base, result.seed) / "results.json"
        if (base, result.seed) in own_totals:
            total += own_totals[base, result.seed]
        elif results.is_file():
            total += float(json.loads(results.read_text())[quantity])
        base = plan.variants[base].base
    return total


def training_totals(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult], quantity: TrainingQuantity
) -> dict[str, dict[str, Any]]:
    """The seconds or steps of each variant's training, those of its bases included.

    Args:
        plan: The plan of the study.
        study: Its folder.
        trial_results: The finished trials.
        quantity: "training_seconds" or "steps".

    Returns:
        By variant: "mean" over its seeds, and "each" of them.
    """
    totals: dict[str, list[float]] = {}
    for result in trial_results:
        total = float(result.measurements[quantity]) + base_total(plan, study, result, trial_results, quantity)
        totals.setdefault(result.variant, []).append(round(total, 1))
    return {name: {"mean": round(float(np.mean(each)), 1), "each": each} for name, each in totals.items()}


def _training_conditions(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult]
) -> dict[str, list[dict[str, Any]]]:
    """The conditions that each variant's runs, and those that they stand on, were begun under, each once."""
    conditions: dict[str, list[dict[str, Any]]] = {}
    for result in trial_results:
        variant_conditions = conditions.setdefault(result.variant, [])
        name = result.variant
        while name:
            under = _start_conditions(trial_folder(study, name, result.seed) / "environment.json")
            if under and under not in variant_conditions:
                variant_conditions.append(under)
            name = plan.variants[name].base
    return conditions


def _start_conditions(environment: Path) -> dict[str, Any]:
    """A run's machine and versions; none where its file has none, or cannot be read."""
    try:
        content = json.loads(environment.read_text(encoding="utf-8"))
        return {**content["machine"], **content["versions"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
