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
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.minimal_pairs import (
    KINDS,
    caption_twins,
    drawn_together,
    minimal_pairs_of,
    read_minimal_pairs,
    scene_twins,
)
from clipvisionalign.data.scenes import COUNT_WORDS, random_scene, read_scenes, relation
from clipvisionalign.retrieval.minimal_pairs import outscored
from clipvisionalign.study.report import text_only
from clipvisionalign.study.results import Measured, composition
from clipvisionalign.study.text_only import TrigramModel, twins_told_apart

SCENES = [random_scene(random.Random(seed)) for seed in range(300)]


def bag(text: str) -> Counter:
    return Counter(word for word in text.split() if word not in ("a", "an"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scenes_twin_differs_in_exactly_the_thing_named(kind):
    """Read off both scene graphs, group by group."""
    seen = 0
    for scene in SCENES:
        twin = scene_twins(scene).get(kind)
        if twin is None:
            continue
        seen += 1
        changed = [(a, b) for a, b in zip(scene.groups, twin.other.groups, strict=True) if a != b]
        assert (scene.background, scene.seed) == (twin.other.background, twin.other.seed)
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
    assert seen > 150


def test_the_true_caption_is_true_and_the_twin_is_not():
    """Captions read back against what is drawn, without the code that made them."""
    for scene in SCENES:
        first, second = scene.groups[:2]
        there = {(group.shape, group.colour): group.count for group in scene.groups}
        twins = scene_twins(scene)
        how = relation(first, second)
        true, false = twins["relation"].true, twins["relation"].twin
        assert true.startswith(first.words(with_size=False))
        assert false.startswith(second.words(with_size=False))
        assert how in true
        assert how in false  # the same words, the other way round: of two things one cannot be left of the other twice
        assert relation(second, first) != how
        words = {word: number for number, word in COUNT_WORDS.items()} | {"an": 1}
        told = twins["count"]
        assert words[told.true.split()[0]] == first.count
        assert words[told.twin.split()[0]] != first.count
        colour = twins["negation"].twin.split()[1]
        assert (first.shape, colour) not in there
        if "attribute" in twins:
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

    pairs = [twin for scene in SCENES if (twin := scene_twins(scene).get(kind))]
    for pair in pairs:
        # Plurals stay with their number, which travels with the group.
        assert bag(pair.true) == bag(pair.twin) or kind == "attribute"
    same = [pair for pair in pairs if bag(pair.true) == bag(pair.twin)]
    assert len(same) > 100
    found = outscored(BagOfWords(), same, [pair.true for pair in same], [pair.twin for pair in same])
    assert found.mean() == 0.5


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

    images, true, twins = list(image_of), [f"t{n}" for n in range(20)], [f"f{n}" for n in range(20)]
    found = [outscored(model, images, true, twins) for model in (Vectors(), Scores(), Pairs())]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    assert 0 < found[0].mean() < 1
    # Asked the other way round it is the opposite.
    assert (outscored(Vectors(), images, twins, true) == 1 - found[0]).all()


def test_captions_of_photographs_keep_their_grammar():
    told = {
        "A man chases a dog .": ("relation", "A dog chases a man ."),
        "Two men are in front of a red car": ("relation", "Two men are behind a red car"),
        "A black dog bites an orange ball": ("attribute", "An orange dog bites a black ball"),
        "Three girls play": ("count", "Five girls play"),
        "A boy is swimming": ("negation", "A boy is not swimming"),
    }
    for caption, (kind, twin) in told.items():
        assert caption_twins(caption)[kind] == twin
    # Swapping these says the same again.
    assert "relation" not in caption_twins("a man and a woman smile")
    assert "attribute" not in caption_twins("a black and white dog sleeps")
    assert caption_twins("nothing to swap here") == {}


def test_pairs_of_a_data_set(scenes_folder):
    data = read_captioned_images(scenes_folder).split("dev")
    assert len(read_scenes(scenes_folder)) == 120
    pairs = minimal_pairs_of(data)
    assert {pair.kind for pair in pairs} == set(KINDS)
    few = minimal_pairs_of(data, limit=3)
    assert Counter(pair.kind for pair in few) == dict.fromkeys(KINDS, 3)
    assert few == minimal_pairs_of(data, limit=3)
    assert set(few) <= set(pairs)


# --- published sets, in files written by hand in their layouts -------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "ex_0_img_0.png", "ex_0_img_1.png"):
        Image.new("RGB", (40, 30), "green").save(tmp_path / "images" / name)
    return tmp_path


def test_sugarcrepe(pictures):
    row = {"filename": "1.jpg", "caption": "a dog on a mat", "negative_caption": "a mat on a dog"}
    (pictures / "swap_obj.json").write_text(json.dumps({"0": row}))
    (pair,) = read_minimal_pairs(pictures / "swap_obj.json", pictures / "images")
    assert (pair.kind, pair.true, pair.twin) == ("swap_obj", "a dog on a mat", "a mat on a dog")


def test_aro_cuts_out_the_part_that_is_spoken_of(pictures):
    from io import BytesIO

    row = {"image_path": "1.jpg", "bbox_x": 5, "bbox_y": 5, "bbox_w": 20, "bbox_h": 10, "relation_name": "on",
           "true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}  # fmt: skip
    (pictures / "visual_genome_relation.json").write_text(json.dumps([row]))
    (pair,) = read_minimal_pairs(pictures / "visual_genome_relation.json", pictures / "images")
    assert Image.open(BytesIO(pair.image)).size == (20, 10)
    assert pair.kind == "relation"


def test_winoground_gives_both_pictures(pictures):
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "x over y", "caption_1": "y over x"}
    (pictures / "examples.jsonl").write_text(json.dumps(row) + "\n")
    pairs = read_minimal_pairs(pictures)
    assert [(pair.image.name, pair.true, pair.twin) for pair in pairs] == [
        ("ex_0_img_0.png", "x over y", "y over x"),
        ("ex_0_img_1.png", "y over x", "x over y"),
    ]


def test_pairs_of_one_image_row_or_identity_are_drawn_together(pictures):
    """Whatever was cut out of the image, and whatever a set calls its rows."""
    cut = {"bbox_y": 5, "bbox_w": 20, "bbox_h": 10, "true_caption": "the dog is on the mat",
           "false_caption": "the mat is on the dog"}  # fmt: skip
    several = [{"image_path": f"{name}.jpg", "bbox_x": x, **cut} for name in (1, 2) for x in (1, 2, 3)]
    Image.new("RGB", (40, 30), "red").save(pictures / "images" / "2.jpg")
    sets = pictures / "sets"
    sets.mkdir()
    (sets / "aro.json").write_text(json.dumps(several))
    row = {"image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "x over y", "caption_1": "y over x"}
    (sets / "wino.jsonl").write_text(json.dumps(row) + "\n")
    crepe = {"filename": "1.jpg", "caption": "a dog on a mat", "negative_caption": "a mat on a dog"}
    (sets / "swap.json").write_text(json.dumps({"0": crepe, "1": crepe | {"filename": "2.jpg"}, "2": crepe}))
    found = drawn_together(read_minimal_pairs(sets, pictures / "images"))
    assert found == {"relation": [0, 0, 0, 1, 1, 1], "winoground": [0, 0], "swap": [0, 1, 0]}
    rows = [CaptionedImage(f"{i}.jpg", Path(f"{i}.jpg"), ("Two dogs",), "dev", identity=who)
            for i, who in enumerate(["a", "b", "a", None])]  # fmt: skip
    assert drawn_together(minimal_pairs_of(CaptionedImages(rows, pictures))) == {"count": [0, 1, 0, 2]}
    assert drawn_together(minimal_pairs_of(CaptionedImages(rows, pictures, identity="none"))) == {"count": [0, 1, 2, 3]}


def test_pairs_that_were_drawn_together_are_no_evidence_beside_each_other():
    """A model that tosses a coin an image, which most pairs of the image follow: it is shown to differ from chance in
    5 % of studies at most, and so are words alone. Where it is not known what was drawn together nothing is tested."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(40), rng.integers(4, 12, 40))
    shown = 0
    for _ in range(300):
        coins, follows = rng.random(40) < 0.5, rng.random(len(unit)) < 0.7
        found = np.where(follows, coins[unit], rng.random(len(unit)) < 0.5).astype(float)
        cells = [Measured("self", 0, {"composition": {"aro": {"relation": found.tolist()}}}, {})]
        (row,) = composition(cells, {"aro": {"relation": unit.tolist()}})["aro"]
        shown += row["p_holm"] < 0.05
        assert (row["pairs"], row["units"]) == (len(unit), 40)
        assert row["value"] == pytest.approx(100 * found.mean())
    assert shown <= 0.075 * 300
    words = text_only({"aro": {"relation": found.tolist()}}, {"aro": {"relation": unit.tolist()}})["aro"][0]
    assert (words["low"], words["high"]) == (row["low"], row["high"])
    (row,) = composition(cells, {})["aro"]
    assert (row["low"], row["p"], row["p_holm"], row["units"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "no minimal pairs"),
        ('[{"a": 1}]', "its rows have a; known are"),
        ('{"0": {"filename": "gone.jpg", "caption": "a", "negative_caption": "b"}}', "entry 1: FileNotFoundError"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=told):
        read_minimal_pairs(tmp_path / "x.json")


# --- the control -----------------------------------------------------------------------------------------------------


def test_probabilities_of_the_language_model_sum_to_one():
    model = TrigramModel(["a dog runs", "a dog sleeps", "the cat sleeps"])
    words = [*model.model.vocab]
    assert sum(model.model.score(word, ["a", "dog"]) for word in words) == pytest.approx(1.0, abs=0.02)
    assert model.log_probability("a dog runs") > model.log_probability("dog a runs")


def test_a_shortcut_shows_in_the_control(scenes_folder):
    """Twins that nobody would write are told apart by words alone; those of the scenes are not."""
    from clipvisionalign.data.minimal_pairs import MinimalPair

    captions = ["a dog is running on the grass", "a man is sitting on a bench", "a boy is playing"] * 10
    unlikely = [MinimalPair(b"", "a dog is running", "a dog is not running", "negation")] * 4
    assert np.mean(twins_told_apart(captions, unlikely)["negation"]) == 1.0
    data = read_captioned_images(scenes_folder)
    found = twins_told_apart(data.split("train").captions, minimal_pairs_of(data.split("dev")))
    assert 0.2 < np.mean(found["relation"]) < 0.8


@pytest.mark.parametrize(
    ("caption", "twin"),
    [("dog bites man", "man bites dog"), ("собака кусает человека", "человека кусает собака"),
     ("der Hund beißt den Mann", "den Mann beißt der Hund"), ("कुत्ता आदमी को काटता है", "आदमी कुत्ता को काटता है"), ("犬が男を噛む", "男が犬を噛む")],
)  # fmt: skip
def test_words_alone_are_of_any_language_or_there_is_no_control(caption, twin):
    from clipvisionalign.data.minimal_pairs import MinimalPair

    pairs = [MinimalPair(b"", caption, twin, "relation")] * 2
    assert twins_told_apart([caption] * 50, pairs) == {"relation": [1.0, 1.0]}
    # Words that it has never seen tell it nothing.
    assert twins_told_apart(["Zażółć gęślą jaźń"] * 50, pairs) == {}
