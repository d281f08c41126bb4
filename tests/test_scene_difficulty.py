"""Drawn scenes by difficulty: captions that are true and have what is asked for, and long ones that differ at the
needle alone; the usual data set stays as it was, byte for byte."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import asdict, replace
from itertools import islice, pairwise, product
from pathlib import Path

import pytest

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.foils import make_minimal_pairs
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_dataset import random_scenes, read_scene_record, read_scenes, write_scenes
from clipvisionalign.data.scene_descriptions import (
    NEEDLE_TOKENS,
    _neutral_sentences,
    caption_features,
    composed_captions,
    count_tokens,
    describe_scene,
    filler,
)
from clipvisionalign.data.scene_difficulty import SceneDifficulty, difficulty_faults, difficulty_of
from clipvisionalign.data.scenes import (
    BACKGROUNDS,
    SHAPE_COLOURS,
    SHAPES,
    Scene,
    scene_captions,
    spatial_relation,
    swap_first_groups,
)
from clipvisionalign.study.config import Drawing, Plan
from clipvisionalign.study.data import open_study_data
from clipvisionalign.study.plan_file import plan_text, read_plan

HARD = SceneDifficulty(captions=5, relations=0.5, negation=0.3, counts=0.7)
SCENES = [scene for _, _, scene in random_scenes(300, seed=3)]
MANY = [scene for _, _, scene in random_scenes(200, seed=4, groups=6)]


def captions_of(folder: Path) -> list[str]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return [row["caption"] for row in csv.DictReader(file)]


# --- as it was ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "digest"),
    [
        ({}, "3355072d1efa0687"),
        ({"plain": True}, "d7d96c472f77755c"),
        ({"splits": {"train": 12, "dev": 4, "test": 8}}, "bc5005ab55e5b1a9"),
    ],
)
def test_the_usual_data_set_is_drawn_as_by_earlier_versions_byte_for_byte(tmp_path, how, digest):
    for name, more in (("a", {}), ("b", {"difficulty": SceneDifficulty()})):
        folder = write_scenes(tmp_path / name, 24, 3, 32, **how, **more)
        content = b"".join((folder / file).read_bytes() for file in ("metadata.csv", "scenes.jsonl"))
        assert hashlib.sha256(content).hexdigest()[:16] == digest
        assert sorted(path.name for path in folder.iterdir()) == ["images", "metadata.csv", "scenes.jsonl"]
        assert read_scene_record(folder) is None


def test_a_plan_without_difficulty_is_written_as_before_and_one_with_it_is_read_again(tmp_path):
    assert "difficulty" not in plan_text(Plan(scenes=9, drawing=Drawing(seed=1)))
    hard = Plan(scenes=9, drawing=Drawing(difficulty=replace(HARD, tokens=512, needle="middle")))
    (tmp_path / "plan.yaml").write_text(plan_text(hard))
    assert read_plan(tmp_path / "plan.yaml") == hard


# --- composed captions -------------------------------------------------------------------------------------------------

MENTION = r"(?:an?|some|one|two|three|four) (\w+) (\w+)"


def kind(colour: str, shape: str) -> tuple[str, str]:
    return colour, shape if shape in SHAPES else {"crosses": "cross"}.get(shape, shape.removesuffix("s"))


def is_true_of(caption: str, scene: Scene) -> bool:
    """Whether all that a composed caption states holds for a scene: read back word by word."""
    groups = {(group.colour, group.shape): group for group in scene.groups}
    head, _, negated = caption.partition(", but no ")
    mentioned = [kind(*match.groups()) for match in re.finditer(MENTION, head) if match[1] in SHAPE_COLOURS]
    if set(mentioned) != set(groups) or len(mentioned) != len(groups):
        return False
    for number, colour, shape in re.findall(r"(one|two|three|four|an?|some) (\w+) (\w+)", head):
        if colour in SHAPE_COLOURS:
            count = groups[kind(colour, shape)].count
            exact = {"one": 1, "two": 2, "three": 3, "four": 4, "some": max(count, 2)}.get(number, 1)
            if count != exact:
                return False
    if negated and kind(*negated.split(",")[0].split()[:2]) in groups:
        return False
    if (ground := re.search(r", on (?:a )?(\w+)(?: background)?$", caption)) and ground[1] != scene.background:
        return False
    first, second = (groups[each] for each in mentioned[:2])
    if relation := re.search(r"to the left of|to the right of|above|below", head):
        return spatial_relation(first, second) == relation[0]
    return f"{first.position_phrase()} and " in head


@pytest.mark.parametrize("scenes", [SCENES, MANY])
def test_composed_captions_are_different_and_true_and_false_of_the_scene_with_swapped_groups(scenes):
    seen = set()
    for scene in scenes:
        captions = composed_captions(scene, HARD)
        assert len(set(captions)) == 5
        for caption in captions:
            assert is_true_of(caption, scene), caption
            assert not is_true_of(caption, swap_first_groups(scene)), caption
            seen.add(caption_features(caption))
    assert len(seen) == 8, "every combination of relation, negation and counts occurs"


def test_scenes_have_the_groups_that_are_asked_for():
    for groups in range(2, 7):
        drawn = [scene for _, _, scene in random_scenes(30, seed=1, groups=groups)]
        assert {len(scene.groups) for scene in drawn} == {groups}
        assert all(len({(group.column, group.row) for group in scene.groups}) == groups for scene in drawn)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_have_each_feature_in_the_share_that_is_asked_for(share):
    for name, attribute in (("relations", "relation"), ("negation", "negation"), ("counts", "counts")):
        difficulty = replace(SceneDifficulty(captions=5), **{name: share})
        features = [caption_features(caption) for scene in SCENES for caption in composed_captions(scene, difficulty)]
        having = sum(getattr(each, attribute) for each in features)
        # Four standard deviations of a binomial count; none at 0 and 1.
        assert abs(having - share * len(features)) <= 4 * (len(features) * share * (1 - share)) ** 0.5
        assert not any(getattr(each, other) for each in features for other in each._fields if other != attribute)


def test_a_data_set_records_its_difficulty_and_counts_that_add_up(tmp_path, capsys):
    folder = write_scenes(tmp_path / "d", 40, 2, 32, splits={"train": 20, "dev": 8, "test": 12}, difficulty=HARD)
    record, captions = read_scene_record(folder), captions_of(folder)
    assert record is not None
    assert record.difficulty == HARD
    assert record.captions == len(captions) == 200
    features = [caption_features(caption) for caption in captions]
    assert record.relations == sum(each.relation for each in features)
    assert record.negation == sum(each.negation for each in features)
    assert record.counts == sum(each.counts for each in features)
    assert record.longest == max(count_tokens(caption) for caption in captions)
    for name, scene in read_scenes(folder).items():
        own = [row.captions for row in read_captioned_images(folder).rows if row.name == name]
        assert [list(each) for each in own] == [composed_captions(scene, HARD)]
    assert main(["check", str(folder)]) == 0
    assert f"of 200 captions {record.relations} have relations" in " ".join(capsys.readouterr().out.split())


def record_text(difficulty: object, **counts: object) -> str:
    usual = dict.fromkeys(("captions", "relations", "negation", "counts", "longest"), 1)
    return json.dumps({"difficulty": difficulty, **usual, **counts})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it should have difficulty, captions,"),
        ("{", "Expecting"),
        ('{"captions": 3}', "it should have difficulty, captions,"),
        (record_text({"groups": 99}), "from 2 to 6"),
        (record_text({"colour": 1}), "unknown settings: colour"),
        (record_text({"groups": "4"}), "groups: '4'"),
        (record_text({"groups": True}), "groups: True"),
        (record_text(3), "no object"),
        (record_text({}, captions="many"), "whole number"),
    ],
)
def test_a_record_that_is_damaged_is_named(tmp_path, content, message):
    folder = write_scenes(tmp_path / "d", 3, 2, 32, difficulty=SceneDifficulty(groups=3))
    (folder / "scenes.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        read_scene_record(folder)
    assert str(refused.value).startswith(f"{folder / 'scenes.json'}: ")
    assert "\n" not in str(refused.value)


def test_settings_are_recorded_and_read_as_they_are():
    assert difficulty_of(asdict(HARD)) == HARD
    assert difficulty_of(json.loads(json.dumps(asdict(HARD)))) == HARD


# --- long captions -----------------------------------------------------------------------------------------------------

LENGTHS = (128, 512, 1024, 4096)


@pytest.mark.parametrize(("tokens", "needle"), product(LENGTHS, ("front", "middle", "back")))
def test_two_long_captions_differ_at_the_needle_alone_which_stands_where_it_is_asked_for(tokens, needle):
    difficulty = SceneDifficulty(captions=2, relations=0.5, negation=0.5, counts=0.5, tokens=tokens, needle=needle)
    before, after = filler(tokens, needle)
    texts = set()
    for scene in (*SCENES[:60], *MANY[:60]):
        for short, long in zip(
            composed_captions(scene, difficulty), describe_scene(scene, False, difficulty), strict=True
        ):
            assert long == " ".join(part for part in (before, f"{short}.", after) if part)
            assert tokens - NEEDLE_TOKENS < count_tokens(long) <= tokens
            middle = long.index(short) + len(short) / 2
            low, high = {"front": (0, 0.3), "middle": (0.4, 0.6), "back": (0.7, 1)}[needle]
            assert low <= middle / len(long) <= high
            texts.add(long)
    assert len(texts) > 230


def test_neutral_sentences_hold_no_word_that_describes_a_scene():
    text = " ".join(filler(4096, "back"))
    words = set(re.findall(r"\w+", text))
    captions = [c for scene in SCENES for c in (*scene_captions(scene), *composed_captions(scene, HARD))]
    of_scenes = {word for caption in captions for word in re.findall(r"\w+", caption)}
    assert words & of_scenes <= {"the", "a", "an", "in", "of", "on", "to", "with"}
    assert not words & {*SHAPES, *SHAPE_COLOURS, *BACKGROUNDS, "left", "right", "above", "below", "no", "one"}
    assert not any(caption_features(text))


def test_neutral_sentences_are_whole_and_fill_a_caption_to_the_token():
    whole = set(islice(_neutral_sentences(), 2000))
    for tokens in (*range(128, 400), 4096):
        before, after = filler(tokens, "middle")
        assert count_tokens(f"{before} {after}") == tokens - NEEDLE_TOKENS
        sentences = [f"{sentence}." for sentence in f"{before} {after}".removesuffix(".").split(". ")]
        for sentence in sentences:
            text = re.sub(r"^(and )?so (then )?", "", sentence)
            assert text in whole or re.fullmatch(r"it was (very )*late\.", text), (tokens, sentence)


def test_check_names_the_limit_that_a_needle_is_cut_at(tmp_path, capsys):
    folder = write_scenes(tmp_path / "d", 12, 2, 32, difficulty=SceneDifficulty(captions=1, relations=1.0, tokens=512))
    assert main(["check", str(folder), "--quick", "--tokens", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (note,) = [note for note in report["notes"] if "needle" in note and "alike" in note]
    assert note == (
        "captions that are cut at 128 tokens, before their needle (back), are all alike: "
        "--model.text_tower.max_tokens 512"
    )
    assert main(["check", str(folder), "--quick", "--tokens", "--max-tokens", "512", "--json"]) == 0
    assert "alike" not in capsys.readouterr().out


def test_sentences_of_a_shorter_caption_begin_those_of_a_longer_one():
    sentences = {tokens: filler(tokens, "back")[0].split(". ") for tokens in LENGTHS}
    for shorter, longer in pairwise(LENGTHS):
        assert sentences[longer][: len(sentences[shorter]) - 2] == sentences[shorter][:-2]


def test_tokens_are_those_of_the_embedded_text_tower_and_a_cut_needle_leaves_equal_texts():
    from clipvisionalign.models.caption_tokenizer import open_tokenizer

    tokenizer = open_tokenizer("all-MiniLM-L6-v2", 512)
    difficulty = SceneDifficulty(captions=2, relations=0.5, negation=0.5, counts=0.5, tokens=512)
    captions = [c for scene in (*SCENES[:40], *MANY[:40]) for c in describe_scene(scene, False, difficulty)]
    captions += [f"{sentence}." for sentence in filler(4096, "back")[0].removesuffix(".").split(". ")]
    assert sum(count_tokens(sentence) - 2 for sentence in captions[160:]) == 4096 - 2 - NEEDLE_TOKENS
    captions += [c for scene in MANY[:40] for c in composed_captions(scene, difficulty)]
    assert [len(each) for each in tokenizer.tokenize(captions)] == [count_tokens(caption) for caption in captions]
    cut = open_tokenizer("all-MiniLM-L6-v2", 256).tokenize(captions[:100])
    assert {tuple(each) for each in cut} == {tuple(cut[0])}


def test_minimal_pairs_of_long_captions_differ_at_the_needle_alone(tmp_path):
    difficulty = SceneDifficulty(captions=1, relations=1.0, tokens=512, needle="middle")
    folder = write_scenes(tmp_path / "d", 12, 2, 32, difficulty=difficulty)
    before, after = filler(512, "middle")
    pairs = make_minimal_pairs(read_captioned_images(folder))
    usual = make_minimal_pairs(read_captioned_images(write_scenes(tmp_path / "e", 12, 2, 32)))
    assert [pair.kind for pair in pairs] == [pair.kind for pair in usual]
    assert {"relation", "attribute", "count", "negation"} == {pair.kind for pair in pairs}
    for long, short in zip(pairs, usual, strict=True):
        for text, needle in ((long.caption, short.caption), (long.foil, short.foil)):
            assert text == f"{before} {needle}. {after}"


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"groups": 1}, "groups"),
        ({"groups": 7}, "groups"),
        ({"captions": 6}, "captions"),
        ({"captions": -1}, "captions"),
        ({"captions": 1, "relations": 1.01}, "relations"),
        ({"captions": 1, "counts": float("nan")}, "counts"),
        ({"negation": 0.5}, "negation"),
        ({"tokens": 512}, "tokens"),
        ({"captions": 1, "tokens": 127}, "tokens"),
        ({"captions": 1, "tokens": 4097}, "tokens"),
        ({"captions": 1, "needle": "front"}, "needle"),
        ({"captions": 1, "tokens": 512, "needle": "end"}, "needle"),
    ],
)
def test_a_setting_that_is_not_valid_is_refused_by_its_name_in_plans_and_before_anything_is_drawn(
    tmp_path, settings, field
):
    assert [name for name, _ in difficulty_faults(SceneDifficulty(**settings))] == [field]
    with pytest.raises(DataError, match=f"scenes: {field}: "):
        write_scenes(tmp_path / "d", 3, 2, 32, difficulty=SceneDifficulty(**settings))
    assert not (tmp_path / "d").exists()
    inside = ", ".join(f"{name}: {'.nan' if value != value else value}" for name, value in settings.items())
    (tmp_path / "plan.yaml").write_text(f"scenes: 9\ndrawing:\n  difficulty: {{{inside}}}\n")
    with pytest.raises(ValueError, match=rf"plan.yaml, line 3: drawing.difficulty.{field}: "):
        read_plan(tmp_path / "plan.yaml")


def test_scenes_of_another_difficulty_are_not_used_by_a_study(tmp_path):
    plan = Plan(scenes=60, drawing=Drawing(pixels=32, splits={"train": 40, "dev": 20}, difficulty=HARD))
    data = open_study_data(plan, tmp_path, tmp_path / "scenes")
    assert data.captions == open_study_data(plan, tmp_path, tmp_path / "scenes").captions
    for other in (SceneDifficulty(), replace(HARD, tokens=512), replace(HARD, relations=0.6)):
        with pytest.raises(FileExistsError, match="another difficulty"):
            open_study_data(
                replace(plan, drawing=replace(plan.drawing, difficulty=other)), tmp_path, tmp_path / "scenes"
            )
    more = replace(plan, drawing=replace(plan.drawing, difficulty=replace(HARD, groups=3)))
    with pytest.raises(FileExistsError, match=r"scenes of .* pixels are asked for"):
        open_study_data(more, tmp_path, tmp_path / "scenes")


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_draws_splits_apart_with_counts_that_add_up(tmp_path, capsys):
    out = tmp_path / "d"
    assert (
        main(["scenes", str(out), "--train", "9", "--test", "5", "--size", "32", "--captions", "3", "--counts", "1"])
        == 0
    )
    assert capsys.readouterr().out.strip() == f"{out}: 14 scenes (train 9, test 5) with 42 captions"
    data = read_captioned_images(out)
    assert data.split_sizes() == {"train": 9, "test": 5}
    assert len(data.captions) == 42
    record = read_scene_record(out)
    assert record is not None
    assert (record.captions, record.counts, record.relations) == (42, 42, 0)
    assert main(["scenes", str(tmp_path / "p"), "--images", "6", "--size", "32", "--plain"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'p'}: 6 scenes with 12 captions"
    assert len(captions_of(tmp_path / "p")) == 12


@pytest.mark.parametrize(
    "arguments",
    [
        "--images 5 --train 3",
        "--train 0",
        "--test -4",
        "--train 60 --classes shape",
        "--classes shape --plain",
        "--classes shape --groups 3",
        "--relations 0.5",
        "--captions 9",
        "--captions 2 --needle front",
    ],
)
def test_the_command_refuses_what_does_not_fit_and_draws_nothing(tmp_path, capsys, arguments):
    assert main(["scenes", str(tmp_path / "d"), *arguments.split()]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("clipvisionalign: error: ")
    assert "\n" not in error
    assert not any(tmp_path.iterdir())
