"""A training in stages: what a stage is, and that a run in stages is what its stages are by hand, however it is stopped."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from combined import CutOffError, Watched, comparable_results, go_on, watched_runs
from forked import several
from pretrained_models import make_pretrained
from safetensors.torch import load_file
from test_going_on import silent

from clipvisionalign.cli import main
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.io import load_aligner
from clipvisionalign.settings import config_from_dict
from clipvisionalign.study.config import Plan, Variant, trials_of
from clipvisionalign.study.plan_checks import check_plan
from clipvisionalign.study.startable import refuse_unstartable
from clipvisionalign.study.trial import train_trial
from clipvisionalign.study.trial_checks import refuse_other_settings, settings_hash
from clipvisionalign.study.validation import PlanError
from clipvisionalign.study.zero_shot import add_zero_shot
from clipvisionalign.training import trainer, trainer_setup
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.dry_run import try_step
from clipvisionalign.training.fine_tuning import LoraConfig
from clipvisionalign.training.ineffective_settings import effective, ineffective_settings
from clipvisionalign.training.run_stage import RunStage, stage_settings
from clipvisionalign.training.stages import SET_BY_STAGES, parse_stages
from clipvisionalign.training.train import resume, train
from clipvisionalign.training.trainer import Trainer


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return tiny_settings("self", train_images=24)


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model.safetensors")


def same(a: str | Path, b: str | Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cut_off_before(config: RunConfig, step: int, monkeypatch) -> None:
    """A run that ends before a step, counted over all stages, as if it had been killed."""
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", Watched(before=step))
        with pytest.raises(CutOffError):
            train(config, silent)


# --- what a stage is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": "heads"}, "'heads' has no number of epochs"),
        ({"stages": "heads:"}, "'heads:' has no number of epochs"),
        ({"stages": "heads:0"}, "'heads:0' has no epoch"),
        ({"stages": "heads:1.5"}, "has no number of epochs"),
        ({"stages": "haeds:1"}, r"nothing is called 'haeds' \(did you mean 'heads'\?\)"),
        ({"stages": "heads:1,,all:1"}, "nothing is called ''"),
        ({"stages": "all:1@fast"}, "the learning rate of 'all:1@fast'"),
        ({"stages": "all:1@-1"}, "the learning rate of 'all:1@-1'"),
        ({"stages": "all:1@1e-4/1e-3"}, "'all:1@1e-4/1e-3' has 2 learning rates: .*TEXT/IMAGE/HEADS"),
        ({"stages": "all:1@1e-4/1e-3/1e-3/1e-3"}, "has 4 learning rates"),
        ({"stages": "all:1@1e-4/1e-3/"}, "the learning rate of"),
        ({"stages": "all:1@1e-4/1e-3/2"}, "the learning rate of"),
        ({"stages": "all:1", "epochs": 3}, "its own --epochs"),
        ({"stages": "all:1", "epochs": 3, "freeze": "none"}, "its own --epochs, --freeze"),
        ({"stages": "all:1", "steps": 9}, "its own --steps"),
        ({"stages": "all:1,fusion:1"}, "only the design 'cross' has a fusion"),
        ({"stages": "heads:1", "peft": "lora"}, "no stage trains what --lora.towers text adapts"),
        ({"stages": "image:1", "peft": "lora"}, "no stage trains what --lora.towers text adapts"),
    ],
)
def test_bad_stages_are_one_error_before_anything_is_loaded(given, message, tmp_path):
    config = RunConfig(data=str(tmp_path / "nowhere"), out=str(tmp_path / "run"), **given)
    with pytest.raises(ValueError, match=f"^--stages .*{message}") as error:
        train(config, silent)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_fusion_alone_needs_something_below_it(settings):
    with pytest.raises(ValueError, match="a first stage of the fusion alone"):
        check_settings(settings("none", "cross", stages="fusion:1"))
    check_settings(settings("none", "cross", stages="fusion:1", init="somewhere"))
    check_settings(settings("none", "cross", stages="heads:1,fusion:1"))


@pytest.mark.parametrize(
    ("stages", "towers", "adapted"),
    [
        ("heads:1,all:2", "text", [None, "text"]),
        ("heads:1,all:2", "both", [None, "both"]),
        ("text:1,image:1,all:1", "both", ["text", "image", "both"]),
        ("text:1,image:1", "image", [None, "image"]),
    ],
)
def test_adapters_are_in_the_towers_that_a_stage_trains(stages, towers, adapted):
    config = RunConfig(stages=stages, peft="lora", lora=LoraConfig(towers=towers))
    check_settings(config)
    own = [stage_settings(config, number) for number in range(len(adapted))]
    for each in own:
        check_settings(each)
    assert [each.lora.towers if each.peft == "lora" else None for each in own] == adapted


def test_flags_beside_stages_are_refused_with_their_defaults_too(scenes_folder, tmp_path, capsys):
    for flag in ("--epochs", "--freeze"):
        value = str(getattr(RunConfig(), flag.removeprefix("--")))
        arguments = ["train", str(scenes_folder), "--out", str(tmp_path / "run"), "--stages", "heads:1,all:1"]
        assert main([*arguments, f"{flag}={value}"]) == 1
        assert f"--stages heads:1,all:1 gives each stage its own {flag}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trainer_alone_does_not_pass_stages_over(settings):
    with pytest.raises(ValueError, match="stages are a training each"), Trainer(settings("alone", stages="all:1")):
        pass


# --- a run in stages is what its stages are by hand ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "stages", "more"),
    [
        ("self", "heads:2,all:2@1e-4", {}),
        ("self", "text:1,all:1@1e-4/1e-3/1e-2", {}),
        ("late", "text:1,heads:1", {"peft": "lora", "lora": LoraConfig(rank=2)}),
        ("cross", "all:1,fusion:1", {}),
    ],
)
def test_a_run_in_stages_is_what_its_stages_are_by_hand(design, stages, more, settings, tmp_path):
    config = settings(f"staged-{design}-{stages[0]}", design, stages=stages, head_lr=5e-3, **more)
    results = train(config, silent)
    init = ""
    for number, stage in enumerate(parse_stages(stages)):
        rates = dict(zip(("text_lr", "image_lr", "head_lr"), stage.rates or (), strict=False))
        is_last = number + 1 == len(parse_stages(stages))
        by_hand = replace(
            config, stages="", init=init, out=str(tmp_path / str(number)), epochs=stage.epochs, freeze=stage.freeze,
            best_by="rsum" if is_last else "last", peft=config.peft if stage.trains in ("text", "all") else "none",
            **rates,
        )  # fmt: skip
        alone = train(by_hand, silent)
        there = Path(config.out) if is_last else Path(config.out) / "stages" / f"{number + 1}-{stage.trains}"
        assert same(by_hand.out, there)
        assert results["stages"][number]["rsum"] == alone["rsum"]
        assert results["stages"][number]["steps"] == alone["steps"]
        if not is_last:
            kept = json.loads((there / "results.json").read_text())
            assert (kept["best_epoch"], kept["chosen"]["epoch_by"]) == (stage.epochs, "last epoch")
        init = by_hand.out
    assert results["rsum"] == alone["rsum"]
    assert results["steps"] == sum(row["steps"] for row in results["stages"])
    assert results["training_seconds"] >= max(row["training_seconds"] for row in results["stages"])
    # Nothing was chosen on dev before.
    assert "with_init" not in results["chosen"]
    assert not (Path(config.out) / "init.json").exists()
    assert results == json.loads((Path(config.out) / "results.json").read_text())
    assert not [path for path in Path(config.out).rglob("*") if path.name in ("checkpoints", "lock", "begun.yaml")]
    assert load_aligner(config.out, "cpu").encode_captions(["a circle"]).shape == (1, 32)


@pytest.mark.slow
def test_its_settings_repeat_it_and_it_is_finished(settings, tmp_path):
    config = settings("repeated", stages="heads:1,all:1@1e-3", image_lr=1e-3)
    results = train(config, silent)
    recorded = config_from_dict(RunConfig, yaml.safe_load((Path(config.out) / "config.yaml").read_text()))
    assert recorded == replace(config, model=config.model.resolved())
    again = train(replace(recorded, out=str(tmp_path / "again")), silent)
    assert again["rsum"] == results["rsum"]
    assert same(config.out, tmp_path / "again")
    assert resume(config.out, silent) == results
    # Both towers stayed in the first stage, and did not in the second.
    first, last = weights(Path(config.out) / "stages" / "1-heads"), weights(config.out)
    start = Aligner(config.model, load_weights=True).text_tower.state_dict()
    for name, tensor in first.items():
        if name.startswith("text_tower."):
            assert torch.equal(tensor, start[name.removeprefix("text_tower.")])
    for part in ("text_tower.", "image_tower.", "image_head."):
        assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith(part))


@pytest.mark.slow
def test_features_of_frozen_towers_are_read_and_not_computed(settings, monkeypatch):
    calls = []
    real = trainer.forward_backward

    def seen(step, stream, config, lookup, chunks):
        calls.append((lookup.image_features is not None, lookup.caption_features is not None))
        return real(step, stream, config, lookup, chunks)

    monkeypatch.setattr(trainer, "forward_backward", seen)
    train(settings("features", stages="heads:1,text:1,all:1"), silent)
    assert calls == [(True, True)] * 2 + [(True, False)] * 2 + [(False, False)] * 2


# --- stopped anywhere, it ends as the undisturbed one ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "stages", "before", "more"),
    [
        ("self", "heads:2,all:2", (2, 5, 8), {"freeze_layers": ["text_tower.encoder.encoder.layer.0.*"]}),
        ("late", "text:1,text:1@1e-4", (3,), {"peft": "lora", "lora": LoraConfig("both", rank=2), "chunk": 5}),
        ("cross", "heads:1,all:1,fusion:1", (4,), {}),
    ],
)
def test_stopped_anywhere_it_ends_as_the_undisturbed_one(design, stages, before, more, settings, monkeypatch):
    undisturbed = settings(f"undisturbed-{design}", design, stages=stages, **more)
    expected = comparable_results(train(undisturbed, silent))
    for step in before:
        config = settings(f"stopped-{design}-{step}", design, stages=stages, **more)
        cut_off_before(config, step, monkeypatch)
        assert not (Path(config.out) / "results.json").exists()
        with pytest.raises(FileExistsError, match="is there already"):
            train(config, silent)
        results = resume(config.out, silent)
        assert comparable_results(results) == expected
        assert same(config.out, undisturbed.out)
        assert [row["trains"] for row in results["stages"]] == [stage.trains for stage in parse_stages(stages)]
        recorded = yaml.safe_load((Path(config.out) / "config.yaml").read_text())
        assert recorded["stages"] == stages


@pytest.mark.slow
def test_stopped_twice_in_two_stages_and_before_the_first_step(settings, monkeypatch):
    undisturbed = settings("once", stages="heads:2,all:2")
    train(undisturbed, silent)
    config = settings("thrice", stages="heads:2,all:2")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", Watched(before=1))
        with pytest.raises(CutOffError):
            train(config, silent)
    for step in (3, 3):
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "forward_backward", Watched(before=step))
            with pytest.raises(CutOffError):
                resume(config.out, silent)
    resume(config.out, silent)
    assert same(config.out, undisturbed.out)


@pytest.mark.slow
def test_an_interrupted_stage_names_the_run_to_resume(settings, monkeypatch, caplog):
    config = settings("interrupted", stages="heads:2,all:1")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "any_stop_requested", lambda *_: (True, 0.0))
        with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO"):
            train(config)
    assert f"resume with: clipvisionalign train --resume {config.out}\n" in f"{caplog.text}\n"
    assert "stages/1-heads" not in [line for line in caplog.text.splitlines() if "--resume" in line][-1]
    undisturbed = settings("uninterrupted", stages="heads:2,all:1")
    train(undisturbed, silent)
    resume(config.out, silent)
    assert same(config.out, undisturbed.out)


@pytest.mark.slow
def test_two_processes_stopped_in_either_stage_end_as_undisturbed(tiny_settings, tmp_path):
    """With a distillation, whose start is encoded by both, in the second stage from another model than the stage's."""
    settings = tiny_settings("self", train_images=24, trackers="", cache="off")
    model = settings("").model
    model = replace(model, image_tower=replace(model.image_tower, name="test_vit", size=32), dropout=0.0)
    # Each process would drop out what it draws.
    model = replace(model, text_tower=replace(model.text_tower, dropout=0.0))
    base = train(settings("base-of-two", model=model, epochs=1), silent)["run"]
    # The one that comes to its end leaves the process group.
    configs = {
        before: settings("two", stages="heads:1,all:1", model=model, init=base, distill=2.0, out=str(tmp_path / f"two-{before}"))
        for before in (2, 4, 0)
    }  # fmt: skip
    runs = [{"config": asdict(config), "before": before} for before, config in configs.items()]
    several(2, watched_runs, runs, str(tmp_path / "told"), out=tmp_path / "said")
    assert (tmp_path / "two-0" / "results.json").is_file()
    for before in (2, 4):
        assert not (tmp_path / f"two-{before}" / "results.json").exists()
        several(2, go_on, configs[before].out, out=tmp_path / f"resumed-{before}")
        assert same(tmp_path / "two-0", tmp_path / f"two-{before}")
    train(replace(configs[0], out=str(tmp_path / "one")), silent)
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two-0")
    )  # fmt: skip
    assert one[0]["dev"]["rsum"] == pytest.approx(two[0]["dev"]["rsum"])
    assert one[-1]["train_distillation"] == pytest.approx(two[-1]["train_distillation"], rel=1e-3)


@pytest.mark.slow
def test_other_stages_are_refused_when_it_is_resumed(settings, monkeypatch):
    config = settings("edited", stages="heads:1,all:2")
    cut_off_before(config, 4, monkeypatch)
    path = Path(config.out) / "config.yaml"
    as_it_was = path.read_text()
    path.write_text(as_it_was.replace("heads:1,all:2", "heads:2,all:2"))
    with pytest.raises(ValueError, match="1-heads: this stage has other settings by now: epochs 2, begun with 1"):
        resume(config.out, silent)
    path.write_text(as_it_was.replace("heads:1,all:2", "heads:1,text:2"))
    with pytest.raises(ValueError, match="freeze 'image', begun with 'none'"):
        resume(config.out, silent)
    # As of any run, its end may change.
    path.write_text(as_it_was.replace("heads:1,all:2", "heads:1,all:3"))
    assert resume(config.out, silent)["stages"][1]["epochs"] == 3


def refuse(setup) -> None:
    raise ValueError("no such plan")


# --- one that takes another's place ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stays_until_the_first_stage_of_another_begins(settings, monkeypatch):
    config = settings("replaced", stages="heads:1,all:1")
    train(config, silent)
    before = weights(config.out)
    other = replace(config, stages="text:1,all:1", overwrite=True, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(trainer.TrainerSetup, "_plan_steps", refuse)
        with pytest.raises(ValueError, match="no such plan"):
            train(other, silent)
    assert sorted(path.name for path in (Path(config.out) / "stages").iterdir()) == ["1-heads"]
    assert (Path(config.out) / "results.json").is_file()
    assert not (Path(config.out) / "begun.yaml").exists()
    cut_off_before(other, 1, monkeypatch)
    # From the first step on it is the other run's.
    assert sorted(path.name for path in (Path(config.out) / "stages").iterdir()) == ["1-text"]
    resume(config.out, silent)
    alone = replace(other, out=f"{config.out}-alone", overwrite=False)
    train(alone, silent)
    assert same(config.out, alone.out)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(config.out).items())
    # One without stages leaves nothing of them, also where the last one has not begun.
    cut_off_before(replace(other, seed=4), 1, monkeypatch)
    train(replace(other, stages="", epochs=1, seed=5), silent)
    assert not (Path(config.out) / "stages").exists()


# --- what it starts from ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dev_split_that_chose_the_run_it_starts_from_is_told_and_no_stage_is(settings, tmp_path):
    first = settings("chooses", epochs=3)
    train(first, silent)
    path = Path(first.out) / "results.json"
    results = json.loads(path.read_text())
    results["chosen"]["epoch"] = {"model": 1, "halves": [2, 1]}
    path.write_text(json.dumps(results))
    staged = train(settings("of-chooser", stages="heads:1,text:1,all:1", init=first.out), silent)
    assert staged["chosen"]["with_init"].startswith(f"it starts from {first.out}, whose epoch")
    assert "stages/" not in staged["chosen"]["figures"]
    recorded = json.loads((tmp_path.parent / Path(first.out).parent / "of-chooser" / "init.json").read_text())
    assert recorded["run"] == first.out


def figures_before_the_first_step(run: str | Path) -> dict:
    first = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == 0
    return {"rsum": first["dev"]["rsum"]}


@pytest.mark.slow
def test_the_start_of_a_run_is_what_its_first_stage_starts_from(settings, monkeypatch):
    first = settings("start", epochs=1)
    train(first, silent)
    config = settings("started", stages="heads:1@0.05,text:1", init=first.out, ema=0.0)
    results = train(config, silent)
    starts = [figures_before_the_first_step(run) for run in (Path(config.out) / "stages" / "1-heads", config.out)]
    assert starts[0] != starts[1]
    assert results["start"] == starts[0]
    assert [row["start"] for row in results["stages"]] == starts
    stopped = replace(config, out=f"{config.out}-stopped")
    # In the second stage.
    cut_off_before(stopped, results["stages"][0]["steps"] + 1, monkeypatch)
    resumed = resume(stopped.out, silent)
    assert (resumed["start"], [row["start"] for row in resumed["stages"]]) == (starts[0], starts)
    # One that starts from towers by name starts from no model that could be measured; its second stage does.
    results = train(settings("no-start", stages="heads:1,text:1"), silent)
    assert "start" not in results
    assert ["start" in row for row in results["stages"]] == [False, True]


def test_rates_that_destroy_are_told_by_the_start_of_the_run_and_of_the_stage():
    def bar(run: list[float], own: list[float], trains: str = "heads") -> list[float]:
        recorded = {"start": {"rsum": dict(zip(("value", "low", "high"), run, strict=True))}} if run else {}
        config = RunConfig(stages=f"{trains}:1,all:1", init="before")
        return RunStage(config, 1, previous=[{"trains": trains, **recorded}]).destroyed_start(own)

    run = [400.0, 390.0, 410.0]
    # It fell slowly, or rose; or it fell in the stage before, which told so.
    assert bar(run, [392.0, 382.0, 402.0]) == run
    assert bar(run, [420.0, 410.0, 430.0]) == [420.0, 410.0, 430.0]
    assert bar(run, [300.0, 290.0, 310.0]) == [300.0, 290.0, 310.0]
    assert bar([], [300.0, 290.0, 310.0], "fusion") == [300.0, 290.0, 310.0]
    assert bar(run, []) == []
    # A dev split of a few images has no interval.
    assert bar([400.0, None, None], [392.0, None, None]) == [392.0, None, None]


@pytest.mark.slow
def test_stages_of_a_pretrained_model_in_a_narrower_space_with_a_distillation(settings, tmp_path):
    folder = make_pretrained("clip", tmp_path / "clip")
    config = replace(
        settings("pretrained", stages="heads:1,all:1@1e-4"), model=AlignerConfig(pretrained=str(folder), width=16),
        out=str(tmp_path / "run"), train_images=8, batch=4, distill=1.0,
    )  # fmt: skip
    results = train(config, silent)
    start = Aligner(AlignerConfig(pretrained=str(folder))).state_dict()
    towers = [name for name in start if name.startswith(("image_tower.", "text_tower."))]
    first, last = weights(tmp_path / "run" / "stages" / "1-heads"), weights(tmp_path / "run")
    assert all(torch.equal(first[name], start[name]) for name in towers)
    changed = {name.split(".")[0] for name in towers if not torch.equal(last[name], start[name])}
    assert changed == {"image_tower", "text_tower"}
    assert [row["trains"] for row in results["stages"]] == ["heads", "all"]
    # The second stage starts near the model of the first, and both are kept near the pretrained one.
    first_lines, last_lines = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "run" / "stages" / "1-heads", tmp_path / "run")
    )
    assert first_lines[0]["epoch"] == last_lines[0]["epoch"] == 0
    assert first_lines[-1]["dev"]["rsum"]["value"] == pytest.approx(last_lines[0]["dev"]["rsum"]["value"])
    assert all(lines[-1]["train_distillation"] < 0.5 for lines in (first_lines, last_lines))


# --- plans -----------------------------------------------------------------------------------------------------------


def staged_plan(plan: Plan) -> Plan:
    return replace(
        plan, seeds=[0], settings={**plan.settings, "epochs": 2, "freeze": "image"},
        variants={"self": Variant(), "self-staged": Variant({**_model(plan), "stages": "heads:1,all:1"})},
    )  # fmt: skip


def _model(plan: Plan) -> dict:
    return {"model": {**plan.settings["model"], "design": "self"}}


@pytest.mark.slow
def test_a_plan_has_variants_in_stages(plan, tmp_path, monkeypatch):
    plan = staged_plan(plan)
    check_plan(plan)
    one, staged = trials_of(plan, tmp_path / "study")
    assert (one.config.epochs, one.config.freeze, one.config.stages) == (2, "image", "")
    assert (staged.config.epochs, staged.config.freeze, staged.config.stages) == (6, "image", "heads:1,all:1")
    refuse_unstartable(plan, [one, staged])
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", Watched(before=2))
        with pytest.raises(CutOffError):
            train_trial(staged)
    # As it was begun, it is resumed.
    train_trial(staged)
    refuse_other_settings(staged)
    assert len(json.loads((staged.folder / "results.json").read_text())["stages"]) == 2


def test_hashes_of_settings_without_stages_are_what_they_were(plan, tmp_path):
    one, staged = trials_of(staged_plan(plan), tmp_path / "study")
    without = replace(staged, config=replace(staged.config, stages=""))
    assert settings_hash(without) == settings_hash(one)
    assert settings_hash(staged) != settings_hash(one)


def test_the_plan_says_where_stages_are_at_fault(plan):
    bad = staged_plan(plan)
    bad.variants["self-staged"].settings["stages"] = "haeds:1"
    with pytest.raises(PlanError, match=r"variants.self-staged.settings.stages.*nothing is called 'haeds'"):
        check_plan(bad)
    seconds = staged_plan(plan)
    with pytest.raises(PlanError, match="a budget of seconds does not"):
        check_plan(replace(seconds, budget=replace(seconds.budget, same="seconds")))
    compared = replace(staged_plan(plan), compare=replace(plan.compare, a="self", b="self-staged"))
    # As many passes: one and one are two.
    with pytest.raises(PlanError, match="passes are not equal: epochs 3 and 2"):
        check_plan(replace(compared, settings={**compared.settings, "epochs": 3}))


def test_what_stages_have_of_their_own_is_refused_beside_those_of_a_plan(plan):
    def check(shared: dict, own: dict) -> list:
        settings = {key: value for key, value in plan.settings.items() if key not in SET_BY_STAGES}
        given = replace(
            plan, seeds=[0], settings={**settings, **shared}, variants={"self": Variant({**_model(plan), **own})}
        )
        check_plan(given)
        return [(each.config.stages, each.config.epochs) for each in trials_of(given, Path("study"))]

    staged = {"stages": "heads:1,all:1"}
    # Also what is the default.
    for setting, value in (("freeze", "both"), ("freeze", RunConfig.freeze), ("epochs", 2), ("steps", 3)):
        own = rf"variants\.self\.settings\.{setting}: stages have {setting} of their own, .*leave it out"
        with pytest.raises(PlanError, match=rf"{own}, or give the variant 'stages: \"\"'"):
            check(staged, {setting: value})
        with pytest.raises(PlanError, match=f"{own}$"):
            check({}, {**staged, setting: value})
        with pytest.raises(PlanError, match=rf"^settings\.{setting}: .*leave it out, or 'stages'"):
            check({**staged, setting: value}, {})
        check(staged, {"stages": "", setting: value})
        check({setting: value}, staged)
    assert check(staged, {}) == check({"epochs": 2}, staged) == [("heads:1,all:1", RunConfig.epochs)]
    assert check(staged, {"stages": "", "epochs": 2}) == [("", 2)]


def test_a_pretrained_model_is_measured_as_it_is_beside_stages(plan):
    model = {"design": "self", "pretrained": "openai/clip-vit-base-patch32"}
    settings = {"stages": "heads:1,all:1", "model": model}
    given = add_zero_shot(replace(plan, seeds=[0], settings=settings, variants={"self": Variant()}))
    check_plan(given)
    measured, staged = trials_of(given, Path("study"))
    assert (measured.config.stages, measured.config.epochs) == ("", 0)
    assert staged.config.stages == settings["stages"]


def test_a_dry_run_finds_what_a_later_stage_would_fail_at(settings):
    config = settings("dry", stages="heads:1,text:1", freeze_layers=["*_head.*", "*log_scale", "text_tower.*"])
    with pytest.raises(ValueError, match="nothing is left to be trained"):
        try_step(config)
    config = settings("dry", stages="all:1,heads:1", freeze_layers=["*_head.*", "*log_scale"], init="somewhere")
    with pytest.raises(ValueError, match=r"--freeze both .*nothing is left to be trained"):
        try_step(config, settings("base"))
    try_step(settings("dry", "cross", stages="heads:1,all:1,fusion:1"))


def _of_tower(model: AlignerConfig, name: str) -> AlignerConfig:
    return replace(model, image_tower=replace(model.image_tower, name=name, size=32, weights="random"))


LATER_FAULTS = {
    "too many blocks": ({"freeze_blocks": 9}, "test_resnet", r"--freeze_blocks 9: test_resnet has 4; "),
    "no blocks": ({"freeze_blocks": 2}, "convnext_atto", r"--freeze_blocks: convnext_atto is not divided into blocks"),
    "no layer to adapt": (
        {"peft": "lora", "freeze_layers": ["text_tower.encoder.*"]}, "test_resnet", r"--peft lora: no layer of the text "
    ),
    "batch norms of a chunk": ({"chunk": 5}, "test_resnet", r"--chunk: test_resnet .* batch norms"),
    "nothing to train": (
        {"stages": "all:1,heads:1", "freeze_layers": ["*_head.*", "*log_scale"], "init": "base"}, "",
        r"--freeze both .*nothing is left to be trained"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", LATER_FAULTS)
def test_what_a_later_stage_refuses_is_refused_before_the_first_one_trains(
    fault, settings, tiny_runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "forward_backward", lambda *given: pytest.fail("a stage has trained"))
    more, name, message = LATER_FAULTS[fault]
    config = settings(
        "", **{"stages": "heads:1,all:1", "freeze_layers": [], "out": str(tmp_path / "new" / "run"), **more}
    )
    config = replace(config, init=config.init and str(tiny_runs["self"]))
    config = replace(config, model=_of_tower(config.model, name) if name else config.model)
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        train(config, silent)
    assert not (tmp_path / "new").exists()
    # As the stage is alone.
    alone = replace(stage_settings(config, 1), init=config.init, out=str(tmp_path / "alone"))
    with pytest.raises(ValueError, match=f"^{message}") as refused_alone:
        train(alone, silent)
    assert str(refused.value) == str(refused_alone.value)


def killed(*_: object) -> None:
    raise CutOffError


@pytest.mark.parametrize("restart", [False, True])
def test_a_package_that_only_a_later_stage_needs_is_missed_at_once(restart, settings, tmp_path, monkeypatch):
    config = settings("", stages="heads:1,all:1", peft="lora", out=str(tmp_path / "new" / "run"))
    if restart:
        with monkeypatch.context() as patched:
            patched.setattr(trainer_setup, "pin_revisions", killed)
            with pytest.raises(CutOffError):
                train(config, silent)
    monkeypatch.setattr(trainer, "forward_backward", lambda *given: pytest.fail("a stage has trained"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="peft"):
        resume(config.out, silent) if restart else train(config, silent)
    assert (tmp_path / "new").exists() == restart


def test_a_setting_counts_if_it_counts_in_one_stage(settings):
    config = settings("idle", stages="heads:1,all:1", text_lr=1e-5, image_lr=1e-5, patience=2)
    rates = ("--text_lr", "--image_lr", "--patience")
    assert not [line for line in ineffective_settings(config) if any(rate in line for rate in rates)]
    assert (effective(config).text_lr, effective(config).patience) == (1e-5, 2)
    config = settings("idle", stages="heads:1,text:1", image_lr=1e-5, best_by="last", patience=2)
    lines = ineffective_settings(config)
    assert [line for line in lines if "--image_lr" in line]
    assert "no effect of --patience: --best_by last keeps the last epoch" in lines


def test_a_profile_is_of_the_last_stage(settings):
    assert train(settings("profiled", stages="heads:1,all:1", profile=2), silent)["steps"] == 2
