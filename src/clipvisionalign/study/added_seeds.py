"""The next seed of a study whose plan adds seeds until an interval is narrow enough (`study.sequential`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.study.aggregate import TrialResult, contributions_table
from clipvisionalign.study.config import Plan
from clipvisionalign.study.folder import PLAN_FILE
from clipvisionalign.study.plan_file import read_kept_plan
from clipvisionalign.study.sequential import NOT_YET, looks_at, stopped_by
from clipvisionalign.study.units import image_units

logger = logging.getLogger(__name__)


def with_begun_seeds(plan: Plan, study: Path) -> Plan:
    """A plan that adds seeds, with those that were added to it in this folder before.

    Args:
        plan: The plan.
        study: The study's folder.

    Returns:
        The plan, with more seeds or as it is.
    """
    if not plan.until.width:
        return plan
    try:
        begun = read_kept_plan(study / PLAN_FILE).seeds
    except (ValueError, OSError):
        return plan
    return replace(plan, seeds=begun) if begun[: len(plan.seeds)] == plan.seeds else plan


def with_next_seed(plan: Plan, measured: Sequence[TrialResult], eval_data: CaptionedImages) -> Plan | None:
    """The plan with one more seed, the same for all variants.

    Args:
        plan: The plan.
        measured: The trials that have results.
        eval_data: The split that was measured.

    Returns:
        The plan; None where the interval is narrow enough, no seed is left, or the last one has no result.
    """
    until, compare = plan.until, plan.compare
    if not until.width:
        return None
    unit = image_units(eval_data)
    tables: dict[str, dict[int, np.ndarray]] = {compare.a: {}, compare.b: {}}
    for result in measured:
        if result.variant in tables and result.measurements["audit"]["passed"]:
            ranks = [result.ranks["ranks"]]
            table = contributions_table(ranks, eval_data.caption_image, compare.figure, unit)
            tables[result.variant][result.seed] = table[0]
    looks = looks_at(tables[compare.a], tables[compare.b], compare.figure)
    if stopped_by(looks, until.width, len(plan.seeds), until.max_seeds) != NOT_YET:
        return None
    if any(plan.seeds[-1] not in table for table in tables.values()):
        logger.info(f"no seed is added: {compare.a} or {compare.b} has no result of seed {plan.seeds[-1]}")
        return None
    width = f"its interval is {looks[-1]['high'] - looks[-1]['low']:.1f} wide" if looks else "it has no interval yet"
    seed = max(plan.seeds) + 1
    logger.info(
        f"--- {compare.a} against {compare.b}: {width}, {until.width:g} are asked for: seed {seed} is added ---"
    )
    return replace(plan, seeds=[*plan.seeds, seed])
