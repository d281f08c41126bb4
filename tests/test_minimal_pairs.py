"""Minimal pairs: twins differ in the thing named and in nothing else; published sets are read; the text-only control."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages, DataError
from clipvisionalign.data.foils import (
    FOIL_KINDS,
    caption_foils,
    drawn_together,
    make_minimal_pairs,
    read_minimal_pairs,
    scene_foils,
)
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_dataset import read_scenes
from clipvisionalign.data.scenes import COUNT_WORDS, random_scene, spatial_relation
from clipvisionalign.retrieval.minimal_pairs import score_minimal_pairs
from clipvisionalign.study.aggregate import TrialResult, aggregate_composition
from clipvisionalign.study.blind_baseline import TrigramModel, blind_accuracy
from clipvisionalign.study.report.build import blind_baseline

SCENES = [random_scene(random.Random(seed)) for seed in range(300)]


def bag(text: str) -> Counter:
    return Counter(word for word in text.split() if word not in ("a", "an"))


@pytest.mark.parametrize("kind", FOIL_KINDS)
def test_a_scenes_foil_differs_in_exactly_the_thing_named(kind):
    """Read off both scene graphs, group by group."""
    checked = 0
    for scene in SCENES:
        pair = scene_foils(scene).get(kind)
        if pair is None:
            continue
        checked += 1
        changed = [(a, b) for a, b in zip(scene.groups, pair.foil_scene.groups, strict=True) if a != b]
        assert (scene.background, scene.seed) == (pair.foil_scene.background, pair.foil_scene.seed)
        if kind == "relation":
            (a, b), (c, d) = changed
            assert (replace(b, column=a.column, row=a.row), replace(d, column=c.column, row=c.row)) == (a, c)
            assert {(b.column, b.row), (d.column, d.row)} == {(a.column, a.row), (c.column, c.row)}
        elif kind == "attribute":
            (a, b), (c, d) = changed
            assert (replace(b, colour=a.colour), replace(d, colour=c.colour)) == (a, c)
            assert (b.colour, d.colour) == (c.colour, a.colour)
        elif kind == "count":
            ((a, b),) = changed
            assert replace(b, count=a.count) == a
        else:
            ((a, b),) = changed
            assert replace(b, colour=a.colour) == a
    assert checked > 150


def test_the_true_caption_is_true_and_the_foil_is_not():
    """Captions read back against what is drawn, without the code that made them."""
    for scene in SCENES:
        first, second = scene.groups[:2]
        there = {(group.shape, group.colour): group.count for group in scene.groups}
        pairs = scene_foils(scene)
        how = spatial_relation(first, second)
        true, false = pairs["relation"].caption, pairs["relation"].foil
        assert true.startswith(first.phrase(with_size=False))
        assert false.startswith(second.phrase(with_size=False))
        assert how in true
        assert how in false  # the same words, the other way round: of two things one cannot be left of the other twice
        assert spatial_relation(second, first) != how
        count_of_word = {word: number for number, word in COUNT_WORDS.items()} | {"an": 1}
        count_pair = pairs["count"]
        assert count_of_word[count_pair.caption.split()[0]] == first.count
        assert count_of_word[count_pair.foil.split()[0]] != first.count
        colour = pairs["negation"].foil.split()[1]
        assert (first.shape, colour) not in there
        if "attribute" in pairs:
            assert (first.shape, second.colour) not in there


@pytest.mark.parametrize("kind", ["relation", "attribute", "negation"])
def test_a_bag_of_words_gets_fifty_percent(kind):
    """Same words, so that a bag of words, whatever it weighs them by, sees no difference."""

    class BagOfWords:
        def __init__(self):
            self.rng = np.random.default_rng(0)
            self.vectors = {}

        def encode_images(self, images):
            return self.rng.normal(size=(len(images), 16))

        def encode_captions(self, captions):
            def vector(word):
                return self.vectors.setdefault(word, self.rng.normal(size=16).astype(np.float32))

            return np.stack(
                [np.mean([vector(word) for word in sorted(bag(text).elements())], axis=0) for text in captions]
            )

    pairs = [candidate for scene in SCENES if (candidate := scene_foils(scene).get(kind))]
    for pair in pairs:
        # Plurals stay with their number, which travels with the group.
        assert bag(pair.caption) == bag(pair.foil) or kind == "attribute"
    same = [pair for pair in pairs if bag(pair.caption) == bag(pair.foil)]
    assert len(same) > 100
    outcomes = score_minimal_pairs(BagOfWords(), same, [pair.caption for pair in same], [pair.foil for pair in same])
    assert outcomes.mean() == 0.5


def test_outscored_is_the_same_by_vectors_scores_and_pairs():
    rng = np.random.default_rng(1)
    image_of = {f"i{n}": rng.normal(size=8) for n in range(20)}
    text_of = {f"{kind}{n}": rng.normal(size=8) for n in range(20) for kind in "tf"}

    class Vectors:
        def encode_images(self, images):
            return np.stack([image_of[image] for image in images])

        def encode_captions(self, captions):
            return np.stack([text_of[caption] for caption in captions])

    class Scores:
        def score(self, images, captions):
            return Vectors().encode_images(images) @ Vectors().encode_captions(captions).T

    class Pairs:
        def score_pairs(self, images, captions, i, c):
            return Scores().score(images, captions)[i, c]

    images, true, foils = list(image_of), [f"t{n}" for n in range(20)], [f"f{n}" for n in range(20)]
    outcomes = [score_minimal_pairs(model, images, true, foils) for model in (Vectors(), Scores(), Pairs())]
    assert (outcomes[0] == outcomes[1]).all()
    assert (outcomes[0] == outcomes[2]).all()
    assert 0 < outcomes[0].mean() < 1
    # Asked the other way round it is the opposite.
    assert (score_minimal_pairs(Vectors(), images, foils, true) == 1 - outcomes[0]).all()


def test_captions_of_photographs_keep_their_grammar():
    expected = {
        "A man chases a dog .": ("relation", "A dog chases a man ."),
        "Two men are in front of a red car": ("relation", "Two men are behind a red car"),
        "A black dog bites an orange ball": ("attribute", "An orange dog bites a black ball"),
        "Three girls play": ("count", "Five girls play"),
        "A boy is swimming": ("negation", "A boy is not swimming"),
    }
    for caption, (kind, foil) in expected.items():
        assert caption_foils(caption)[kind] == foil
    # Swapping these says the same again.
    assert "relation" not in caption_foils("a man and a woman smile")
    assert "attribute" not in caption_foils("a black and white dog sleeps")
    assert caption_foils("nothing to swap here") == {}


def test_pairs_of_a_data_set(scenes_folder):
    data = read_captioned_images(scenes_folder).split("dev")
    assert len(read_scenes(scenes_folder)) == 120
    pairs = make_minimal_pairs(data)
    assert {pair.kind for pair in pairs} == set(FOIL_KINDS)
    few = make_minimal_pairs(data, limit=3)
    assert Counter(pair.kind for pair in few) == dict.fromkeys(FOIL_KINDS, 3)
    assert few == make_minimal_pairs(data, limit=3)
    assert set(few) <= set(pairs)


# --- published sets, in files written by hand in their layouts -------------------------------------------------------


@pytest.fixture
def data_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "ex_0_img_0.png", "ex_0_img_1.png"):
        Image.new("RGB", (40, 30), "green").save(tmp_path / "images" / name)
    return tmp_path


def test_sugarcrepe(data_folder):
    row = {"filename": "1.jpg", "caption": "a dog on a mat", "negative_caption": "a mat on a dog"}
    (data_folder / "swap_obj.json").write_text(json.dumps({"0": row}))
    (pair,) = read_minimal_pairs(data_folder / "swap_obj.json", data_folder / "images")
    assert (pair.kind, pair.caption, pair.foil) == ("swap_obj", "a dog on a mat", "a mat on a dog")


def test_aro_cuts_out_the_part_that_is_spoken_of(data_folder):
    from io import BytesIO

    row = {"image_path": "1.jpg", "bbox_x": 5, "bbox_y": 5, "bbox_w": 20, "bbox_h": 10, "relation_name": "on",
           "true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}  # fmt: skip
    (data_folder / "visual_genome_relation.json").write_text(json.dumps([row]))
    (pair,) = read_minimal_pairs(data_folder / "visual_genome_relation.json", data_folder / "images")
    assert Image.open(BytesIO(pair.image)).size == (20, 10)
    assert pair.kind == "relation"


def test_winoground_gives_both_images(data_folder):
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "x over y", "caption_1": "y over x"}
    (data_folder / "examples.jsonl").write_text(json.dumps(row) + "\n")
    pairs = read_minimal_pairs(data_folder)
    assert [(pair.image.name, pair.caption, pair.foil) for pair in pairs] == [
        ("ex_0_img_0.png", "x over y", "y over x"),
        ("ex_0_img_1.png", "y over x", "x over y"),
    ]


def test_pairs_of_one_image_row_or_identity_are_drawn_together(data_folder):
    """Whatever was cut out of the image, and whatever a set calls its rows."""
    cut = {"bbox_y": 5, "bbox_w": 20, "bbox_h": 10, "true_caption": "the dog is on the mat",
           "false_caption": "the mat is on the dog"}  # fmt: skip
    several = [{"image_path": f"{name}.jpg", "bbox_x": x, **cut} for name in (1, 2) for x in (1, 2, 3)]
    Image.new("RGB", (40, 30), "red").save(data_folder / "images" / "2.jpg")
    sets = data_folder / "sets"
    sets.mkdir()
    (sets / "aro.json").write_text(json.dumps(several))
    row = {"image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "x over y", "caption_1": "y over x"}
    (sets / "wino.jsonl").write_text(json.dumps(row) + "\n")
    crepe = {"filename": "1.jpg", "caption": "a dog on a mat", "negative_caption": "a mat on a dog"}
    (sets / "swap.json").write_text(json.dumps({"0": crepe, "1": crepe | {"filename": "2.jpg"}, "2": crepe}))
    groups = drawn_together(read_minimal_pairs(sets, data_folder / "images"))
    assert groups == {"relation": [0, 0, 0, 1, 1, 1], "winoground": [0, 0], "swap": [0, 1, 0]}
    rows = [CaptionedImage(f"{i}.jpg", Path(f"{i}.jpg"), ("Two dogs",), "dev", identity=who)
            for i, who in enumerate(["a", "b", "a", None])]  # fmt: skip
    assert drawn_together(make_minimal_pairs(CaptionedImages(rows, data_folder))) == {"count": [0, 1, 0, 2]}
    assert drawn_together(make_minimal_pairs(CaptionedImages(rows, data_folder, identity="none"))) == {
        "count": [0, 1, 2, 3]
    }


def test_pairs_that_were_drawn_together_are_no_evidence_beside_each_other():
    """A model that tosses a coin an image, which most pairs of the image follow: it is shown to differ from chance in
    5 % of studies at most, and so are words alone. Where it is not known what was drawn together nothing is tested."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(40), rng.integers(4, 12, 40))
    shown = 0
    for _ in range(300):
        coins, follows = rng.random(40) < 0.5, rng.random(len(unit)) < 0.7
        outcomes = np.where(follows, coins[unit], rng.random(len(unit)) < 0.5).astype(float)
        cells = [TrialResult("self", 0, {"composition": {"aro": {"relation": outcomes.tolist()}}}, {})]
        (row,) = aggregate_composition(cells, {"aro": {"relation": unit.tolist()}})["aro"]
        shown += row["p_holm"] < 0.05
        assert (row["pairs"], row["units"]) == (len(unit), 40)
        assert row["value"] == pytest.approx(100 * outcomes.mean())
    assert shown <= 0.075 * 300
    words = blind_baseline({"aro": {"relation": outcomes.tolist()}}, {"aro": {"relation": unit.tolist()}})["aro"][0]
    assert (words["low"], words["high"]) == (row["low"], row["high"])
    (row,) = aggregate_composition(cells, {})["aro"]
    assert (row["low"], row["p"], row["p_holm"], row["units"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no minimal pairs"),
        ('[{"a": 1}]', "its rows have a; supported are"),
        ('{"0": {"filename": "gone.jpg", "caption": "a", "negative_caption": "b"}}', "entry 1: FileNotFoundError"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_minimal_pairs(tmp_path / "x.json")


# --- the control -----------------------------------------------------------------------------------------------------


def test_probabilities_of_the_language_model_sum_to_one():
    model = TrigramModel(["a dog runs", "a dog sleeps", "the cat sleeps"])
    vocabulary = [*model.model.vocab]
    assert sum(model.model.score(word, ["a", "dog"]) for word in vocabulary) == pytest.approx(1.0, abs=0.02)
    assert model.log_probability("a dog runs") > model.log_probability("dog a runs")


def test_a_shortcut_shows_in_the_control(scenes_folder):
    """Twins that nobody would write are told apart by words alone; those of the scenes are not."""
    from clipvisionalign.data.foils import MinimalPair

    captions = ["a dog is running on the grass", "a man is sitting on a bench", "a boy is playing"] * 10
    unlikely = [MinimalPair(b"", "a dog is running", "a dog is not running", "negation")] * 4
    assert np.mean(blind_accuracy(captions, unlikely)["negation"]) == 1.0
    data = read_captioned_images(scenes_folder)
    outcomes = blind_accuracy(data.split("train").captions, make_minimal_pairs(data.split("dev")))
    assert 0.2 < np.mean(outcomes["relation"]) < 0.8


@pytest.mark.parametrize(
    ("caption", "foil"),
    [("dog bites man", "man bites dog"), ("собака кусает человека", "человека кусает собака"),
     ("der Hund beißt den Mann", "den Mann beißt der Hund"), ("कुत्ता आदमी को काटता है", "आदमी कुत्ता को काटता है"), ("犬が男を噛む", "男が犬を噛む")],
)  # fmt: skip
def test_words_alone_are_of_any_language_or_there_is_no_control(caption, foil):
    from clipvisionalign.data.foils import MinimalPair

    pairs = [MinimalPair(b"", caption, foil, "relation")] * 2
    assert blind_accuracy([caption] * 50, pairs) == {"relation": [1.0, 1.0]}
    # Words that it has never seen tell it nothing.
    assert blind_accuracy(["Zażółć gęślą jaźń"] * 50, pairs) == {}
