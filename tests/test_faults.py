"""Nothing that was paid for is lost: a study that fails, or is killed, in any of its stages keeps what is finished, and a
report can be made from what is there, which shows what is missing.

FAULTS=all goes through all stages both ways; else a dozen of them.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import STAGES, TOLD, Stage
from forked import Forked, wait_until
from test_refused import contents

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.hashes import hash_file
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.files import Held, run_lock
from clipvisionalign.log import log_to
from clipvisionalign.models.device import library_versions
from clipvisionalign.study.config import Plan
from clipvisionalign.study.folder import LOCK, REPORT_LOCK
from clipvisionalign.study.gaps import read_failures
from clipvisionalign.study.plan_file import plan_text
from clipvisionalign.study.report.build import write_report
from clipvisionalign.study.report.costs import measured_by_note
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import trials_without_results
from clipvisionalign.study.runner import read_study_report, run_study


def cases(seed: int) -> list[str]:
    every = list(STAGES)
    return every if os.environ.get("FAULTS") == "all" else sorted(random.Random(seed).sample(every, 6))


@pytest.fixture(scope="module")
def few(study: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished study with two of its variants only."""
    folder = tmp_path_factory.mktemp("few") / "study"
    shutil.copytree(study, folder, copy_function=os.link)
    (folder / "plan.yaml").unlink()
    two = replace(plan, variants={name: plan.variants[name] for name in ("self", "late")})
    (folder / "plan.yaml").write_text(plan_text(two))
    return folder


@pytest.fixture
def two(plan: Plan) -> Plan:
    measure = replace(plan.measure, examples=1)
    return replace(plan, variants={name: plan.variants[name] for name in ("self", "late")}, measure=measure)


def paid_for(study: Path) -> dict[str, str]:
    """By content what a study's cells were trained for, and what was measured of them."""
    kept = ("model.safetensors", "results.json", "ranks.npz", "measured.json", "config.yaml")
    files = [path for name in kept for path in study.glob(f"cells/*/{name}")] + [*study.glob("costs/*.json")]
    return {path.relative_to(study).as_posix(): hash_file(path) for path in files}


def lost(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if after.get(name) != before[name]]


def shown_in(study: Path) -> str:
    return (study / "report.html").read_text(encoding="utf-8")


def check_gap(stage: Stage, report: dict[str, Any], page: str, reason: str) -> None:
    """What the stage makes is missing in the report, and shown as missing; every other cell has its results."""
    trials = {f"{trial.variant}-{trial.seed}" for trial in trials_without_results(report)}
    of_trial = stage.lacks in ("late-1",)
    assert trials == ({stage.lacks} if of_trial else set())
    parts = {part["part"] for part in report["not_made"]}
    if stage.lacks and not of_trial and stage.lacks not in ("plot", "table"):
        assert stage.lacks in parts
    if stage.lacks:
        assert reason in page
    if of_trial:
        assert report["results"]["variants"]["late"]["seeds"] == [0]
        assert "late (1 of 2 seeds)" in page
        assert "mean of 1 to 2 seeds" in page
        assert "mean of 2 seeds" not in page.replace("2 seeds out of", "")


@pytest.mark.parametrize("name", cases(1))
def test_a_stage_that_fails_costs_no_more_than_itself(name, few, two, tmp_path, monkeypatch):
    stage, study = STAGES[name], tmp_path / "study"
    faults.disturbed(study, few, stage)
    before = paid_for(study)
    faults.quick(monkeypatch.setattr)
    with monkeypatch.context() as within:
        faults.strike(within.setattr, stage, faults.raises)
        if stage.lacks:
            report = run_study(two, study)
            check_gap(stage, report, shown_in(study), TOLD)
        else:
            with pytest.raises(OSError, match=TOLD):
                run_study(two, study)
    assert not lost(before, paid_for(study))
    # From what is there, in a process that knows nothing of what happened; with the reason where a cell failed.
    report = read_study_report(study)
    write_report(study, report)
    if stage.lacks not in ("", "plot", "table"):
        check_gap(stage, report, shown_in(study), TOLD)
    else:
        assert trials_without_results(report) == report["not_made"] == []


@pytest.mark.parametrize("name", cases(2))
def test_a_study_that_is_killed_keeps_what_it_has_and_goes_on(name, few, two, tmp_path, monkeypatch):
    stage, study = STAGES[name], tmp_path / "study"
    faults.disturbed(study, few, stage)
    before = paid_for(study)
    process = Forked(faults.killed_study, str(study), name, out=tmp_path / "said.txt")
    assert process.wait(300) == -signal.SIGKILL, process.said
    assert not lost(before, paid_for(study))
    faults.quick(monkeypatch.setattr)
    report = read_study_report(study)
    write_report(study, report)
    kept = [part for part in report["not_made"] if part["reason"] == "not measured yet"]
    if stage.lacks == "late-1":
        (trial,) = trials_without_results(report)
        assert (trial.variant, trial.seed) == ("late", 1)
        assert trial.state == ("unfinished" if name == "training" else "not measured")
        assert trial.reason in shown_in(study)
    elif stage.removed:
        assert {part["part"] for part in kept} == {stage.lacks}
        assert "not measured yet" in shown_in(study)
    else:
        assert trials_without_results(report) == report["not_made"] == []
    assert not list(study.glob("**/*.part")) or name in ("keeping figures", "report.json", "page")


# --- what is damaged -------------------------------------------------------------------------------------------------

HALF = '{"asked": {"model": "0123'
DAMAGES = {
    "figures of a cell": ("cells/late-1/measured.json", HALF, ""),
    "ranks of a cell": ("cells/late-1/ranks.npz", "PK", ""),
    "figures of a training": ("cells/late-1/results.json", HALF, ""),
    "weights": ("cells/late-1/model.safetensors", None, "late-1"),
    "learning curve": ("cells/late-1/metrics.jsonl", None, "learning curve"),
    "data of a training": ("cells/late-1/data.json", HALF, "late-1"),
    "cost": ("costs/late-0.json", HALF, "time and memory"),
    "other protocols": ("other-protocols.json", HALF, "other protocols"),
    "reasons": ("failed.json", HALF, ""),
    "report": ("report.json", HALF, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_cannot_be_read_costs_no_more_than_what_it_held(name, few, two, tmp_path, monkeypatch):
    """`report` shows it as missing, and the study makes it again where it can."""
    file_name, text, lacks = DAMAGES[name]
    study = tmp_path / "study"
    faults.disturbed(study, few, Stage(""))
    before = paid_for(study)
    removed = [*faults.ONE, file_name] if name == "learning curve" else [file_name]
    for path in removed:
        (study / path).unlink(missing_ok=True)
    if text is not None:
        (study / file_name).write_text(text)
    faults.quick(monkeypatch.setattr)
    monkeypatch.setattr("clipvisionalign.study.cost_rounds.profile_run", lambda *given: json.loads(few_cost(few)))
    monkeypatch.setattr(
        "clipvisionalign.study.assemble.measure_flawed_protocols", lambda *given: {"bars": [], **NO_LEAK}
    )
    kept = read_study_report(study)
    write_report(study, kept)
    if name == "weights" or file_name in (*faults.ONE, "cells/late-1/ranks.npz"):
        ((variant, seed, state),) = [(trial.variant, trial.seed, trial.state) for trial in trials_without_results(kept)]
        assert (variant, seed, state) == ("late", 1, "not measured")
    elif lacks in ("time and memory", "other protocols"):
        assert {part["part"] for part in kept["not_made"]} == {lacks}
    said: list[str] = []
    with log_to(said.append):
        after = run_study(two, study)
    assert [name for name in lost(before, paid_for(study)) if name not in (*removed, *faults.ONE)] == []
    trials = {f"{trial.variant}-{trial.seed}" for trial in trials_without_results(after)}
    assert trials == ({lacks} if lacks == "late-1" else set())
    assert {part["part"] for part in after["not_made"]} == ({lacks} if lacks == "learning curve" else set())


# --- what was told before --------------------------------------------------------------------------------------------


def states(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {f"{each.variant}-{each.seed}": (each.state, each.reason) for each in trials_without_results(report)}


@pytest.fixture
def alone(few, tmp_path, monkeypatch) -> Path:
    """The finished study without its report."""
    faults.quick(monkeypatch.setattr)
    study = tmp_path / "study"
    faults.disturbed(study, few, Stage(""))
    (study / "report.json").unlink(missing_ok=True)
    return study


def failed_before(study: Path, reason: str) -> None:
    # Not into a file that other tests share.
    (study / "failed.json").unlink(missing_ok=True)
    (study / "failed.json").write_text(json.dumps({"late-1": reason}))


def untrained(trial: Path, step: int) -> None:
    for name in ("results.json", "measured.json", "ranks.npz"):
        (trial / name).unlink(missing_ok=True)
    (trial / "metrics.jsonl").unlink()
    (trial / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")


def test_a_former_failure_is_not_told_of_a_cell_that_came_further(alone):
    (alone / "cells" / "late-1" / "measured.json").unlink()
    failed_before(alone, "OutOfMemoryError: CUDA out of memory")
    assert states(read_study_report(alone))["late-1"][0] == "not measured"
    failed_before(alone, "measuring: OSError: no space")
    assert states(read_study_report(alone))["late-1"] == ("failed", "measuring: OSError: no space")


def test_a_cell_that_is_begun_again_has_not_failed(alone, two, monkeypatch):
    untrained(alone / "cells" / "late-1", 40)
    failed_before(alone, "OSError: no space left on device")

    def stopped(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "clipvisionalign.study.trials.train_trial",
        lambda cell, **options: (cell.folder / "results.json").is_file() or stopped(),
    )
    with pytest.raises(KeyboardInterrupt):
        run_study(two, alone)
    assert states(read_study_report(alone)) == {"late-1": ("unfinished", "stopped after step 40")}


def test_a_page_follows_a_training_that_goes_on(alone):
    for step in (40, 80):
        untrained(alone / "cells" / "late-1", step)
        report = read_study_report(alone)
        assert states(report) == {"late-1": ("unfinished", f"stopped after step {step}")}
        write_report(alone, report)


def holds(*locks: str) -> int:
    with ExitStack() as until_killed:
        for lock in locks:
            until_killed.enter_context(run_lock(Path(lock), "is at it"))
        Path(f"{locks[0]}.held").touch()
        time.sleep(600)
    return 0


@pytest.fixture
def another(tmp_path):
    """Makes a process that holds locks, and waits until it does."""
    processes = []

    def hold(*locks: Path) -> int:
        processes.append(Forked(holds, *map(str, locks), out=tmp_path / "said.txt"))
        wait_until(Path(f"{locks[0]}.held").exists, processes[-1])
        Path(f"{locks[0]}.held").unlink()
        return processes[-1].process.pid

    yield hold
    for process in processes:
        process.kill()


@pytest.mark.parametrize("there", [True, False])
def test_a_study_that_another_process_carries_out_is_refused_before_anything_is_written(
    alone, two, tmp_path, another, there
):
    study = alone if there else tmp_path / "out"
    study.mkdir(exist_ok=True)
    pid = another(study / LOCK)
    before = contents(study)
    with pytest.raises(Held, match=rf"process {pid} on \S+ carries out this study"):
        run_study(replace(two, data="", scenes=60), study) if not there else run_study(two, study)
    assert contents(study) == before


def test_a_report_is_written_by_one_process_at_a_time(alone, another, capsys):
    another(alone / REPORT_LOCK)
    before = contents(alone)
    assert main(["report", str(alone)]) == 1
    assert "writes the report of this study" in capsys.readouterr().err
    assert contents(alone) == before


def test_a_cell_that_another_process_trains_has_not_failed(alone, two, another, monkeypatch):
    untrained(alone / "cells" / "late-1", 40)
    pid = another(alone / "cells" / "late-1" / "lock")
    assert states(read_study_report(alone)) == {
        "late-1": ("unfinished", f"process {pid} on {platform.node()} trains it: after step 40")
    }
    faults.quick(monkeypatch.setattr)
    report = run_study(two, alone)
    state, reason = states(report)["late-1"]
    assert state == "unfinished"
    assert reason.endswith(f"process {pid} on {platform.node()} trains this run; wait until it ends, or stop it")
    assert not report["failed"]
    assert "late-1" not in read_failures(alone)


@pytest.mark.parametrize("content", ['{"format": 2}', '{"format": 1, "results": {"by_topic": 3}}', HALF])
def test_a_report_that_cannot_be_read_is_never_lost(alone, content):
    (alone / "report.json").write_text(content)
    read_study_report(alone)
    assert (alone / "report.unread.json").read_text() == content
    for measured in alone.glob("cells/*/measured.json"):
        measured.unlink()
    (alone / "report.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read by this version"):
        read_study_report(alone)
    assert (alone / "report.json").read_text() == content


def test_figures_that_another_version_has_measured_are_told_as_such(alone, monkeypatch):
    """They are not measured again for it, nor for another machine."""
    assert measured_by_note(StudyReport.of(read_study_report(alone))) == ""
    now = library_versions()
    monkeypatch.setattr(
        "clipvisionalign.study.report.build.library_versions", lambda: {**now, "clipvisionalign": "9.9"}
    )
    report = read_study_report(alone)
    write_report(alone, report)
    note = f"this report: clipvisionalign 9.9; self, late: clipvisionalign {now['clipvisionalign']}"
    assert measured_by_note(StudyReport.of(report)) == note
    assert f"Not every accuracy was measured by these versions: {note}." in shown_in(alone)


def test_of_several_reports_that_cannot_be_read_none_is_lost(alone):
    unread = ['{"format": 2}', '{"format": 3}', HALF]
    for content in unread:
        (alone / "report.json").write_text(content)
        read_study_report(alone)
    assert sorted(path.read_text() for path in alone.glob("report.unread*.json")) == sorted(unread)


def test_a_page_stays_until_its_successor_is_whole(alone, monkeypatch):
    """Whatever the writing of another one ends in; where a package is missing, before anything is written."""
    write_report(alone, read_study_report(alone))
    (alone / "report.html").write_text("the earlier page")
    for missing in ("matplotlib", "jinja2"):
        (alone / "report.json").write_text('{"format": 2}')
        before = contents(alone)
        with monkeypatch.context() as within:
            within.setitem(sys.modules, missing, None)
            assert main(["report", str(alone)]) == 1
        assert contents(alone) == before
    (alone / "report.json").unlink()
    report = read_study_report(alone)
    monkeypatch.setattr("clipvisionalign.study.report.html.render_page", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(alone, report)
    assert (alone / "report.html").read_text() == "the earlier page"


def test_a_poorer_report_takes_the_place_of_none(alone):
    full_report = read_study_report(alone)
    assert not trials_without_results(full_report)
    write_report(alone, full_report)
    (alone / "cells" / "self-0" / "measured.json").unlink()
    said: list[str] = []
    with log_to(said.append):
        assert read_study_report(alone) == json.loads(json.dumps(full_report))
    assert any("self-0 of the report" in line for line in said)


def test_a_study_that_loses_a_result_keeps_its_earlier_report(alone, two, monkeypatch):
    """A cell that had one, and cannot be measured by now."""
    write_report(alone, read_study_report(alone))
    before = (alone / "report.json").read_bytes()
    (alone / "cells" / "late-1" / "measured.json").unlink()
    faults.strike(monkeypatch.setattr, STAGES["loading"], faults.raises)
    said: list[str] = []
    with log_to(said.append):
        run_study(two, alone)
    assert (alone / "report.json").read_bytes() == before
    assert any("late-1 of the report have no figures" in line for line in said)


def test_what_was_added_to_a_report_stays_or_is_told(alone):
    search = {"gallery": 9, "share": 78.0, "first": 5, "chance": 0.4, "queries": 50}
    measured = alone / "cells" / "late-1" / "measured.json"
    kept = measured.read_bytes()
    measured.unlink()
    before = read_study_report(alone) | {"search": search, "made_from": "other figures"}
    (alone / "report.json").write_text(json.dumps(before))
    again = read_study_report(alone)
    assert again["search"] == search
    assert any("78.0 %" in claim["text"] for claim in again["claims"])
    # Of other results it would tell something else.
    measured.write_bytes(kept)
    full_report = read_study_report(alone)
    assert "search" not in full_report
    assert "search" in {part["part"] for part in full_report["not_made"]}


NO_LEAK: dict[str, Any] = {"audit_of_the_leak": {"passed": False, "checks": []}}


def few_cost(study: Path) -> str:
    return (study / "costs" / "late-0.json").read_text()


# --- what makes every result impossible ------------------------------------------------------------------------------


def test_what_no_cell_could_pass_is_found_before_training(few, two, scenes_folder, tmp_path, monkeypatch, capsys):
    """An image in train and test, too few images for an audit, minimal pairs that are not there, a package that is
    missing: each before anything is trained; and a study that was trained all the same still gets its report."""
    trained: list[str] = []
    monkeypatch.setattr(
        "clipvisionalign.study.trials.train_trial", lambda cell, **options: trained.append(cell.folder.name)
    )
    data = tmp_path / "data"
    shutil.copytree(scenes_folder, data)
    train, test = (read_captioned_images(data).split(split).images[0] for split in ("train", "test"))
    test.write_bytes(train.read_bytes())
    small = {"train": 10, "dev": 2, "test": 2}
    impossible = {
        "as every audit would fail: 1 images or identities stand in two splits": {"data": str(data)},
        "an audit needs at least 10 images, not 2": {
            "data": str(write_scenes(tmp_path / "small", 14, 1, 64, False, small))
        },
        "nowhere.json": {"measure": replace(two.measure, minimal_pairs=str(tmp_path / "nowhere.json"))},
    }
    for number, (message, other) in enumerate(impossible.items()):
        with pytest.raises((DataError, OSError, ValueError), match=message):
            run_study(replace(two, **other), tmp_path / f"out-{number}")
    with monkeypatch.context() as within:
        within.setattr("clipvisionalign.study.report.build.find_spec", lambda name: None if name == "nltk" else name)
        with pytest.raises(ModuleNotFoundError, match="nltk"):
            run_study(two, tmp_path / "out-nltk")
    assert not trained
    # Trained by an earlier version, which found it too late: its report is made, without a result and with the reason.
    study = tmp_path / "study"
    faults.disturbed(
        study,
        few,
        Stage("", tuple(f"cells/{name}-{seed}/measured.json" for name in ("self", "late") for seed in (0, 1))),
    )
    assert main(["report", str(study)]) == 0
    assert "not measured" in capsys.readouterr().out
    page = shown_in(study)
    assert "No cell has results." in page
    assert page.count("trained, and not measured yet") == 4
