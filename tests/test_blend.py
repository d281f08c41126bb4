"""Models between a run and what it started from: which is chosen, on what it is measured, and the run that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrained_models import CAPTIONS, make_pretrained

from clipvisionalign.adaptation.alpha_curve import (
    AlphaPoint,
    GalleryRanking,
    choices_of_curve,
    choose_alpha,
    cross_fitted,
)
from clipvisionalign.cli import main
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.late_interaction import LateConfig
from clipvisionalign.retrieval.evaluate import load_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.cross_fit import RankingResult
from clipvisionalign.training.halves import DevHalves
from clipvisionalign.training.opened_run import open_run
from clipvisionalign.training.pair_weights import PairWeights
from clipvisionalign.training.train import train

NONE = PairWeights()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_chosen_is_the_best_own_figure_among_those_that_keep_enough_of_every_foreign_one():
    alphas, own = [0.0, 0.5, 1.0], [100.0, 180.0, 200.0]
    assert choose_alpha(alphas, own, [], []) == 2
    assert choose_alpha(alphas, own, [[300, 280, 150]], [300], keep=0.9) == 1
    assert choose_alpha(alphas, own, [[300, 280, 150]], [300], keep=0.5) == 2
    # The second data set allows no step.
    assert choose_alpha(alphas, own, [[300, 280, 150], [400, 100, 100]], [300, 400], keep=0.9) == 0


def test_on_a_tie_the_model_nearer_to_the_base_is_chosen():
    assert choose_alpha([0.0, 0.5, 1.0], [100.0, 150.0, 150.0], [], []) == 1
    assert choose_alpha([0.0, 0.5, 1.0], [150.0, 150.0, 150.0], [], []) == 0


def test_where_none_keeps_enough_the_one_that_keeps_most_is_chosen():
    """A run with a late interaction: its model at alpha 0 is not the base."""
    assert choose_alpha([0.0, 0.5, 1.0], [1.0, 2.0, 3.0], [[100, 200, 50]], [300], keep=0.9) == 1


def curve_of(own: list[tuple[float, float, float]], ranks: list[int]) -> list[AlphaPoint]:
    """Points of a curve: rsum of dev and of each half, and one rank that all queries have. Four images, a caption
    each."""
    points = []
    for position, (rsums, rank) in enumerate(zip(own, ranks, strict=True)):
        table = np.full((4, 1), rank)
        ranking = RankingResult(PositiveRanks(table, table), None, [])
        alpha = position / (len(own) - 1)
        points.append(AlphaPoint(alpha, (NONE,) * 3, (GalleryRanking((ranking,) * 3, rsums),)))
    return points


def test_each_half_is_measured_with_the_alpha_of_the_other():
    curve = curve_of([(10, 30, 10), (20, 20, 20), (30, 10, 30)], ranks=[1, 2, 3])
    choices = choices_of_curve(curve, curve[0], keep=0.9)
    assert choices == [2, 0, 2]
    half = np.array([0, 1, 0, 1])
    halves = DevHalves(half, half, Positives.of(np.arange(4), 4), "images of one identity")
    ranks = cross_fitted([curve[choice] for choice in choices], 0, halves).ranks
    # The queries of half 0 by what half 1 chose, alpha 1 of rank 3.
    assert ranks.image_to_text[:, 0].tolist() == [3, 1, 3, 1]
    assert ranks.text_to_image[:, 0].tolist() == [3, 1, 3, 1]


def test_a_gallery_without_halves_is_ranked_by_what_all_of_dev_chose():
    curve = curve_of([(10, 30, 10), (30, 10, 30)], ranks=[1, 2])
    points = [curve[choice] for choice in choices_of_curve(curve, curve[0], keep=0.9)]
    assert cross_fitted(points, 0, None).ranks.image_to_text[:, 0].tolist() == [2, 2, 2, 2]


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP."""
    return make_pretrained("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Other scenes than those that are tuned on."""
    return write_scenes(tmp_path_factory.mktemp("foreign") / "other", 80, seed=9, size=64)


def tune(out: Path, data: Path, model: AlignerConfig, **more: Any) -> Path:
    """A run of an epoch."""
    settings = {"epochs": 1, "batch": 32, "precision": "float32", "trackers": "", "workers": 0, "augment": "none"}
    train(RunConfig(data=str(data), out=str(out), model=model, **{**settings, **more}))
    return out


@pytest.fixture(scope="module")
def tuned(clip, scenes_folder, tmp_path_factory) -> Path:
    """A run from the small CLIP, both towers trained."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return tune(out, scenes_folder, AlignerConfig(pretrained=str(clip)), freeze="none", text_lr=1e-3, image_lr=1e-3)


@pytest.fixture(scope="module")
def blended(tuned, foreign, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A blend of three models with a foreign data set, and what blend.json holds."""
    out = tmp_path_factory.mktemp("blended") / "blend"
    flags = ["--foreign", str(foreign), "--alphas", "0.25", "0.5", "--quiet"]
    assert main(["blend", str(tuned), *flags, "--out", str(out)]) == 0
    return out, json.loads((out / "blend.json").read_text())


def test_the_blended_run_has_the_weights_between_and_opens_as_a_run(blended, tuned, clip):
    out, document = blended
    alpha = document["alpha"]["model"]
    assert [point["alpha"] for point in document["curve"]] == [0.0, 0.25, 0.5, 1.0]
    run, base, blend = (load_aligner(each, "cpu", packed=False).state_dict() for each in (tuned, clip, out))
    moved = [name for name in run if run[name].is_floating_point() and not torch.equal(run[name], base[name])]
    assert any(name.startswith("image_tower") for name in moved)
    assert any(name.startswith("text_tower") for name in moved)
    for name in moved:
        assert torch.allclose(blend[name], (1 - alpha) * base[name] + alpha * run[name], atol=1e-6), name


def test_its_results_are_those_of_a_run_and_tell_what_was_chosen_where(blended, scenes_folder):
    out, document = blended
    results = json.loads((out / "results.json").read_text())
    assert results["chosen"]["alpha"] == {name: document["alpha"][name] for name in ("model", "halves", "given")}
    assert len(results["chosen"]["alpha"]["halves"]) == 2
    assert results["chosen"]["figures"].startswith("cross-fitted: each half's queries by the alpha and weights")
    assert results["rsum"]["value"] == pytest.approx(document["galleries"][0]["blend"]["rsum"]["value"])
    assert load_ranks(out / "ranks.npz")["ranks"].image_to_text.shape[0] == results["images"]
    evaluated = open_run(str(out)).evaluate()
    assert "alpha" in evaluated["in_sample"]
    assert evaluated["rsum"]["value"] == pytest.approx(results["chosen"]["model_in_sample"]["rsum"]["value"])


@pytest.mark.slow
def test_a_gallery_of_its_training_images_still_fails_the_audit(blended, tuned):
    out, _ = blended
    audit = open_run(str(out)).audit(12)
    assert audit["passed"], [check for check in audit["checks"] if not check["passed"]]
    assert TrainedOnImages.load(out / TRAINED_ON_FILE).digests == TrainedOnImages.load(tuned / TRAINED_ON_FILE).digests
    assert "was trained on these images" in open_run(str(out), split="train").evaluate()["trained_on"]


@pytest.mark.slow
def test_the_ends_of_the_path_are_the_base_and_the_run(tuned, clip, tmp_path):
    for alpha, model in (("0", clip), ("1", tuned)):
        out = tmp_path / alpha
        assert main(["blend", str(tuned), "--alpha", alpha, "--out", str(out), "--quiet"]) == 0
        blend, end = load_aligner(out, "cpu", packed=False), load_aligner(model, "cpu", packed=False)
        weights, end_weights = blend.state_dict(), end.state_dict()
        assert weights.keys() == end_weights.keys()
        assert all(torch.equal(weights[name], end_weights[name]) for name in weights)
        # Sums of other memory addresses may differ in their last bit.
        assert torch.allclose(blend.encode_captions(CAPTIONS), end.encode_captions(CAPTIONS), atol=1e-6)
        document = json.loads((out / "blend.json").read_text())
        same = {(row["a"], row["b"]) for row in document["galleries"][0]["differences"] if row["same_model"]}
        assert same == {("blend", "base") if alpha == "0" else ("run", "blend")}
        results = json.loads((out / "results.json").read_text())
        assert results["chosen"]["figures"].startswith(f"alpha {alpha} was given, not chosen")
        assert "alpha" not in open_run(str(out)).evaluate().get("in_sample", "")


@pytest.mark.slow
def test_figures_of_base_and_run_are_those_of_evaluate(blended, tuned, clip, scenes_folder, foreign):
    _, document = blended
    for gallery, data in zip(document["galleries"], (scenes_folder, foreign), strict=True):
        base = open_run(str(clip), str(data)).evaluate()
        assert gallery["base"]["rsum"]["value"] == pytest.approx(base["rsum"]["value"])
        assert gallery["chance"] == pytest.approx(base["chance"]["rsum"])
        run = open_run(str(tuned), str(data)).evaluate()
        assert gallery["run"]["rsum"]["value"] == pytest.approx(run["rsum"]["value"])
        row = gallery["differences"][0]
        assert (row["a"], row["b"]) == ("run", "base")
        assert row["value"] == pytest.approx(run["rsum"]["value"] - base["rsum"]["value"])
        assert gallery["kept"]["run"]["value"] == pytest.approx(run["rsum"]["value"] / base["rsum"]["value"])


@pytest.mark.slow
def test_on_another_split_nothing_was_chosen(tuned, tmp_path, capsys):
    out = tmp_path / "blend"
    flags = ["--alphas", "0.5", "--split", "test", "--json", "--quiet"]
    assert main(["blend", str(tuned), *flags, "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "measured on test, on which nothing was chosen" in document["alpha"]["figures"]
    assert document["galleries"][0]["split"] == "test"
    assert document["curve_data"][0]["split"] == "dev"
    measured = open_run(str(out), split="test").evaluate()
    assert "in_sample" not in measured
    assert document["galleries"][0]["blend"]["rsum"]["value"] == pytest.approx(measured["rsum"]["value"])


@pytest.mark.slow
def test_late_interaction_on_another_run_is_kept_and_its_weight_chosen_again(tiny_runs, scenes_folder, tmp_path):
    """The base is the run of --init, by itself, without the late interaction."""
    saved = load_aligner(tiny_runs["self"], "cpu").config
    late = AlignerConfig("late", saved.image_tower, saved.text_tower, LateConfig(width=16), width=saved.width)
    run = tune(tmp_path / "late", scenes_folder, late, init=str(tiny_runs["self"]))
    out = tmp_path / "blend"
    assert main(["blend", str(run), "--alphas", "0.5", "--out", str(out), "--quiet"]) == 0
    document = json.loads((out / "blend.json").read_text())
    assert document["base"] == str(tiny_runs["self"])
    base = open_run(str(tiny_runs["self"]), str(scenes_folder)).evaluate()
    assert document["galleries"][0]["base"]["rsum"]["value"] == pytest.approx(base["rsum"]["value"])
    blend, tuned_model = load_aligner(out, "cpu", packed=False), load_aligner(run, "cpu", packed=False)
    assert torch.equal(blend.late.token.weight, tuned_model.late.token.weight)
    weights = json.loads((out / "results.json").read_text())["chosen"]["weights"]["late"]
    assert blend.late.weight.item() == pytest.approx(weights["model"])
    assert len(weights["halves"]) == 2
    # What the base chose its epoch by, on these very images, is told.
    assert any(str(tiny_runs["self"]) in note for note in document["galleries"][0]["notes"])


@pytest.mark.slow
def test_a_cross_run_with_stretched_windows_is_blended_in_its_own_architecture(clip, scenes_folder, tmp_path):
    """Positions of the base are stretched as the run's were; the fusion is the run's."""
    model = AlignerConfig("cross", pretrained=str(clip), positions="stretched", late=LateConfig(width=16))
    model.fusion.layers, model.fusion.heads, model.fusion.width, model.fusion.candidates = 1, 2, 32, 4
    run = tune(tmp_path / "cross", scenes_folder, model)
    out = tmp_path / "blend"
    assert main(["blend", str(run), "--alpha", "0.5", "--out", str(out), "--quiet"]) == 0
    blend = load_aligner(out, "cpu")
    assert blend.text_tower.max_tokens == 20 + 4 * 57
    assert open_run(str(out)).evaluate()["candidates"] == 4
    document = json.loads((out / "blend.json").read_text())
    zero_shot = open_run(str(clip), str(scenes_folder)).evaluate()
    assert document["galleries"][0]["base"]["rsum"]["value"] == pytest.approx(zero_shot["rsum"]["value"])


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, arguments: list[str]) -> str:
    """The one line of an error."""
    assert main([*arguments, "--quiet"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_does_not_fit_is_refused_in_a_line(tuned, clip, tiny_runs, blended, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    run = str(tuned)
    siglip = make_pretrained("siglip", tmp_path / "siglip")
    cases = {
        "another architecture than": ["blend", run, "--with", str(siglip), *out],
        "that is the run itself": ["blend", run, "--with", run, *out],
        "neither a run folder nor a pretrained model": ["blend", run, "--with", str(tmp_path), *out],
        "has two towers by name": ["blend", str(tiny_runs["self"]), "--with", str(clip), *out],
        "it started from no model": ["worth", str(tiny_runs["self"])],
        "nothing was tuned": ["worth", str(clip)],
        "not a run folder": ["blend", str(tmp_path), *out],
        "has to be from 0": ["blend", run, "--alpha", "1.5", *out],
        "give one of them": ["blend", run, "--alpha", "0.5", "--alphas", "0.5", *out],
        "a share from 0 to 1": ["blend", run, "--keep", "90", *out],
        "the split 'nowhere' is empty": ["blend", run, "--split", "nowhere", *out],
        "is there already": ["blend", run, "--out", str(blended[0])],
        "lies in it": ["blend", run, "--out", str(tuned.parent), "--overwrite"],
        "holds no blended run": ["blend", run, "--out", str(siglip), "--overwrite"],
    }
    for words, arguments in cases.items():
        assert words in refused(capsys, arguments), words
        assert not (tmp_path / "out").exists()


def test_another_tokenizer_of_the_same_shapes_is_refused(tuned, clip, tmp_path, capsys):
    """With the same weights its captions would have other vectors."""
    import shutil

    other = shutil.copytree(clip, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        settings[part]["hidden_act"] = "gelu"
    (other / "config.json").write_text(json.dumps(settings))
    line = refused(capsys, ["blend", str(tuned), "--with", str(other), "--out", str(tmp_path / "out")])
    assert "have other vectors" in line


def test_a_run_of_no_epochs_is_what_it_started_from(clip, scenes_folder, tmp_path, capsys):
    run = tune(tmp_path / "zero-shot", scenes_folder, AlignerConfig(pretrained=str(clip)), epochs=0)
    assert "--epochs 0" in refused(capsys, ["worth", str(run)])
