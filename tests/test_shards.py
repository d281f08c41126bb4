"""Shards as people make them: every sample is read right, or listed with its shard, key and reason."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from odd_shards import Members, hold, shards, write_shard

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import LAYOUTS, detect_layout, is_stream, read_captioned_images
from clipvisionalign.data.splits import canonical_split
from clipvisionalign.data.streams.files import count_samples, read_shard
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.data.streams.loader import StreamedBatches
from clipvisionalign.data.streams.sources import open_stream


def read(folder: Path, *members: tuple[str, bytes | str | object]) -> tuple[dict[str, list[str]], list[str]]:
    """The captions of each sample that is read by its key, and what is listed."""
    encoded: Members = []
    for name, content in members:
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        encoded.append((name, text if isinstance(text, bytes) else text.encode()))
    path = write_shard(folder / "train-0.tar", encoded)
    try:
        data = read_captioned_images(folder)
    except DataError:
        assert all(sample.error for sample in read_shard(path))
        return {}, [f"{sample.name}: {sample.error}" for sample in read_shard(path)]
    assert len(data) + sum(problem.rows for problem in data.problems) == count_samples(path) == data.rows_in_files
    # What a training reads is the same.
    stream = open_stream(str(folder))
    passed = [sample for sample in stream.read(1, 0, 0, stream.count) if not sample.error]
    assert sorted((sample.name, sample.captions) for sample in passed) == sorted(
        (row.name, row.captions) for row in data
    )
    return {row.name.partition(", ")[2]: list(row.captions) for row in data}, [str(each) for each in data.problems]


@pytest.mark.parametrize(
    ("about", "text", "captions", "message"),
    [
        # Metadata of any kind hides no .txt.
        ({"url": "u", "width": 224}, "a dog", ["a dog"], ""),
        ({"title": "holiday", "description": "d"}, "a dog", ["a dog"], ""),
        ({"captions": []}, "a dog", ["a dog"], ""),
        ({"captions": [None]}, "a dog", ["a dog"], "no caption"),
        ({"caption": 7}, "a dog", ["a dog"], "int where a text belongs: 7"),
        (b"{broken", "a dog", ["a dog"], ".json cannot be read"),
        (b"[" * 30_000, "a dog", ["a dog"], ".json cannot be read"),
        (b"\xff\xfe\xff", "a dog", ["a dog"], ".json cannot be read"),
        # Captions of a .json in any form.
        ({"captions": ["a dog", None]}, None, ["a dog"], "no caption"),
        ({"captions": ["a dog", 5, {"x": 1}]}, None, ["a dog"], "int where a text belongs: 5"),
        ({"captions": {"raw": "a dog"}}, None, ["a dog"], ""),
        ({"Captions": "a dog"}, None, ["a dog"], ""),
        ({"captions": 5, "caption": "a dog"}, None, ["a dog"], "int where a text belongs: 5"),
        ({"title": "a dog"}, None, ["a dog"], ""),
        (["a dog", "it runs"], None, ["a dog", "it runs"], ""),
        ("\ufeff" + json.dumps({"caption": "a dog"}), None, ["a dog"], ""),
        (json.dumps({"caption": "a dog"}).encode("utf-16"), None, ["a dog"], ""),
        (b'{"caption": "a \\ud800 dog"}', None, ["a \N{REPLACEMENT CHARACTER} dog"], ""),
        # None at all.
        ({"caption": 7}, None, None, "int where a text belongs: 7"),
        (7, None, None, "int where a text belongs: 7"),
        (b"null", None, None, "no caption"),
        ({"captions": {"en": "a dog"}}, None, None, "no caption"),
        ({}, " \n", None, "no caption"),
        # Texts as editors save them: a line ends at LF, CR LF or CR, and nowhere else.
        (None, "\ufeffone\r\ntwo\rthree\nfour", ["one", "two", "three", "four"], ""),
        (None, "one\u2028more\x0c\x85", ["one more"], ""),
        (None, "a caf\u00e9 \u201ctable\u201d".encode("cp1252"), ["a caf\u00e9 \u201ctable\u201d"], "read as Windows-1252"),
        (None, "a dog".encode("utf-16"), ["a dog"], ""),
    ],
)  # fmt: skip
def test_captions_of_a_sample(tmp_path, about, text, captions, message):
    members = [("x.jpg", b"image")]
    members += [("x.json", about)] if about is not None else []
    members += [("x.txt", text)] if text is not None else []
    captions_by_key, listed = read(tmp_path, *members)
    assert captions_by_key == ({} if captions is None else {"x": captions})
    assert message in "\n".join(listed)
    assert bool(listed) == bool(message)
    assert all(line.startswith("train-0.tar, x") for line in listed)


def test_a_point_within_a_key_is_a_part_of_it(tmp_path):
    names = [f"{stem}.{ending}" for stem in ("x.1", "x.2", "v1.0/y", "z") for ending in ("jpg", "txt")]
    captions_by_key, listed = read(tmp_path, *((name, name) for name in names))
    assert captions_by_key == {"x.1": ["x.1.txt"], "x.2": ["x.2.txt"], "v1.0/y": ["v1.0/y.txt"], "z": ["z.txt"]}
    assert not listed


def test_several_parts_of_one_sample_are_one(tmp_path):
    names = ["x.jpg", "x.mask.png", "x.caption.txt", "x.cls", "y.left.jpg", "y.txt", "w.jpg", "w.png", "w.txt"]
    captions_by_key, listed = read(tmp_path, *((name, name) for name in names))
    assert captions_by_key == {"x": ["x.caption.txt"], "y.left": ["y.txt"], "w": ["w.txt"]}
    assert not listed


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    stems = [f"{number:03d}" for number in range(30)]
    images = [(f"{stem}.jpg", f"image {stem}") for stem in stems]
    texts = [(f"{stem}.txt", f"words {stem}") for stem in reversed(stems)]
    captions_by_key, listed = read(tmp_path, *images, *texts)
    assert captions_by_key == {stem: [f"words {stem}"] for stem in stems}
    assert not listed
    all_samples = list(read_shard(tmp_path / "train-0.tar"))
    assert list(read_shard(tmp_path / "train-0.tar", 11)) == all_samples[11:]


def test_a_name_that_comes_again_is_another_sample(tmp_path):
    """Shards that were put together, each of which counts from 0."""
    captions_by_key, listed = read(
        tmp_path, ("0.jpg", b"a"), ("0.txt", "one"), ("1.jpg", b"b"), ("1.txt", "two"), ("0.jpg", b"c"), ("0.txt", "three"),
        ("1.txt", "of nothing"),
    )  # fmt: skip
    assert captions_by_key == {"0": ["one"], "1": ["two"], "0 (2)": ["three"]}
    assert listed == ["train-0.tar, 1 (2): no image (left out)"]


def test_endings_are_read_whatever_their_case_and_images_whatever_their_ending(tmp_path):
    from test_streams import image_bytes

    captions_by_key, listed = read(
        tmp_path, ("a.JPG", b"x"), ("a.TXT", "one"), ("b.Jpeg", b"y"), ("b.JSON", {"caption": "two"}),
        ("c.img", image_bytes(3)), ("c.txt", "three"), ("d.avif", b"z"), ("d.txt", "four"), ("e.bin", b"none"), ("e.txt", "five"),
        ("f.h5", b"features"), ("f.im", image_bytes(4)), ("f.jpg", b"f"), ("f.txt", "six"),
    )  # fmt: skip
    assert captions_by_key == {"a": ["one"], "b": ["two"], "c": ["three"], "d": ["four"], "f": ["six"]}
    rows = {row.name: row.image for row in read_captioned_images(tmp_path)}
    assert rows["train-0.tar, f"] == b"f"
    assert listed == ["train-0.tar, e: no image (left out)"]


def test_files_of_no_sample_are_counted(tmp_path):
    captions_by_key, listed = read(
        tmp_path, ("._a.jpg", b"x"), ("./a.jpg", b"y"), ("./a.txt", "one"), ("__MACOSX/._a.txt", b""), ("README", b""),
        ("__meta__", b""),
    )  # fmt: skip
    assert captions_by_key == {"a": ["one"]}
    assert not listed
    assert read_captioned_images(tmp_path).notes == [
        "train-0.tar: 3 files are of no sample by their names, such as ._a.jpg"
    ]
    # Nor is what macOS puts beside a shard one.
    (tmp_path / "._train-0.tar").write_bytes(b"no tar file")
    assert len(read_captioned_images(tmp_path)) == 1


def test_a_sample_that_says_it_is_of_another_split_is_listed(tmp_path):
    members = [(f"{n}.jpg", b"%d" % n) for n in range(3)]
    members += [(f"{n}.json", {"caption": "a dog", "split": split}) for n, split in enumerate(("train", "test", "val"))]
    members += [("3.jpg", b"3"), ("3.json", {"caption": "a cat", "set": "cc3m"})]
    captions_by_key, listed = read(tmp_path, *members)
    assert captions_by_key == {"0": ["a dog"], "3": ["a cat"]}
    assert [line.partition(": ")[2] for line in listed] == [
        f"its split is '{split}', in a file of 'train' (left out)" for split in ("test", "dev")
    ]


def test_what_a_training_leaves_out_of_samples_is_counted(tmp_path):
    captions = [["a dog", None], ["a dog"], ["a dog", 5, None], [None]]
    members = [(f"{n}.jpg", b"%d" % n) for n in range(4)] + [(f"{n}.json", each) for n, each in enumerate(captions)]
    assert len(read(tmp_path, *members)[0]) == 3
    batches = StreamedBatches(open_stream(str(tmp_path)), lambda texts: [[1] for _ in texts], 0, None)
    for _ in range(2):
        list(batches.epoch(4, 1, 0))
    assert (batches.sample_counts.good, batches.sample_counts.bad, batches.sample_counts.complaints) == (6, 2, 6)
    assert len(batches.sample_counts.first) == 1
    assert "train-0.tar, " in batches.sample_counts.first[0]
    again = StreamedBatches(open_stream(str(tmp_path)), lambda texts: [[1] for _ in texts], 0, None)
    again.restore_counters([batches.counters(), batches.counters()])
    assert again.sample_counts.complaints == 12


def test_an_identity_is_a_text_or_a_number(tmp_path):
    for number, identity in enumerate(("p", 0, {"a": 1})):
        read(tmp_path, ("x.jpg", b"x"), ("x.json", {"caption": "a", "identity": identity}))
        data = read_captioned_images(tmp_path)
        assert data.rows[0].identity == ("p", "0", None)[number]
        assert len(data.problems) == (number == 2)


def dataset(folder: Path, count: int = 60) -> Path:
    """A folder of Flickr8k's form."""
    from test_streams import image_bytes

    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(count):
        (folder / "Images" / f"{number}.png").write_bytes(image_bytes(number))
        lines += [f"{number}.png,caption {number}"]
    (folder / "captions.txt").write_text("\n".join(lines))
    return folder


def test_one_place_decides_what_is_a_stream(tmp_path):
    """An archive beside what it was unpacked to is none, whatever it is called."""
    folder = dataset(tmp_path / "flickr")
    images = [(f"Images/{path.name}", path.read_bytes()) for path in sorted((folder / "Images").iterdir())]
    write_shard(folder / "Flickr8k_Dataset.tar", images)
    write_shard(folder / "train.tar", images)
    assert detect_layout(folder).name == read_captioned_images(folder).layout == "flickr8k"
    assert not is_stream(folder)
    # So are shards of what lies there unpacked, which are named; a layout that is named is taken.
    samples = [(f"{n}.{end}", content) for n in range(4) for end, content in (("png", images[n][1]), ("txt", b"words"))]
    write_shard(folder / "train-000.tar", samples)
    assert not is_stream(folder)
    assert is_stream(folder, "stream")
    # Shards with a table beside them, and no images, are shards.
    (folder / "Images").rename(tmp_path / "Images")
    assert is_stream(folder)
    assert not is_stream(folder, "flickr8k")
    (tmp_path / "Images").rename(folder / "Images")
    assert len(read_captioned_images(folder, "flickr8k")) == 60
    other = tmp_path / "shards"
    other.mkdir()
    write_shard(other / "00000.tar", samples)
    assert is_stream(other)
    assert len(read_captioned_images(other)) == 4
    assert is_stream(other / "00000.tar")
    assert is_stream(tmp_path / "train-{0..9}.parquet")
    assert not is_stream(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"unknown layout 'shards'; supported are: auto, stream, "):
        detect_layout(other, "shards")
    assert "stream" in LAYOUTS


def test_check_reads_shards_and_counts_them(tmp_path, capsys):
    from test_streams import image_bytes

    for split, count in (("train", 12), ("dev", 5)):
        members: Members = []
        for n in range(count):
            members += [(f"{n}.png", image_bytes(n + 100 * (split == "dev"))), (f"{n}.txt", f"words {n}".encode())]
        members += [("bad.png", image_bytes(7)), ("cut.png", image_bytes(8)[:30]), ("cut.txt", b"a cut one")]
        write_shard(tmp_path / f"{split}-0.tar", members)
    kept, report = check(read_captioned_images(tmp_path))
    assert report.layout == "stream"
    assert report.splits == {"train": 12, "dev": 5}
    left_out = [problem for problem in report.problems if problem.effect == "left out"]
    assert len(kept) + len(left_out) == 12 + 5 + 4
    assert main(["check", str(tmp_path)]) == 1
    stdout = capsys.readouterr().out
    assert "train-0.tar, bad: no caption" in stdout
    assert "cut" in stdout
    assert "layout stream, 17 images (dev 5, train 12)" in stdout
    assert "21 rows = 17 read + 4 left out" in stdout


def test_what_is_too_much_for_memory_is_refused(tmp_path, monkeypatch):
    read(tmp_path, ("x.jpg", b"x"), ("x.txt", "one"))
    monkeypatch.setattr("clipvisionalign.data.streams.in_memory._memory", lambda: 1000)
    for reading in (read_captioned_images, lambda folder: read_stream_split(folder, "train")):
        with pytest.raises(DataError, match=r"more than half of this machine's memory .*name some of the files"):
            reading(tmp_path)
    assert open_stream(str(tmp_path)).count == 1


# --- splits, and what is passed over ----------------------------------------------------------------------------------


def saved(folder: Path, splits: dict[str, range], **columns: object) -> Path:
    """A saved data set with an image and a caption for each number; columns: others, a value for all rows."""
    import datasets
    from test_streams import image_bytes

    parts = {}
    for name, numbers in splits.items():
        rows = {
            "image": [{"bytes": image_bytes(n), "path": None} for n in numbers],
            "caption": [f"c{n}" for n in numbers],
        }
        rows |= {column: [value] * len(numbers) for column, value in columns.items()}
        parts[name] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "split_names", [("train", "restval", "validation", "test"), ("val", "valid", "validation", "dev", "train"),
              ("restval", "training", "train", "testing", "test", "minival")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["saved", "shards"])
def test_splits_whose_names_mean_one_are_put_together(tmp_path, split_names, kind):
    from test_streams import image_bytes

    numbers = {word: range(10 * index, 10 * index + 2 + index) for index, word in enumerate(split_names)}
    if kind == "saved":
        saved(tmp_path, numbers)
    else:
        for word, some in numbers.items():
            members = [
                (f"{n}.{end}", image_bytes(n) if end == "png" else b"c%d" % n) for n in some for end in ("png", "txt")
            ]
            write_shard(tmp_path / f"{word}-0.tar", members)
    meant: dict[str, list[str]] = {}
    for word, some in numbers.items():
        meant.setdefault(canonical_split(word), []).extend(f"c{n}" for n in some)
    data = read_captioned_images(tmp_path)
    assert len({row.name for row in data}) == len(data) == data.rows_in_files == sum(map(len, numbers.values()))
    for split, captions in meant.items():
        assert sorted(data.split(split).captions) == sorted(captions)
        assert sorted(read_stream_split(tmp_path, split).captions) == sorted(captions)
    stream = open_stream(str(tmp_path))
    assert sorted(c for each in stream.read(1, 0, 0, stream.count) for c in each.captions) == sorted(meant["train"])


def test_splits_that_mean_one_and_have_other_columns_are_refused(tmp_path):
    saved(tmp_path / "one", {"train": range(4)})
    saved(tmp_path / "other", {"restval": range(4, 8)}, caption=["a", "b"])
    (tmp_path / "other" / "restval").rename(tmp_path / "one" / "restval")
    (tmp_path / "one" / "dataset_dict.json").write_text('{"splits": ["train", "restval"]}')
    with pytest.raises(DataError, match=r"one: train and restval are all of 'train', and their columns do not go"):
        read_captioned_images(tmp_path / "one")


@pytest.mark.parametrize("layout", ["texts", "flickr8k", "folder", "table"])
@pytest.mark.parametrize("samples", [0, 2, 9])
def test_shards_beside_unpacked_images_hide_none_of_them(tmp_path, layout, samples):
    """Whatever the archive holds of what lies beside it, and whatever layout that is."""
    from test_streams import image_bytes

    names = [f"{split}/{n}.png" for split in ("train", "dev", "test") for n in range(3)]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(index))
        if layout == "texts":
            (tmp_path / name).with_suffix(".txt").write_text(f"c{index}")
    table = {"flickr8k": "captions.txt", "folder": "metadata.csv", "table": "all.csv"}.get(layout, "")
    if table:
        lines = [f"{name},c{index}" for index, name in enumerate(names)]
        (tmp_path / table).write_text("\n".join([f"{'file_name' if layout == 'folder' else 'image'},caption", *lines]))
    for shard in ("train.tar", "train-1.tar") if samples else ():
        some = [
            (f"{n}.{end}", image_bytes(n) if end == "png" else b"c%d" % n)
            for n in range(samples)
            for end in ("png", "txt")
        ]
        write_shard(tmp_path / shard, some)
    data = read_captioned_images(tmp_path)
    assert (data.layout, len(data)) == (layout, 9)
    assert sum("train-1.tar and 1 more are not read" in note for note in data.notes) == bool(samples)
    assert not is_stream(tmp_path)


def test_what_lies_beside_a_stream_is_named(tmp_path):
    from test_streams import image_bytes

    read(tmp_path, ("x.jpg", b"x"), ("x.txt", "one"), ("x.mask.png", b"y"), ("x.png", b"z"))
    (tmp_path / "shards.json").write_text('{"train-0.tar": 1}')
    (tmp_path / "more").mkdir()
    for n in range(3):
        (tmp_path / "more" / f"{n}.png").write_bytes(image_bytes(n))
    (tmp_path / "notes.txt").write_text("about")
    assert read_captioned_images(tmp_path).notes == [
        "train-0.tar: 2 images are not read, since their sample has another one, such as x.mask.png",
        "4 files beside those of the stream are not read, such as notes.txt: 3 .png, 1 .txt",
    ]
    folder = saved(tmp_path / "saved", {"train": range(3)}, title="t", width=3)
    assert read_captioned_images(folder).notes == ["train: columns that are not read: title, width"]


@pytest.mark.parametrize(
    "members",
    [
        [("x.json", {"captions": ["a", "b"], "caption": "c"})],
        [("x.json", {"captions": ["a"], "text": ["a", "c"]})],
        [("x.json", {"caption": "a"}), ("x.txt", "a\nc")],
        [("x.json", {"sentences": ["a"], "Raw": "c"})],
    ],
)
def test_captions_of_a_sample_that_are_not_read_are_told(tmp_path, members):
    captions_by_key, listed = read(tmp_path, ("x.jpg", b"x"), *members)
    assert "c" not in captions_by_key["x"]
    assert [line.endswith("1 captions beside those that are read, such as 'c' (warning)") for line in listed] == [True]
    # Those that say the same, as img2dataset writes them, are not told.
    assert read(tmp_path, ("x.jpg", b"x"), ("x.json", {"caption": "a  dog"}), ("x.txt", "a dog "))[1] == []


@pytest.mark.parametrize(
    "names", [("caption",), ("caption", "caption_2"), ("caption_0", "caption_1"), ("text", "Text 2", "title"),
              ("captions", "caption", "caption3")],
)  # fmt: skip
def test_a_stream_reads_the_columns_of_captions_that_a_table_does(tmp_path, names):
    import datasets
    from test_streams import image_bytes

    rows = {"image": [{"bytes": image_bytes(n), "path": None} for n in range(6)]}
    rows |= {name: [f"{name} of {n}" if n or name == names[0] else None for n in range(6)] for name in names}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train-0.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    as_table = read_captioned_images(tmp_path / "train-0.parquet")
    for source in (str(tmp_path / "train-{0..0}.parquet"), tmp_path / "saved"):
        dataset = read_captioned_images(source)
        assert sorted(row.captions for row in dataset) == sorted(row.captions for row in as_table)
        unread = [name for note in (*dataset.notes, *as_table.notes) for name in names if name in note.split(": ")[1]]
        assert len(unread) % 2 == 0


@pytest.mark.parametrize("name", ["test", "train", "test[:80%]", "validation"])
@pytest.mark.parametrize("row_splits", [(), ("train", "val", "test", "train"), ("test",)])
def test_a_data_set_that_was_saved_as_one_is_of_the_split_that_it_says(tmp_path, name, row_splits):
    """Of the file that it was made from, unless its rows say better: no test row is trained on."""
    import datasets
    from test_streams import image_bytes

    rows: dict[str, list] = {
        "image": [{"bytes": image_bytes(n), "path": None} for n in range(8)],
        "caption": [f"c{n}" for n in range(8)],
    }
    if row_splits:
        rows["split"] = [row_splits[n % len(row_splits)] for n in range(8)]
    dataset = datasets.Dataset.from_dict(rows, split=datasets.NamedSplit(name)).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    own = canonical_split(name.partition("[")[0])
    meant = {f"c{n}": canonical_split(row_splits[n % len(row_splits)]) if row_splits else own for n in range(8)}
    if row_splits == ("test",) and own != "test":
        # Nothing of it is what the file says.
        with pytest.raises(DataError, match="its split is 'test'"):
            read_captioned_images(tmp_path / "saved")
        return
    data = read_captioned_images(tmp_path / "saved")
    assert {row.captions[0]: row.split for row in data} == meant
    if "train" in meant.values():
        stream = open_stream(str(tmp_path / "saved"))
        assert {sample.captions[0] for sample in stream.samples() if not sample.error} == {
            c for c in meant if meant[c] == "train"
        }
    else:
        with pytest.raises(DataError, match="no split 'train'"):
            open_stream(str(tmp_path / "saved"))


def test_a_saved_data_set_without_images_is_refused_by_its_name(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"number": [1, 2]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved: no column of images and captions in \['number'\]"):
        read_captioned_images(tmp_path / "saved")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(shards())
def test_any_shard_is_read_or_listed(members):
    with tempfile.TemporaryDirectory() as folder:
        hold(Path(folder), members)
