"""Class folders: how they are recognised and read, the names of classes, and counts that add up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.class_names import folder_words, name_classes
from clipvisionalign.data.formats import detect_layout, read_captioned_images
from clipvisionalign.data.formats.classes import read_classes
from clipvisionalign.data.scene_classes import CLASSES_BY, write_scene_classes
from clipvisionalign.data.splits import write_splits


def draw(folder: Path, *names: str, first: int = 0) -> Path:
    """Images of 24 pixels below a folder, each another one."""
    for number, name in enumerate(names, first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (24, 24), (37 * number % 256, 91 * number % 256, 53 * number % 256))
        image.paste((255 - 29 * number % 256, 17 * number % 256, 200), (number % 20, 3, number % 20 + 4, 20))
        image.save(path)
    return folder


SPLIT_FOLDERS = [
    f"{split}/{name}/{number}.png"
    for split in ("train", "val", "test")
    for name in ("dog", "black_cat")
    for number in range(3)
]


@pytest.fixture
def split_folders(tmp_path: Path) -> Path:
    return draw(tmp_path / "data", *SPLIT_FOLDERS)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_folders_of_splits_and_classes_are_recognised(split_folders):
    data = read_captioned_images(split_folders)
    assert (data.layout, data.official_splits, len(data)) == ("classes", True, 18)
    assert data.split_sizes() == {"train": 6, "dev": 6, "test": 6}
    assert data.class_names == {"black_cat": "black cat", "dog": "dog"}
    assert {(row.identity, row.captions) for row in data} == {
        ("dog", ("a photo of a dog.",)), ("black_cat", ("a photo of a black cat.",)),
    }  # fmt: skip
    assert any("'black_cat' as 'black cat'" in note for note in data.notes)


def test_images_of_a_class_are_positives_of_each_others_captions(split_folders):
    identity = read_captioned_images(split_folders).split("train").image_identity
    assert identity is not None
    assert len(set(identity.tolist())) == 2


def test_class_folders_without_splits_are_taken_when_they_are_named(tmp_path):
    folder = draw(tmp_path / "data", *(f"{name}/{number}.png" for name in ("dog", "cat") for number in range(20)))
    with pytest.raises(DataError, match="if each folder of images in it is a class, give --layout classes"):
        read_captioned_images(folder)
    data = read_captioned_images(folder, "classes")
    assert not data.official_splits
    # A class is in every split that a hash gives; an identity of another layout is in one.
    assert {row.identity for row in data.split("train")} == {"dog", "cat"}
    assert len(data.split_sizes()) > 1
    _, report = check(data)
    assert not any(problem.kind == "identity in two splits" for problem in report.problems)
    split = write_splits(data, [], tmp_path / "splits.csv")
    assert {row.identity for row in split.split("train")} == {"dog", "cat"}


def test_a_names_file_or_wordnet_ids_tell_that_folders_are_classes(tmp_path):
    folder = draw(tmp_path / "data", "n01440764/a.JPEG", "n01443537/b.JPEG")
    with pytest.raises(DataError, match=r"n01440764 \(2 such\) is named by an id of WordNet.*LOC_synset_mapping.txt"):
        read_captioned_images(folder)
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02012849 crane\n"
    )
    data = read_captioned_images(folder)
    assert data.class_names == {"n01440764": "tench", "n01443537": "goldfish"}
    assert any("has 1 other name" in note for note in data.notes)
    other = draw(tmp_path / "other", "dog/a.png", "cat/b.png")
    (other / "classes.txt").write_text("cat\ndog\n")
    assert detect_layout(other).name == "classes"


AMBIGUOUS = {
    "images and masks": ("train/images/a.png", "train/masks/a.png", "val/images/b.png", "val/masks/b.png"),
    "an image beside the classes": (*SPLIT_FOLDERS, "a.png"),
    "an image beside the classes of a split": (*SPLIT_FOLDERS, "train/a.png"),
    "a folder that is no split": (*SPLIT_FOLDERS, "extra/dog/a.png"),
    "one class": ("train/dog/a.png", "val/dog/b.png"),
    "photos by year": ("2019/a.png", "2020/b.png"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_may_be_something_else_is_not_taken_for_classes(tmp_path, name):
    folder = draw(tmp_path / "data", *AMBIGUOUS[name])
    with pytest.raises(DataError, match="none of the supported"):
        detect_layout(folder)


def test_every_other_layout_comes_first(split_folders):
    for name in ("train/dog/0.png", "val/dog/0.png", "test/dog/0.png"):
        (split_folders / name).with_suffix(".txt").write_text("a dog")
    assert detect_layout(split_folders).name == "texts"
    (split_folders / "metadata.csv").write_text("file_name,caption\ntrain/dog/0.png,a dog\n")
    assert detect_layout(split_folders).name == "folder"


def test_every_image_is_read_or_counted(split_folders, capsys):
    """Images in no class, files that are no image, images that cannot be decoded, empty classes."""
    draw(split_folders, "train/lost.png", "extra/dog/a.png", "loose.png", first=50)
    (split_folders / "train/dog/notes.txt").write_text("mine")
    (split_folders / "val/dog/broken.png").write_bytes(b"no image")
    (split_folders / "train/horse").mkdir()
    assert main(["check", str(split_folders), "--layout", "classes", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    files = sum(1 for path in split_folders.rglob("*.png"))
    assert report["rows"] == {"in_files": files, "read": 18, "left_out": 4}
    kinds = {"in no class": 3, "unreadable image": 1, "empty class": 1}
    assert {kind: report["summary"][kind] for kind in kinds} == kinds
    assert any("1 no image by its ending: 1 .txt" in note for note in report["notes"])


def test_one_image_in_two_classes_and_two_splits_is_listed(split_folders, capsys):
    shutil.copy(split_folders / "train/dog/0.png", split_folders / "train/black_cat/same.png")
    shutil.copy(split_folders / "train/dog/1.png", split_folders / "test/dog/same.png")
    main(["check", str(split_folders), "--json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    (in_two,) = [problem for problem in problems if problem["kind"] == "image in two classes"]
    assert "'dog'" in in_two["message"]
    assert "'black_cat'" in in_two["message"]
    assert any(problem["kind"] == "same image in two splits" for problem in problems)


def test_a_link_into_two_classes_is_an_error(split_folders):
    os.link(split_folders / "train/dog/0.png", split_folders / "train/black_cat/same.png")
    with pytest.raises(DataError, match="an image has one identity"):
        read_captioned_images(split_folders)


def test_a_class_that_is_called_as_a_missing_value_is_a_class(tmp_path):
    folder = draw(tmp_path / "data", *(f"train/{name}/0.png" for name in ("none", "nan", "1.0")))
    data = read_captioned_images(folder)
    assert {row.identity for row in data} == set(data.class_names) == {"none", "nan", "1.0"}


def test_classes_that_a_split_lacks_are_told(tmp_path):
    folder = draw(tmp_path / "data", *SPLIT_FOLDERS, "train/horse/0.png")
    notes = read_captioned_images(folder).notes
    assert any("1 of 3 classes are not in every split, such as 'horse' (train alone)" in note for note in notes)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_by_a_file_in_each_form(tmp_path):
    def names(folders: list[str], file: str, text: str) -> dict[str, str]:
        path = tmp_path / file
        path.write_text(text)
        return name_classes(folders, path).names

    assert names(["d1", "d2"], "a.txt", "d2 a cat\nd1 a dog\n") == {"d1": "a dog", "d2": "a cat"}
    assert names(["d1", "d2"], "a.tsv", "d2\tcat\nd1\tdog\n") == {"d1": "dog", "d2": "cat"}
    # By the order of the folders, numbers as numbers.
    assert names(["10", "9"], "b.txt", "ninth\ntenth\n") == {"9": "ninth", "10": "tenth"}
    # Folders that the file spells, in whatever order, also as numbered lines.
    assert names(["dog", "black_cat"], "c.txt", "dog\nBlack Cat\nhorse\n") == {"dog": "dog", "black_cat": "Black Cat"}
    assert names(["001.Black_Cat", "002.Dog"], "d.txt", "1 001.Black_Cat\n2 002.Dog\n") == {
        "001.Black_Cat": "Black Cat", "002.Dog": "Dog",
    }  # fmt: skip
    imagenet = {"0": ["n01440764", "tench"], "1": ["n01484850", "great_white_shark"]}
    assert names(["n01484850", "n01440764"], "e.json", json.dumps(imagenet)) == {
        "n01440764": "tench", "n01484850": "great white shark",
    }  # fmt: skip
    assert names(["a", "b"], "f.json", '{"b": "two", "a": "one"}') == {"a": "one", "b": "two"}
    assert names(["a", "b"], "g.json", '{"1": "second", "0": "first"}') == {"a": "first", "b": "second"}
    assert names(["a", "b"], "h.json", '["first", "second"]') == {"a": "first", "b": "second"}


def test_names_of_imagenet_are_those_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folders = [f"n{number:08d}" for number in range(1000)]
    names = list(name_classes(folders, "openai").names.values())
    assert len(set(names)) == 1000
    differing = {number for number in range(1000) if names[number] != open_clip.IMAGENET_CLASSNAMES[number]}
    repeated = {name for name in open_clip.IMAGENET_CLASSNAMES if open_clip.IMAGENET_CLASSNAMES.count(name) > 1}
    assert {open_clip.IMAGENET_CLASSNAMES[number] for number in differing} == repeated
    with pytest.raises(DataError, match="names for the 1,000 class folders"):
        name_classes(["dog", "cat"], "openai")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.from_regex(r"[a-z]{2,8}(_[a-z]{2,8})?", fullmatch=True), min_size=2, unique=True), st.randoms())
def test_names_do_not_depend_on_the_order_of_folders_or_of_lines(folders, shuffled):
    import tempfile

    names = name_classes(folders).names
    assert names == {folder: folder_words(folder) for folder in folders}
    mixed = shuffled.sample(folders, len(folders))
    assert name_classes(mixed).names == names
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / "names.txt"
        path.write_text("\n".join(f"{folder} the {folder}" for folder in mixed))
        assert name_classes(folders, path).names == {folder: f"the {folder_words(folder)}" for folder in folders}
        path.write_text("\n".join(mixed))
        assert name_classes(folders, path).names == names


def test_drawn_classes(tmp_path):
    for by, classes in CLASSES_BY.items():
        images = 10 * len(classes)
        data = read_captioned_images(write_scene_classes(tmp_path / by, by, images, size=32))
        assert set(data.class_names) == set(classes)
        assert data.split_sizes() == {"train": 8 * len(classes), "dev": len(classes), "test": len(classes)}
    with pytest.raises(DataError, match="too few for 6 classes: at least 60"):
        write_scene_classes(tmp_path / "new", "shape", 59)
    with pytest.raises(DataError, match="not empty"):
        write_scene_classes(tmp_path / "shape", "shape", 60)


BAD_NAMES = {
    "no such file": (["a", "b"], None, "no such file"),
    "empty": (["a", "b"], "\n \n", "no name of a class in it"),
    "another number": (["a1", "b1"], "x\ny\nz\n", "3 names for 2 class folders"),
    "one is missing": (["a", "b"], "a one\nc three\n", r"no name for the class folder 'b' \(1 such\)"),
    "one is spelled, the others are not": (["dog", "cat"], "dog\nkitten\n", "no name for the class folder 'cat'"),
    "two names of a class": (
        ["dog", "cat"],
        "dog a hound\n\ncat a cat\ndog a puppy\n",
        r"names.txt: two names for the class folder 'dog', 'a hound' \(line 1\) and 'a puppy' \(line 4\)",
    ),
    "equal names": (["a", "b"], "a crane\nb Crane\n", "'a' and 'b' are both called 'Crane'"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_one_error(tmp_path, name):
    folders, text, message = BAD_NAMES[name]
    path = tmp_path / "names.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        name_classes(folders, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('"dog"', "expected an object"),
        ('{"a": 3}', "'a': expected a name"),
        ("[]", "no name"),
        ('{"a": "x", "a": "y"}', "'a' occurs twice"),
        ('[["a", "x"], ["b", "z"], ["a", "y"]]', r"'x' \(entry 1\) and 'y' \(entry 3\)"),
    ],
)
def test_bad_json_of_names_is_one_error(tmp_path, text, message):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        name_classes(["a", "b"], tmp_path / "names.json")
    assert "\n" not in str(error.value)


def test_folders_of_one_name_as_words_are_refused(tmp_path):
    folder = draw(tmp_path / "data", "black_cat/a.png", "BlackCat/b.png")
    with pytest.raises(DataError, match="both called") as error:
        read_classes(folder)
    assert str(folder) in str(error.value)


def test_a_file_of_captions_beside_class_folders_is_listed(split_folders):
    (split_folders / "classes.txt").write_text("dog a brown dog\nblack_cat a cat\n")
    (split_folders / "labels.csv").write_text("image,caption\ntrain/dog/0.png,unread\n")
    with pytest.raises(DataError, match="no folder"):
        read_captioned_images(split_folders / "labels.csv", "classes")
    data = read_captioned_images(split_folders, "classes")
    assert data.class_names["dog"] == "a brown dog"
    assert [problem.place for problem in data.problems if problem.kind == "file not read"] == ["labels.csv"]
