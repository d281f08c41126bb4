"""Zero-shot classification: equal to open_clip's own evaluation, ties against the model, intervals, the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from test_classes import SPLIT_FOLDERS, draw

from clipvisionalign.cli import main
from clipvisionalign.data.caption_templates import DEFAULT_TEMPLATE, SIGLIP_TEMPLATE, read_templates
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scene_classes import write_scene_classes
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval import accuracy_gain, classify, zero_shot_classifier
from clipvisionalign.retrieval.classification import classification_of_ranks
from clipvisionalign.retrieval.label_ranks import LabelRanks, label_ranks_of_scores, label_ranks_of_vectors
from clipvisionalign.training.opened_classes import compare_classification, open_classes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """120 drawn images of 64 pixels in six classes."""
    return write_scene_classes(tmp_path_factory.mktemp("classes") / "shapes", "shape", 120, size=64)


@pytest.fixture(scope="module")
def coloured_run(tmp_path_factory) -> tuple[Path, Path]:
    """320 drawn images in eight classes by colour, and a model whose heads were trained on those of the train split."""
    from clipvisionalign.models.aligner import AlignerConfig
    from clipvisionalign.models.image_tower import ImageTowerConfig
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    folder = tmp_path_factory.mktemp("coloured")
    data = write_scene_classes(folder / "colours", "colour", 320, size=64)
    train(RunConfig(
        data=str(data), out=str(folder / "run"), model=AlignerConfig(image_tower=ImageTowerConfig(size=64)), epochs=3,
        batch=32, augment="none", precision="float32", cache=str(folder / "cache"), freeze="both", head_lr=5e-3,
        trackers="", workers=0,
    ))  # fmt: skip
    return data, folder / "run"


# --- equal to open_clip's own evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["oc_vit", "oc_quickgelu", "oc_siglip"])
@pytest.mark.parametrize("templates", ["openai", "simple"])
def test_equal_to_open_clips_own_evaluation(folders, shapes, monkeypatch, family, templates):
    import open_clip
    import torch
    from open_clip_train import zero_shot
    from PIL import Image

    # It makes a number of an array of one, which NumPy no longer does.
    monkeypatch.setattr(zero_shot, "float", lambda array: array.item(), raising=False)
    folder = folders(family)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    opened = open_classes(str(folder), str(shapes), "all", templates)
    names = list(opened.data.class_names.values())
    sets = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, names, sets[templates])
        pixels = torch.stack([preprocess(Image.open(image).convert("RGB")) for image in opened.images.images])
        logits = 100.0 * model.encode_image(pixels, normalize=True) @ weights
    ours = zero_shot_classifier(opened.model, names, read_templates(templates))
    assert np.abs(ours - weights.T.numpy()).max() <= 1e-5
    results = opened.classify()
    labels = torch.from_numpy(results.label_ranks.labels)
    top_1, top_5 = (hits / len(labels) for hits in zero_shot.accuracy(logits, labels, topk=(1, 5)))
    assert results.label_ranks.predictions.tolist() == logits.argmax(dim=1).tolist()
    assert [results.top[k].value for k in (1, 5)] == pytest.approx([top_1, top_5], abs=1e-12)


# --- the measure ------------------------------------------------------------------------------------------------------


class FixedVectors:
    """A model that has a vector for each image, and the same for each caption of a class."""

    def __init__(self, images: np.ndarray, classes: dict[str, np.ndarray]) -> None:
        self.images, self.classes = images, classes

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        return self.images

    def encode_captions(self, captions: Sequence[str]) -> np.ndarray:
        return np.stack([self.classes[caption.split()[-1].rstrip(".")] for caption in captions])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 30))
def test_ranks_and_predictions_are_those_of_a_sorted_table(seed, classes, images):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(images, 5)), random.normal(size=(classes, 5))
    labels = random.integers(classes, size=images)
    table = left @ right.T
    for result in (label_ranks_of_vectors(left, right, labels), label_ranks_of_scores(table, labels)):
        expected = [1 + int((row > row[label]).sum()) for row, label in zip(table, labels, strict=True)]
        assert result.ranks.tolist() == expected
        assert result.predictions.tolist() == table.argmax(axis=1).tolist()
    # The order of the classes does not matter.
    order = random.permutation(classes)
    moved = label_ranks_of_vectors(left, right[order], np.argsort(order)[labels])
    assert moved.ranks.tolist() == expected
    figures = classification_of_ranks(result, [f"c{number}" for number in range(classes)], 50)
    assert figures.top[1].value == pytest.approx(np.mean(table.argmax(axis=1) == labels))
    per_class = [np.mean(table.argmax(axis=1)[labels == label] == label) for label in set(labels.tolist())]
    assert figures.mean_per_class.value == pytest.approx(np.mean(per_class))
    assert sum(row.images for row in figures.per_class()) == images
    assert sum(row.correct for row in figures.per_class()) == round(figures.top[1].value * images)
    for estimate in (*figures.top.values(), figures.mean_per_class):
        if images >= 6:
            assert estimate.low is not None
            assert estimate.high is not None
            assert 0 <= estimate.low <= estimate.value + 1e-12
            assert estimate.value <= estimate.high + 1e-12 <= 1 + 1e-9
        else:
            assert estimate.low is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_model_that_gives_every_class_one_vector_is_never_right(dtype):
    names = ["dog", "cat", "cow"]
    vector = np.array([0.6, 0.8], dtype=dtype)
    model = FixedVectors(np.tile(vector, (12, 1)), dict.fromkeys(names, vector))
    results = classify(model, list("abcdefghijkl"), [0, 1, 2] * 4, names)
    assert results.top[1].value == 0
    assert results.mean_per_class.value == 0
    assert set(results.label_ranks.ranks.tolist()) == {3}


def test_a_class_vector_is_the_unit_mean_of_the_unit_vectors_of_its_captions():
    class Scaled:
        """Captions of the second template have long vectors, which weigh no more."""

        encode_images = None

        def encode_captions(self, captions: Sequence[str]) -> np.ndarray:
            vectors = {"a dog": [1.0, 0.0], "the dog": [0.0, 50.0], "a cat": [-1.0, 0.0], "the cat": [0.0, -7.0]}
            return np.array([vectors[caption] for caption in captions])

    weights = zero_shot_classifier(Scaled(), ["dog", "cat"], ["a {}", "the {}"])
    assert weights == pytest.approx(np.array([[1, 1], [-1, -1]]) / np.sqrt(2))


def test_classes_without_images_compete_and_do_not_enter_the_mean():
    vectors = {name: np.eye(7)[number] for number, name in enumerate("abcdefg")}
    images = np.stack([vectors["a"], vectors["a"], vectors["b"], vectors["g"]])
    results = classify(FixedVectors(images, vectors), list("1234"), [0, 0, 1, 1], list("abcdefg"))
    assert results.top[1].value == 0.75
    assert results.mean_per_class.value == 0.75
    assert results.chance == {"top_1": 1 / 7, "top_5": 5 / 7, "mean_per_class": 1 / 7}
    rows = {row.name: row for row in results.per_class()}
    assert (rows["b"].images, rows["b"].correct, rows["b"].confused_with, rows["b"].confused) == (2, 1, "g", 1)
    assert rows["c"].images == 0
    # Of five classes or fewer the first five are all.
    assert set(classify(FixedVectors(images[:3], vectors), list("123"), [0, 0, 1], list("abcde")).top) == {1}


def test_a_figure_of_one_class_is_the_share_of_it_that_a_bootstrap_draws():
    """The resamples of cells are those of images: the same interval as by images drawn one by one."""
    random = np.random.default_rng(3)
    labels, scores = random.integers(8, size=400), random.normal(size=(400, 8))
    scores[np.arange(400), labels] += 1.0
    ranks = label_ranks_of_scores(scores, labels)
    results = classification_of_ranks(ranks, list("abcdefgh"), 4000)
    drawn = random.integers(400, size=(4000, 400))
    correct = ranks.ranks == 1
    low, high = np.percentile(correct[drawn].mean(axis=1), [2.5, 97.5])
    assert [results.top[1].low, results.top[1].high] == pytest.approx([low, high], abs=0.006)
    means = [np.mean([correct[draw_][labels[draw_] == c].mean() for c in range(8)]) for draw_ in drawn[:1000]]
    low, high = np.percentile(means, [2.5, 97.5])
    assert [results.mean_per_class.low, results.mean_per_class.high] == pytest.approx([low, high], abs=0.008)


def ranks_of_hits(labels: np.ndarray, hits: np.ndarray, classes: int) -> LabelRanks:
    """Rank 1 for a hit; else the next class is predicted."""
    return LabelRanks(labels, np.where(hits, 1, 2), np.where(hits, labels, (labels + 1) % classes))


@pytest.mark.parametrize(("classes", "images"), [(200, 1), (200, 2), (100, 3), (10, 50)])
def test_intervals_of_the_mean_per_class_hold_the_figure_however_few_images_a_class_has(classes, images):
    """As those of top-1, which is the same figure where classes are of one size; by the binomial law of the hits."""
    random, size = np.random.default_rng(1), classes * images
    labels, names = np.repeat(np.arange(classes), images), [str(number) for number in range(classes)]
    held, previous = 0.0, None
    for hits in range(int(binom.ppf(1e-5, size, 0.5)), int(binom.isf(1e-5, size, 0.5)) + 1):
        is_hit = random.permutation(np.arange(size) < hits)
        results = classification_of_ranks(ranks_of_hits(labels, is_hit, classes), names, 1000, seed=hits)
        assert results.mean_per_class.to_dict() == pytest.approx(results.top[1].to_dict())
        held += binom.pmf(hits, size, 0.5) * (results.mean_per_class.low <= 0.5 <= results.mean_per_class.high)
        if previous is not None:
            gains = accuracy_gain(results, previous, 100)
            assert gains["mean_per_class"].to_dict() == pytest.approx(gains["top_1"].to_dict())
        previous = results
    assert held >= 0.94


def test_intervals_of_the_mean_per_class_hold_it_with_classes_of_many_sizes():
    """Half of the figure is of classes of one image, whose chance of a hit is another one."""
    random, samples = np.random.default_rng(2), 300
    labels = np.repeat(np.arange(80), [1] * 40 + [20] * 40)
    chances, names = np.where(labels < 40, 0.3, 0.7), [str(number) for number in range(80)]
    estimates = [
        classification_of_ranks(ranks_of_hits(labels, random.random(len(labels)) < chances, 80), names, 400, seed)
        for seed in range(samples)
    ]
    assert np.mean([each.mean_per_class.low <= 0.5 <= each.mean_per_class.high for each in estimates]) >= 0.94
    # All right: what 840 images show of a figure is less, where half of it is of 40 of them.
    every = classification_of_ranks(ranks_of_hits(labels, labels >= 0, 80), names)
    assert every.mean_per_class.low < every.top[1].low < every.mean_per_class.value == 1


def test_a_paired_gain_is_the_difference_and_narrower_than_unpaired():
    random = np.random.default_rng(0)
    labels, scores = random.integers(6, size=300), random.normal(size=(300, 6))
    scores[np.arange(300), labels] += 1.5
    better = scores.copy()
    better[np.arange(300), labels] += 0.2
    one, other = (
        classification_of_ranks(label_ranks_of_scores(each, labels), list("abcdef")) for each in (better, scores)
    )
    gains = accuracy_gain(one, other)
    assert set(gains) == {"top_1", "top_5", "mean_per_class"}
    assert gains["top_1"].value == pytest.approx(one.top[1].value - other.top[1].value)
    assert gains["mean_per_class"].value == pytest.approx(one.mean_per_class.value - other.mean_per_class.value)
    assert gains["top_1"].low > 0
    assert gains["top_1"].high - gains["top_1"].low < one.top[1].high - one.top[1].low
    assert accuracy_gain(other, one)["top_1"].value == pytest.approx(-gains["top_1"].value)
    same = accuracy_gain(one, one)["top_1"]
    assert same.value == 0
    with pytest.raises(ValueError, match="not of the same images and classes"):
        accuracy_gain(one, classification_of_ranks(label_ranks_of_scores(scores[:-1], labels[:-1]), list("abcdef")))


class OneScore:
    """Answers `score` alone: an image is a number, and fits the class whose name has so many letters."""

    def score(self, images: Sequence[int], captions: Sequence[str]) -> np.ndarray:
        lengths = np.array([len(caption.split()[-1]) for caption in captions])
        bonus = np.array([3.0 if caption.startswith("odd") else 0.0 for caption in captions])
        return -np.abs(np.array(images)[:, None] - lengths[None, :]) + bonus


def test_a_model_that_scores_pairs_is_measured_by_the_mean_over_templates():
    results = classify(OneScore(), [1, 2, 3], [0, 1, 2], ["a", "bb", "ccc"], ["odd {}", "even {}"])
    assert results.top[1].value == 1
    with pytest.raises(TypeError, match="it has no vectors"):
        classify(OneScore(), [1, 2, 3], [0, 1, 2], ["a", "bb", "ccc"], by="vectors")


BAD_CALLS = {
    "one class": ({"class_names": ["a"]}, ValueError, "1 classes: nothing to decide"),
    "a label too many": ({"labels": [0, 1, 1]}, ValueError, "labels should be 2 class numbers"),
    "a label out of range": ({"labels": [0, 2]}, ValueError, "labels name classes 0 to 2"),
    "equal names": ({"class_names": ["a", "a"]}, ValueError, "two classes are called 'a'"),
    "no name": ({"class_names": ["a", " "]}, ValueError, "a class should have a name"),
    "one name": ({"class_names": "ab"}, TypeError, "a list of strings belongs here"),
    "no placeholder": ({"templates": ["a photo"]}, DataError, "template 1: 'a photo' has 0 times {}"),
    "another way": ({"by": "words"}, ValueError, "--by words"),
    "no model": ({"model": object()}, TypeError, "answers neither"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    changed, error, message = BAD_CALLS[name]
    model = FixedVectors(np.eye(2), {"a": np.eye(2)[0], "b": np.eye(2)[1]})
    with pytest.raises(error, match=message):
        classify(**{"model": model, "images": ["1", "2"], "labels": [0, 1], "class_names": ["a", "b"], **changed})


def test_templates_of_a_model(folders):
    from clipvisionalign.retrieval.classification import default_template

    assert default_template(load_aligner(folders("siglip"), "cpu")) == SIGLIP_TEMPLATE
    assert default_template(load_aligner(folders("clip"), "cpu")) == DEFAULT_TEMPLATE
    assert (len(read_templates("openai")), len(read_templates("simple"))) == (80, 7)


# --- the command ------------------------------------------------------------------------------------------------------


def classified(capsys, *arguments: str | Path) -> dict[str, Any]:
    assert main(["classify", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["clip", "siglip", "oc_vit"])
def test_a_pretrained_model_is_measured(folders, shapes, tmp_path, capsys, family):
    results = classified(capsys, folders(family), shapes, "--out", tmp_path / "out")
    assert (results["images"], results["classes"], results["split"]) == (12, 6, "test")
    assert results["chance"]["top_1"] == pytest.approx(1 / 6)
    assert json.loads((tmp_path / "out/classification.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert np.mean([row["class"] == row["predicted"] for row in rows]) == pytest.approx(results["top_1"]["value"])
    assert np.mean([int(row["rank"]) <= 5 for row in rows]) == pytest.approx(results["top_5"]["value"])
    assert main(["classify", str(folders(family)), str(shapes), "--split", "all", "--templates", "simple"]) == 0
    printed = capsys.readouterr().out
    for words in ("top-1", "top-5", "mean per class", "chance", "16.7", "most confused with", "7 such as"):
        assert words in printed


@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_every_design_is_measured_in_both_ways(tiny_runs, shapes, capsys, design):
    by = {way: classified(capsys, tiny_runs[design], shapes, "--by", way) for way in ("auto", "vectors", "score")}
    ranked_by = "score" if design == "late" else "vectors"
    assert {key: by["auto"][key] for key in ("top_1", "per_class")} == {
        key: by[ranked_by][key] for key in ("top_1", "per_class")
    }
    if design in ("self", "sparse"):
        # With one template both are the cosine.
        assert by["vectors"]["per_class"] == by["score"]["per_class"]


@pytest.mark.slow
def test_a_model_trained_on_class_folders_is_above_chance_and_tells_what_it_was_trained_on(coloured_run, capsys):
    data, run = coloured_run
    results = classified(capsys, run, data)
    assert results["images"] == 32
    assert results["top_1"]["low"] > results["chance"]["top_1"]
    assert results["mean_per_class"]["low"] > results["chance"]["mean_per_class"]
    assert "trained_on" not in results
    trained = classified(capsys, run, data, "--split", "train")
    assert "was trained on these images" in trained["trained_on"]
    everything = classified(capsys, run, data, "--split", "all")
    assert everything["trained_on_images"]["same"] == 256
    assert classified(capsys, run, data, "--split", "val")["images"] == 32


def test_two_models_on_the_same_images(coloured_run, tiny_runs):
    data, run = coloured_run
    comparison = compare_classification(str(run), str(tiny_runs["self"]), str(data))
    ours, base = comparison["run"], comparison["baseline"]
    for name in ("top_1", "mean_per_class"):
        difference = comparison["difference"][name]
        assert difference["value"] == pytest.approx(ours[name]["value"] - base[name]["value"])
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert comparison["difference"]["top_1"]["low"] > 0


def test_class_folders_without_splits_are_measured_whole(folders, tmp_path, capsys):
    data = draw(tmp_path / "data", *(f"{name}/{number}.png" for name in ("dog", "cat") for number in range(4)))
    (data / "dog/broken.png").write_bytes(b"no image")
    results = classified(capsys, folders("clip"), data)
    assert (results["split"], results["images"]) == ("all", 8)
    names = tmp_path / "names.txt"
    names.write_text("dog a brown dog\ncat a black cat\n")
    named = classified(capsys, folders("clip"), data, "--names", names)
    assert [row["name"] for row in named["per_class"]] == ["a black cat", "a brown dog"]
    assert [row["class"] for row in named["per_class"]] == ["cat", "dog"]


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments after the model, and what the one line says."""
    data = draw(folder / "data", *SPLIT_FOLDERS)
    draw(folder / "one", "train/dog/a.png", "test/dog/b.png")
    draw(folder / "flat", "a.png", "b.png")
    draw(folder / "ids", "n01440764/a.png", "n01443537/b.png")
    draw(folder / "equal", "black_cat/a.png", "BlackCat/b.png")
    for name in ("dog", "cat"):
        (folder / "unreadable" / name).mkdir(parents=True)
        (folder / "unreadable" / name / "a.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    draw(folder / "listed", "d1/a.png", "d2/b.png")
    (folder / "listed/classes.txt").write_text("dog\ncat\ncow\n")
    files = {
        "no_place.txt": "a photo of a {}.\na photo\n", "two.txt": "{} and {}\n", "brace.txt": "a {name} and {}\n",
        "nothing.txt": "\n\n", "twice.txt": "a {}\na {}\n", "short.txt": "one\n", "same.txt": "dog a\nblack_cat A\n",
        "names.json": "{", "binary.txt": "\0\1\2",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "written").mkdir()
    (folder / "written/predictions.csv").write_text("mine")
    at, test = str(data), ["--split", "test"]
    return {
        "no such data": ([str(folder / "nowhere")], "no folder"),
        "a file": ([str(folder / "two.txt")], "no folder"),
        "an empty folder": ([str(folder / "empty")], "no class folder with images"),
        "images without classes": ([str(folder / "flat")], "no class folder with images"),
        "one class": ([str(folder / "one")], "one class folder with images, 'dog'"),
        "no such split": ([at, "--split", "holdout"], "the split 'holdout' is empty; this data set has"),
        "WordNet's ids": ([str(folder / "ids")], "named by an id of WordNet"),
        "folders of one name": ([str(folder / "equal")], "both called"),
        "no image can be read": ([str(folder / "unreadable")], "no image of 'all' can be decoded"),
        "names for other classes": ([str(folder / "listed")], "3 names for 2 class folders"),
        "no such templates": ([at, *test, "--templates", "openia"], "none of own, openai, simple"),
        "a template without a place": ([at, "--templates", str(folder / "no_place.txt")], "line 2: 'a photo' has 0 times {}"),
        "a template with two": ([at, "--templates", str(folder / "two.txt")], "line 1: '{} and {}' has 2 times {}"),
        "another brace": ([at, "--templates", str(folder / "brace.txt")], "line 1: 'a {name} and {}' has another brace"),
        "no template": ([at, "--templates", str(folder / "nothing.txt")], "no template in it"),
        "a template twice": ([at, "--templates", str(folder / "twice.txt")], "line 2: 'a {}' is"),
        "no text": ([at, "--templates", str(folder / "binary.txt")], "line 1"),
        "no such names": ([at, "--names", str(folder / "nowhere.txt")], "no such file"),
        "too few names": ([at, "--names", str(folder / "short.txt")], "1 name for 2 class folders"),
        "equal names": ([at, "--names", str(folder / "same.txt")], "both called 'a'"),
        "broken JSON": ([at, "--names", str(folder / "names.json")], "not valid JSON"),
        "ImageNet's names": ([at, "--names", "openai"], "names for the 1,000 class folders"),
        "written already": ([at, "--out", str(folder / "written")], "predictions.csv: is there already"),
        "a file for a folder": ([at, "--out", str(folder / "two.txt")], "is a file"),
        "overwrite what": ([at, "--overwrite"], "which is not given"),
    }  # fmt: skip


def test_bad_inputs_are_one_line_each(folders, tmp_path, capsys):
    model, cases = str(folders("clip")), bad_inputs(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, (arguments, message) in cases.items():
        assert main(["classify", model, *arguments]) == 1, name
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if line.startswith("clipvisionalign: error")]
        assert len(lines) == 1, (name, output.err)
        assert message in lines[0], name
        assert output.err.rstrip().splitlines()[-1] == lines[0], name
        assert output.out == "", name
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_model_is_loaded_where_the_data_are_at_fault(folders, tmp_path, monkeypatch, capsys):
    from clipvisionalign.training import opened_classes

    monkeypatch.setattr(opened_classes, "load_model", lambda *given: pytest.fail("a model is loaded"))
    cases = bad_inputs(tmp_path)
    del cases["no image can be read"]
    for arguments, _ in cases.values():
        assert main(["classify", str(folders("clip")), *arguments]) == 1
    assert main(["classify", str(tmp_path / "nowhere"), str(tmp_path / "data")]) == 1
    capsys.readouterr()
