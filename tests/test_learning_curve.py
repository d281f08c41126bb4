"""Learning curves: subsets, trainings that are used again, and the interval of the extrapolation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clipvisionalign.adaptation import learning_curve as curves
from clipvisionalign.adaptation.curve_trainings import plan_trainings
from clipvisionalign.adaptation.extrapolation import MAX_RSUM, Extrapolation, extrapolate, paired_noise
from clipvisionalign.adaptation.learning_curve import CurvePoint, LearningCurve, learning_curve
from clipvisionalign.adaptation.learning_curve_plot import save_plot
from clipvisionalign.adaptation.start import start_overlap
from clipvisionalign.cli import main
from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.models.text_tower import TextTowerConfig
from clipvisionalign.retrieval.metrics import MetricEstimate
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.fine_tuning import LoraConfig
from clipvisionalign.training.stages import Stage, parse_stages
from clipvisionalign.training.train import train

CAPTIONS = (1000, 2000, 4000, 8000)
CHANCE = 12.0


def logarithmic(captions):
    return 40 + 28 * np.log2(np.asarray(captions) / 1000)


def power_law(captions):
    return MAX_RSUM - 520 * (np.asarray(captions) / 1000) ** -0.2


def logistic(captions):
    odds = np.exp(-2.5 + 0.5 * np.log2(np.asarray(captions) / 1000))
    return CHANCE + (MAX_RSUM - CHANCE) * odds / (1 + odds)


def square_root(captions):
    return 420 - 300 * (np.asarray(captions) / 1000) ** -0.5


SHAPES = [logarithmic, power_law, logistic, square_root]


@pytest.mark.parametrize("curve", SHAPES)
def test_a_curve_without_noise_is_extrapolated_exactly(curve):
    predicted = extrapolate(CAPTIONS[:3], curve(CAPTIONS[:3]), CAPTIONS[3], 0.0, CHANCE)
    assert predicted.value == pytest.approx(curve(CAPTIONS[3]), abs=1e-6)
    assert predicted.gain == pytest.approx(curve(CAPTIONS[3]) - curve(CAPTIONS[2]), abs=1e-6)
    assert predicted.weights[curve.__name__.replace("_", " ")] == pytest.approx(1)


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_the_interval_holds_the_figure_as_often_as_it_promises(noise):
    """Noise of the images of known size, 300 curves of each shape: 90 % are promised over all of them. A convex curve in
    noise of a quarter of its steps cannot be told from a straight one, and is the one that is held least."""
    rng = np.random.default_rng(0)
    held = {}
    for curve in SHAPES:
        figures = np.clip(curve(CAPTIONS) + rng.normal(0, noise, (300, 4)), CHANCE + 1, 599)
        predicted = [extrapolate(CAPTIONS[:3], row[:3], CAPTIONS[3], noise, CHANCE) for row in figures]
        held[curve.__name__] = np.mean([p.low <= row[3] <= p.high for p, row in zip(predicted, figures, strict=True)])
    assert np.mean(list(held.values())) >= 0.9, held
    assert min(held.values()) >= 0.8, held


def test_trainings_that_deviate_by_chance_widen_the_interval():
    smooth = extrapolate(CAPTIONS, [100.0, 130.0, 160.0, 190.0], 16000, 2.0)
    rough = extrapolate(CAPTIONS, [100.0, 145.0, 145.0, 190.0], 16000, 2.0)
    assert rough.high - rough.low > 1.5 * (smooth.high - smooth.low)


def test_the_interval_grows_with_the_noise_of_the_images_and_with_the_distance():
    figures = logarithmic(CAPTIONS)
    near = extrapolate(CAPTIONS, figures, 16000, 2.0)
    for other in (extrapolate(CAPTIONS, figures, 16000, 8.0), extrapolate(CAPTIONS, figures, 128000, 2.0)):
        assert other.high - other.low > near.high - near.low


def test_figures_at_the_bounds_are_extrapolated_within_them():
    for figures in ([600.0, 600.0, 600.0], [5.0, 3.0, 8.0], [0.0, 0.0, 0.0], [500.0, 560.0, 599.0]):
        predicted = extrapolate(CAPTIONS[:3], figures, CAPTIONS[3], 3.0, CHANCE)
        assert 0 <= predicted.low <= predicted.high <= MAX_RSUM
        assert np.isfinite(predicted.value)


@pytest.mark.parametrize(
    ("captions", "target", "message"),
    [([1, 2], 4, "three points"), ([1, 4, 2], 8, "ascend"), ([1, 2, 4], 4, "not more than 4")],
)
def test_what_cannot_be_extrapolated_is_refused(captions, target, message):
    with pytest.raises(ValueError, match=message):
        extrapolate(captions, [100.0] * len(captions), target, 1.0)


def test_noise_that_all_figures_share_is_left_out():
    rng = np.random.default_rng(0)
    own, common = rng.normal(0, 3.0, (4000, 3)), rng.normal(0, 50.0, (4000, 1))
    assert paired_noise(own + common) == pytest.approx(3.0, rel=0.05)


# --- the sentence -----------------------------------------------------------------------------------------------------


def made_curve(gain: tuple[float, float, float], measured: float = 200.0) -> LearningCurve:
    points = [
        CurvePoint(n / 8000, n // 5, n, MetricEstimate(150 + n / 160, 140 + n / 160, 160 + n / 160), "")
        for n in CAPTIONS[:3]
    ]
    points.append(CurvePoint(1.0, 1600, 8000, MetricEstimate(measured, measured - 9, measured + 9), ""))
    test = Extrapolation(8000, 200.0, 190.0, 210.0, 0, 0, 0, {})
    twice = Extrapolation(16000, measured + gain[0], measured + gain[1], measured + gain[2], *gain, {})
    fitted = curves.fit_learning_curve(CAPTIONS, [150.0, 170.0, 185.0, measured], 2.0)
    return LearningCurve("run", "data", 100, 500, 12.0, 40, points, test, twice, fitted)


def test_the_sentence_says_what_the_interval_carries():
    assert made_curve((1.9, 0.4, 3.6)).summary() == (
        "twice the captions (16,000 in place of 8,000) would bring +1.9 [0.4, 3.6] rsum"
    )
    assert "is not shown: +1.9 [-0.4, 4.2]" in made_curve((1.9, -0.4, 4.2)).summary()
    assert "would cost rsum: -2.0 [-3.0, -1.0]" in made_curve((-2.0, -3.0, -1.0)).summary()
    assert "did not predict this run: 200.0 [190.0, 210.0] predicted, 230.0 measured" in (
        made_curve((1.9, 0.4, 3.6), 230.0).summary()
    )


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_plot_is_written(tmp_path, ending):
    path = save_plot(made_curve((10.0, 2.0, 18.0)), tmp_path / f"curve.{ending}")
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"\.svg, \.png, \.pdf"):
        save_plot(made_curve((10.0, 2.0, 18.0)), tmp_path / "curve.txt")


# --- trainings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return tiny_settings("self", epochs=2, freeze="both")


@pytest.fixture(scope="module")
def run(settings) -> Path:
    """A finished run, and its learning curve."""
    config = settings("whole")
    train(config)
    learning_curve(config.out)
    return Path(config.out)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_subsets_are_nested_and_every_training_has_the_same_steps_from_the_same_settings(run):
    folders = [run / "curve" / name for name in ("1-8", "1-4", "1-2")] + [run]
    names = [set(TrainedOnImages.load(folder / TRAINED_ON_FILE).names) for folder in folders]
    assert all(small < large for small, large in pairwise(names))
    assert [len(each) for each in names] == [len(names[-1]) // divisor for divisor in (8, 4, 2, 1)]
    assert {results(folder)["steps"] for folder in folders} == {results(run)["steps"]}


def test_the_points_are_the_figures_of_the_trainings(run):
    curve = json.loads((run / "curve" / "curve.json").read_text())
    assert [point["rsum"] for point in curve["points"]] == [
        results(Path(point["run"]))["rsum"] for point in curve["points"]
    ]
    assert curve["points"][-1]["run"] == str(run)
    assert curve["twice"]["captions"] == 2 * curve["points"][-1]["captions"]
    assert curve["test"]["captions"] == curve["points"][-1]["captions"]
    assert curve["chance"] == results(run)["chance"]["rsum"]
    assert [point["steps"] for point in curve["points"]] == [
        results(Path(point["run"]))["steps"] for point in curve["points"]
    ]


def test_finished_trainings_are_used_again(run, monkeypatch):
    before = json.loads((run / "curve" / "curve.json").read_text())

    def no_training(*arguments, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(curves, "train", no_training)
    monkeypatch.setattr(curves, "resume", no_training)
    assert learning_curve(run).to_dict() == before


@pytest.mark.slow
def test_a_curve_that_was_stopped_is_resumed_and_ends_as_an_undisturbed_one(run, settings, monkeypatch):
    from clipvisionalign.training.trainer import Trainer

    class Stop(Exception):
        """Stands for a kill."""

    folder, real, count = run.parent / "stopped", Trainer.train_step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == results(run)["steps"] + 3:
            raise Stop
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", step)
        with pytest.raises(Stop):
            learning_curve(run, folder)
    assert (folder / "1-8" / "results.json").is_file()
    assert not (folder / "1-4" / "results.json").is_file()
    resumed = learning_curve(run, folder)
    undisturbed = json.loads((run / "curve" / "curve.json").read_text())
    assert [point.rsum.value for point in resumed.points] == [point["rsum"]["value"] for point in undisturbed["points"]]


@pytest.mark.slow
def test_pair_scores_and_another_start_are_part_of_the_curve(run, settings):
    config = settings("late", "late", init=str(run), freeze="both")
    train(config)
    curve = learning_curve(config.out)
    assert [point.rsum.value for point in curve.points] == [
        results(Path(point.run))["rsum"]["value"] for point in curve.points
    ]
    assert {json.loads((Path(point.run) / "init.json").read_text())["contents"] for point in curve.points} != set()
    images = training_images(run)
    assert curve.to_dict()["start"] == {"run": str(run), "images": images}
    assert f"start from {run}, which was trained on {images} of the {images} images before" in curve.summary()


@pytest.mark.parametrize(("part", "as_recorded"), [(0, True), (20, True), (94, True), (94, False)])
def test_images_that_the_start_was_trained_on_are_counted_over_all_runs_before(run, tmp_path, part, as_recorded):
    """By their hashes, in whichever run before; without these, by the data set."""
    record = TrainedOnImages.load(run / TRAINED_ON_FILE)
    first = copy_run(run, tmp_path / "first")
    TrainedOnImages(record.names[:part], record.digests[:part], []).save(first / TRAINED_ON_FILE)
    second = copy_run(run, tmp_path / "second", init=str(first))
    TrainedOnImages(["other"], ["0" * 32], []).save(second / TRAINED_ON_FILE)
    third = copy_run(run, tmp_path / "third", init=str(second))
    if not as_recorded:
        (first / TRAINED_ON_FILE).unlink()
    overlap = start_overlap(third)
    assert (overlap.images if overlap else 0) == part
    assert overlap is None or overlap.run == str(second)
    assert start_overlap(copy_run(run, tmp_path / "alone")) is None
    untrained = copy_run(run, tmp_path / "untrained", epochs=0)
    assert start_overlap(copy_run(run, tmp_path / "from_untrained", init=str(untrained))) is None


@pytest.mark.parametrize(
    "more", [{"peft": "lora", "freeze": "image", "lora": LoraConfig(towers="text")}, {"chunk": 4}, {"steps": 5}]
)
def test_all_other_settings_are_those_of_the_run(run, settings, tmp_path, more):
    folder = copy_run(run, tmp_path, **more)
    original = read_settings(folder)
    for training in plan_trainings(folder):
        varied = {"out", "train_images", "epochs", "steps", "patience", "trackers"}
        same = replace(training, **{name: getattr(original, name) for name in varied})
        assert same == original
        assert training.steps == (more.get("steps") or results(run)["steps"])


def test_stages_are_longer_where_the_images_are_fewer(run, tmp_path):
    folder = copy_run(run, tmp_path, stages="heads:1,text:2@0.001", epochs=6, freeze="image")
    images = training_images(folder)
    for divisor, training in zip((8, 4, 2), plan_trainings(folder), strict=True):
        ratio = steps_in_epoch(images, 16) / steps_in_epoch(images // divisor, 16)
        stages = parse_stages(training.stages)
        assert [(stage.trains, stage.rates) for stage in stages] == [("heads", None), ("text", (0.001,) * 3)]
        assert [stage.epochs for stage in stages] == [math.ceil(ratio), math.ceil(2 * ratio)]
        check_settings(training)


@pytest.mark.slow
def test_trainings_of_a_run_in_stages_count_their_own_steps_and_keep_its_rates(run, settings, capsys):
    """An eighth of the images, in whole epochs of a stage, is not trained in exactly the steps of the run."""
    config = settings("staged", stages="heads:1,all:1@0.00012345678", epochs=6, freeze="image", batch=36)
    train(config)
    assert main(["curve", config.out]) == 0
    points = json.loads((Path(config.out) / "curve" / "curve.json").read_text())["points"]
    assert [point["steps"] for point in points] == [results(Path(point["run"]))["steps"] for point in points]
    assert "steps each" not in capsys.readouterr().out
    rates = {parse_stages(training.stages)[-1].rates for training in plan_trainings(config.out)}
    assert rates == {(0.00012345678,) * 3}


@pytest.mark.parametrize("rate", [1e-5, 1 / 3, 0.00012345678, 1.0, 5e-324])
def test_a_stage_is_written_as_it_is_read(rate):
    for rates in ((rate,) * 3, (rate, 1e-4, 1e-3)):
        stage = Stage("all", 3, rates)
        assert parse_stages(str(stage)) == [stage]


def test_a_run_of_before_is_trained_again_with_what_was_asked_for(run, tmp_path):
    """Its width of 256 and its 128 tokens, recorded beside every pretrained model, were nobody's wish."""
    import yaml

    folder = copy_run(run, tmp_path)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    before = asdict(AlignerConfig("self", width=256, text_tower=TextTowerConfig(max_tokens=128)))
    recorded["model"] = before | {"pretrained": "clip"}
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    for training in plan_trainings(folder):
        assert training.model == AlignerConfig("self", pretrained="clip")


def test_settings_of_runs_are_read_in_one_place():
    """Else a reader takes what earlier versions recorded unasked for what was asked for."""
    package = Path(curves.__file__).parents[1]
    readers = [path.name for path in package.rglob("*.py") if "config_from_dict(RunConfig" in path.read_text()]
    assert readers == ["recorded.py"]


def training_images(run: Path) -> int:
    return json.loads((run / "data.json").read_text())["train"]["images"]


def read_settings(run: Path) -> RunConfig:
    import yaml

    from clipvisionalign.settings import config_from_dict

    return config_from_dict(RunConfig, yaml.safe_load((run / "config.yaml").read_text()))


def copy_run(run: Path, target: Path, **settings) -> Path:
    """A run folder without its curve, with other settings written down."""
    import shutil

    import yaml

    folder = shutil.copytree(run, target / "copy", ignore=shutil.ignore_patterns("curve"))
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(replace(read_settings(run), **settings))))
    return folder


def test_what_has_no_curve_is_refused_before_anything_is_trained(run, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "train", None)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        learning_curve(tmp_path)
    folder = copy_run(run, tmp_path)
    record = json.loads((folder / "data.json").read_text())
    for train_split, message in (
        ({"images": 500, "fingerprint": ""}, "a stream"),
        ({"images": 20, "captions": 90}, "32"),
    ):
        (folder / "data.json").write_text(json.dumps({**record, "train": train_split}))
        with pytest.raises(ValueError, match=message):
            learning_curve(folder)
    (folder / "data.json").write_text(json.dumps(record))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="by one process"):
        learning_curve(folder)
    monkeypatch.delenv("WORLD_SIZE")
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="train --resume"):
        learning_curve(folder)


def test_a_training_with_other_settings_is_not_taken_for_one_of_the_curve(run, tmp_path):
    folder = copy_run(run, tmp_path, head_lr=0.5)
    with pytest.raises(FileExistsError, match="another head_lr is there"):
        plan_trainings(folder, run / "curve")


def test_data_that_are_no_longer_those_of_the_run_are_refused(run, tmp_path, monkeypatch):
    folder = copy_run(run, tmp_path)
    record = json.loads((folder / "data.json").read_text())
    record["as_read"]["dev"]["captions"] = "other"
    (folder / "data.json").write_text(json.dumps(record))
    monkeypatch.setattr(curves, "train", None)
    with pytest.raises(DataError, match="no longer the data"):
        learning_curve(folder)


def test_a_model_as_it_is_has_no_curve(run, tmp_path):
    with pytest.raises(ValueError, match="trained on no captions"):
        learning_curve(copy_run(run, tmp_path, epochs=0))


@pytest.mark.parametrize("recorded_in", ["results.json", "blend.json"])
def test_a_blended_run_has_no_curve_and_the_run_that_it_was_made_of_is_named(run, tmp_path, recorded_in):
    folder = copy_run(run, tmp_path)
    if recorded_in == "results.json":
        blend = {"blend": {"run": str(run), "base": "clip", "alpha": 0.5}}
        (folder / "results.json").write_text(json.dumps(results(folder) | blend))
    else:
        (folder / "blend.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a blended run, .*; give the run that it was made of") as refused:
        plan_trainings(folder)
    assert recorded_in == "blend.json" or f"clipvisionalign curve {run}" in str(refused.value)


def test_a_width_found_in_the_training_images_has_a_curve_only_where_it_is_that_of_another_run(run, tmp_path):
    """Else each training finds its own, and they do not start from the same weights."""
    folder = copy_run(run, tmp_path)
    space = {"own": 24, "width": 12, "explained": 0.9, "images": 90, "captions": 450}
    (folder / "weights.json").write_text(json.dumps({"common_space": space}))
    with pytest.raises(ValueError, match=r"12 of 24 dimensions .* --epochs 0 .* --init"):
        plan_trainings(folder)
    later = copy_run(folder, tmp_path / "later", init=str(run))
    assert {training.init for training in plan_trainings(later)} == {str(run)}


def test_the_command_prints_the_table_and_the_sentence(run, capsys):
    before = json.loads((run / "curve" / "curve.json").read_text())
    assert main(["curve", str(run)]) == 0
    printed = capsys.readouterr().out
    figures = before["test"]
    for text in (
        f"{figures['value']:.1f} [{figures['low']:.1f}, {figures['high']:.1f}]",
        f"{before['twice']['captions']:,}", f"chance {before['chance']:.1f}", before["summary"][:40],
    ):  # fmt: skip
        assert text in " ".join(printed.split())
    assert (run / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["curve", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before
