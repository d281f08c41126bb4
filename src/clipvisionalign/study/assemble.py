"""A report, assembled from the folders of the trials."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from clipvisionalign.data.foils import drawn_together
from clipvisionalign.data.hashes import dataset_hashes, run_hash
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.json_io import write_json
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import progress_step
from clipvisionalign.study.aggregate import TrialResult
from clipvisionalign.study.blind_baseline import blind_accuracy
from clipvisionalign.study.config import Trial
from clipvisionalign.study.cost_rounds import first_trials, measure_cost_rounds
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.flawed_protocols import measure_flawed_protocols
from clipvisionalign.study.gaps import Gaps, NotMeasuredError
from clipvisionalign.study.measurements import read_if_current, why_not_kept
from clipvisionalign.study.report.build import build_report
from clipvisionalign.study.report.examples import build_examples
from clipvisionalign.study.trial import count_truncated_captions

logger = logging.getLogger(__name__)


def assemble_report(
    context: StudyContext, trials: Sequence[Trial], trial_results: Sequence[TrialResult], gaps: Gaps
) -> dict[str, Any]:
    """The report from what the cells' folders hold: what cannot be made is a gap.

    Args:
        context: What the trials are measured on.
        trials: All trials.
        trial_results: Those that have results.
        gaps: Takes what cannot be made.

    Returns:
        The document.
    """
    plan, data, eval_data = context.plan, context.data, context.eval_data
    trial_by_key = {(trial.variant, trial.seed): trial for trial in trials}
    audited = [result for result in trial_results if result.measurements["audit"]["passed"]]
    finished = [trial_by_key[result.variant, result.seed] for result in trial_results]
    audited_trials = [trial_by_key[result.variant, result.seed] for result in audited]
    costs = measure_cost_rounds(context, finished, gaps)
    with progress_step("minimal pairs by words alone"):
        train_captions = with_captions(data.split("train"), "each").captions
        controls = {
            name: gaps.try_part("words alone", blind_accuracy, train_captions, pair_list, target=name) or {}
            for name, pair_list in context.pairs.items()
        }
    flawed_protocols = (
        gaps.try_part("other protocols", _measure_flawed_protocols, context, audited_trials) if audited_trials else None
    )
    with progress_step("examples"):
        examples = (
            gaps.try_part("examples", build_examples, audited_trials, audited, eval_data, plan.measure.examples)
            if audited
            else None
        )
    counted = {
        name: gaps.try_part(
            "captions that are cut", count_truncated_captions, trial.folder, eval_data, plan.split, target=name
        )
        for name, trial in first_trials(finished).items()
    }
    for result in trial_results:
        if not result.measurements["curves"]["step"]:
            gaps.add_missing(
                "learning curve", "its metrics.jsonl holds no epoch", f"{result.variant}, seed {result.seed}"
            )
    truncation = {name: counts for name, counts in counted.items() if counts is not None}
    together = {name: drawn_together(pair_list) for name, pair_list in context.pairs.items()}
    return build_report(
        plan,
        context.study,
        data,
        eval_data,
        trial_results,
        gaps,
        costs,
        controls,
        flawed_protocols,
        examples or {},
        truncation,
        together,
    )


def _measure_flawed_protocols(context: StudyContext, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """What other protocols would have made of the first run that has results; kept, as it costs a short training."""
    if not context.plan.measure.protocol:
        return None
    eval_data = context.eval_data
    path = context.study / "other-protocols.json"
    trial = trials[0]
    train = context.data.split("train")
    inputs = {
        "run": trial.folder.name,
        "model": run_hash(trial.folder),
        **dataset_hashes(eval_data),
        "training data": dataset_hashes(train, read_images=False),
        "split": context.plan.split,
    }
    said: list[str] = []
    content = read_if_current(path, inputs, said.append if context.read_only else logger.info, "other protocols")
    if content is not None:
        return content
    if context.read_only:
        raise NotMeasuredError(why_not_kept(said))
    logger.info("--- what it would have looked like by other protocols ---")
    content = {"asked": inputs, "variant": trial.variant, "seed": trial.seed}
    with progress_step("other protocols"):
        content |= measure_flawed_protocols(load_aligner(trial.folder), train, eval_data)
    write_json(path, content)
    return content
