"""Files as people have them: a row is read right, or listed with its place and reason, and the counts add up.

Every case makes its own input; each stands for a kind that public bug reports tell of.
"""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from odd_tables import check_json, check_table, json_files, tables
from PIL import Image

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.captions import parse_captions
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import detect_layout, read_captioned_images
from clipvisionalign.data.text_files import decode, read_delimited, split_lines


def paint(path: Path, number: int = 0) -> str:
    """An image whose content is its number's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (number % 256, number // 256 % 256, 90)).save(path, "PNG")
    return path.name


def image_bytes(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 7), (number % 256, number // 256 % 256, 90)).save(out, "PNG")
    return out.getvalue()


def captions_of(data) -> dict[str, tuple[str, ...]]:
    return {row.name: row.captions for row in data}


def read(path: Path, **options):
    """The data set, after its rows were counted: those in the files are those read and those listed."""
    data = read_captioned_images(path, **options)
    kept, report = check(data, full=False)
    assert report.rows is not None
    assert report.rows["in_files"] == report.rows["read"] + report.rows["left_out"]
    assert report.rows["read"] == sum(row.row_count for row in kept)
    return data


# --- text ------------------------------------------------------------------------------------------------------------

ODD_CHARACTERS = ("\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@pytest.mark.parametrize("layout", ["csv", "tsv", "jsonl", "txt", "token", "kaggle", "captions.txt"])
def test_a_line_ends_at_lf_cr_lf_or_cr_alone(tmp_path, layout):
    captions = [f"before{mark}after {number}" for number, mark in enumerate(ODD_CHARACTERS)]
    names = [paint(tmp_path / f"{number}.png", number) for number in range(len(captions))]
    pairs = list(zip(names, captions, strict=True))
    if layout == "jsonl":
        text = "".join(json.dumps({"file_name": a, "caption": b}, ensure_ascii=False) + "\n" for a, b in pairs)
        (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    elif layout == "txt":
        for name, caption in pairs:
            (tmp_path / name).with_suffix(".txt").write_text(caption + "\r\n", encoding="utf-8", newline="")
    else:
        file, header, between = {
            "csv": ("metadata.csv", "file_name,caption", ","), "tsv": ("captions.tsv", "image\tcaption", "\t"),
            "token": ("results_20130124.token", "", "#0\t"),
            "kaggle": ("results.csv", "image_name| comment_number| comment", "| 0| "),
            "captions.txt": ("captions.txt", "image,caption", ","),
        }[layout]  # fmt: skip
        lines = ([header] if header else []) + [f"{a}{between}{b}" for a, b in pairs]
        (tmp_path / file).write_text("\r".join(lines) + "\r", encoding="utf-8", newline="")
    data = read(tmp_path)
    assert captions_of(data) == {name: (" ".join(caption.split()),) for name, caption in pairs}
    assert not [problem for problem in data.problems if problem.effect == "left out"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_quote_that_is_never_closed_swallows_no_row(tmp_path, suffix):
    between = "\t" if suffix == "tsv" else ","
    captions = [
        "plain", '"Stop" says the sign', '"never closed', "a man", 'he said "go"', "a hat", '"another one', '5" wide',
    ]  # fmt: skip
    names = [paint(tmp_path / f"{n}.png", n) for n in range(len(captions))]
    lines = [f"image{between}caption", *(f"{a}{between}{b}" for a, b in zip(names, captions, strict=True))]
    (tmp_path / f"table.{suffix}").write_text("\n".join(lines))
    data = read(tmp_path)
    assert captions_of(data) == {a: (b,) for a, b in zip(names, captions, strict=True)}
    assert [(problem.kind, problem.place, problem.effect) for problem in data.problems] == [
        ("open quote", f"table.{suffix}, line 4", "mended"), ("open quote", f"table.{suffix}, line 8", "mended"),
    ]  # fmt: skip


def test_quoted_cells_are_read_as_csv_writes_them(tmp_path):
    captions = ["a, b", 'say "hi"', "two\nlines, a b", "three\r\nlines", " spaces ", '"', 'ends with "', "x;y|z\tw"]
    names = [paint(tmp_path / f"{n}.png", n) for n in range(len(captions))]
    for delimiter in (",", ";", "\t", "|"):
        with (tmp_path / "table.csv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["image", "caption"])
            writer.writerows(zip(names, captions, strict=True))
        data = read(tmp_path)
        assert captions_of(data) == {a: (" ".join(b.split()),) for a, b in zip(names, captions, strict=True)}
        assert not data.problems


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.sampled_from('ab ,;"\t\n\r\\é'), max_size=8), min_size=2, max_size=2),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", "\t", ";"]),
)
def test_what_the_csv_module_writes_comes_back(rows, delimiter):
    # Backslashes before quotes are another program's way to write quotes; of the two readings this is not the one.
    rows = [[cell.replace("\\", "/") for cell in row] for row in rows]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)
    lines = split_lines(out.getvalue())
    parsed = [record.cells for record in read_delimited(lines, delimiter, lambda cells: False)]
    # Within a cell, a line's end is a line's end.
    assert parsed == [[cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row] for row in rows]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "mac"]
)
def test_usual_encodings_are_read(tmp_path, encoding):
    caption = "a child’s “dress” – pink… 5 €" if encoding != "mac" else "plain"
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    text = f"file_name,caption\n{paint(tmp_path / 'é.png')},{caption}\n" if encoding != "cp1252" else (
        f"file_name,caption\n{paint(tmp_path / 'e.png')},{caption}\n")  # fmt: skip
    for mark in dict.fromkeys((marks.get(encoding, b""), b"")):
        (tmp_path / "metadata.csv").write_bytes(mark + text.encode("utf-8" if encoding == "mac" else encoding))
        data = read(tmp_path)
        assert data.captions == [caption]
        assert {problem.kind for problem in data.problems} == ({"broken encoding"} if encoding == "cp1252" else set())


OF_OTHER_SCRIPTS = {
    "Собака бежит по траве за красным мячом; две девочки сидят на скамейке": ("cp1251", "koi8_r"),
    "Ένας σκύλος τρέχει στο γρασίδι, δύο κορίτσια κάθονται σε ένα παγκάκι": ("cp1253",),
    "一只狗在草地上奔跑，两个女孩坐在长椅上": ("gb18030",),
    "一隻狗在草地上奔跑，兩個女孩坐在長椅上": ("big5",),
    "犬が草の上を走っている。二人の女の子がベンチに座っている": ("shift_jis", "euc_jp"),
    "개가 잔디 위를 달린다. 두 소녀가 벤치에 앉아 있다": ("euc_kr",),
    "สุนัขวิ่งบนหญ้า เด็กหญิงสองคนนั่งบนม้านั่ง": ("cp874",),
}


@pytest.mark.parametrize(
    ("caption", "encoding"), [(text, each) for text, several in OF_OTHER_SCRIPTS.items() for each in several]
)
def test_encodings_of_other_scripts_are_guessed_and_said(tmp_path, caption, encoding):
    (tmp_path / "metadata.tsv").write_bytes(
        f"file_name\tcaption\n{paint(tmp_path / 'a.png')}\t{caption}\n".encode(encoding)
    )
    data = read(tmp_path)
    assert data.captions == [caption]
    (problem,) = data.problems
    assert (problem.kind, problem.effect, problem.place) == ("broken encoding", "mended", "metadata.tsv, line 2")
    assert "a guess" in problem.message


@pytest.mark.parametrize(
    "caption",
    [
        "Ça, où? À côté d'un café, près de l'église",
        "Äpfel über Öl",
        "niño pequeño",
        "five €",
        "ÀÉÎ",
        "ø",
        "Übergrößenträger",
    ],
)
def test_latin_text_is_not_guessed_at(caption):
    decoded = decode(f"a.png,{caption}\n".encode("cp1252"))
    assert decoded.text == f"a.png,{caption}\n"
    assert decoded.repair.endswith("Windows-1252")


@given(st.binary(max_size=200))
@example(b"\xff\xfe\x00")
@example(b"\xef\xbb\xbf\xff")
def test_any_bytes_are_some_text(content):
    decode(content)


@pytest.mark.parametrize("text", ["é.txt", "é.TXT", "e\u0301.txt", "e\u0301.Txt", "é.png.txt"])
@pytest.mark.parametrize("image", ["é.png", "e\u0301.png"])
def test_a_text_belongs_to_its_image_in_whatever_spelling(tmp_path, image, text):
    if text.endswith("png.txt"):
        text = f"{image}.txt"
    paint(tmp_path / image)
    paint(tmp_path / "alone.png", 1)
    (tmp_path / text).write_text("a dog\n")
    (tmp_path / "other.TXT").write_text("a cat\n")
    data = read(tmp_path)
    assert captions_of(data) == {image: ("a dog",)}
    place_by_kind = {problem.kind: problem.place for problem in data.problems}
    same = text in (f"{image}.txt", image.replace("png", "txt"))
    assert place_by_kind == {"no captions": "alone.png"} | ({} if same else {"name spelled otherwise": image})
    assert any("other.TXT" in note for note in data.notes)


def test_two_texts_of_an_image_that_differ_in_spelling_are_not_confused(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("the right one")
    (tmp_path / "a.TXT").write_text("another")
    data = read(tmp_path)
    assert data.captions == ["the right one"]
    assert any("a.TXT" in note for note in data.notes)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("folder", ["", "train"])
def test_of_several_columns_the_one_with_files_names_the_images(tmp_path, ending, folder):
    where = tmp_path / folder
    names = [paint(where / f"{n}.png", n) for n in range(3)]
    rows = [{"image": str(index), "file_name": name, "caption": f"c{index}"} for index, name in enumerate(names)]
    if ending == "jsonl":
        (where / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (where / "metadata.csv").write_text(
            "image,file_name,caption\n" + "".join(",".join(row.values()) + "\n" for row in rows)
        )
    below = f"{folder}/" if folder else ""
    assert captions_of(read(tmp_path)) == {f"{below}{n}.png": (f"c{n}",) for n in range(3)}


@pytest.mark.parametrize("root", ["here", "/mnt/elsewhere/set", "D:\\sets\\set"])
def test_absolute_names_in_a_folder_of_a_split_are_found(tmp_path, root):
    names = [paint(tmp_path / "train" / f"{n}.png", n) for n in range(3)]
    separator = "\\" if root.startswith("D") else "/"
    root = str(tmp_path / "train") if root == "here" else root
    rows = "".join(f"{root}{separator}{name},caption {name}\n" for name in names)
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    data = read(tmp_path)
    assert {row.image.name: (row.split, row.captions) for row in data} == {
        n: ("train", (f"caption {n}",)) for n in names
    }


def test_one_line_of_another_encoding_spoils_no_other(tmp_path):
    names = [paint(tmp_path / f"{n}.png", n) for n in range(3)]
    lines = [b"file_name,caption", f"{names[0]},caf\u00e9 \u2013 one".encode(), f"{names[1]},caf\u00e9".encode("cp1252"),
             f"{names[2]},\u65e5\u672c".encode()]  # fmt: skip
    (tmp_path / "metadata.csv").write_bytes(b"\n".join(lines))
    data = read(tmp_path)
    assert data.captions == ["café – one", "café", "日本"]
    assert [(problem.place, problem.effect) for problem in data.problems] == [("metadata.csv, line 3", "mended")]


@pytest.mark.parametrize(
    ("cell", "texts", "wrong"),
    [
        ("a dog", ["a dog"], 0), (b"a dog", ["a dog"], 0), ('["a dog", "two"]', ["a dog", "two"], 0),
        ("['a dog', \"a man's hat\"]", ["a dog", "a man's hat"], 0), (["a", None, "b"], ["a", "b"], 1),
        ([{"raw": "a"}, {"caption": "b", "id": 3}, {"sentence": "c"}], ["a", "b", "c"], 0), (None, [], 1),
        (float("nan"), [], 1), (17, [], 1), (True, [], 1), ([], [], 1), ({}, [], 1), ("  ", [], 1),
        ([["a"], ["b"]], ["a", "b"], 0), ({"tokens": ["a", "dog"]}, ["a dog"], 0), ({"tokens": None}, [], 1),
        ("[a dog]", ["[a dog]"], 0), ("[1, 2]", [], 2), ({"raw": 5}, [], 1), ("[" * 500 + "]" * 500, None, 1),
    ],
)  # fmt: skip
def test_a_cell_holds_captions_in_any_form(cell, texts, wrong):
    parsed, reasons = parse_captions(cell)
    assert len(reasons) == wrong
    assert texts is None or parsed == texts


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("raw"), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_any_cell_gives_captions_or_a_reason(cell):
    texts, wrong = parse_captions(cell)
    assert texts or wrong
    assert all(isinstance(text, str) and text == " ".join(text.split()) and text for text in texts)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_all_rows(tmp_path):
    rows = [{"file_name": paint(tmp_path / f"{n:02}.png", n), "caption": f"image {n}"} for n in range(12)]
    for row in rows[1:]:
        row["split"] = "test"
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = read(tmp_path)
    assert data.split_sizes() == {"test": 11}
    assert [(problem.kind, problem.place, problem.rows) for problem in data.problems] == [("in no split", "00.png", 1)]


def test_captions_in_several_columns_and_columns_that_nobody_reads(tmp_path):
    names = [paint(tmp_path / f"{n}.png", n) for n in range(2)]
    text = "image,caption_1,caption_2,caption,caption,licence\n" + "".join(
        f"{n},one,two,three,four,CC0\n" for n in names
    )
    (tmp_path / "table.csv").write_text(text)
    data = read(tmp_path)
    assert all(sorted(row.captions) == ["four", "one", "three", "two"] for row in data)
    assert data.notes == ["table.csv: columns that are not read: licence"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_of_every_wrong_form_are_listed_one_by_one(tmp_path, form):
    good = [paint(tmp_path / f"{n}.png", n) for n in range(2)]
    rows = [
        {"image": good[0], "caption": "one"}, {"image": "x" * 300, "caption": "a name that is too long"},
        {"image": "nul\0byte.png", "caption": "no name"}, {"image": None, "caption": "no image"},
        {"image": "y" * 5000 + ".png", "caption": "a name of no file system"}, {"image": good[1], "caption": None},
        {"image": good[1], "caption": "two"}, {"image": "gone.png", "caption": "no file"},
    ]  # fmt: skip
    if form == "jsonl":
        (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"image": \n')
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    kept, report = check(read_captioned_images(tmp_path), full=False)
    assert captions_of(kept) == {good[0]: ("one",), good[1]: ("two",)}
    left_out = 6 + 2 * (form == "jsonl")
    assert report.rows == {"in_files": 2 + left_out, "read": 2, "left_out": left_out}
    assert sum(problem.rows for problem in report.problems if problem.effect == "left out") == left_out


def test_images_within_a_table_are_known_by_their_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def write(rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
        return read(tmp_path / "data.parquet")

    # Base names that come again in other folders, as `datasets` cuts them.
    rows = [{"image": {"bytes": image_bytes(n), "path": f"{n % 4}.png"}, "caption": f"of {n}"} for n in range(60)]
    first = write(rows)
    assert len(first) == 60
    assert len({row.name for row in first}) == 60
    assert all(row.location.startswith("data.parquet, row ") for row in first)
    splits = {row.captions: row.split for row in first}
    assert len(set(splits.values())) == 3
    more = write([{"image": {"bytes": image_bytes(900), "path": "0.png"}, "caption": "in front"}, *rows])
    assert {row.captions: row.split for row in more if row.captions in splits} == splits
    again = write([*rows, {"image": {"bytes": image_bytes(7), "path": None}, "caption": "the same once more"}])
    assert captions_of(again)["3-" + next(r.name for r in first if r.captions == ("of 7",))[2:]] == (
        "of 7", "the same once more")  # fmt: skip


def test_an_image_in_base_64_is_an_image(tmp_path):
    text = base64.b64encode(image_bytes(3)).decode()
    rows = [f"data:image/png;base64,{text}", "data:image/png;base64,%%%"]
    (tmp_path / "table.csv").write_text(
        "image,caption\n" + "".join(f'"{cell}",text {n}\n' for n, cell in enumerate(rows))
    )
    data = read(tmp_path)
    assert [(row.image, row.captions) for row in data] == [(image_bytes(3), ("text 0",))]
    assert [problem.place for problem in data.problems] == ["table.csv, line 3"]


def test_files_of_macos_beside_a_table_are_none(tmp_path):
    (tmp_path / "._captions.csv").write_bytes(b"\0\5\26\7Mac OS X        ")
    (tmp_path / "captions.csv").write_text(f"image,caption\n{paint(tmp_path / 'a.png')},a\n")
    assert captions_of(read(tmp_path)) == {"a.png": ("a",)}


# --- names -----------------------------------------------------------------------------------------------------------


def test_one_file_under_many_names_is_one_image(tmp_path):
    paint(tmp_path / "p0.png", 0)
    paint(tmp_path / "p1.png", 1)
    (tmp_path / "sub").mkdir()
    os.symlink("p0.png", tmp_path / "link.png")
    names = ["p0.png", "./p0.png", "sub/../p0.png", "link.png", str(tmp_path / "p0.png"), ".\\p0.png"]
    lines = [f"{name},caption {number}" for number, name in enumerate([*names, "p1.png"])]
    (tmp_path / "table.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    data = read(tmp_path)
    assert captions_of(data) == {
        "p0.png": tuple(f"caption {number}" for number in range(len(names))),
        "p1.png": (f"caption {len(names)}",),
    }
    # What was not written as the file is called is said.
    assert [(problem.kind, problem.place) for problem in data.problems] == [
        ("name spelled otherwise", "table.csv, line 7")
    ]


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_form_of_unicode(tmp_path, on_disk, in_table):
    names = ["sub é/café.png", "München.png", "がっこう.png"]
    for number, name in enumerate(names):
        paint(tmp_path / unicodedata.normalize(on_disk, name), number)
    rows = "".join(f"{unicodedata.normalize(in_table, name)},of {name}\n" for name in names)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
    data = read(tmp_path)
    assert len(check(data)[0]) == 3
    assert {problem.kind for problem in data.problems} == {"name spelled otherwise"}


def test_a_spelling_that_fits_two_files_fits_none(tmp_path):
    paint(tmp_path / "a.png", 0)
    paint(tmp_path / "A.png", 1)
    (tmp_path / "table.csv").write_text("image,caption\na.png,small\nA.png,large\n.\\a.PNG,either\n")
    kept, report = check(read_captioned_images(tmp_path))
    assert captions_of(kept) == {"a.png": ("small",), "A.png": ("large",)}
    assert [problem.kind for problem in report.problems if problem.rows] == ["missing image"]


def test_absolute_paths_of_another_machine_are_found_below_the_folder(tmp_path):
    paint(tmp_path / "images" / "a.png", 0)
    paint(tmp_path / "b.png", 1)
    rows = "/home/someone/set/images/a.png,one\nC:\\data\\set\\b.png,two\n/elsewhere/other/b.png,three\n"
    (tmp_path / "table.csv").write_text(f"image,caption\n{rows}")
    kept, report = check(read_captioned_images(tmp_path))
    # Two files of one name far away are not one file here.
    assert [row.captions for row in kept] == [("one",), ("two",)]
    assert [problem.rows for problem in report.problems if problem.kind == "missing image"] == [1]


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["split", "identity"])
def test_a_contradiction_names_both_rows(tmp_path, what):
    paint(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,caption,{what}\n0.png,a,train\n./0.png,b,test\n")
    with pytest.raises(DataError, match=r"0\.png.*test.*line 3.*train.*line 2"):
        read_captioned_images(tmp_path)


def test_lists_that_overlap_are_named(tmp_path):
    paint(tmp_path / "Images" / "a.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,one\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "Flickr_8k.testImages.txt").write_text("b.jpg\n")
    with pytest.raises(DataError, match=r"b\.jpg.*trainImages\.txt.*testImages\.txt"):
        read_captioned_images(tmp_path)


@pytest.mark.parametrize(
    ("year", "split"),
    [("train2017", "train"), ("val", "dev"), ("dev", "dev"), ("minival2014", "dev"), ("valminusminival2014", "train"),
     ("test2014", "test"), ("validation", "dev")],
)  # fmt: skip
def test_coco_splits_are_told_by_the_files_names(tmp_path, year, split):
    paint(tmp_path / "a.jpg")
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1.0, "caption": "a cat"}]}
    (tmp_path / f"captions_{year}.json").write_text(json.dumps(coco))
    assert read(tmp_path).split_sizes() == {split: 1}


def test_coco_files_of_one_name_in_two_folders_are_two_images(tmp_path):
    for year, number in (("train2017", 0), ("val2017", 1)):
        paint(tmp_path / year / "1.jpg", number)
        coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": f"of {year}"}]}
        (tmp_path / f"captions_{year}.json").write_text(json.dumps(coco))
    data = read(tmp_path)
    assert [(row.split, row.captions) for row in data] == [("train", ("of train2017",)), ("dev", ("of val2017",))]
    assert len({row.name for row in data}) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["", "x", "y", "z"])), min_size=3, max_size=24),
    st.sampled_from(["table", "embedded", "folder", "texts", "absolute"]), st.sampled_from(["none", "identity", "group"]),
)  # fmt: skip
def test_no_content_identity_or_group_stands_in_two_splits_and_nothing_moves(tmp_path_factory, images, layout, by):
    """images: (content, whom it shows), so that the same content comes several times."""
    if layout == "texts":
        by = "none"

    def write(root: Path, rows):
        root.mkdir(exist_ok=True)
        table = []
        for number, (content, who) in rows:
            path = root / f"{number}.png"
            paint(path, content)
            row = {"image": path.name, "caption": f"caption {number}"}
            if layout == "embedded":
                row["image"] = {"bytes": path.read_bytes(), "path": None}
            if layout == "absolute":
                row["image"] = str(path)
            if layout == "texts":
                path.with_suffix(".txt").write_text(row["caption"])
            if by != "none":
                row["identity" if by == "identity" else "scene"] = who or None
            table.append(row)
        if layout == "embedded":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "t.parquet")
        elif layout != "texts":
            name = "metadata.jsonl" if layout == "folder" else "t.jsonl"
            (root / name).write_text("\n".join(json.dumps(row) for row in table))
        try:
            data = read(root, group="scene" if by == "group" else "")
        except DataError as error:
            # One content with two identities, or groups, contradicts itself where the row is the image.
            if "an image has one" not in str(error):
                raise
            return None
        return {caption: row.split for row in data for caption in row.captions}

    rows = list(enumerate(images))
    folder = tmp_path_factory.mktemp("data")
    before = write(folder / "set", rows)
    if before is None:
        return
    for what in range(2):
        splits: dict[object, set[str]] = {}
        for number, image in rows:
            if f"caption {number}" in before and (what == 0 or (image[1] and by != "none")):
                splits.setdefault(image[what], set()).add(before[f"caption {number}"])
        assert all(len(split_names) == 1 for split_names in splits.values())
    more = [(100 + number, (200 + number, "")) for number in range(3)]
    for after in (write(folder / "more", [*more, *rows]), write(folder / "moved", rows)):
        assert after is not None
        assert all(after[caption] == split for caption, split in before.items() if caption in after)
        assert set(before) <= set(after) or by != "none"


def test_a_person_stands_in_one_split_and_an_empty_split_is_told(tmp_path, capsys):
    from clipvisionalign.cli import main

    rows = [f"{paint(tmp_path / f'p{n}.png', n)},caption {n},person{n // 4}" for n in range(40)]
    (tmp_path / "table.csv").write_text("image,caption,identity\n" + "\n".join(rows))
    data = read(tmp_path)
    assert len({(row.identity, row.split) for row in data}) == 10
    main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    assert "40 rows = 40 read + 0 left out" in said
    if len(data.split_sizes()) < 3:
        assert "--write-splits" in said
    file = tmp_path / "splits.csv"
    # Plain colours are nearly equal; they are not compared here.
    assert main(["check", str(tmp_path), "--quick", "--write-splits", str(file)]) == 0
    shared = read(tmp_path)
    assert shared.official_splits
    assert len({(row.identity, row.split) for row in shared}) == 10
    assert set(shared.split_sizes()) == {"train", "dev", "test"}
    # What is added moves nothing, and stands with its own.
    more = [f"{paint(tmp_path / f'q{n}.png', 100 + n)},new {n},person{n}" for n in range(12)]
    (tmp_path / "table.csv").write_text("image,caption,identity\n" + "\n".join([*more, *rows]))
    later = read(tmp_path)
    splits = {row.name: row.split for row in later}
    assert {row.name: row.split for row in shared}.items() <= splits.items()
    assert len({(row.identity, row.split) for row in later}) == 12
    assert main(["check", str(tmp_path), "--write-splits", str(file)]) == 1


def test_near_duplicates_are_shared_out_together(tmp_path):
    import numpy as np

    from clipvisionalign.cli import main

    noise = np.random.default_rng(0)
    for number in range(12):
        image = Image.fromarray(noise.integers(0, 255, (48, 48, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1))
        for quality in (95, 80):
            image.save(tmp_path / f"{number}-{quality}.jpg", quality=quality)
            (tmp_path / f"{number}-{quality}.txt").write_text(f"noise {number}")
    assert main(["check", str(tmp_path), "--write-splits", str(tmp_path / "splits.csv")]) == 0
    splits = {row.name: row.split for row in read(tmp_path)}
    assert all(splits[f"{n}-95.jpg"] == splits[f"{n}-80.jpg"] for n in range(12))
    assert set(splits.values()) == {"train", "dev", "test"}


# --- any file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("odd")


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tables())
def test_any_table_is_read_row_by_row_or_refused(one_folder, table):
    check_table(table, one_folder / "tables")


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(json_files())
def test_any_json_is_read_row_by_row_or_refused(one_folder, file):
    check_json(file, one_folder / "json")


def test_files_of_which_nothing_is_used_are_counted(tmp_path, capsys):
    from clipvisionalign.cli import main

    for number, name in enumerate(("a.png", "b.jfif", "c", "unused.jpe", "._a.png", "@eaDir/a.png", "sub/link.png")):
        paint(tmp_path / name, number)
    (tmp_path / "sub" / "link.png").unlink()
    os.symlink("../a.png", tmp_path / "sub" / "link.png")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "table.csv").write_text("image,caption\na.png,one\nb.jfif,two\nc,three\n")
    main(["check", str(tmp_path), "--json"])
    output = json.loads(capsys.readouterr().out)
    assert output["images"] == 3
    assert output["notes"][0] == "1 image file of which no row is read, such as unused.jpe"
    assert ".pdf" in " ".join(output["notes"])


def test_images_beside_their_texts_are_known_by_content(tmp_path):
    for number, name in enumerate(("a.png", "b.jfif", "c.bin", "._d.png")):
        paint(tmp_path / name, number)
        (tmp_path / name).with_suffix(".txt").write_text(f"image {number}")
    (tmp_path / "alone.txt").write_text("of nothing")
    data = read(tmp_path)
    assert captions_of(data) == {"a.png": ("image 0",), "b.jfif": ("image 1",), "c.bin": ("image 2",)}
    assert data.notes == ["1 .txt files that no image stands beside, such as alone.txt"]


def test_a_run_from_before_is_split_as_it_was(tmp_path):
    from clipvisionalign.data.run_data import read_data_of_run
    from clipvisionalign.data.splits import content_key, hash_split

    for number in range(40):
        paint(tmp_path / "data" / f"{number}.png", number)
    rows = "".join(f"{number}.png,caption {number}\n" for number in range(40))
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    about = {"source": str(tmp_path / "data"), "layout": "folder", "identity": "auto"}
    for name, more, rule in (("old", {}, 1), ("new", {"split_rule": 2, "group": ""}, 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.json").write_text(json.dumps(about | more))
        data = read_data_of_run(tmp_path / name)
        assert data.split_rule == rule
        assert all(row.split == hash_split(row.name if rule == 1 else content_key(row.image)) for row in data)


# --- splits, once more ------------------------------------------------------------------------------------------------


def colours(root: Path, count: int, start: int = 0) -> list[str]:
    return [paint(root / f"{start + n}.png", start + n) for n in range(count)]


def splits_of(data) -> dict[str, str]:
    return {row.name: row.split for row in data}


def test_a_file_of_splits_leaves_a_data_sets_own_as_they_are(tmp_path):
    names = colours(tmp_path, 12)
    own = ["train"] * 8 + ["dev"] * 2 + ["test"] * 2
    rows = "".join(f"{name},of {name},{split}\n" for name, split in zip(names, own, strict=True))
    (tmp_path / "metadata.csv").write_text(f"file_name,caption,split\n{rows}")
    before = splits_of(read(tmp_path))
    (tmp_path / "splits.csv").write_text("image,split\n0.png,train\n")
    assert splits_of(read(tmp_path)) == before
    (tmp_path / "splits.csv").write_text("image,split\n11.png,train\n")
    with pytest.raises(DataError, match=r"11\.png.*'train' by splits\.csv, line 2.*'test' by metadata\.csv, line 13"):
        read_captioned_images(tmp_path)


@pytest.mark.parametrize("written", ["./images/{}", "images\\{}", "images/{}", "{}"])
def test_names_in_a_file_of_splits_are_found_like_those_in_a_table(tmp_path, written):
    names = [paint(tmp_path / "images" / f"{n}é.png", n) for n in range(6)]
    rows = "".join(f"{name},of {name}\n" for name in names)
    (tmp_path / "table.csv").write_text(f"image,caption\n{rows}")
    splits = ["train", "train", "train", "dev", "dev", "test"]
    lines = "".join(f"{unicodedata.normalize('NFD', written.format(name))},{split}\n"
                    for name, split in zip(names, splits, strict=True))  # fmt: skip
    (tmp_path / "splits.csv").write_text(f"image,split\n{lines}nobody.png,train\n")
    data = read(tmp_path)
    assert list(splits_of(data).values()) == splits
    assert data.notes == [
        "1 names of splits.csv are of no image with a caption, such as nobody.png",
        "splits by splits.csv",
    ]


def test_a_file_of_splits_may_hold_any_name(tmp_path):
    from clipvisionalign.cli import main

    for number, name in enumerate((b"caf\xe9", b"two\nlines", b'quo"te', b"com,ma", b"plain", b"last")):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b".png"))
        paint(path, 100 * number)
        path.with_suffix(".txt").write_text(f"caption {number}")
    assert main(["check", str(tmp_path), "--quick", "--write-splits", str(tmp_path / "splits.csv")]) == 0
    data = read(tmp_path)
    assert len(data) == 6
    assert data.notes == ["splits by splits.csv"]


def test_groups_stand_together_in_a_file_of_splits_and_with_identities(tmp_path):
    from clipvisionalign.cli import main

    def write(count: int) -> None:
        rows = [{"image": name, "caption": f"of {name}", "film": float(n // 3), "person_id": n // 2}
                for n, name in enumerate(colours(tmp_path, count))]  # fmt: skip
        rows[1]["film"] = 0
        (tmp_path / "table.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    write(30)
    # Films and persons overlap by chains over six images: these stand together.
    by_hash = read(tmp_path, group="film")
    assert len({(int(row.name[:-4]) // 6, row.split) for row in by_hash}) == 5
    assert (
        main(["check", str(tmp_path), "--quick", "--group", "film", "--write-splits", str(tmp_path / "splits.csv")])
        == 0
    )
    shared = read(tmp_path, group="film")
    assert len({(int(row.name[:-4]) // 6, row.split) for row in shared}) == 5
    assert set(splits_of(shared).values()) == {"train", "dev", "test"}
    write(36)
    assert splits_of(shared).items() <= splits_of(read(tmp_path, group="film")).items()


def test_an_image_whose_group_was_torn_by_hand_is_listed(tmp_path):
    colours(tmp_path, 4)
    rows = "".join(f"{n}.png,of {n},{'x' if n < 3 else 'y'}\n" for n in range(4))
    (tmp_path / "table.csv").write_text(f"image,caption,identity\n{rows}")
    (tmp_path / "splits.csv").write_text("image,split\n0.png,train\n1.png,test\n3.png,dev\n")
    data = read(tmp_path)
    assert splits_of(data) == {"0.png": "train", "1.png": "test", "3.png": "dev"}
    assert [(problem.kind, problem.place, problem.rows) for problem in data.problems] == [("in no split", "2.png", 1)]


def test_an_identity_that_nobody_knows_is_none(tmp_path):
    names = colours(tmp_path, 5)
    cells = ["nan", "NULL", "None", "", "7"]
    rows = "".join(f"{name},of {name},{cell}\n" for name, cell in zip(names, cells, strict=True))
    (tmp_path / "table.csv").write_text(f"image,caption,identity\n{rows}")
    assert [row.identity for row in read(tmp_path)] == [None, None, None, None, "7"]


@pytest.mark.parametrize(("split_names", "ending"), [("train valid test", ""), ("Train Dev Testing", ""), ("training val test", ""),
                                               ("train dev test", "Images"), ("train val test", "Images")])  # fmt: skip
def test_lists_of_flickr_are_known_by_any_word(tmp_path, split_names, ending):
    names = colours(tmp_path / "Images", 3)
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},of {name}\n" for name in names))
    for name, word in zip(names, split_names.split(), strict=True):
        (tmp_path / f"{'Flickr_8k.' if ending else ''}{word}{ending}.txt").write_text(f"{name}\n")
    data = read(tmp_path)
    assert [row.split for row in data] == ["train", "dev", "test"]
    assert data.official_splits


def test_a_file_of_splits_that_came_later_changes_no_run(tmp_path):
    from clipvisionalign.data.run_data import read_data_of_run

    names = colours(tmp_path / "data", 30)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{n},of {n}\n" for n in names))
    before = {rule: splits_of(read_captioned_images(tmp_path / "data", split_rule=rule)) for rule in (1, 2)}
    (tmp_path / "data" / "splits.csv").write_text("image,split\n" + "".join(f"{name},dev\n" for name in names))
    for rule, splits in before.items():
        run = tmp_path / f"run{rule}"
        run.mkdir()
        about = {"source": str(tmp_path / "data"), "layout": "folder"} | ({"split_rule": rule} if rule > 1 else {})
        (run / "data.json").write_text(json.dumps(about))
        assert splits_of(read_data_of_run(run)) == splits
    assert set(splits_of(read_captioned_images(tmp_path / "data")).values()) == {"dev"}


@pytest.mark.parametrize("count", [4, 5, 10, 12, 40])
def test_the_way_out_of_empty_splits_leads_to_a_set_that_trains(tmp_path, capsys, count):
    from clipvisionalign.cli import main

    names = colours(tmp_path, count)
    (tmp_path / "table.csv").write_text("image,caption\n" + "".join(f"{name},of {name}\n" for name in names))
    before = read(tmp_path)
    said = main(["check", str(tmp_path), "--quick"]), capsys.readouterr().out
    sizes = before.split_sizes()
    assert ("--write-splits" in said[1]) == (
        sizes.get("dev", 0) < 2 or sizes.get("train", 0) < 2 or "test" not in sizes
    )
    assert main(["check", str(tmp_path), "--quick", "--write-splits", str(tmp_path / "mine.csv")]) == 1
    assert main(["check", str(tmp_path), "--quick", "--write-splits", str(tmp_path / "splits.csv")]) == 0
    stdout = capsys.readouterr().out
    sizes = read(tmp_path).split_sizes()
    assert min(sizes["dev"], sizes["train"]) >= 2
    assert (sizes.get("test", 0) >= 1) == (count > 4)
    assert f"dev {sizes['dev']}" in stdout
    assert "too few images in dev" not in stdout


def test_too_few_to_share_out_is_said(tmp_path):
    from clipvisionalign.cli import main

    rows = "".join(f"{name},of {name},one\n" for name in colours(tmp_path, 6))
    (tmp_path / "table.csv").write_text(f"image,caption,identity\n{rows}")
    assert main(["check", str(tmp_path), "--quick", "--write-splits", str(tmp_path / "splits.csv")]) == 1
    assert not (tmp_path / "splits.csv").exists()


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "table.csv").write_text(f"image,caption\npipe.png,none\n{paint(tmp_path / 'a.png')},one\n")
    assert captions_of(check(read_captioned_images(tmp_path))[0]) == {"a.png": ("one",)}


# --- rows between quotes, cells and files that nobody reads ----------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "row", "suffix"),
    [
        ("image,caption,note", "{}.jpg,{}", ".csv"), ("image\tcaption", "{}\t{}", ".tsv"),
        ("image\tcaption", "img {}\t{}", ".tsv"), ("image,caption,split,note", "x/{}.jpg,{},train", ".csv"),
        ("image;caption;note", "{}.jpg?size=5;{}", ".csv"), ("image,caption", "{}", ".txt"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opened", [0, 5])
@pytest.mark.parametrize("there", [True, False])
def test_an_open_quote_swallows_no_row_of_any_form(tmp_path, header, row, suffix, opened, there):
    captions = ['"Stop' if n == opened else 'go"' if n == 9 else f"text {n}" for n in range(12)]
    row = "{}.jpg,{}" if suffix == ".txt" else row
    lines = [header, *(row.format(number, caption) for number, caption in enumerate(captions))]
    file = tmp_path / ("captions.txt" if suffix == ".txt" else f"table{suffix}")
    file.write_text("\n".join(lines) + "\n")
    for number, line in enumerate(lines[1:]):
        if there or number == 11:
            paint(tmp_path / line.replace(";", ",").replace("\t", ",").split(",")[0], number)
    data = read_captioned_images(file)
    assert data.rows_in_files == 12
    assert [caption for row in data for caption in row.captions] == captions
    assert [problem.place for problem in data.problems if problem.kind == "open quote"] == [
        f"{file.name}, line {opened + 2}"
    ]


@pytest.mark.parametrize("columns", [("caption", "image"), ("image", "caption"), ("caption", "image", "note")])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_caption_over_lines_is_one_wherever_its_column_stands(tmp_path, columns, suffix):
    captions = ["one\ntwo", 'say "hi",\nand go', "a.jpg\n\nb", "plain", "x\ty\n, z"]
    rows = [
        {"image": paint(tmp_path / f"{number}.png", number), "caption": caption, "note": "first\nsecond"}
        for number, caption in enumerate(captions)
    ]
    with (tmp_path / f"table.{suffix}").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t" if suffix == "tsv" else ",", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    data = read(tmp_path)
    assert not data.problems
    assert captions_of(data) == {row["image"]: (" ".join(row["caption"].split()),) for row in rows}


@pytest.mark.parametrize("line", ['p{}\t"a dog ""{}"" runs', 'p{}\t"a dog {} runs', '{}"\t"{}', '"{}'])
def test_open_quotes_are_read_in_one_pass(line, monkeypatch):
    from clipvisionalign.data import text_files

    read = []
    real = text_files._split
    monkeypatch.setattr(text_files, "_split", lambda text, delimiter: read.append(len(text)) or real(text, delimiter))
    lines = [line.format(number, number) if number % 3 else f"p{number}\ta dog" for number in range(900)]
    assert list(read_delimited(lines, "\t", lambda cells: False))
    # Characters that were split, of those that are there.
    assert sum(read) < 80 * sum(map(len, lines))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_column_without_a_name_is_no_split_identity_or_group(tmp_path, form):
    pandas = pytest.importorskip("pandas")
    rows = [{"": n, "image": paint(tmp_path / f"{n}.png", n), "caption": f"image {n}"} for n in range(6)]
    if form == "csv":
        pandas.DataFrame(rows)[["image", "caption"]].to_csv(tmp_path / "table.csv")
    elif form == "jsonl":
        (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pandas.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    data = read(tmp_path)
    assert captions_of(data) == {row["image"]: (row["caption"],) for row in rows}
    assert not data.problems
    assert not data.official_splits
    assert all(row.identity is None for row in data)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_column_that_comes_twice_keeps_its_cells(tmp_path, form):
    name = paint(tmp_path / "a.png")
    if form == "csv":
        (tmp_path / "table.csv").write_text(f"image,caption,caption\n{name},one,two\n")
    elif form == "jsonl":
        (tmp_path / "table.jsonl").write_text(f'{{"image": "{name}", "caption": "one", "caption": "two"}}\n')
    else:
        import pyarrow
        import pyarrow.parquet

        columns = [pyarrow.array([text]) for text in (name, "one", "two")]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_arrays(columns, names=["image", "caption", "caption"]), tmp_path / "table.parquet"
        )
    assert captions_of(read(tmp_path)) == {"a.png": ("one", "two")}


@pytest.mark.parametrize("what", ["date", "timestamp", "duration", "zone", "bytes"])
@pytest.mark.parametrize("used", [False, True])
def test_a_cell_of_parquet_that_python_has_not_costs_its_row_at_most(tmp_path, what, used):
    import pyarrow
    import pyarrow.parquet

    kind, odd = {
        "date": (pyarrow.date32(), 2**31 - 1), "timestamp": (pyarrow.timestamp("ms"), 2**60),
        "duration": (pyarrow.duration("s"), 2**60), "zone": (pyarrow.timestamp("s", "Nowhere/Town"), 5),
        "bytes": (pyarrow.string(), None),
    }[what]  # fmt: skip
    names = [paint(tmp_path / f"{n}.png", n) for n in range(3)]
    if what == "bytes":
        cells = pyarrow.array([b"one", "caf\u00e9".encode("cp1252"), b"two"]).view(pyarrow.string())
    else:
        cells = pyarrow.array([None, odd, None], pyarrow.int32() if what == "date" else pyarrow.int64()).view(kind)
    columns = {"image": pyarrow.array(names), "caption": pyarrow.array(["a", "b", "c"])}
    columns["caption" if used and what == "bytes" else "identity" if used else "taken"] = cells
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    data = read(tmp_path)
    if what == "bytes":
        assert [row.captions for row in data] == ([("one",), ("café",), ("two",)] if used else [("a",), ("b",), ("c",)])
        assert [problem.kind for problem in data.problems] == ["broken encoding"]
    else:
        assert [row.name for row in data] == [name for name in names if not used or name != names[1]]
        assert [problem.place for problem in data.problems] == ["table.parquet, row 1"] * used


@pytest.mark.parametrize("path", ["./", ".", "/", "..", "a/..", ""])
def test_an_embedded_image_whose_path_is_no_file_has_a_name(tmp_path, path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": image_bytes(n), "path": path}, "caption": f"of {n}"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    data = read(tmp_path / "data.parquet")
    assert [row.captions for row in data] == [("of 0",), ("of 1",), ("of 2",)]
    assert all(row.name.startswith("image-") for row in data)


def test_a_mark_does_not_change_what_single_bytes_are():
    text = "\u201cStop\u201d \u2026"
    assert decode(codecs.BOM_UTF8 + text.encode("cp1252") + "\u65e5\u672c".encode()).text == text + "\u65e5\u672c"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told_by_its_beginning(tmp_path, encoding):
    captions = [chr(0x4E00 + n) * 200 for n in range(20)]
    names = [paint(tmp_path / f"{n}.png", n) for n in range(20)]
    text = "image,caption\n" + "".join(f"{a},{b}\n" for a, b in zip(names, captions, strict=True))
    (tmp_path / "table.csv").write_bytes(text.encode(encoding))
    assert read(tmp_path).captions == captions


@pytest.mark.parametrize("order", [("A.png", "a.png"), ("a.png", "A.png")])
def test_names_that_differ_in_case_alone_are_two_images(tmp_path, order):
    paint(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("image,caption\n" + "".join(f"{name},of {name}\n" for name in order))
    kept, report = check(read_captioned_images(tmp_path), full=False)
    assert captions_of(kept) == {"a.png": ("of a.png",)}
    assert [problem.rows for problem in report.problems if problem.kind == "missing image"] == [1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base_64_is_read_in_either_alphabet_padded_or_not(tmp_path, encode, padded):
    contents = [image_bytes(number) for number in range(30)]
    texts = [encode(content).decode() for content in contents]
    rows = "".join(f"{text if padded else text.rstrip('=')},text {n}\n" for n, text in enumerate(texts))
    (tmp_path / "table.csv").write_text(f"image,caption\n{rows}")
    assert [row.image for row in read(tmp_path)] == contents


_WORDS = st.lists(st.sampled_from(["a dog", "it's", 'say "go"', "one, two", "[x]", "back\\slash", "é", "(a)", "x: y"]),
                  min_size=1, max_size=4)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(_WORDS, st.booleans())
def test_a_list_of_captions_is_read_however_a_program_writes_it(words, with_none):
    numpy = pytest.importorskip("numpy")
    cells = [*words, None] if with_none else words
    array = numpy.array(cells, dtype=object)
    nan = str([*words, float("nan")])
    for text in (
        str(cells), json.dumps(cells), json.dumps(cells, ensure_ascii=False), repr(tuple(cells)), str(array), repr(array),
        str(numpy.array(words)), repr(numpy.array(words)), nan, f"[{[words[0]]!s}, {words[1:]}]",
        str([{"raw": word} for word in words]), json.dumps({"captions": words}), repr({"sentences": cells}),
        str([word.encode() for word in words]), str(cells).replace(", ", ",\n "),
    ):  # fmt: skip
        texts, wrong = parse_captions(text)
        assert [each.replace(",", "") for each in texts] == [word.replace(",", "") for word in words], text
        assert wrong in ([], ["no caption"])
    assert parse_captions(repr(words[0].encode())) == ([words[0]], [])


@pytest.mark.parametrize(
    ("cell", "texts", "wrong"),
    [
        ("[]", [], 1), ("[null]", [], 1), ("[None]", [], 1), ("[nan]", [], 1), ("[NaN, 'a']", ["a"], 1), ("()", [], 1),
        ("{}", [], 1), ('{"raw": "a dog"}', ["a dog"], 0), ("('a','b')", ["a", "b"], 0), ("b'a dog'", ["a dog"], 0),
        ("array(['a', 'b'], dtype='<U5')", ["a", "b"], 0), ('[["a"],["b"]]', ["a", "b"], 0), ("array([], dtype=object)", [], 1),
        ("[['a' 'b']\n ['c' 'd']]", ["a", "b", "c", "d"], 0), ("{'a'}", ["a"], 0), ("[array(['a'])]", ["a"], 0),
        ("['a' ... 'z']", [], 1), ("['a dog', 'a c", [], 1), ('["a" b]', [], 1), ("[{'raw': 'a dog'", [], 1),
        ({"tokens": "a dog"}, ["a dog"], 0), ({"tokens": [" a", "dog"]}, ["a dog"], 0), ({"tokens": []}, [], 1),
        ("[a dog]", ["[a dog]"], 0), ("(a dog)", ["(a dog)"], 0), ("(2)", ["(2)"], 0), ("{a dog}", ["{a dog}"], 0),
        ("[dog]", ["[dog]"], 0), ("'a' and 'b'", ["'a' and 'b'"], 0), ("[a] and [b]", ["[a] and [b]"], 0),
        ("b'side the road", ["b'side the road"], 0), ("('Stop')", ["('Stop')"], 0), ("[it's a dog]", ["[it's a dog]"], 0),
    ],
)  # fmt: skip
def test_what_is_written_like_a_value_is_no_caption(cell, texts, wrong):
    parsed, reasons = parse_captions(cell)
    assert parsed == texts
    assert len(reasons) == wrong


@pytest.mark.parametrize(
    "name", ["notes.json", "dataset_b.json", "captions_b.json", "annotations.JSON", "b.jsonl", "b.csv"]
)
def test_a_file_that_is_not_read_is_to_be_named_only_where_that_reads_it(tmp_path, name):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / name).write_text("{}")
    (problem,) = [
        problem for problem in read_captioned_images(tmp_path, layout="texts").problems if problem.place == name
    ]
    is_read = True
    try:
        detect_layout(tmp_path / name)
    except DataError:
        is_read = False
    assert ("name it instead of the folder" in problem.message) == is_read
    assert ("by its name: data_captions.json" in problem.message) == (not is_read)


@pytest.mark.parametrize(
    "beside", ["captions.csv", "more.jsonl", "sub/metadata_old.csv", "dataset_more.json", "z.parquet"]
)
@pytest.mark.parametrize("layout", ["folder", "table", "karpathy", "coco", "rstpreid", "token", "texts"])
def test_a_file_of_captions_that_is_not_read_is_listed(tmp_path, layout, beside):
    if layout == "table" and "/" not in beside and not beside.endswith(".json"):
        # Of two tables in one folder none is read.
        beside = f"sub/{beside}"
    if layout == "karpathy" and beside.startswith("dataset_"):
        beside = "dataset_zz.json"
    name = paint(tmp_path / "a.png")
    file, content = {
        "folder": ("metadata.csv", f"file_name,caption\n{name},a\n"), "table": ("t.csv", f"image,caption\n{name},a\n"),
        "karpathy": ("dataset_a.json", json.dumps({"images": [{"filename": name, "sentences": ["a"]}]})),
        "coco": ("captions_train.json", json.dumps(
            {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]})),
        "rstpreid": ("data_captions.json", json.dumps([{"id": 1, "img_path": name, "captions": ["a"]}])),
        "token": ("results_20130124.token", f"{name}#0\ta\n"), "texts": ("a.txt", "a\n"),
    }[layout]  # fmt: skip
    (tmp_path / file).write_text(content)
    (tmp_path / "instances_train.json").write_text("{}")
    other = tmp_path / beside
    other.parent.mkdir(exist_ok=True)
    other.write_text("image,caption\na.png,unread\n")
    data = read_captioned_images(tmp_path, layout="flickr30k" if layout == "token" else layout)
    assert data.captions == ["a"]
    assert [(problem.kind, problem.place) for problem in data.problems if problem.effect == "warning"] == [
        ("file not read", beside)
    ]
    if layout != "texts":
        # A file that is named is read alone.
        assert not [p for p in read_captioned_images(tmp_path / file).problems if p.kind == "file not read"]


@pytest.mark.parametrize(
    "folder_names", [("training", "validation", "testing"), ("Train", "val", "Test"), ("restval", "devel", "holdout")]
)
def test_a_folder_of_any_name_is_read_or_its_rows_are_listed(tmp_path, folder_names):
    for number, word in enumerate(folder_names):
        paint(tmp_path / word / "a.png", number)
        (tmp_path / word / "metadata.csv").write_text(f"file_name,caption\na.png,of {word}\n")
    data = read(tmp_path)
    assert data.rows_in_files == 3
    known = [word for word in folder_names if word != "holdout"]
    assert data.captions == [f"of {word}" for word in sorted(known)]
    assert len(set(data.split_sizes())) == len(known)
    assert [problem.place for problem in data.problems] == ["holdout/a.png"] * ("holdout" in folder_names)


def test_an_id_of_two_images_belongs_to_neither(tmp_path):
    names = [paint(tmp_path / f"{n}.png", n) for n in range(3)]
    coco = {
        "images": [{"id": min(n, 1), "file_name": name} for n, name in enumerate(names)] * 2,
        "annotations": [{"image_id": n, "caption": f"of {n}"} for n in (0, 1, 0)],
    }
    (tmp_path / "captions_train.json").write_text(json.dumps(coco))
    data = read(tmp_path)
    assert captions_of(data) == {"0.png": ("of 0", "of 0")}
    assert data.rows_in_files == 3
    assert [problem.place for problem in data.problems if problem.rows] == ["captions_train.json, annotations[1]"]


def test_a_key_that_stands_twice_is_told(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "dataset_a.json").write_text(
        '{"images": [{"filename": "a.png", "sentences": ["one"], "sentences": ["two"]}]}'
    )
    assert [problem.kind for problem in read(tmp_path).problems] == ["repeated key"]


def test_several_tables_are_named_and_none_is_chosen(tmp_path):
    name = paint(tmp_path / "a.png")
    for table in ("one.csv", "two.csv"):
        (tmp_path / table).write_text(f"image,caption\n{name},of {table}\n")
    with pytest.raises(DataError, match=r"2 tables \(one\.csv, two\.csv\): name the one"):
        read_captioned_images(tmp_path)
    assert read(tmp_path / "two.csv").captions == ["of two.csv"]
