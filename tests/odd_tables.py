"""Tables and JSON files of any form, and what holds of all of them: each row is read or listed, or the file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import read_captioned_images

NAMES = ("a.png", "b.png", "ü.png")

#: What a table is made of, so that every few characters mean something to its reader.
_PIECES = (
    *NAMES, "./a.png", "x\\b.png", "A.PNG", "gone.png", "a dog", "[", "]", '["one", null]', "{", "}", "0", "nan", "None", "train",
    "test", "val", "7", '"', '""', ",", ";", "\t", "|", " ", "\n", "\r\n", "\r", "\\", "\x00", "\x0b", "\x85", "\u2028", "é",
    "\ufeff", "#0", "4   ", "x" * 300,
)  # fmt: skip
_HEADERS = (
    "image,caption", "file_name;text", "image\tcaption\tsplit", "caption,caption,image", "image,caption_1,caption_2,pid",
    "image_name| comment_number| comment", "", "sep=;", "nothing,here",
)  # fmt: skip
_FILES = (
    "metadata.csv",
    "table.tsv",
    "captions.txt",
    "results.csv",
    "results_20130124.token",
    "metadata.jsonl",
    "a.txt",
)
_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252")


def tables() -> st.SearchStrategy[tuple[str, bytes]]:
    """A file's name and its bytes."""
    text = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=40).map("".join)
    table_text = st.tuples(st.sampled_from(_HEADERS), text).map("\n".join)
    content = st.tuples(table_text, st.sampled_from(_ENCODINGS)).map(lambda both: both[0].encode(both[1], "replace"))
    # A byte too many, or too few, in the middle.
    spoiled = st.tuples(content, st.integers(0, 60), st.binary(max_size=2)).map(
        lambda three: three[0][: three[1]] + three[2] + three[0][three[1] + 1 :]
    )
    return st.tuples(st.sampled_from(_FILES), content | spoiled)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**30) | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([
            "raw", "id", "file_name", "filename", "caption", "captions", "sentences", "split", "image_id", "tokens",
            "img_path", "filepath", "pid",
        ]),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip
_LAYOUTS = ("karpathy", "coco", "rstpreid", "jsonl")


def json_files() -> st.SearchStrategy[tuple[str, list[Any], list[Any]]]:
    """A layout, its rows, and what else stands in the file: COCO's images."""
    return st.tuples(st.sampled_from(_LAYOUTS), st.lists(_ANYTHING, max_size=6), st.lists(_ANYTHING, max_size=3))


def _images(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        if not (folder / name).is_file():
            Image.new("RGB", (6, 5), (90 * number, 10, 200)).save(folder / name)


def _only(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _images(folder)
    for path in folder.iterdir():
        if path.name not in NAMES:
            path.unlink()
    (folder / name).write_bytes(content)


def read_and_add_up(folder: Path) -> CaptionedImages | None:
    """The data set of a folder, after its rows were added up; None where it is refused as a whole."""
    try:
        data = read_captioned_images(folder)
    except DataError:
        return None
    kept, report = check(data, full=False)
    assert report.rows is not None
    assert report.rows["in_files"] == report.rows["read"] + report.rows["left_out"], report
    assert report.rows["read"] == sum(row.row_count for row in kept) > 0 or not len(kept)
    assert all(caption == " ".join(caption.split()) != "" for caption in kept.captions)
    assert len({row.name for row in data}) == len(data)
    return data


def check_table(value: tuple[str, bytes], folder: Path) -> None:
    """A table is read, or refused, and nothing of it is lost."""
    _only(folder, *value)
    read_and_add_up(folder)


def check_json(value: tuple[str, list[Any], list[Any]], folder: Path) -> None:
    """A JSON file with one good row and others of any form: the good one is read, and each is read or listed."""
    layout, entries, more = value
    name, good = {
        "karpathy": ("dataset_x.json", {"filename": "a.png", "split": "train", "sentences": [{"raw": "a dog"}]}),
        "coco": ("captions_train.json", {"image_id": -1, "caption": "a dog"}),
        "rstpreid": ("data_captions.json", {"id": 0, "img_path": "a.png", "captions": ["a dog"], "split": "train"}),
        "jsonl": ("metadata.jsonl", {"file_name": "a.png", "caption": "a dog"}),
    }[layout]
    rows = [good, *entries]
    text = "\n".join(map(json.dumps, rows))
    if layout == "coco":
        text = json.dumps({"images": [{"id": -1, "file_name": "a.png"}, *more], "annotations": rows})
    elif layout != "jsonl":
        text = json.dumps({"images": rows} if layout == "karpathy" else rows)
    _only(folder, name, text.encode())
    data = read_and_add_up(folder)
    if data is not None:
        assert data.rows_in_files == len(rows)
