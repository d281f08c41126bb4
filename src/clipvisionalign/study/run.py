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
from clipvisionalign.data.fingerprint import data_contents, run_contents
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.minimal_pairs import MinimalPair, drawn_together, minimal_pairs_of, read_minimal_pairs
from clipvisionalign.data.of_run import is_data_of_run, recognised
from clipvisionalign.data.scenes import is_drawn, random_scenes, read_scenes, write_scenes
from clipvisionalign.data.split_file import how_to_share_out, split_file_of
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.files import PART, Held, folders_above, held, remove, written_aside
from clipvisionalign.images import open_picture
from clipvisionalign.models.aligner import Remembered
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import long_step, progress
from clipvisionalign.retrieval.audit import LEAST, audited_images
from clipvisionalign.retrieval.ranks import Partners
from clipvisionalign.study.cells import (
    TOWERS,
    cut_captions,
    kept_figures,
    measure_cell,
    ranks_of,
    read_json,
    recorded_layout,
    refuse_changed_data,
    refuse_other,
    reusable,
    settings_hash,
    train_cell,
    with_commits,
    write_json,
)
from clipvisionalign.study.costs import conditions, of_same_conditions
from clipvisionalign.study.examples import examples_of
from clipvisionalign.study.gaps import (
    FAILED,
    NOT_MEASURED,
    NOT_TRAINED,
    UNFINISHED,
    Gaps,
    NotMeasured,
    made_from,
    reason_of,
    reasons_in,
    training_state,
    without_results,
)
from clipvisionalign.study.plan import (
    Cell,
    Drawing,
    Plan,
    cell_folder,
    cells_of,
    check_plan,
    data_of,
    read_kept_plan,
)
from clipvisionalign.study.probe import Probe, estimated, probes_of, steps_for
from clipvisionalign.study.profile import combined, profile_run
from clipvisionalign.study.protocol import other_protocols
from clipvisionalign.study.report import TO_WRITE, build_report, check_installed, read_report, with_gaps, write_report
from clipvisionalign.study.results import Measured, check_gallery
from clipvisionalign.study.startable import refuse_unstartable
from clipvisionalign.study.text_only import twins_told_apart
from clipvisionalign.study.validation import PlanError
from clipvisionalign.study.words import claims_of

Say = Callable[[str], None]

#: The part of a report that a caller adds.
MORE = "what is added to the report"

#: How the reason of a cell begins whose measuring failed, and not its training.
MEASURING = "measuring: "

#: In a study's folder: its plan, the scenes that it drew, the steps that its seconds pay for.
PLAN, SCENES, BUDGET = "plan.yaml", "scenes", "budget.json"
#: There too: which process carries out the study, and which one writes its report.
LOCK, REPORT_LOCK = "lock", "report.lock"


def run_study(
    plan: Plan, out: str | Path, say: Say = print, more: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Carry out a plan in the folder `out`; returns what its report.json holds.

    more: adds to the report before it is written.
    Raises ValueError for a plan that cannot be carried out, DataError for unusable data, FileExistsError where runs
    with other settings stand in the way, Held where another process carries out the study.
    """
    study = Path(out)
    # Before anything is trained.
    check_installed((*TO_WRITE, "nltk", "scipy"))
    plan = _checked(plan, study, say)
    with study_held(study):
        refuse_unstartable(plan, cells_of(plan, study))
        return _carried_out(plan, study, say, more)


def _carried_out(plan: Plan, study: Path, say: Say, more: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """The report of a study that this process holds."""
    start = time.perf_counter()
    with _removed_if_refused(study):
        data = _open_data(plan, study, study / SCENES, say)
        part = data.split(plan.split)
        subject = Subject(plan, study, data, part, _minimal_pairs(plan, part), _overlap(data))
        check_possible(subject)
        refuse_changed_data(cells_of(plan, study))
        steps = _steps(plan, cells_of(plan, study), study, part, say)
        cells = with_commits(cells_of(plan, study, steps), study, say)
        # From here on it is this plan's study.
        study.mkdir(parents=True, exist_ok=True)
        _keep_steps(plan, study, steps)
        with written_aside(study / PLAN) as aside:
            aside.write_text(plan_text(plan), encoding="utf-8")
    gaps = Gaps(study, say)
    # What frozen towers give of an image or a caption is the same in all cells.
    remembered: dict[str, Remembered] = {}
    trained = _train(cells, gaps, say, remembered)
    say("--- figures, audits, minimal pairs ---")
    measured = _measure(subject, trained, gaps, say, remembered)
    report = _report(subject, cells, measured, gaps, say)
    if more is not None:
        gaps.part(MORE, more, report)
        with_gaps(report, gaps)
    with report_held(study, waits=True):
        _write(study, report, say)
    say(f"{study}: report.html, report.json, figures/, tables/ ({(time.perf_counter() - start) / 60:.1f} min)")
    return report


@contextmanager
def study_held(study: Path) -> Iterator[None]:
    """The study is this process's alone meanwhile. Folders that were made for that are not left empty. Raises Held."""
    with folders_above(study):
        study.mkdir(exist_ok=True)
        with held(study / LOCK, "carries out this study"):
            yield


@contextmanager
def report_held(study: Path, waits: bool = False) -> Iterator[None]:
    """The report of a study is this process's alone to write meanwhile, so that the one that was made last stays, and
    whole. waits: for another process that writes it, which else raises Held."""
    with held(study / REPORT_LOCK, "writes the report of this study", waits) if study.is_dir() else nullcontext():
        yield


def report_of_study(out: str | Path, say: Say = print) -> dict[str, Any]:
    """The report of a study's folder as far as the study has come: nothing is trained or measured for it.

    The report.json that is there, where it was made from all that is measured; else a new one from the cells' figures,
    with what is missing shown as such. Raises ValueError where there is neither a report nor a study with its data.
    """
    study = Path(out)
    if not study.is_dir() or not (study / PLAN).is_file():
        return read_report(study)
    before = _earlier_report(study, say)
    # One that names no measurements is an earlier version's, or a published one, which has none beside it.
    if before is not None and before.get("made_from", "") == made_from(study):
        return before
    plan = _in_recorded_layout(read_kept_plan(study / PLAN), study, say)
    source = Path(data_of(plan, study))
    if not source.exists():
        if before is None:
            raise ValueError(f"{study}: its figures are of the data set {source}, which is not there: put it back")
        say(f"{study}: has other figures by now, of {source}, which is not there: the report is as it was made before")
        return before
    say(f"{study}: the report is made from what has been measured so far")
    data = _open_data(plan, study, study / SCENES, say)
    part = data.split(plan.split)
    gaps = Gaps(study, say)
    pairs = gaps.part("minimal pairs", _minimal_pairs, plan, part) or {}
    subject = Subject(plan, study, data, part, pairs, _overlap(data), only_kept=True)
    cells = cells_of(plan, study)
    report = _report(subject, cells, _measure(subject, cells, gaps, say), gaps, say)
    return _best_of(study, before, report, gaps, say)


def _best_of(
    study: Path, before: dict[str, Any] | None, report: dict[str, Any], gaps: Gaps, say: Say
) -> dict[str, Any]:
    """A report that was made anew, with what only the earlier one has; the earlier one where it has results that this
    one lacks. One that cannot be read is kept under another name; raises ValueError where nothing takes its
    place."""
    path = study / "report.json"
    if before is None:
        if path.is_file() and not report["results"]["variants"]:
            raise ValueError(f"{path}: cannot be read by this version, and no cell beside it has figures of it")
        _set_aside_unread(path, say)
        return report
    if _lost(study, before, report, say):
        return before
    if "search" in before:
        if before["results"] == report["results"]:
            report["search"] = before["search"]
            report["claims"] = claims_of(report)
        else:
            gaps.lacks("search", "it was measured of other runs than there are now")
            with_gaps(report, gaps)
    return report


def _lost(study: Path, before: dict[str, Any], report: dict[str, Any], say: Say) -> bool:
    """Whether a report lacks results of the earlier one, which then stays: that is said."""
    lost = _with_results(before) - _with_results(report)
    if lost:
        named = ", ".join(f"{name}-{seed}" for name, seed in sorted(lost))
        say(f"{study}: {named} of the report have no figures of this data there now: it is as it was made before")
    return bool(lost)


def _with_results(report: dict[str, Any]) -> set[tuple[str, int]]:
    """Variants and seeds that a report has results of."""
    return {(name, seed) for name, each in report["results"]["variants"].items() for seed in each["seeds"]}


def _earlier_report(study: Path, say: Say) -> dict[str, Any] | None:
    """The report that was made last; None where there is none, or none that can be read."""
    if not (study / "report.json").is_file():
        return None
    try:
        return read_report(study)
    except ValueError as error:
        say(str(error))
        return None


def _set_aside_unread(report: Path, say: Say) -> None:
    """Keep a report that cannot be read, if there is one, under another name, beside those that were kept before."""
    if report.is_file():
        numbers = chain([""], (f"-{number}" for number in count(2)))
        names = (report.with_name(f"report.unread{number}.json") for number in numbers)
        aside = report.replace(next(name for name in names if not name.exists()))
        say(f"{report}: cannot be read by this version; it is kept as {aside.name}")


@dataclass(frozen=True)
class Subject:
    """What a study's cells are measured on, and how.

    part: the split that is measured; pairs: sets of minimal pairs by name; overlap: images in two splits, None where
    there is one split. only_kept: nothing is measured: what was measured before is taken.
    """

    plan: Plan
    study: Path
    data: CaptionedImages
    part: CaptionedImages
    pairs: dict[str, list[MinimalPair]]
    overlap: list[str] | None
    only_kept: bool = False


def _overlap(data: CaptionedImages) -> list[str] | None:
    """Images in two splits. A split cannot overlap with itself: the check is of data sets with more than one."""
    found = [problem.message for problem in data.problems if "two splits" in problem.kind]
    return found if len(data.split_sizes()) > 1 else None


def check_possible(subject: Subject) -> None:
    """Raises DataError where no cell could have a result, whatever is trained: an audit that every one would fail."""
    plan, part, overlap = subject.plan, subject.part, subject.overlap
    where = f"{subject.data.source}: no cell could have a result"
    if overlap:
        named = "; ".join(overlap[:3]) + (" ..." if len(overlap) > 3 else "")
        raise DataError(
            f"{where}, as every audit would fail: {len(overlap):,} images or identities stand in two splits: {named}; "
            f"{_way_apart(subject.data, plan)}"
        )
    for name, source in (("train", subject.data), ("dev", _dev_of(plan, subject.data))):
        if (count := source.split_sizes().get(name, 0)) < 2:
            raise DataError(f"{source.source}: no cell could be trained: its {name} split has {count} images"
                            f"{source.way_out()}")  # fmt: skip
    partners = Partners.of(part.caption_image, len(part), part.image_identity, part.caption_group)
    try:
        audited_images(partners, max(plan.measure.audit_images, LEAST), np.random.default_rng(0))
    except ValueError as error:
        raise DataError(f"{where}: {error} (split '{plan.split}', measure: audit_images)") from None


def _way_apart(data: CaptionedImages, plan: Plan) -> str:
    """How images that are (nearly) the same come to stand in one split."""
    group = f" --group {plan.group}" if plan.group else ""
    share_out = f"{how_to_share_out(data.source)[:-1]}{group}' shares all images out, such ones together"
    if not data.official_splits:
        return share_out
    if data.split_rule == SPLIT_RULE:
        return f"{split_file_of(data.source)} has them so: remove it, and {share_out}"
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


def _measure(
    subject: Subject, cells: Sequence[Cell], gaps: Gaps, say: Say, remembered: dict[str, Remembered] | None = None
) -> list[Measured]:
    """The figures of the cells that are trained; the others, and those that cannot be measured, are gaps."""
    measured = []
    asked = subject.part, subject.plan.split, subject.pairs, subject.overlap, subject.plan.measure.audit_images
    for cell in progress(cells, "measuring runs", len(cells), not subject.only_kept):
        state = training_state(cell)
        try:
            if state is not None:
                gaps.cells[cell.variant, cell.seed] = state
                continue
            if subject.only_kept:
                said: list[str] = []
                found = kept_figures(cell, *asked, said.append)
                if found is None:
                    gaps.cells[cell.variant, cell.seed] = _not_measured(cell, said)
                    continue
            else:
                found = measure_cell(cell, *asked, say, remembered)
            one = Measured(cell.variant, cell.seed, found, ranks_of(cell, subject.plan.split))
            check_gallery(one, subject.part)
        except Exception as error:
            reason = f"{MEASURING}{reason_of(error)}"
            say(f"{cell.folder.name}: FAILED: {reason}")
            if subject.only_kept:
                gaps.cells[cell.variant, cell.seed] = (FAILED, reason)
            else:
                gaps.failed(cell, reason)
            continue
        measured.append(one)
        if not subject.only_kept:
            gaps.passed(cell)
    return measured


def _not_measured(cell: Cell, said: Sequence[str]) -> tuple[str, str]:
    """State and reason of a trained cell without figures of this data."""
    told = reasons_in(cell.folder.parent.parent).get(cell.folder.name, "")
    # Why a training failed says nothing of a cell that is trained by now.
    if told.startswith(MEASURING):
        return FAILED, told
    return NOT_MEASURED, _why_not_kept(said) or "trained, and not measured yet"


def _why_not_kept(said: Sequence[str]) -> str:
    """Why what is kept is not taken, from the line that `reusable` says where it can be measured again; "" for none."""
    return said[0].rpartition("measured again: ")[2] if said else ""


def _report(
    subject: Subject, cells: Sequence[Cell], measured: Sequence[Measured], gaps: Gaps, say: Say
) -> dict[str, Any]:
    """The report from what the cells' folders hold: what cannot be made is a gap."""
    plan, data, part = subject.plan, subject.data, subject.part
    places = {(cell.variant, cell.seed): cell for cell in cells}
    good = [one for one in measured if one.found["audit"]["passed"]]
    finished = [places[one.variant, one.seed] for one in measured]
    shown = [places[one.variant, one.seed] for one in good]
    costs = _costs(subject, finished, gaps, say)
    with long_step("minimal pairs by words alone"):
        taught = data.split("train").captions
        controls = {
            name: gaps.part("words alone", twins_told_apart, taught, some, of=name) or {}
            for name, some in subject.pairs.items()
        }
    other = gaps.part("other protocols", _other_protocols, subject, shown, say) if shown else None
    with long_step("examples"):
        examples = gaps.part("examples", examples_of, shown, good, part, plan.measure.examples) if good else None
    cut = {
        name: gaps.part("captions that are cut", cut_captions, cell.folder, part, plan.split, of=name)
        for name, cell in _first_of_each(finished).items()
    }
    for one in measured:
        if not one.found["curves"]["step"]:
            gaps.lacks("learning curve", "its metrics.jsonl holds no epoch", f"{one.variant}, seed {one.seed}")
    cut = {name: found for name, found in cut.items() if found is not None}
    together = {name: drawn_together(some) for name, some in subject.pairs.items()}
    return build_report(
        plan, subject.study, data, part, measured, gaps, costs, controls, other, examples or {}, cut, together
    )


def _write(study: Path, report: dict[str, Any], say: Say) -> None:
    """Write a report, unless the one that is there has results that it lacks, which is said; raises ValueError, where
    there is no result, with the reasons."""
    empty = not report["results"]["variants"]
    before = _earlier_report(study, say)
    if before is None:
        _set_aside_unread(study / "report.json", say)
    if before is None or not _lost(study, before, report, say):
        with long_step("writing the report"):
            write_report(study, report, say)
    if empty:
        told = "; ".join(f"{cell['variant']}-{cell['seed']}: {cell['reason']}" for cell in without_results(report))
        raise ValueError(f"{study}: no cell came to its end: {told}")


def plan_ahead(plan: Plan, out: str | Path, say: Say = print) -> dict[str, float]:
    """How long a study will take, in seconds by what they go into, from a few steps of each variant. Nothing is
    written; what `run_study` would refuse is refused."""
    study = Path(out)
    plan = _checked(plan, study, say)
    refuse_unstartable(plan, cells_of(plan, study))
    with tempfile.TemporaryDirectory() as folder:
        drawn = study / SCENES if (study / SCENES).exists() else Path(folder) / SCENES
        data = _open_data(plan, study, drawn, say)
        part = data.split(plan.split)
        check_possible(Subject(plan, study, data, part, _minimal_pairs(plan, part), _overlap(data)))
        cells = cells_of(plan, study)
        refuse_changed_data(cells)
        known = _known_steps(plan, cells, study)
        for cell in cells_of(plan, study, known):
            if plan.budget.same == "pictures" or cell.variant in known:
                refuse_other(cell)
        source = plan.data or str(drawn)
        probes = probes_of([replace(cell, config=replace(cell.config, data=source)) for cell in cells], part, say)
    if plan.budget.same == "seconds":
        steps = {name: known.get(name) or steps_for(plan.budget.seconds, each) for name, each in probes.items()}
        cells = cells_of(plan, study, steps)
    return estimated(plan, cells, probes, data.split_sizes()["train"], part)


def _checked(plan: Plan, study: Path, say: Say) -> Plan:
    """The plan as it is carried out. Raises PlanError for one that cannot be, FileExistsError where the folder holds
    something that is no study."""
    if plan.data and plan.scenes:
        say(f"no effect of 'scenes' and 'drawing': the data set is {plan.data}")
        plan = replace(plan, scenes=0, drawing=Drawing())
    check_plan(plan)
    # What a call has left that was stopped before its plan was kept.
    left = {f"{name}{part}" for name in (SCENES, PLAN, BUDGET, TOWERS, LOCK) for part in ("", PART)}
    known = not study.exists() or (study / PLAN).is_file()
    if not known and (not study.is_dir() or {path.name for path in study.iterdir()} - left):
        raise FileExistsError(f"{study}: is there already and no study; give another --out")
    _refuse_leaving_out(plan, study)
    if plan.budget.same == "seconds" and (idle := _idle_settings(plan)):
        say(f"no effect of {', '.join(idle)}: every variant trains for {plan.budget.seconds:g} seconds")
    return _in_recorded_layout(plan, study, say)


def _in_recorded_layout(plan: Plan, study: Path, say: Say) -> Plan:
    """A plan that leaves the layout open, with the one that the study's own runs read the data set in, where that is
    taken for another by now: which is said. Not for a budget of seconds, whose steps are kept by all settings, nor
    where dev is of another data set, which has a layout of its own."""
    if plan.layout != "auto" or not plan.data or plan.budget.same == "seconds" or plan.settings.get("dev_data"):
        return plan
    runs = [cell_folder(study, name, seed) for seed in plan.seeds for name in plan.variants]
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
        kept = read_kept_plan(study / PLAN)
        cells = [(name, seed) for seed in kept.seeds for name in kept.variants]
        begun = [cell for cell in cells if (cell_folder(study, *cell) / "config.yaml").is_file()]
    before = _earlier_report(study, lambda line: None)
    shown = sorted(_with_results(before)) if before is not None else []
    asked = {(name, seed) for name in plan.variants for seed in plan.seeds}
    if left := [cell for cell in dict.fromkeys([*begun, *shown]) if cell not in asked]:
        named = ", ".join(f"{name}-{seed}" for name, seed in left)
        raise FileExistsError(
            f"{study}: this plan leaves out {named}, which the study has; the report would lack them: give the whole "
            f"plan, which is {study / PLAN}, or another --out, or remove their runs and the report"
        )


def _idle_settings(plan: Plan) -> list[str]:
    """Settings that a budget of seconds takes the place of, by their keys."""
    given = {"settings": plan.settings}
    given |= {f"variants.{name}.settings": variant.settings for name, variant in plan.variants.items()}
    return [f"{key}.{name}" for key, settings in given.items() for name in ("epochs", "steps") if name in settings]


@contextmanager
def _removed_if_refused(study: Path) -> Iterator[None]:
    """What the body drew is not left where the body raises an error."""
    there = (study / SCENES).exists()
    try:
        yield
    except Exception:
        if not there:
            remove(study / SCENES)
        raise


def plan_text(plan: Plan) -> str:
    """A plan as its YAML file."""
    import yaml

    return yaml.safe_dump(plan.to_dict(), sort_keys=False)


def _open_data(plan: Plan, study: Path, drawn: Path, say: Say) -> CaptionedImages:
    """The checked data set whole. drawn: where scenes are, or are drawn, once.

    Raises DataError for data that cannot be used, FileExistsError where other scenes are drawn than the plan's.
    """
    source = Path(plan.data) if plan.data else drawn
    if not plan.data:
        data_of(plan, study)
        if is_drawn(drawn):
            _refuse_other_scenes(plan, study, drawn)
        elif drawn.exists():
            raise FileExistsError(f"{drawn}: is there already and no drawn scenes; give another --out")
        else:
            _draw(drawn, plan)
            say(f"{drawn}: {plan.scenes:,} scenes drawn, {'two' if plan.drawing.plain else 'five'} captions each")
    data = read_captioned_images(source, plan.layout, plan.group).with_identity(plan.identity)
    if plan.split not in data.split_sizes():
        raise DataError(f"{source}: the split '{plan.split}' is empty; it has {', '.join(data.split_sizes())}")
    kept, _ = check(data, full=True, shown=True)
    return kept


def _draw(folder: Path, plan: Plan) -> None:
    """A drawing that was cut off is begun again."""
    how = plan.drawing
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(folder, sync=False) as aside:
        write_scenes(aside, plan.scenes, how.seed, how.pixels, how.plain, how.splits or None)


def _refuse_other_scenes(plan: Plan, study: Path, drawn: Path) -> None:
    """Raises FileExistsError where the scenes that are drawn are not those of the plan."""
    there, how = read_scenes(drawn), plan.drawing
    asked = {name: scene for name, _, scene in random_scenes(plan.scenes, how.seed, how.plain, how.splits or None)}
    first = next(iter(there), "")
    pixels = open_picture(drawn / first).width if (drawn / first).is_file() else how.pixels
    if there != asked or pixels != how.pixels:
        told = f"{len(there):,} of {pixels} pixels" if there == asked or len(there) != len(asked) else "others"
        raise FileExistsError(
            f"{drawn}: {plan.scenes:,} scenes of {how.pixels} pixels are asked for (seed {how.seed}"
            f"{', plain' if how.plain else ''}), and {told} are drawn there; give another --out, or the plan that they "
            "were drawn by"
        )


# --- a budget of seconds ---------------------------------------------------------------------------------------------


def _steps(plan: Plan, cells: list[Cell], study: Path, part: CaptionedImages, say: Say) -> dict[str, int]:
    """How many steps each variant's seconds pay for: found once, and kept; empty for a budget of pictures."""
    known = _known_steps(plan, cells, study)
    unknown = [cell for cell in cells if cell.variant not in known]
    if plan.budget.same == "pictures" or not unknown:
        return known
    say("--- how many steps the budget pays for ---")
    probes: dict[str, Probe] = probes_of(unknown, part, say)
    return known | {name: steps_for(plan.budget.seconds, each) for name, each in probes.items()}


def _known_steps(plan: Plan, cells: list[Cell], study: Path) -> dict[str, int]:
    """The steps that are kept of variants with these settings. Raises FileExistsError where runs are there that were
    given other seconds, or none."""
    if plan.budget.same == "pictures":
        return {}
    kept = study / BUDGET
    found = read_json(kept) if kept.is_file() else {"steps": {}}
    # Those of an earlier version do not tell what they are of.
    made, same = found.get("settings", {}), found.get("seconds") == plan.budget.seconds
    known: dict[str, int] = {}
    for cell in cells:
        name = cell.variant
        if same and name in found["steps"] and made.get(name) in (None, settings_hash(cell)):
            known[name] = found["steps"][name]
        elif (cell.folder / "config.yaml").is_file():
            given = f"{found['seconds']:g} seconds" if not same and "seconds" in found else "another budget"
            asked = f"{plan.budget.seconds:g} seconds"
            told = f"was trained with {given} or other settings, and {asked} are asked for"
            raise FileExistsError(f"{cell.folder}: {told}; give another --out, or remove it")
    return known


def _keep_steps(plan: Plan, study: Path, steps: dict[str, int]) -> None:
    """Beside those of variants that another call left out."""
    if not steps:
        return
    kept = study / BUDGET
    found = read_json(kept) if kept.is_file() else {}
    before = found if found.get("seconds") == plan.budget.seconds else {}
    now = {cell.variant: settings_hash(cell) for cell in cells_of(plan, study)}
    told = {
        "seconds": plan.budget.seconds,
        "steps": before.get("steps", {}) | steps,
        "settings": before.get("settings", {}) | now,
    }
    if told != found:
        write_json(kept, told)


def _train(cells: list[Cell], gaps: Gaps, say: Say, remembered: dict[str, Remembered]) -> list[Cell]:
    """Train what is not finished; returns the cells that are."""
    trained: list[Cell] = []
    held_by_others: set[str] = set()
    start = time.perf_counter()
    number_trained = 0
    for number, cell in enumerate(cells, 1):
        left = [other for other in cells[number - 1 :] if not (other.folder / "results.json").is_file()]
        eta = ""
        if number_trained and left:
            minutes = (time.perf_counter() - start) / number_trained * len(left) / 60
            eta = f", about {minutes:.0f} min of training left"
        say(f"--- {cell.variant}, seed {cell.seed}: cell {number} of {len(cells)}{eta} ---")
        done = (cell.folder / "results.json").is_file()
        base = Path(cell.config.init).name if cell.config.init else ""
        if base in held_by_others:
            held_by_others.add(cell.folder.name)
            gaps.left(cell, NOT_TRAINED, f"it stands on {base}, which another process trains")
        elif base and not (Path(cell.config.init) / "results.json").is_file():
            gaps.failed(cell, f"it stands on {base}, which failed")
        else:
            try:
                if not done:
                    gaps.passed(cell)
                train_cell(cell, say, remembered)
                trained.append(cell)
                number_trained += not done
                continue
            except Held as error:
                held_by_others.add(cell.folder.name)
                gaps.left(cell, UNFINISHED, str(error))
            except Exception as error:
                gaps.failed(cell, f"{type(error).__name__}: {error}".splitlines()[0])
        state, reason = gaps.cells[cell.variant, cell.seed]
        say(f"{cell.folder.name}: {state.upper()}: {reason}; the rest goes on")
    return trained


def _minimal_pairs(plan: Plan, part: CaptionedImages) -> dict[str, list[MinimalPair]]:
    """The sets of minimal pairs, by name."""
    asked, found = plan.measure, {}
    if asked.composition:
        own = minimal_pairs_of(part, asked.composition)
        if own:
            found["this data"] = own
    if asked.minimal_pairs:
        found[Path(asked.minimal_pairs).stem] = read_minimal_pairs(asked.minimal_pairs, asked.minimal_pair_images)
    return found


def _first_of_each(cells: Sequence[Cell]) -> dict[str, Cell]:
    """The first cell of each variant."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.variant, cell)
    return first


def _costs(subject: Subject, finished: Sequence[Cell], gaps: Gaps, say: Say) -> dict[str, dict[str, Any]]:
    """Time and memory of each variant's first finished run, in fresh processes that take turns; of a variant whose
    process fails the rounds that did not. What was measured on another machine, or with other versions, is measured
    again; where nothing is measured it is taken, and told."""
    plan, part, folder = subject.plan, subject.part, subject.study / "costs"
    first = _first_of_each(finished)
    turns = [(turn, name) for turn in range(plan.measure.rounds) for name in first]
    brief = {"brief": plan.measure.brief}
    here = {} if subject.only_kept else conditions()
    contents = {**data_contents(part), **brief}
    asked = {name: {"model": run_contents(cell.folder), **contents, **here} for name, cell in first.items()}
    said: dict[tuple[int, str], list[str]] = {turn: [] for turn in turns}
    kept = {
        (turn, name): reusable(
            folder / f"{name}-{turn}.json", asked[name],
            said[turn, name].append if subject.only_kept else say, f"time and memory of {name}",
        )
        for turn, name in turns
    }  # fmt: skip
    if not subject.only_kept and any(found is None for found in kept.values()):
        say("--- time and memory, each in a fresh process ---")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    reasons: dict[str, list[str]] = {name: [] for name in first}
    for turn, name in progress(turns, "time and memory", len(turns), None in kept.values()):
        found = kept[turn, name]
        if found is None and subject.only_kept:
            reasons[name].append(reason_of(NotMeasured(_why_not_kept(said[turn, name]))))
        elif found is None:
            try:
                found = _profiled(subject, first[name], folder / f"{name}-{turn}.json", asked[name])
            except Exception as error:
                reasons[name].append(reason_of(error))
        if found is not None:
            rounds[name].append(found)
    rounds, elsewhere = of_same_conditions(rounds, [*contents, "model"])
    for name, others in elsewhere.items():
        reasons[name] += ["measured under other conditions than the rest: left out"] * others
    for name, failed in reasons.items():
        if failed:
            of = f"{name}, {len(failed)} of {plan.measure.rounds} rounds"
            gaps.lacks("time and memory", "; ".join(dict.fromkeys(failed)), of)
    made = {
        name: gaps.part("time and memory", combined, several, of=name) for name, several in rounds.items() if several
    }
    return {name: found for name, found in made.items() if found is not None}


def _profiled(subject: Subject, cell: Cell, kept: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """One round of a run's time and memory, kept in a file."""
    kept.parent.mkdir(exist_ok=True)
    config = cell.config
    found = profile_run(cell.folder, config.data, subject.plan.split, config.layout, subject.plan.measure.brief)
    found = {"asked": asked, **found}
    write_json(kept, found)
    return found


def _other_protocols(subject: Subject, shown: Sequence[Cell], say: Say) -> dict[str, Any] | None:
    """What other protocols would have made of the first run that has results; kept, as it costs a short training."""
    if not subject.plan.measure.protocol:
        return None
    part = subject.part
    kept = subject.study / "other-protocols.json"
    cell = shown[0]
    train = subject.data.split("train")
    asked = {
        "run": cell.folder.name,
        "model": run_contents(cell.folder),
        **data_contents(part),
        "training data": data_contents(train, pictures=False),
        "split": subject.plan.split,
    }
    said: list[str] = []
    found = reusable(kept, asked, said.append if subject.only_kept else say, "other protocols")
    if found is not None:
        return found
    if subject.only_kept:
        raise NotMeasured(_why_not_kept(said))
    say("--- what it would have looked like by other protocols ---")
    found = {"asked": asked, "variant": cell.variant, "seed": cell.seed}
    with long_step("other protocols"):
        found |= other_protocols(load_aligner(cell.folder), train, part)
    write_json(kept, found)
    return found
