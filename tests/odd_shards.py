"""Shards as people make them, drawn by hypothesis, and what has to hold of each: read or listed, nothing lost."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.streams.files import count_samples, read_shard
from clipvisionalign.data.streams.loader import StreamedBatches
from clipvisionalign.data.streams.sources import open_stream
from clipvisionalign.data.streams.webdataset import META, index_shard

STEMS = ("a", "a.1", "a.2", "b", "B", "sub/a", "./c", "._a", "sub/._b", "__m__", "ü", "x y", "noending")
ENDINGS = ("jpg", "JPG", "png", "mask.png", "json", "JSON", "txt", "TXT", "caption.txt", "cls", "bin", "")
KEYS = ("captions", "caption", "Caption", "text", "raw", "sentences", "title", "identity", "pid", "split", "width")

Members = list[tuple[str, bytes]]


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
        st.sampled_from(["a dog runs", "None", '["one", null]', "train", "test", " ", "\ud800", "it\u2028runs"]),
    )  # fmt: skip
    names = st.one_of(st.sampled_from(KEYS), st.text(max_size=5))
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))


@st.composite
def contents(draw: st.DrawFn, ending: str) -> bytes:
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=20))
    if ending.lower() == "json":
        depth = draw(st.sampled_from([0, 0, 0, 0, 20_000]))
        value = draw(st.dictionaries(st.sampled_from(KEYS), json_values(), max_size=4) | json_values())
        text = "[" * depth + json.dumps(value) + "]" * depth
    else:
        text = draw(
            st.text(max_size=30) | st.sampled_from(["one\ntwo\r\nthree\rfour", "a caf\u00e9 \u201ctable\u201d"])
        )
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    return text.encode(encoding, "replace")


@st.composite
def shards(draw: st.DrawFn) -> Members:
    """Members of a shard in any order, some of them twice; every image has bytes of its own."""
    members = []
    for stem, ending in draw(st.lists(st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDINGS)), max_size=14)):
        is_image = ending.lower().rpartition(".")[2] in ("jpg", "png")
        content = b"image %d" % len(members) if is_image else draw(contents(ending))
        members.append((f"{stem}.{ending}" if ending else stem, content))
    return members


def write_shard(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def hold(folder: Path, members: Members) -> None:
    """Every sample is read or listed, every member is in one sample or passed over by name, and a training reads what
    `check` reads."""
    path = write_shard(folder / "train-0.tar", members)
    with tarfile.open(path) as tar:
        index = index_shard(tar)
    in_samples = [member.tar_info.offset for sample in index.samples for member in sample.members]
    known = [name for name, _ in members if not META.match(name.removeprefix("./"))]
    assert len(in_samples) == len(set(in_samples))
    assert len(in_samples) + len(index.skipped_files) == len(known)

    samples = list(read_shard(path))
    assert len(samples) == count_samples(path)
    data = None
    try:
        data = read_captioned_images(folder, "stream")
    except DataError:
        assert all(sample.for_split("train").error for sample in samples)
    if data is not None:
        _adds_up(data, len(samples))
    if not samples:
        return
    batches = StreamedBatches(open_stream(str(path)), lambda captions: [[len(each)] for each in captions], 0, None)
    try:
        names = [name for batch in batches.epoch(4, 1, 0) for name in batch.names]
    except DataError as error:
        if "samples are bad" not in str(error):
            raise
        return
    assert sorted(names) == sorted(row.name for row in data or [])


def _adds_up(data: CaptionedImages, count: int) -> None:
    assert len(data) + sum(problem.rows for problem in data.problems) == count == data.rows_in_files
    assert len({row.image for row in data}) == len({row.name for row in data}) == len(data)
    for caption in data.captions:
        assert caption.strip()
        caption.encode()
