"""A study from its plan to its report: train every cell, measure all alike, write down what was found.

What is finished is never done again: a study that was stopped, however, goes on where it was when its command is given
again. A cell that fails is written down with its reason, and the rest goes on; the next call tries it anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.fingerprint import data_contents, run_contents
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.minimal_pairs import MinimalPair, minimal_pairs_of, read_minimal_pairs
from clipvisionalign.data.scenes import write_scenes
from clipvisionalign.files import written_aside
from clipvisionalign.models.aligner import Remembered, load_aligner
from clipvisionalign.progress import long_step, progress
from clipvisionalign.study.cells import (
    cut_captions,
    measure_cell,
    ranks_of,
    refuse_other,
    reusable,
    train_cell,
    with_commits,
    write_json,
)
from clipvisionalign.study.examples import examples_of
from clipvisionalign.study.plan import Cell, Plan, cells_of, check_plan, data_of
from clipvisionalign.study.probe import Probe, estimated, probes_of, steps_for
from clipvisionalign.study.profile import combined, profile_run
from clipvisionalign.study.protocol import other_protocols
from clipvisionalign.study.report import build_report, write_report
from clipvisionalign.study.results import Measured
from clipvisionalign.study.text_only import twins_told_apart

Say = Callable[[str], None]

#: The plan in a study's folder.
PLAN = "plan.yaml"


def run_study(
    plan: Plan, out: str | Path, say: Say = print, more: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Carry out a plan in the folder `out`; returns what its report.json holds.

    more: adds to the report before it is written.
    Raises ValueError for a plan that cannot be carried out, DataError for unusable data, FileExistsError where runs
    with other settings stand in the way.
    """
    start = time.perf_counter()
    study = Path(out)
    _open_folder(plan, study)
    data = _open_data(plan, study, say)
    part = data.split(plan.split)
    cells = with_commits(_cells(plan, study, part, say), study, say)
    for cell in cells:
        refuse_other(cell)
    (study / PLAN).write_text(plan_text(plan))
    failed = _train(cells, say)
    pairs = _minimal_pairs(plan, part)
    # A split cannot overlap with itself: the check is of data sets with more than one.
    overlap = [problem.message for problem in data.problems if "two splits" in problem.kind]
    apart = overlap if len(data.split_sizes()) > 1 else None
    finished = [cell for cell in cells if (cell.variant, cell.seed) not in failed]
    say("--- figures, audits, minimal pairs ---")
    measured = []
    remembered: dict[str, Remembered] = {}
    for cell in progress(finished, "measuring runs", len(finished)):
        try:
            found = measure_cell(cell, part, plan.split, pairs, apart, plan.measure.audit_images, say, remembered)
            measured.append(Measured(cell.variant, cell.seed, found, ranks_of(cell, plan.split)))
        except Exception as error:
            failed[cell.variant, cell.seed] = f"measuring: {type(error).__name__}: {error}"
            say(f"{cell.folder.name}: FAILED: {failed[cell.variant, cell.seed]}")
    if not measured:
        told = "; ".join(f"{name}-{seed}: {reason}" for (name, seed), reason in failed.items())
        raise ValueError(f"{study}: no cell came to its end: {told}")
    finished = [cell for cell in finished if (cell.variant, cell.seed) not in failed]
    costs = _costs(plan, study, finished, part, say)
    with long_step("minimal pairs by words alone"):
        controls = {name: twins_told_apart(data.split("train").captions, some) for name, some in pairs.items()}
    other = _other_protocols(plan, study, finished, data, part, say)
    with long_step("examples"):
        examples = examples_of(finished, measured, part, plan.measure.examples)
    first = {cell.variant: cell for cell in reversed(finished)}
    cut = {name: cut_captions(cell.folder, part, plan.split) for name, cell in reversed(first.items())}
    report = build_report(plan, study, data, part, measured, failed, costs, controls, other, examples, cut)
    if more is not None:
        more(report)
    with long_step("writing the report"):
        write_report(study, report)
    say(f"{study}: report.html, report.json, figures/, tables/ ({(time.perf_counter() - start) / 60:.1f} min)")
    return report


def plan_ahead(plan: Plan, out: str | Path, say: Say = print) -> dict[str, float]:
    """How long a study will take, in seconds by what they go into, from a few steps of each variant."""
    study = Path(out)
    if not plan.data and not (study / "scenes").is_dir():
        study.mkdir(parents=True, exist_ok=True)
    data = _open_data(plan, study, say)
    part = data.split(plan.split)
    cells = cells_of(plan, study)
    probes = probes_of(cells, part, say)
    if plan.budget.same == "seconds":
        cells = cells_of(plan, study, {name: steps_for(plan.budget.seconds, each) for name, each in probes.items()})
    return estimated(plan, cells, probes, data.split_sizes()["train"], part)


def _open_folder(plan: Plan, study: Path) -> None:
    """Make the folder; the plan in it marks it as a study's, and is replaced once this plan turns out to fit."""
    check_plan(plan)
    if study.exists() and (not study.is_dir() or (any(study.iterdir()) and not (study / PLAN).is_file())):
        raise FileExistsError(f"{study}: is there already and no study; give another --out")
    study.mkdir(parents=True, exist_ok=True)
    if not (study / PLAN).is_file():
        (study / PLAN).write_text(plan_text(plan))


def plan_text(plan: Plan) -> str:
    """A plan as its YAML file."""
    import yaml

    return yaml.safe_dump(plan.to_dict(), sort_keys=False)


def _open_data(plan: Plan, study: Path, say: Say) -> CaptionedImages:
    """The checked data set whole; scenes are drawn once."""
    source = Path(data_of(plan, study))
    if not plan.data and not (source / "scenes.jsonl").is_file():
        _draw(source, plan)
        say(f"{source}: {plan.scenes:,} scenes drawn, {'two' if plan.drawing.plain else 'five'} captions each")
    data = read_captioned_images(source, plan.layout, plan.group).with_identity(plan.identity)
    if plan.split not in data.split_sizes():
        raise DataError(f"{source}: the split '{plan.split}' is empty; it has {', '.join(data.split_sizes())}")
    kept, _ = check(data, full=True, shown=True)
    return kept


def _draw(folder: Path, plan: Plan) -> None:
    """A drawing that was cut off is begun again."""
    how = plan.drawing
    with written_aside(folder, sync=False) as aside:
        write_scenes(aside, plan.scenes, how.seed, how.pixels, how.plain, how.splits or None)


def _cells(plan: Plan, study: Path, part: CaptionedImages, say: Say) -> list[Cell]:
    """The cells, their steps known: a budget of seconds is turned into steps once, and kept."""
    if plan.budget.same == "pictures":
        return cells_of(plan, study)
    kept = study / "budget.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    if known.get("seconds") != plan.budget.seconds:
        known = {"seconds": plan.budget.seconds, "steps": {}}
    unknown = [cell for cell in cells_of(plan, study) if cell.variant not in known["steps"]]
    if unknown:
        say("--- how many steps the budget pays for ---")
        probes: dict[str, Probe] = probes_of(unknown, part, say)
        known["steps"] |= {name: steps_for(plan.budget.seconds, each) for name, each in probes.items()}
        write_json(kept, known)
    return cells_of(plan, study, known["steps"])


def _train(cells: list[Cell], say: Say) -> dict[tuple[str, int], str]:
    """Train what is not finished; returns the reasons of what failed."""
    failed: dict[tuple[str, int], str] = {}
    start = time.perf_counter()
    trained = 0
    for number, cell in enumerate(cells, 1):
        left = [other for other in cells[number - 1 :] if not (other.folder / "results.json").is_file()]
        eta = ""
        if trained and left:
            eta = f", about {(time.perf_counter() - start) / trained * len(left) / 60:.0f} min of training left"
        say(f"--- {cell.variant}, seed {cell.seed}: cell {number} of {len(cells)}{eta} ---")
        done = (cell.folder / "results.json").is_file()
        base = Path(cell.config.init).name if cell.config.init else ""
        if base and not (Path(cell.config.init) / "results.json").is_file():
            failed[cell.variant, cell.seed] = f"it stands on {base}, which failed"
        else:
            try:
                train_cell(cell, say)
                trained += not done
                continue
            except Exception as error:
                failed[cell.variant, cell.seed] = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"{cell.folder.name}: FAILED: {failed[cell.variant, cell.seed]}; the rest goes on")
    return failed


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


def _costs(plan: Plan, study: Path, finished: list[Cell], part: CaptionedImages, say: Say) -> dict[str, dict[str, Any]]:
    """Time and memory of each variant's first finished run, in fresh processes that take turns."""
    folder = study / "costs"
    folder.mkdir(exist_ok=True)
    first: dict[str, Cell] = {}
    for cell in finished:
        first.setdefault(cell.variant, cell)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    turns = [(turn, name) for turn in range(plan.measure.rounds) for name in first]
    brief = {"brief": plan.measure.brief}
    asked = {name: {"model": run_contents(cell.folder), **data_contents(part), **brief} for name, cell in first.items()}
    for turn, name in turns:
        kept = folder / f"{name}-{turn}.json"
        if reusable(kept, asked[name], say, f"time and memory of {name}") is None:
            kept.unlink(missing_ok=True)
    todo = [turn for turn in turns if not (folder / f"{turn[1]}-{turn[0]}.json").is_file()]
    if todo:
        say("--- time and memory, each in a fresh process ---")
    for turn, name in progress(turns, "time and memory", len(turns), bool(todo)):
        kept = folder / f"{name}-{turn}.json"
        if not kept.is_file():
            config = first[name].config
            found = profile_run(first[name].folder, config.data, plan.split, config.layout, plan.measure.brief)
            write_json(kept, {"asked": asked[name], **found})
        rounds[name].append({key: value for key, value in json.loads(kept.read_text()).items() if key != "asked"})
    return {name: combined(several) for name, several in rounds.items() if several}


def _other_protocols(
    plan: Plan, study: Path, finished: list[Cell], data: CaptionedImages, part: CaptionedImages, say: Say
) -> dict[str, Any] | None:
    """What other protocols would have made of the first variant's first run; kept, as it costs a short training."""
    if not plan.measure.protocol:
        return None
    kept = study / "other-protocols.json"
    cell = finished[0]
    train = data.split("train")
    asked = {
        "run": cell.folder.name,
        "model": run_contents(cell.folder),
        **data_contents(part),
        "training data": data_contents(train, pictures=False),
    }
    found = reusable(kept, asked, say, "other protocols")
    if found is not None:
        return found
    say("--- what it would have looked like by other protocols ---")
    found = {"asked": asked, "variant": cell.variant, "seed": cell.seed}
    with long_step("other protocols"):
        found |= other_protocols(load_aligner(cell.folder), train, part)
    write_json(kept, found)
    return found
