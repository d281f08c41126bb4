"""What is refused, or only asked, changes nothing on disk: every command, by what its folder holds before and after."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_reports import made_report
from PIL import Image
from test_study import edit_captions

from clipvisionalign.cli import COMMANDS, main
from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.run_data import recognised
from clipvisionalign.data.scene_difficulty import SceneDifficulty
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.log import log_to
from clipvisionalign.study import assemble, budget, runner
from clipvisionalign.study.config import Budget, Drawing, Plan, Variant, trials_of
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.plan_file import plan_text
from clipvisionalign.study.runner import estimate_study_time, run_study
from clipvisionalign.study.time_estimate import StepTiming
from clipvisionalign.study.trial_checks import recorded_layout
from clipvisionalign.training.data import hashes_as_read


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def world(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    """A data set, a run of it, an index, a folder that is none of these, and plans."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(scenes_folder, folder / "data")
    shutil.copytree(tiny_runs["self"], folder / "run")
    for split, name in product(("train", "test"), ("circle", "star")):
        (folder / "classes" / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "classes" / split / name / "a.png")
    (folder / "other.txt").write_text("mine")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    (folder / "plan.yaml").write_text("data: data\nvariants: [self]\nseeds: [0]\n")
    (folder / "wrong.yaml").write_text("data: data\nvariants: [self]\nseeds: [0]\nbudget: {seconds: 3}\n")
    (folder / "settings.yaml").write_text("epochs: 1\nepochs_: 2\n")
    (folder / "few.yaml").write_text("scenes: 1\ndrawing: {pixels: 32}\nvariants: [self]\nseeds: [0]\n")
    (folder / "broken").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "broken" / f"{split}.jpg").write_bytes(b"no image")
    rows = [f"{split}.jpg,a caption,{split}" for split in ("train", "dev", "test")]
    (folder / "broken" / "metadata.csv").write_text("\n".join(["file_name,caption,split", *rows]) + "\n")
    return folder


REFUSED: dict[str, list[str]] = {
    "scenes": ["other", "other --images 5", "new --images 0", "new --size 3", "new --images many", "plan.yaml",
               "new --images 5 --train 5", "new --dev 0", "new --groups 9", "new --relations 2 --captions 1", "new --tokens 512",
               "new --classes shape --test 90", "new --captions 1 --tokens 99", "new --needle end"],
    "check": ["nowhere", "data --layout nothing", "data --max-tokens 3", "data --write-splits plan.yaml",
              "data --tokens nowhere --write-splits new.csv"],
    "shards": ["broken new", "nowhere new", "data new --per-shard 0", "data new --layout nothing"],
    "train": ["broken --out new", "data --out run --epochs 1",
              "data --out other --overwrite true", "data --out new --epochs 0",
              "data --out new --epoch 1", "nowhere --out new", "data --out new --model.text_tower.name nowhere",
              "data --out new --config settings.yaml", "data --out new --freeze all", "--resume other",
              "data --out new --recipe none", "data --out new --init other",
              "data --out new --model.design none", "data --out new --warmup 2",
              "data --out new --captions joined --identity caption", "data --out new --captions join",
              "data --out new --captions joined --init run --distill 1"],
    "evaluate": ["other", "run --split none", "run --data nowhere", "run --candidates 3", "--vectors nothing.npy", "",
                 "run --captions join", "run --captions joined --identity caption"],
    "classify": ["run data", "run nowhere", "other classes", "run classes --split none", "run classes --templates none",
                 "run classes --names nowhere", "run classes --out other.txt --overwrite", "run classes --overwrite",
                 "run classes --by words", "run classes --split none --out new", "run"],
    "encode": ["run --data broken --out new/vectors.parquet", "run --data broken --out new/vectors.npy",
               "other --out new.parquet", "run --out new.txt", "run --out new.parquet --split none",
               "run data --data data --out new.parquet", "run --out new.npy --distractors nowhere", "run"],
    "audit": ["other", "run --split none", "run --data nowhere", "run --sample 2"],
    "blend": ["other --out new", "nowhere --out new", "run --out new --alpha 2", "run --out new --with nowhere", "run"],
    "worth": ["other", "nowhere", "run --split none", "run --with nowhere", "run --keep 2", ""],
    "curve": ["other", "nowhere", "data", "run --out plan.yaml", ""],
    "study": ["few.yaml --out new", "few.yaml --out new --dry-run", "plan.yaml --data broken --out new", "nothing",
              "wrong.yaml --out new", "plan.yaml --out other", "plan.yaml --out plan.yaml",
              "plan.yaml --out new --data nowhere", "plan.yaml --out new --split none", "plan.yaml --out new --seeds 1,1",
              "plan.yaml --out new --seeds x", "plan.yaml --out new --seeds=", "plan.yaml --out new --seconds 0",
              "plan.yaml --out new --same pictures --seconds 3", "plan.yaml --out new --variants none",
              "plan.yaml --out new --variants=", "plan.yaml --out other --dry-run", "wrong.yaml --out new --dry-run",
              "plan.yaml --out new --data nowhere --dry-run", "data --out new", "scenes --out new --split none"],
    "report": ["other --compare nowhere --out new/page.html", "other", "nowhere", "other --compare nowhere"],
    "verify": ["other", "nowhere", "plan.yaml", ""],
    "calibrate": ["other data", "nowhere data", "run nowhere", "run", "run data --split none", "run data --out plan.yaml",
                  "run --judged plan.yaml", "run data --layout nothing", "run broken"],
    "index": ["run data --out new --captions --layout csv",
              "other data --out new", "run nowhere --out new", "run data --out other",
              "run data --out new --metadata nowhere.csv", "run data --out new --captions --layout nothing",
              "run data --out new --patches",
              "run data --out new --vectors int4", "run data --out new --vector-width 7",
              "run data --out new --shards 0", "run data --out new --shards 101"],
    "search": ["other dog", "nowhere dog", "other"],
    "serve": ["other", "nowhere", "nowhere --ray", "index --replicas 2", "index --replicas 0",
              "index --ray --replicas 0", "index --ray 127.0.0.1:1", "other --token-file nowhere"],
    "export": ["run --onnx plan.yaml/new", "run --huggingface plan.yaml/new", "other --onnx new",
               "other --huggingface new", "run", "run --huggingface other"],
    "duplicates": ["other", "nowhere", "other --near 2", "other --null", "other --paths --scenes", "nowhere --decisions",
                   "other --not a.jpg b.jpg", "nowhere --forget a.jpg", "other --not", "other --json --paths", ""],
    "completion": ["", "ksh"],
    "explain": ["run plan.yaml dog --out new/map.png", "run data/images dog --out new/map.png",
                "other a.jpg dog --out new.png", "run nowhere.jpg dog --out new.png"],
}  # fmt: skip


def test_every_command_is_here():
    assert set(REFUSED) == set(COMMANDS)


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_refused_call_changes_nothing(world, monkeypatch, capsys, name):
    monkeypatch.chdir(world)
    before = contents(world)
    for given in REFUSED[name]:
        # What would be written lies in folders that are not there.
        arguments = re.sub(r"\bnew\b", "deep/er/new", given)
        try:
            status = main([name, *arguments.split()])
        except SystemExit as left:
            status = left.code
        stderr = capsys.readouterr().err
        assert status in (1, 2), arguments
        assert stderr.strip(), arguments
        now = contents(world)
        assert now == before, (arguments, {path for path in {*now, *before} if now.get(path, 0) != before.get(path, 0)})


# --- studies -----------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """A study has come to its training."""


@pytest.fixture
def quick(monkeypatch):
    """Studies that end where they would begin to train, and steps that take a second each; the cells that are asked for."""
    asked: list[Any] = []

    def train(trials: list[Any], *more: Any, **options: Any) -> None:
        asked[:] = trials
        raise Reached

    def probes(trials: list[Any], *more: Any) -> dict[str, StepTiming]:
        return {trial.variant: StepTiming(1.0, 0.01, 0.001) for trial in trials}

    monkeypatch.setattr(runner, "train_trials", train)
    monkeypatch.setattr(runner, "time_variants", probes)
    monkeypatch.setattr(budget, "time_variants", probes)
    monkeypatch.setattr(runner, "refuse_unstartable", lambda *given: None)
    return asked


def begun(plan: Plan, out: Path, steps: dict[str, int] | None = None) -> None:
    """Leave a study as it is once its runs have begun."""
    with pytest.raises(Reached):
        run_study(plan, out)
    for trial in trials_of(plan, out, steps):
        trial.folder.mkdir(parents=True)
        (trial.folder / "config.yaml").write_text(yaml.safe_dump(asdict(trial.config)))


SPLITS = {"train": 40, "dev": 10, "test": 10}
SCENES = Plan(
    scenes=60, drawing=Drawing(pixels=32, splits=SPLITS), seeds=[0], variants={"self": Variant(), "late": Variant()}
)  # fmt: skip


def test_a_study_that_is_only_asked_about_draws_nothing_and_blocks_nothing(quick, tmp_path):
    out = tmp_path / "out"
    for plan in (SCENES, replace(SCENES, budget=Budget("seconds", 30.0))):
        assert estimate_study_time(plan, out)["training"] > 0
        assert not out.exists()
    with pytest.raises(Reached):
        run_study(SCENES, out)
    before = contents(out)
    assert estimate_study_time(SCENES, out)["training"] > 0
    assert contents(out) == before


def test_other_scenes_than_those_that_are_drawn_are_refused(quick, tmp_path):
    out = tmp_path / "out"
    begun(SCENES, out)
    before = contents(out)
    with pytest.raises(Reached):
        run_study(SCENES, out)
    others = [
        replace(SCENES, scenes=61, drawing=Drawing(pixels=32)), replace(SCENES, drawing=Drawing(seed=8, pixels=32)),
        replace(SCENES, drawing=Drawing(pixels=40)), replace(SCENES, drawing=Drawing(pixels=32, plain=True)),
        replace(SCENES, drawing=Drawing(pixels=32, splits={"train": 30, "dev": 15, "test": 15})),
        replace(SCENES, drawing=Drawing(pixels=32, splits=SPLITS, difficulty=SceneDifficulty(groups=4))),
    ]  # fmt: skip
    for other in others:
        for call in (run_study, estimate_study_time):
            with pytest.raises(FileExistsError, match=r"scenes of .* pixels are asked for"):
                call(other, out)
            assert contents(out) == before


def test_scenes_are_not_left_by_a_study_that_is_refused_after_they_are_drawn(quick, tmp_path):
    few = replace(SCENES, scenes=1, drawing=Drawing(pixels=32))
    with pytest.raises(ValueError, match="the split 'dev' is empty"):
        run_study(few, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_way_out_of_nearly_equal_images_in_two_splits_is_one(quick, tmp_path, scenes_folder, capsys):
    """By the command that the refusal names; also once a file of splits has them so."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = ["file_name,caption"]
    for number, path in enumerate(sorted((scenes_folder / "images").rglob("*.*"))[:50]):
        with Image.open(path) as image:
            for quality in (95, 80):
                image.convert("RGB").save(data / "images" / f"{number}-{quality}.jpg", quality=quality)
                rows.append(f"images/{number}-{quality}.jpg,a scene of number {number}")
    (data / "metadata.csv").write_text("\n".join(rows) + "\n")
    plan = replace(SCENES, data=str(data), scenes=0, drawing=Drawing())
    with pytest.raises(DataError, match="stand in two splits") as refused:
        run_study(plan, tmp_path / "out")
    command = re.search(r"'clipvisionalign (check .*?)'", str(refused.value))
    assert command is not None
    main(command[1].split())
    with pytest.raises(Reached):
        run_study(plan, tmp_path / "out")
    # As it were before images came to the data set.
    table = (data / "splits.csv").read_text().splitlines()
    (data / "splits.csv").write_text("\n".join(["image,split", *(f"{row.rpartition(',')[0]},{('train', 'dev')[n % 2]}"
                                                                for n, row in enumerate(table[1:]))]) + "\n")  # fmt: skip
    with pytest.raises(DataError, match=r"splits.csv has them so: remove it"):
        run_study(plan, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has", ["runs", "report"])
def test_a_plan_that_leaves_out_what_a_study_has_changes_nothing_of_it(tmp_path, scenes_folder, has):
    """Neither its plan nor its report is lost for one that has less."""
    out = tmp_path / "out"
    plan = replace(SCENES, data=str(scenes_folder), scenes=0, drawing=Drawing(), seeds=[0, 1])
    begun(plan, out)
    if has == "report":
        shutil.rmtree(out / "cells")
        (out / "report.json").write_text(json.dumps(made_report()))
    before = contents(out)
    one = {"self": Variant()}
    for fewer in (replace(plan, variants=one), replace(plan, seeds=[1]), replace(plan, variants=one, seeds=[0])):
        for call in (run_study, estimate_study_time):
            with pytest.raises(FileExistsError, match=r"leaves out \w+-\d.*plan.yaml"):
                call(fewer, out)
            assert contents(out) == before
    more = {**plan.variants, "sparse": Variant()}
    with pytest.raises(Reached):
        run_study(replace(plan, variants=more, seeds=[0, 1, 2]), out)


@pytest.mark.usefixtures("quick")
def test_a_report_of_another_split_is_replaced_only_once_it_is_removed(tmp_path, scenes_folder):
    out = tmp_path / "out"
    plan = replace(SCENES, data=str(scenes_folder), scenes=0, drawing=Drawing(), seeds=[0, 1], split="dev")
    begun(plan, out)
    (out / "report.json").write_text(json.dumps(made_report(split="dev")))
    before = contents(out)
    for call in (run_study, estimate_study_time):
        with pytest.raises(FileExistsError, match=r"its report is of the split 'dev', and 'test'.*--out, or remove"):
            call(replace(plan, split="test"), out)
        assert contents(out) == before
    with pytest.raises(Reached):
        run_study(plan, out)
    (out / "report.json").unlink()
    with pytest.raises(Reached):
        run_study(replace(plan, split="test"), out)


@pytest.fixture
def finished(tmp_path, scenes_folder, quick) -> Plan:
    """The plan of a study in `out` whose runs have come to their end, with a record of their data."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(scenes_folder, data)
    plan = replace(SCENES, data=str(data), scenes=0, drawing=Drawing())
    begun(plan, out)
    read = read_captioned_images(data)
    about = {
        "source": str(data),
        "layout": read.layout,
        "split_rule": SPLIT_RULE,
        "as_read": hashes_as_read(read, read),
    }
    for cell in trials_of(plan, out):
        (cell.folder / "data.json").write_text(json.dumps(about))
        (cell.folder / "results.json").write_text("{}")
    return plan


def test_data_that_changed_since_runs_were_trained_is_refused_whether_asked_about_or_carried_out(tmp_path, finished):
    for call in (run_study, estimate_study_time):
        with suppress(Reached):
            call(finished, tmp_path / "out")
    edit_captions(tmp_path / "data", "train")
    before = contents(tmp_path)
    more = replace(finished, variants={**finished.variants, "sparse": Variant()})
    for plan, call in product((finished, more), (run_study, estimate_study_time)):
        with pytest.raises(DataError, match="no longer the data that it was trained on: train has other captions"):
            call(plan, tmp_path / "out")
        assert contents(tmp_path) == before


def test_a_study_reads_its_data_as_its_runs_did_whatever_lies_beside_it_later(tmp_path, finished):
    rows = read_captioned_images(finished.data).rows
    listed = [{"filename": row.name, "split": "train" if n % 2 else "val", "sentences": [{"raw": "a dog"}]}
            for n, row in enumerate(rows)]  # fmt: skip
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"images": listed}))
    assert recognised(finished.data) == "karpathy"
    for call in (run_study, estimate_study_time):
        said: list[str] = []
        with suppress(Reached), log_to(said.append):
            call(finished, tmp_path / "out")
        assert any(f"is read as '{recorded_layout(tmp_path / 'out/cells/self-0')}'" in line for line in said)
    # And once that is gone again.
    (tmp_path / "data" / "dataset.json").unlink()
    assert estimate_study_time(finished, tmp_path / "out")


def test_a_mistaken_budget_is_refused_and_the_right_one_is_still_taken(quick, tmp_path, scenes_folder):
    out = tmp_path / "out"
    plan = replace(SCENES, data=str(scenes_folder), scenes=0, drawing=Drawing(), budget=Budget("seconds", 300.0))
    begun(plan, out, {"self": 300, "late": 300})
    before = contents(out)
    mistaken = [
        replace(plan, budget=Budget("seconds", 600.0)), replace(plan, budget=Budget("pictures")),
        replace(plan, settings={"batch": 32}), replace(plan, variants={**plan.variants, "self": Variant({"batch": 32})}),
    ]  # fmt: skip
    for other in mistaken:
        for call in (run_study, estimate_study_time):
            with pytest.raises(FileExistsError):
                call(other, out)
            assert contents(out) == before
    with pytest.raises(Reached):
        run_study(plan, out)
    assert {trial.config.steps for trial in quick} == {300}
    assert contents(out) == before
    # Another variant's steps are found beside those that are kept.
    with pytest.raises(Reached):
        run_study(replace(plan, variants={**plan.variants, "sparse": Variant()}), out)
    assert set(json.loads((out / "budget.json").read_text())["steps"]) == {"self", "late", "sparse"}


@pytest.mark.usefixtures("quick")
def test_other_seconds_are_refused_for_variants_that_are_not_trained_yet(scenes_folder, tmp_path):
    out = tmp_path / "out"
    plan = replace(SCENES, data=str(scenes_folder), scenes=0, drawing=Drawing(), budget=Budget("seconds", 300.0))
    begun(plan, out, {"self": 300, "late": 300})
    before = contents(out)
    other = replace(plan, budget=Budget("seconds", 600.0), variants={**plan.variants, "sparse": Variant()})
    with pytest.raises(FileExistsError, match="300 seconds or other settings, and 600 seconds are asked for"):
        run_study(other, out)
    assert contents(out) == before
    with pytest.raises(Reached):
        run_study(replace(plan, variants={**plan.variants, "sparse": Variant()}), out)


def test_steps_that_are_kept_are_of_the_settings_that_they_were_found_for(quick, tmp_path, scenes_folder, monkeypatch):
    out = tmp_path / "out"
    plan = replace(SCENES, data=str(scenes_folder), scenes=0, drawing=Drawing(), budget=Budget("seconds", 300.0))
    with pytest.raises(Reached):
        run_study(plan, out)
    monkeypatch.setattr(
        budget,
        "time_variants",
        lambda trials, *more: {each.variant: StepTiming(2.0, 0.01, 0.001) for each in trials},
    )
    with pytest.raises(Reached):
        run_study(plan, out)
    assert {trial.config.steps for trial in quick} == {300}
    with pytest.raises(Reached):
        run_study(replace(plan, settings={"batch": 32}), out)
    assert {trial.config.steps for trial in quick} == {150}


def test_a_folder_of_ones_own_is_not_taken_for_a_studys(quick, tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "photo.txt").write_text("mine")
    before = contents(tmp_path)
    for call in (run_study, estimate_study_time):
        with pytest.raises(FileExistsError):
            call(SCENES, tmp_path)
        assert contents(tmp_path) == before


def test_a_data_set_takes_the_place_of_scenes_and_that_is_said(quick, tmp_path, scenes_folder):
    said: list[str] = []
    plan = replace(SCENES, data=str(scenes_folder), drawing=Drawing(pixels=40))
    with pytest.raises(Reached), log_to(said.append):
        run_study(plan, tmp_path / "out")
    assert any("no effect of 'scenes'" in line for line in said)
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["scenes"] == 0
    assert plan_text(plan) != (tmp_path / "out" / "plan.yaml").read_text()


def test_other_protocols_are_of_the_split_that_they_were_measured_on(tmp_path, monkeypatch, scenes_folder, tiny_runs):
    from types import SimpleNamespace

    from clipvisionalign.data.formats import read_captioned_images

    calls: list[Any] = []
    monkeypatch.setattr(assemble, "measure_flawed_protocols", lambda *given: calls.append(given) or {"bars": []})
    monkeypatch.setattr(assemble, "load_aligner", lambda folder: None)
    data = read_captioned_images(scenes_folder)
    trial: Any = SimpleNamespace(folder=tiny_runs["self"], variant="self", seed=0)

    def measured(split: str, part: str) -> int:
        plan = replace(SCENES, split=split)
        assemble._measure_flawed_protocols(StudyContext(plan, tmp_path, data, data.split(part), {}, None), [trial])
        return len(calls)

    # Also where two splits hold the same.
    assert [measured(*each) for each in [("dev", "dev"), ("dev", "dev"), ("test", "dev"), ("test", "test")]] == [
        1,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_profile_of_a_small_data_set_ends_with_its_times_and_leaves_nothing(world, monkeypatch, capsys, steps):
    """Also with fewer batches than steps are asked for, within an epoch and beyond one."""
    monkeypatch.chdir(world)
    before = contents(world)
    model = yaml.safe_load((world / "run" / "config.yaml").read_text())["model"]
    (world.parent / "profile.yaml").write_text(yaml.safe_dump({"model": model}))
    given = ["data", "--config", str(world.parent / "profile.yaml"), "--train_images", "40", "--batch", "16", "--cache", "off",
             "--epochs", "2", "--precision", "float32", "--augment", "none"]  # fmt: skip
    assert main(["train", *given, "--profile", str(steps)]) == 0
    assert count_noun(min(steps, 6), "step") in capsys.readouterr().out
    assert contents(world) == before


ASKED = {
    "check": ["data --json", "data --quick"],
    "evaluate": ["run --json", "run --split test --json"],
    "classify": ["run classes --json", "run classes --split all"],
    "study": ["tiny.yaml --out new --dry-run", "drawn.yaml --out new --dry-run", "tiny.yaml --out new --same seconds --seconds 3 --dry-run"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASKED))
def test_a_call_that_only_asks_changes_nothing(world, monkeypatch, capsys, name):
    """By the commands, with real steps where a dry run takes some: also of fewer images than those take."""
    monkeypatch.chdir(world)
    model = yaml.safe_load((world / "run" / "config.yaml").read_text())["model"]
    settings = {
        "model": {key: value for key, value in model.items() if key != "design"},
        "batch": 32,
        "augment": "none",
    }
    plan = {"variants": ["self"], "seeds": [0], "settings": settings | {"precision": "float32", "train_images": 20}}
    (world / "tiny.yaml").write_text(yaml.safe_dump({"data": "data", **plan}))
    (world / "drawn.yaml").write_text(yaml.safe_dump({"scenes": 120, "drawing": {"pixels": 32}, **plan}))
    before = contents(world)
    for arguments in ASKED[name]:
        assert main([name, *arguments.split()]) == 0, arguments
        assert contents(world) == before, arguments
