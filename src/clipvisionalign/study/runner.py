"""A study from its plan to its report: train every cell, measure all alike, write down what was found.

What is finished is never done again: a study that was stopped, however, goes on where it was when its command is given
again. A cell that fails is written down with its reason, and the rest goes on; the next call tries it anew.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.foils import MinimalPair, drawn_together, make_minimal_pairs, read_minimal_pairs
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.hashes import dataset_hashes, run_hash
from clipvisionalign.data.run_data import is_data_of_run, recognised
from clipvisionalign.data.scenes import is_scene_dataset, random_scenes, read_scenes, write_scenes
from clipvisionalign.data.split_file import split_file_path, write_splits_command
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.files import PARTIAL_SUFFIX, Held, atomic_write, folders_above, remove, run_lock
from clipvisionalign.images import open_image
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import progress, progress_step
from clipvisionalign.retrieval.audit import MIN_SAMPLE, audited_images
from clipvisionalign.retrieval.ranks import Positives
from clipvisionalign.study.aggregate import TrialResult, check_gallery
from clipvisionalign.study.blind_baseline import blind_accuracy
from clipvisionalign.study.config import Drawing, Plan, Trial, data_source, trial_folder, trials_of
from clipvisionalign.study.cost import current_conditions, select_same_conditions
from clipvisionalign.study.flawed_protocols import measure_flawed_protocols
from clipvisionalign.study.gaps import (
    FAILED,
    NOT_MEASURED,
    NOT_TRAINED,
    UNFINISHED,
    Gaps,
    NotMeasuredError,
    error_reason,
    measurements_hash,
    read_failures,
    training_state,
    trials_without_results,
)
from clipvisionalign.study.measurements import load_measurements, load_trial_ranks, read_if_current
from clipvisionalign.study.plan_checks import check_plan
from clipvisionalign.study.plan_file import plan_text, read_kept_plan
from clipvisionalign.study.profile import combine_rounds, profile_run
from clipvisionalign.study.report.build import (
    TO_WRITE,
    add_gaps,
    build_report,
    check_installed,
    read_report,
    write_report,
)
from clipvisionalign.study.report.examples import build_examples
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.startable import refuse_unstartable
from clipvisionalign.study.time_estimate import StepTiming, estimate_seconds, steps_in_time, time_variants
from clipvisionalign.study.tower_commits import PINNED_TOWERS_FILE, pin_tower_commits
from clipvisionalign.study.trial import count_truncated_captions, measure_trial, train_trial
from clipvisionalign.study.trial_checks import (
    recorded_layout,
    refuse_changed_data,
    refuse_other_settings,
    settings_hash,
)
from clipvisionalign.study.validation import PlanError

Log = Callable[[str], None]

#: The part of a report that a caller adds.
ADDED_PART = "what is added to the report"

#: How the reason of a cell begins whose measuring failed, and not its training.
MEASURING_PREFIX = "measuring: "

#: In a study's folder: its plan, the scenes that it drew, the steps that its seconds pay for.
PLAN_FILE, SCENES_FOLDER, BUDGET_FILE = "plan.yaml", "scenes", "budget.json"
#: There too: which process carries out the study, and which one writes its report.
LOCK, REPORT_LOCK = "lock", "report.lock"


def run_study(
    plan: Plan, out: str | Path, say: Log = print, extend_report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Carry out a plan in the folder `out`; returns what its report.json holds.

    more: adds to the report before it is written.
    Raises ValueError for a plan that cannot be carried out, DataError for unusable data, FileExistsError where runs
    with other settings stand in the way, Held where another process carries out the study.
    """
    study = Path(out)
    # Before anything is trained.
    check_installed((*TO_WRITE, "nltk", "scipy"))
    plan = _prepare_plan(plan, study, say)
    with study_held(study):
        refuse_unstartable(plan, trials_of(plan, study))
        return _carried_out(plan, study, say, extend_report)


def _carried_out(plan: Plan, study: Path, say: Log, more: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """The report of a study that this process holds."""
    start = time.perf_counter()
    with _remove_if_refused(study):
        data = _open_data(plan, study, study / SCENES_FOLDER, say)
        part = data.split(plan.split)
        subject = StudyContext(plan, study, data, part, _minimal_pairs(plan, part), _split_overlap(data))
        check_possible(subject)
        refuse_changed_data(trials_of(plan, study))
        steps = _steps_by_variant(plan, trials_of(plan, study), study, part, say)
        cells = pin_tower_commits(trials_of(plan, study, steps), study, say)
        # From here on it is this plan's study.
        study.mkdir(parents=True, exist_ok=True)
        _save_steps(plan, study, steps)
        with atomic_write(study / PLAN_FILE) as aside:
            aside.write_text(plan_text(plan), encoding="utf-8")
    gaps = Gaps(study, say)
    # What frozen towers give of an image or a caption is the same in all cells.
    remembered: dict[str, TowerOutputCache] = {}
    trained = _train_trials(cells, gaps, say, remembered)
    say("--- figures, audits, minimal pairs ---")
    measured = _measure_trials(subject, trained, gaps, say, remembered)
    report = _build_report(subject, cells, measured, gaps, say)
    if more is not None:
        gaps.try_part(ADDED_PART, more, report)
        add_gaps(report, gaps)
    with report_held(study, waits=True):
        _write_report(study, report, say)
    say(f"{study}: report.html, report.json, figures/, tables/ ({(time.perf_counter() - start) / 60:.1f} min)")
    return report


@contextmanager
def study_held(study: Path) -> Iterator[None]:
    """The study is this process's alone meanwhile. Folders that were made for that are not left empty. Raises Held."""
    with folders_above(study):
        study.mkdir(exist_ok=True)
        with run_lock(study / LOCK, "carries out this study"):
            yield


@contextmanager
def report_held(study: Path, waits: bool = False) -> Iterator[None]:
    """The report of a study is this process's alone to write meanwhile, so that the one that was made last stays, and
    whole. waits: for another process that writes it, which else raises Held."""
    with run_lock(study / REPORT_LOCK, "writes the report of this study", waits) if study.is_dir() else nullcontext():
        yield


def read_study_report(out: str | Path, say: Log = print) -> dict[str, Any]:
    """The report of a study's folder as far as the study has come: nothing is trained or measured for it.

    The report.json that is there, where it was made from all that is measured; else a new one from the cells' figures,
    with what is missing shown as such. Raises ValueError where there is neither a report nor a study with its data.
    """
    study = Path(out)
    if not study.is_dir() or not (study / PLAN_FILE).is_file():
        return read_report(study)
    before = _read_earlier_report(study, say)
    # One that names no measurements is an earlier version's, or a published one, which has none beside it.
    if before is not None and before.get("made_from", "") == measurements_hash(study):
        return before
    plan = _in_recorded_layout(read_kept_plan(study / PLAN_FILE), study, say)
    source = Path(data_source(plan, study))
    if not source.exists():
        if before is None:
            raise ValueError(f"{study}: its figures are of the data set {source}, which is not there: put it back")
        say(f"{study}: has other figures by now, of {source}, which is not there: the report is as it was made before")
        return before
    say(f"{study}: the report is made from what has been measured so far")
    data = _open_data(plan, study, study / SCENES_FOLDER, say)
    eval_data = data.split(plan.split)
    gaps = Gaps(study, say)
    pairs = gaps.try_part("minimal pairs", _minimal_pairs, plan, eval_data) or {}
    subject = StudyContext(plan, study, data, eval_data, pairs, _split_overlap(data), read_only=True)
    trials = trials_of(plan, study)
    report = _build_report(subject, trials, _measure_trials(subject, trials, gaps, say), gaps, say)
    return _merge_with_earlier(study, before, report, gaps, say)


def _merge_with_earlier(
    study: Path, before: dict[str, Any] | None, report: dict[str, Any], gaps: Gaps, say: Log
) -> dict[str, Any]:
    """A report that was made anew, with what only the earlier one has; the earlier one where it has results that this
    one lacks. One that cannot be read is kept under another name; raises ValueError where nothing takes its
    place."""
    path = study / "report.json"
    if before is None:
        if path.is_file() and not report["results"]["variants"]:
            raise ValueError(f"{path}: cannot be read by this version, and no cell beside it has figures of it")
        _set_aside_unreadable(path, say)
        return report
    if _lost(study, before, report, say):
        return before
    if "search" in before:
        if before["results"] == report["results"]:
            report["search"] = before["search"]
            report["claims"] = report_claims(report)
        else:
            gaps.add_missing("search", "it was measured of other runs than there are now")
            add_gaps(report, gaps)
    return report


def _lost(study: Path, before: dict[str, Any], report: dict[str, Any], say: Log) -> bool:
    """Whether a report lacks results of the earlier one, which then stays: that is said."""
    lost = _trials_with_results(before) - _trials_with_results(report)
    if lost:
        named = ", ".join(f"{name}-{seed}" for name, seed in sorted(lost))
        say(f"{study}: {named} of the report have no figures of this data there now: it is as it was made before")
    return bool(lost)


def _trials_with_results(report: dict[str, Any]) -> set[tuple[str, int]]:
    """Variants and seeds that a report has results of."""
    return {(name, seed) for name, each in report["results"]["variants"].items() for seed in each["seeds"]}


def _read_earlier_report(study: Path, say: Log) -> dict[str, Any] | None:
    """The report that was made last; None where there is none, or none that can be read."""
    if not (study / "report.json").is_file():
        return None
    try:
        return read_report(study)
    except ValueError as error:
        say(str(error))
        return None


def _set_aside_unreadable(report: Path, say: Log) -> None:
    """Keep a report that cannot be read, if there is one, under another name, beside those that were kept before."""
    if report.is_file():
        numbers = chain([""], (f"-{number}" for number in count(2)))
        names = (report.with_name(f"report.unread{number}.json") for number in numbers)
        aside = report.replace(next(name for name in names if not name.exists()))
        say(f"{report}: cannot be read by this version; it is kept as {aside.name}")


@dataclass(frozen=True)
class StudyContext:
    """What a study's cells are measured on, and how.

    part: the split that is measured; pairs: sets of minimal pairs by name; overlap: images in two splits, None where
    there is one split. only_kept: nothing is measured: what was measured before is taken.
    """

    plan: Plan
    study: Path
    data: CaptionedImages
    eval_data: CaptionedImages
    pairs: dict[str, list[MinimalPair]]
    overlap: list[str] | None
    read_only: bool = False


def _split_overlap(data: CaptionedImages) -> list[str] | None:
    """Images in two splits. A split cannot overlap with itself: the check is of data sets with more than one."""
    messages = [problem.message for problem in data.problems if "two splits" in problem.kind]
    return messages if len(data.split_sizes()) > 1 else None


def check_possible(context: StudyContext) -> None:
    """Raises DataError where no cell could have a result, whatever is trained: an audit that every one would fail."""
    plan, eval_data, overlap = context.plan, context.eval_data, context.overlap
    prefix = f"{context.data.source}: no cell could have a result"
    if overlap:
        examples_text = "; ".join(overlap[:3]) + (" ..." if len(overlap) > 3 else "")
        raise DataError(
            f"{prefix}, as every audit would fail: {len(overlap):,} images or identities stand in two splits: "
            f"{examples_text}; "
            f"{_way_apart(context.data, plan)}"
        )
    for name, source in (("train", context.data), ("dev", _dev_of(plan, context.data))):
        if (count := source.split_sizes().get(name, 0)) < 2:
            raise DataError(f"{source.source}: no cell could be trained: its {name} split has {count} images"
                            f"{source.splits_hint()}")  # fmt: skip
    positives = Positives.of(
        eval_data.caption_image, len(eval_data), eval_data.image_identity, eval_data.shared_text_ids
    )
    try:
        audited_images(positives, max(plan.measure.audit_images, MIN_SAMPLE), np.random.default_rng(0))
    except ValueError as error:
        raise DataError(f"{prefix}: {error} (split '{plan.split}', measure: audit_images)") from None


def _way_apart(data: CaptionedImages, plan: Plan) -> str:
    """How images that are (nearly) the same come to stand in one split."""
    group = f" --group {plan.group}" if plan.group else ""
    share_out = f"{write_splits_command(data.source)[:-1]}{group}' shares all images out, such ones together"
    if not data.official_splits:
        return share_out
    if data.split_rule == SPLIT_RULE:
        return f"{split_file_path(data.source)} has them so: remove it, and {share_out}"
    way = "leave each out of one of its splits, or name the column that keeps them together (group)"
    return f"'clipvisionalign check {data.source}' lists them: {way}"


def _dev_of(plan: Plan, data: CaptionedImages) -> CaptionedImages:
    """The data set of whose dev split epochs are chosen. Raises PlanError where it cannot be read."""
    elsewhere = plan.settings.get("dev_data")
    if not elsewhere:
        return data
    try:
        return read_captioned_images(elsewhere, plan.layout).with_identity(plan.identity)
    except (ValueError, OSError) as error:
        raise PlanError((("settings", "dev_data"), str(error))) from None


def _measure_trials(
    context: StudyContext,
    trials: Sequence[Trial],
    gaps: Gaps,
    say: Log,
    tower_caches: dict[str, TowerOutputCache] | None = None,
) -> list[TrialResult]:
    """The figures of the cells that are trained; the others, and those that cannot be measured, are gaps."""
    trial_results = []
    inputs = context.eval_data, context.plan.split, context.pairs, context.overlap, context.plan.measure.audit_images
    for trial in progress(trials, "measuring runs", len(trials), not context.read_only):
        state = training_state(trial)
        try:
            if state is not None:
                gaps.states[trial.variant, trial.seed] = state
                continue
            if context.read_only:
                messages: list[str] = []
                measurements = load_measurements(trial, *inputs, messages.append)
                if measurements is None:
                    gaps.states[trial.variant, trial.seed] = _unmeasured_state(trial, messages)
                    continue
            else:
                measurements = measure_trial(trial, *inputs, say, tower_caches)
            result = TrialResult(trial.variant, trial.seed, measurements, load_trial_ranks(trial, context.plan.split))
            check_gallery(result, context.eval_data)
        except Exception as error:
            reason = f"{MEASURING_PREFIX}{error_reason(error)}"
            say(f"{trial.folder.name}: FAILED: {reason}")
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
    # Why a training failed says nothing of a cell that is trained by now.
    if reason.startswith(MEASURING_PREFIX):
        return FAILED, reason
    return NOT_MEASURED, _why_not_kept(messages) or "trained, and not measured yet"


def _why_not_kept(said: Sequence[str]) -> str:
    """Why what is kept is not taken, from the line that `reusable` says where it can be measured again; "" for none."""
    return said[0].rpartition("measured again: ")[2] if said else ""


def _build_report(
    context: StudyContext, trials: Sequence[Trial], trial_results: Sequence[TrialResult], gaps: Gaps, say: Log
) -> dict[str, Any]:
    """The report from what the cells' folders hold: what cannot be made is a gap."""
    plan, data, eval_data = context.plan, context.data, context.eval_data
    trial_by_key = {(trial.variant, trial.seed): trial for trial in trials}
    audited = [result for result in trial_results if result.measurements["audit"]["passed"]]
    finished = [trial_by_key[result.variant, result.seed] for result in trial_results]
    audited_trials = [trial_by_key[result.variant, result.seed] for result in audited]
    costs = _measure_costs(context, finished, gaps, say)
    with progress_step("minimal pairs by words alone"):
        train_captions = data.split("train").captions
        controls = {
            name: gaps.try_part("words alone", blind_accuracy, train_captions, pair_list, target=name) or {}
            for name, pair_list in context.pairs.items()
        }
    flawed_protocols = (
        gaps.try_part("other protocols", _measure_flawed_protocols, context, audited_trials, say)
        if audited_trials
        else None
    )
    with progress_step("examples"):
        examples = (
            gaps.try_part("examples", build_examples, audited_trials, audited, eval_data, plan.measure.examples)
            if audited
            else None
        )
    truncation = {
        name: gaps.try_part(
            "captions that are cut", count_truncated_captions, trial.folder, eval_data, plan.split, target=name
        )
        for name, trial in _first_trials(finished).items()
    }
    for result in trial_results:
        if not result.measurements["curves"]["step"]:
            gaps.add_missing(
                "learning curve", "its metrics.jsonl holds no epoch", f"{result.variant}, seed {result.seed}"
            )
    truncation = {name: counts for name, counts in truncation.items() if counts is not None}
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


def _write_report(study: Path, report: dict[str, Any], say: Log) -> None:
    """Write a report, unless the one that is there has results that it lacks, which is said; raises ValueError, where
    there is no result, with the reasons."""
    empty = not report["results"]["variants"]
    before = _read_earlier_report(study, say)
    if before is None:
        _set_aside_unreadable(study / "report.json", say)
    if before is None or not _lost(study, before, report, say):
        with progress_step("writing the report"):
            write_report(study, report, say)
    if empty:
        reasons = "; ".join(
            f"{trial['variant']}-{trial['seed']}: {trial['reason']}" for trial in trials_without_results(report)
        )
        raise ValueError(f"{study}: no cell came to its end: {reasons}")


def estimate_study_time(plan: Plan, out: str | Path, say: Log = print) -> dict[str, float]:
    """How long a study will take, in seconds by what they go into, from a few steps of each variant. Nothing is
    written; what `run_study` would refuse is refused."""
    study = Path(out)
    plan = _prepare_plan(plan, study, say)
    refuse_unstartable(plan, trials_of(plan, study))
    with tempfile.TemporaryDirectory() as folder:
        scenes_folder = study / SCENES_FOLDER if (study / SCENES_FOLDER).exists() else Path(folder) / SCENES_FOLDER
        data = _open_data(plan, study, scenes_folder, say)
        eval_data = data.split(plan.split)
        check_possible(
            StudyContext(plan, study, data, eval_data, _minimal_pairs(plan, eval_data), _split_overlap(data))
        )
        trials = trials_of(plan, study)
        refuse_changed_data(trials)
        known_steps = _known_steps(plan, trials, study)
        for trial in trials_of(plan, study, known_steps):
            if plan.budget.same == "pictures" or trial.variant in known_steps:
                refuse_other_settings(trial)
        source = plan.data or str(scenes_folder)
        timings = time_variants(
            [replace(trial, config=replace(trial.config, data=source)) for trial in trials], eval_data, say
        )
    if plan.budget.same == "seconds":
        steps = {
            name: known_steps.get(name) or steps_in_time(plan.budget.seconds, each) for name, each in timings.items()
        }
        trials = trials_of(plan, study, steps)
    return estimate_seconds(plan, trials, timings, data.split_sizes()["train"], eval_data)


def _prepare_plan(plan: Plan, study: Path, say: Log) -> Plan:
    """The plan as it is carried out. Raises PlanError for one that cannot be, FileExistsError where the folder holds
    something that is no study."""
    if plan.data and plan.scenes:
        say(f"no effect of 'scenes' and 'drawing': the data set is {plan.data}")
        plan = replace(plan, scenes=0, drawing=Drawing())
    check_plan(plan)
    # What a call has left that was stopped before its plan was kept.
    leftover_names = {
        f"{name}{suffix}"
        for name in (SCENES_FOLDER, PLAN_FILE, BUDGET_FILE, PINNED_TOWERS_FILE, LOCK)
        for suffix in ("", PARTIAL_SUFFIX)
    }
    is_study = not study.exists() or (study / PLAN_FILE).is_file()
    if not is_study and (not study.is_dir() or {path.name for path in study.iterdir()} - leftover_names):
        raise FileExistsError(f"{study}: is there already and no study; give another --out")
    _refuse_leaving_out(plan, study)
    if plan.budget.same == "seconds" and (idle := _ignored_settings(plan)):
        say(f"no effect of {', '.join(idle)}: every variant trains for {plan.budget.seconds:g} seconds")
    return _in_recorded_layout(plan, study, say)


def _in_recorded_layout(plan: Plan, study: Path, say: Log) -> Plan:
    """A plan that leaves the layout open, with the one that the study's own runs read the data set in, where that is
    taken for another by now: which is said. Not for a budget of seconds, whose steps are kept by all settings, nor
    where dev is of another data set, which has a layout of its own."""
    if plan.layout != "auto" or not plan.data or plan.budget.same == "seconds" or plan.settings.get("dev_data"):
        return plan
    runs = [trial_folder(study, name, seed) for seed in plan.seeds for name in plan.variants]
    recorded = {layout for run in runs if (layout := recorded_layout(run)) and is_data_of_run(run, plan.data)}
    now = recognised(plan.data)
    if len(recorded) != 1 or not now or now in recorded:
        return plan
    (layout,) = recorded
    say(f"{plan.data} is read as '{layout}', as the study's runs were; by itself it is taken for '{now}'")
    return replace(plan, layout=layout)


def _refuse_leaving_out(plan: Plan, study: Path) -> None:
    """Raises FileExistsError where the study's earlier plan, or its report, has cells that this one leaves out, and
    they have been begun: the report would lack them, and the plan that they are of would be lost."""
    begun: list[tuple[str, int]] = []
    # One that is damaged names no cells.
    with suppress(OSError, ValueError):
        kept = read_kept_plan(study / PLAN_FILE)
        cells = [(name, seed) for seed in kept.seeds for name in kept.variants]
        begun = [cell for cell in cells if (trial_folder(study, *cell) / "config.yaml").is_file()]
    before = _read_earlier_report(study, lambda line: None)
    shown = sorted(_trials_with_results(before)) if before is not None else []
    asked = {(name, seed) for name in plan.variants for seed in plan.seeds}
    if left := [cell for cell in dict.fromkeys([*begun, *shown]) if cell not in asked]:
        named = ", ".join(f"{name}-{seed}" for name, seed in left)
        raise FileExistsError(
            f"{study}: this plan leaves out {named}, which the study has; the report would lack them: give the whole "
            f"plan, which is {study / PLAN_FILE}, or another --out, or remove their runs and the report"
        )


def _ignored_settings(plan: Plan) -> list[str]:
    """Settings that a budget of seconds takes the place of, by their keys."""
    settings_by_key = {"settings": plan.settings}
    settings_by_key |= {f"variants.{name}.settings": variant.settings for name, variant in plan.variants.items()}
    return [
        f"{key}.{name}" for key, settings in settings_by_key.items() for name in ("epochs", "steps") if name in settings
    ]


@contextmanager
def _remove_if_refused(study: Path) -> Iterator[None]:
    """What the body drew is not left where the body raises an error."""
    existed = (study / SCENES_FOLDER).exists()
    try:
        yield
    except Exception:
        if not existed:
            remove(study / SCENES_FOLDER)
        raise


def _open_data(plan: Plan, study: Path, scenes_folder: Path, say: Log) -> CaptionedImages:
    """The checked data set whole. drawn: where scenes are, or are drawn, once.

    Raises DataError for data that cannot be used, FileExistsError where other scenes are drawn than the plan's.
    """
    source = Path(plan.data) if plan.data else scenes_folder
    if not plan.data:
        data_source(plan, study)
        if is_scene_dataset(scenes_folder):
            _refuse_other_scenes(plan, study, scenes_folder)
        elif scenes_folder.exists():
            raise FileExistsError(f"{scenes_folder}: is there already and no drawn scenes; give another --out")
        else:
            _draw_scenes(scenes_folder, plan)
            say(
                f"{scenes_folder}: {plan.scenes:,} scenes drawn, {'two' if plan.drawing.plain else 'five'} "
                "captions each"
            )
    data = read_captioned_images(source, plan.layout, plan.group).with_identity(plan.identity)
    if plan.split not in data.split_sizes():
        raise DataError(f"{source}: the split '{plan.split}' is empty; it has {', '.join(data.split_sizes())}")
    clean_data, _ = check(data, full=True, show_progress=True)
    return clean_data


def _draw_scenes(folder: Path, plan: Plan) -> None:
    """A drawing that was cut off is begun again."""
    drawing = plan.drawing
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder, sync=False) as aside:
        write_scenes(aside, plan.scenes, drawing.seed, drawing.pixels, drawing.plain, drawing.splits or None)


def _refuse_other_scenes(plan: Plan, study: Path, scenes_folder: Path) -> None:
    """Raises FileExistsError where the scenes that are drawn are not those of the plan."""
    existing, drawing = read_scenes(scenes_folder), plan.drawing
    expected = {
        name: scene
        for name, _, scene in random_scenes(plan.scenes, drawing.seed, drawing.plain, drawing.splits or None)
    }
    first_name = next(iter(existing), "")
    pixels = open_image(scenes_folder / first_name).width if (scenes_folder / first_name).is_file() else drawing.pixels
    if existing != expected or pixels != drawing.pixels:
        existing_text = (
            f"{len(existing):,} of {pixels} pixels"
            if existing == expected or len(existing) != len(expected)
            else "others"
        )
        raise FileExistsError(
            f"{scenes_folder}: {plan.scenes:,} scenes of {drawing.pixels} pixels are asked for (seed {drawing.seed}"
            f"{', plain' if drawing.plain else ''}), and {existing_text} are drawn there; give another --out, "
            "or the plan that they "
            "were drawn by"
        )


# --- a budget of seconds ---------------------------------------------------------------------------------------------


def _steps_by_variant(
    plan: Plan, trials: list[Trial], study: Path, eval_data: CaptionedImages, say: Log
) -> dict[str, int]:
    """How many steps each variant's seconds pay for: found once, and kept; empty for a budget of pictures."""
    steps = _known_steps(plan, trials, study)
    unknown = [trial for trial in trials if trial.variant not in steps]
    if plan.budget.same == "pictures" or not unknown:
        return steps
    say("--- how many steps the budget pays for ---")
    timings: dict[str, StepTiming] = time_variants(unknown, eval_data, say)
    return steps | {name: steps_in_time(plan.budget.seconds, each) for name, each in timings.items()}


def _known_steps(plan: Plan, trials: list[Trial], study: Path) -> dict[str, int]:
    """The steps that are kept of variants with these settings. Raises FileExistsError where runs are there that were
    given other seconds, or none."""
    if plan.budget.same == "pictures":
        return {}
    path = study / BUDGET_FILE
    saved = read_json(path) if path.is_file() else {"steps": {}}
    # Those of an earlier version do not tell what they are of.
    saved_settings, same = saved.get("settings", {}), saved.get("seconds") == plan.budget.seconds
    steps: dict[str, int] = {}
    for trial in trials:
        name = trial.variant
        if same and name in saved["steps"] and saved_settings.get(name) in (None, settings_hash(trial)):
            steps[name] = saved["steps"][name]
        elif (trial.folder / "config.yaml").is_file():
            saved_text = f"{saved['seconds']:g} seconds" if not same and "seconds" in saved else "another budget"
            requested_text = f"{plan.budget.seconds:g} seconds"
            message = f"was trained with {saved_text} or other settings, and {requested_text} are asked for"
            raise FileExistsError(f"{trial.folder}: {message}; give another --out, or remove it")
    return steps


def _save_steps(plan: Plan, study: Path, steps: dict[str, int]) -> None:
    """Beside those of variants that another call left out."""
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


def _train_trials(trials: list[Trial], gaps: Gaps, say: Log, tower_caches: dict[str, TowerOutputCache]) -> list[Trial]:
    """Train what is not finished; returns the cells that are."""
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
        say(f"--- {trial.variant}, seed {trial.seed}: cell {number} of {len(trials)}{eta} ---")
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
                train_trial(trial, say, tower_caches)
                trained.append(trial)
                number_trained += not was_finished
                continue
            except Held as error:
                held_by_others.add(trial.folder.name)
                gaps.left(trial, UNFINISHED, str(error))
            except Exception as error:
                gaps.record_failure(trial, f"{type(error).__name__}: {error}".splitlines()[0])
        state, reason = gaps.states[trial.variant, trial.seed]
        say(f"{trial.folder.name}: {state.upper()}: {reason}; the rest goes on")
    return trained


def _minimal_pairs(plan: Plan, eval_data: CaptionedImages) -> dict[str, list[MinimalPair]]:
    """The sets of minimal pairs, by name."""
    measurements, pairs = plan.measure, {}
    if measurements.composition:
        own_pairs = make_minimal_pairs(eval_data, measurements.composition)
        if own_pairs:
            pairs["this data"] = own_pairs
    if measurements.minimal_pairs:
        pairs[Path(measurements.minimal_pairs).stem] = read_minimal_pairs(
            measurements.minimal_pairs, measurements.minimal_pair_images
        )
    return pairs


def _first_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The first cell of each variant."""
    trial_by_variant: dict[str, Trial] = {}
    for trial in trials:
        trial_by_variant.setdefault(trial.variant, trial)
    return trial_by_variant


def _measure_costs(context: StudyContext, finished: Sequence[Trial], gaps: Gaps, say: Log) -> dict[str, dict[str, Any]]:
    """Time and memory of each variant's first finished run, in fresh processes that take turns; of a variant whose
    process fails the rounds that did not. What was measured on another machine, or with other versions, is measured
    again; where nothing is measured it is taken, and told."""
    plan, eval_data, folder = context.plan, context.eval_data, context.study / "costs"
    trial_by_variant = _first_trials(finished)
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
            said[round_number, name].append if context.read_only else say, f"time and memory of {name}",
        )
        for round_number, name in schedule
    }  # fmt: skip
    if not context.read_only and any(cost is None for cost in saved.values()):
        say("--- time and memory, each in a fresh process ---")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in trial_by_variant}
    reasons: dict[str, list[str]] = {name: [] for name in trial_by_variant}
    for round_number, name in progress(schedule, "time and memory", len(schedule), None in saved.values()):
        cost = saved[round_number, name]
        if cost is None and context.read_only:
            reasons[name].append(error_reason(NotMeasuredError(_why_not_kept(said[round_number, name]))))
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


def _measure_flawed_protocols(context: StudyContext, trials: Sequence[Trial], say: Log) -> dict[str, Any] | None:
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
    content = read_if_current(path, inputs, said.append if context.read_only else say, "other protocols")
    if content is not None:
        return content
    if context.read_only:
        raise NotMeasuredError(_why_not_kept(said))
    say("--- what it would have looked like by other protocols ---")
    content = {"asked": inputs, "variant": trial.variant, "seed": trial.seed}
    with progress_step("other protocols"):
        content |= measure_flawed_protocols(load_aligner(trial.folder), train, eval_data)
    write_json(path, content)
    return content
