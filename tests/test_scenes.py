"""The drawn data set: true captions, twins that hold the same words, the same image from the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from clipvisionalign.cli import main
from clipvisionalign.cli.data import scenes_parser
from clipvisionalign.data.scene_dataset import random_scenes, write_scenes
from clipvisionalign.data.scenes import Group, Scene, draw_scene, scene_captions, spatial_relation, swap_first_groups

SCENES = list(random_scenes(400, seed=3))


def test_five_differing_captions_some_of_them_long():
    lengths = []
    for _, _, scene in SCENES:
        captions = scene_captions(scene)
        assert len(set(captions)) == 5
        lengths += [len(caption.split()) for caption in captions]
    assert max(lengths) > 60
    assert np.median(lengths) < 25


def test_no_two_scenes_are_alike_and_foils_share_a_split():
    keys = Counter(scene.key() for _, _, scene in SCENES)
    assert max(keys.values()) == 1
    split_of = {scene.key(): split for _, split, scene in SCENES}
    with_foil = [scene for _, _, scene in SCENES if swap_first_groups(scene).key() in split_of]
    assert 0.3 < len(with_foil) / len(SCENES) < 0.8
    assert all(split_of[swap_first_groups(scene).key()] == split_of[scene.key()] for scene in with_foil)
    assert set(split_of.values()) == {"train", "dev", "test"}


def test_a_bag_of_words_cannot_tell_foils_apart():
    """The relation of the first caption, told of the twin, holds the same words and is not true of this scene."""
    across = 0
    for _, _, scene in SCENES:
        here, there = scene_captions(scene)[0], scene_captions(swap_first_groups(scene))[0]
        assert here != there
        first, second = scene.groups[:2]
        how = spatial_relation(first, second)
        swapped = f"{second.phrase(with_size=False)} {how} {first.phrase(with_size=False)}"
        assert sorted(here.split()) == sorted(swapped.split())
        assert (
            there
            == f"{first.phrase(with_size=False)} {spatial_relation(second, first)} {second.phrase(with_size=False)}"
        )
        across += how.startswith("to the")
    assert 0.3 < across / len(SCENES) < 0.8


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        ((0, 0), (2, 1), "to the left of"),
        ((2, 2), (1, 2), "to the right of"),
        ((1, 0), (1, 2), "above"),
        ((0, 2), (1, 0), "below"),
    ],
)
def test_relations(a, b, how):
    first, second = (Group("circle", "red", "small", 1, *cell) for cell in (a, b))
    assert spatial_relation(first, second) == how
    assert spatial_relation(first, first) is None


def test_relation_captions_are_true_of_the_scene():
    for _, _, scene in SCENES:
        positions = {group.phrase(with_size=False): (group.column, group.row) for group in scene.groups}
        for caption in scene_captions(scene):
            for left, how, right in re.findall(
                r"((?:an?|two|three|four) \w+ \w+) (?:lies? )?(to the left of|to the right of|above|below) ((?:an?|two|three|four) \w+ \w+)",
                caption,
            ):
                if left not in positions or right not in positions:
                    continue  # the caption with sizes
                (x, y), (u, v) = positions[left], positions[right]
                assert {"to the left of": x < u, "to the right of": x > u, "above": y < v, "below": y > v}[how]


def test_the_colour_stands_where_the_caption_says():
    for colour, rgb in (("red", (214, 40, 40)), ("blue", (38, 84, 200))):
        for column in range(3):
            for row in range(3):
                scene = Scene("white", (Group("circle", colour, "large", 1, column, row),), seed=1)
                pixels = np.asarray(draw_scene(scene, 90), dtype=int)
                close = np.abs(pixels - rgb).sum(axis=2) < 90
                y, x = np.argwhere(close).mean(axis=0) / 30
                assert (int(x), int(y)) == (column, row)


def test_every_shape_and_count_is_drawn_apart():
    distinct_images = set()
    for shape in ("circle", "square", "triangle", "star", "cross", "ring"):
        for count in (1, 2, 3, 4):
            scene = Scene("grey", (Group(shape, "green", "small", count, 1, 1),), seed=5)
            distinct_images.add(draw_scene(scene, 64).tobytes())
    assert len(distinct_images) == 24


def test_a_seed_draws_the_same_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, 6, seed, size=48)
    read = {name: [(tmp_path / name / f).read_bytes() for f in ("metadata.csv", "images/000003.png")] for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0]
    assert read["a"][1] != read["c"][1]
    graphs = [json.loads(line) for line in (tmp_path / "a" / "scenes.jsonl").read_text().splitlines()]
    assert len(graphs) == 6
    assert {"file_name", "split", "background", "groups", "seed"} == set(graphs[0])


@pytest.mark.parametrize(
    ("flags", "part"),
    [([], 0), (["--captions", "1"], 1), (["--classes", "shape"], 2)],
    ids=["plain", "difficulty", "classes"],
)
def test_the_help_names_the_files_that_are_written(tmp_path, flags, part):
    """What stands before the first semicolon is always written, and each further part under its condition alone."""
    parser = scenes_parser()
    (argument,) = (action for action in parser._actions if action.dest == "out")
    files = [set(re.findall(r"\w+/|\w+\.\w+", clause)) for clause in argument.help.split(";")]
    assert main(["scenes", str(tmp_path / "set"), "--images", "60", "--size", "32", *flags]) == 0
    written = {f"{path.name}/" if path.is_dir() else path.name for path in (tmp_path / "set").iterdir()}
    assert written == ({"train/", "val/", "test/"} if part == 2 else files[0] | files[part])
    assert files[2] == set()
