"""A study from its plan to its report: train every cell, measure all alike, write down what was found.

What is finished is never done again: a study that was stopped, however, goes on where it was when its command is given
again. A cell that fails is written down with its reason, and the rest goes on; the next call tries it anew.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.fingerprint import data_contents, run_contents
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.minimal_pairs import MinimalPair, minimal_pairs_of, read_minimal_pairs
from clipvisionalign.data.scenes import random_scenes, read_scenes, write_scenes
from clipvisionalign.files import PART, remove, written_aside
from clipvisionalign.models.aligner import Remembered, load_aligner
from clipvisionalign.pictures import open_picture
from clipvisionalign.progress import long_step, progress
from clipvisionalign.study.cells import (
    TOWERS,
    cut_captions,
    measure_cell,
    ranks_of,
    refuse_other,
    reusable,
    settings_hash,
    train_cell,
    with_commits,
    write_json,
)
from clipvisionalign.study.examples import examples_of
from clipvisionalign.study.plan import Cell, Drawing, Plan, cells_of, check_plan, data_of
from clipvisionalign.study.probe import Probe, estimated, probes_of, steps_for
from clipvisionalign.study.profile import combined, profile_run
from clipvisionalign.study.protocol import other_protocols
from clipvisionalign.study.report import build_report, write_report
from clipvisionalign.study.results import Measured
from clipvisionalign.study.text_only import twins_told_apart

Say = Callable[[str], None]

#: In a study's folder: its plan, the scenes that it drew, the steps that its seconds pay for.
PLAN, SCENES, BUDGET = "plan.yaml", "scenes", "budget.json"


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
    plan = _checked(plan, study, say)
    with _removed_if_refused(study):
        data = _open_data(plan, study, study / SCENES, say)
        part = data.split(plan.split)
        pairs = _minimal_pairs(plan, part)
        steps = _steps(plan, cells_of(plan, study), study, part, say)
        cells = with_commits(cells_of(plan, study, steps), study, say)
        # From here on it is this plan's study.
        study.mkdir(parents=True, exist_ok=True)
        _keep_steps(plan, study, steps)
        with written_aside(study / PLAN) as aside:
            aside.write_text(plan_text(plan), encoding="utf-8")
    # What frozen towers give of an image or a caption is the same in all cells.
    remembered: dict[str, Remembered] = {}
    failed = _train(cells, say, remembered)
    # A split cannot overlap with itself: the check is of data sets with more than one.
    overlap = [problem.message for problem in data.problems if "two splits" in problem.kind]
    apart = overlap if len(data.split_sizes()) > 1 else None
    finished = [cell for cell in cells if (cell.variant, cell.seed) not in failed]
    say("--- figures, audits, minimal pairs ---")
    measured = []
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
    """How long a study will take, in seconds by what they go into, from a few steps of each variant. Nothing is
    written; what `run_study` would refuse is refused."""
    study = Path(out)
    plan = _checked(plan, study, say)
    with tempfile.TemporaryDirectory() as folder:
        drawn = study / SCENES if (study / SCENES).exists() else Path(folder) / SCENES
        data = _open_data(plan, study, drawn, say)
        part = data.split(plan.split)
        _minimal_pairs(plan, part)
        cells = cells_of(plan, study)
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
    left = {f"{name}{part}" for name in (SCENES, PLAN, BUDGET, TOWERS) for part in ("", PART)}
    known = not study.exists() or (study / PLAN).is_file()
    if not known and (not study.is_dir() or {path.name for path in study.iterdir()} - left):
        raise FileExistsError(f"{study}: is there already and no study; give another --out")
    if plan.budget.same == "seconds" and (idle := _idle_settings(plan)):
        say(f"no effect of {', '.join(idle)}: every variant trains for {plan.budget.seconds:g} seconds")
    return plan


def _idle_settings(plan: Plan) -> list[str]:
    """Settings that a budget of seconds takes the place of, by their keys."""
    given = {"settings": plan.settings}
    given |= {f"variants.{name}.settings": variant.settings for name, variant in plan.variants.items()}
    return [f"{key}.{name}" for key, settings in given.items() for name in ("epochs", "steps") if name in settings]


@contextmanager
def _removed_if_refused(study: Path) -> Iterator[None]:
    """What the body drew, and the folder that it made for that, are not left where the body raises an error."""
    there = {study: study.exists(), study / SCENES: (study / SCENES).exists()}
    try:
        yield
    except Exception:
        if not there[study / SCENES]:
            remove(study / SCENES)
        if not there[study] and study.is_dir() and not any(study.iterdir()):
            study.rmdir()
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


def is_drawn(scenes: Path) -> bool:
    """Whether a folder holds scenes, whole."""
    return (scenes / "scenes.jsonl").is_file()


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
    found = json.loads(kept.read_text()) if kept.is_file() else {"steps": {}}
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
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    before = found if found.get("seconds") == plan.budget.seconds else {}
    now = {cell.variant: settings_hash(cell) for cell in cells_of(plan, study)}
    told = {
        "seconds": plan.budget.seconds,
        "steps": before.get("steps", {}) | steps,
        "settings": before.get("settings", {}) | now,
    }
    if told != found:
        write_json(kept, told)


def _train(cells: list[Cell], say: Say, remembered: dict[str, Remembered]) -> dict[tuple[str, int], str]:
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
                train_cell(cell, say, remembered)
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
        "split": plan.split,
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
