"""Metadata of images: every cell as it is written, every row of one image or listed, and filters that find it."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_tables import Table, check_table, tables
from PIL import Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.metadata import Metadata, cast_cell, column_names, infer_column_type, read_metadata
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.tables import BASE_COLUMNS, open_image_table
from clipvisionalign.search.terms import parse_term


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """p0.png to p3.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (40 * number, 90, 0)).save(folder / f"p{number}.png")
    return folder


def read(folder: Path, table: Path) -> Metadata:
    storage = Storage(folder)
    return read_metadata(table, storage, storage.list_files(), BASE_COLUMNS)


def written(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# --- cells and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        (["1", "20", "-3"], "integer", [1, 20, -3]),
        (["1.5", "7", "-0.25"], "number", [1.5, 7.0, -0.25]),
        (["1.5e-05", "1E+16"], "number", [1.5e-05, 1e16]),
        ([1, 2.5], "number", [1.0, 2.5]),
        # Not to be told from an id.
        (["007", "12", "100"], "text", ["007", "12", "100"]),
        (["12_34", "2024_01"], "text", ["12_34", "2024_01"]),
        (["12e45", "3"], "text", ["12e45", "3"]),
        (["+491234", "1"], "text", ["+491234", "1"]),
        (["1.10", "1.1"], "text", ["1.10", "1.1"]),
        (["١٢", "3"], "text", ["١٢", "3"]),
        ([1234567, "A12", 20240131, 7], "text", ["1234567", "A12", "20240131", "7"]),
        ([3.5, "many"], "text", ["3.5", "many"]),
        # No number holds them.
        (["791557233689870338", "5"], "text", ["791557233689870338", "5"]),
        ([2**53, 1], "text", [str(2**53), "1"]),
        ([2**53 - 1, 1], "integer", [2**53 - 1, 1]),
        (["0.12345678901234567890", "1"], "text", ["0.12345678901234567890", "1"]),
        (["1.0e999"], "text", ["1.0e999"]),
        (["9" * 5000], "text", ["9" * 5000]),
        # What stands for no number in a column of numbers is text in one of texts.
        (["3.5", "NaN", "7", "N/A"], "number", [3.5, None, 7.0, None]),
        ([3.5, math.nan, math.inf], "number", [3.5, None, None]),
        (["1", "", "null", None], "integer", [1, None, None, None]),
        (["DE", "NA", "none"], "text", ["DE", "NA", "none"]),
        (["nan", "inf"], "text", ["nan", "inf"]),
        ([None, ""], "text", [None, None]),
        # Other things that a file can hold.
        ([True, "x"], "text", ["true", "x"]),
        ([["café", 1], {"a": None}], "text", ['["café", 1]', '{"a": null}']),
        ([b"caf\xc3\xa9", b"\xff"], "text", ["café", "\\xff"]),
        (["half \ud83d", "x"], "text", ["half \\ud83d", "x"]),
    ],
)  # fmt: skip
def test_a_column_holds_numbers_only_where_they_are_as_written(cells, kind, expected):
    from clipvisionalign.search.metadata import _clean_cell

    given_cells = [_clean_cell(cell) for cell in cells]
    assert infer_column_type(given_cells)[0] == kind
    typed_cells = [cast_cell(cell, kind) for cell in given_cells]
    assert typed_cells == expected
    assert [type(value) for value in typed_cells] == [type(value) for value in expected]


def test_no_two_columns_become_one():
    names = [
        "Title",
        "title",
        "a b",
        "a_b",
        "A-B",
        "Année",
        "標題",
        "2020 sales",
        "id",
        "width",
        "meta_id",
        "",
        "!",
        "a_b_2",
    ]
    new_names = column_names(names, BASE_COLUMNS)
    assert list(new_names) == names
    assert len(set(new_names.values())) == len(names)
    assert not set(new_names.values()) & set(BASE_COLUMNS)
    assert (new_names["title"], new_names["a_b"], new_names["meta_id"], new_names["a_b_2"]) == (
        "title",
        "a_b",
        "meta_id",
        "a_b_2",
    )
    assert (new_names["Année"], new_names["標題"], new_names["2020 sales"]) == ("année", "標題", "meta_2020_sales")
    assert (new_names["width"], new_names["id"]) == ("meta_width", "meta_id_2")


@pytest.mark.slow
def test_filters_find_everything_as_it_is_written(tmp_path, tiny_model, image_folder, capsys):
    Aligner(tiny_model()).save(tmp_path / "run")
    table = written(tmp_path / "told.csv", [
        ["file_name", "tweet", "zip", "lot", "price", "Année", "select", "Shot year", "shot_year", "id", "width"],
        ["p0.png", "791557233689870338", "01234", "12_34", "3.5", "2001", "a", "1", "2", "A7", "10"],
        ["p1.png", "791557233689870339", "00501", "2024_01", "NaN", "2002", "b", "1", "3", "1e5", "20"],
        ["p2.png", "5", "90210", "1_000", "12345678.25", "2003", "c", "1", "4", "007", "30"],
    ])  # fmt: skip
    index = tmp_path / "index"
    lines: list[str] = []
    with log_to(lines.append):
        report = build_index(tmp_path / "run", image_folder, index, metadata=table)
    assert report.metadata == {"rows": 3, "matched": 3, "listed": 0, "left_out": []}
    assert any("'width' is called 'meta_width'" in line for line in lines)
    assert any("'Shot year' is called 'shot_year_2'" in line for line in lines)
    searcher = Searcher(index)

    def paths_where(where: str) -> list[str]:
        return sorted(each.path[:2] for each in searcher.search([parse_term("red")], 10, where))

    for where, expected in {
        "tweet = 791557233689870338": ["p0"], 'tweet = "791557233689870339"': ["p1"], "zip = 00501": ["p1"],
        "zip != 00501": ["p0", "p2"], 'lot = "2024_01"': ["p1"], 'lot = "202401"': [], "price > 3": ["p0", "p2"],
        "price = 12345678.25": ["p2"], "année >= 2002": ["p1", "p2"], "Année > 2002.5": ["p2"],
        f"{unicodedata.normalize('NFD', 'année')} < 2002": ["p0"], 'select = "b"': ["p1"], "shot_year_2 = 1": ["p0", "p1", "p2"],
        "shot_year > 2": ["p1", "p2"], "meta_id = 007": ["p2"], 'meta_id = "1e5"': ["p1"], "meta_width > 10.5": ["p1", "p2"],
        "width < 99999999999": ["p0", "p1", "p2", "p3"], "width > 10.5": ["p0", "p1", "p2", "p3"], "id < 99999999999999999999999": ["p0", "p1", "p2", "p3"],
        "width = 16.0 and meta_width = 10": ["p0"],
    }.items():  # fmt: skip
        assert paths_where(where) == expected, where
    first = searcher.search([parse_term("red")], 1, "meta_width = 30")[0]
    values = {"tweet": "5", "zip": "90210", "lot": "1_000", "price": 12345678.25, "année": 2003, "select": "c",
              "shot_year_2": 1, "shot_year": 4, "meta_id": "007", "meta_width": 30}  # fmt: skip
    assert json.loads(json.dumps(first.to_dict()["metadata"])) == values
    assert main(["search", str(index), "red", "--where", "meta_width = 30"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "e+" not in shown
    # A table that an older version made, numbers as decimals: it opens, and its columns are made anew.
    import pyarrow as arrow

    image_table = open_image_table(index)
    image_table.drop_columns(["année"])
    image_table.add_columns([arrow.field("année", arrow.float64())])
    assert Searcher(index).metadata["année"]
    build_index(tmp_path / "run", image_folder, index, metadata=table)
    assert [each.metadata["année"] for each in Searcher(index).search([parse_term("red")], 1, "année = 2002")] == [2002]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_is_of_an_image_or_listed(image_folder, tmp_path):
    rows = [
        ["file_name", "year"],
        ["p0.png", "1"],
        ["p9.png", "2"],
        ["", "3"],
        ["p0.png", "4"],
        ["./p0.png", "5"],
        ["p1.png", "6"],
    ]
    metadata = read(image_folder, written(tmp_path / "told.csv", rows))
    assert (metadata.rows, metadata.matched, len(metadata.left_out)) == (6, 2, 4)
    assert [problem.place for problem in metadata.left_out] == [f"told.csv, line {line}" for line in (3, 4, 5, 6)]
    assert (metadata.values["p0.png"], metadata.values["p1.png"]) == ({"year": 1}, {"year": 6})
    with pytest.raises(DataError, match=r"none of its 2 rows names an image.*'images/a\.png'.*such as 'p0\.png'"):
        read(
            image_folder,
            written(tmp_path / "none.csv", [["path", "year"], ["images/a.png", "1"], ["images/b.png", "1"]]),
        )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_that_matches_otherwise_is_used_and_told(tmp_path, form):
    folder = tmp_path / "pictures"
    for name in ("café", "sub/Über", "A", "b", "B", "back\\slash", "plain", " blank"):
        path = folder / f"{unicodedata.normalize(form, name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "café.png")
    names = {
        "./plain.png": "plain.png", other: "café.png", "SUB\\ÜBER.PNG": "sub/Über.png", "a.PNG": "A.png", "b.png": "b.png",
        "back\\slash.png": "back\\slash.png", "B.PNG": None, "x/../A.png": "A.png", "nothing.png": None, "..": None, ".": None,
        " blank.png": " blank.png", "blank.png": None, "  ": None,
    }  # fmt: skip
    table = written(tmp_path / "told.csv", [["image", "row"], *([name, str(n)] for n, name in enumerate(names))])
    metadata = read(folder, table)
    expected = {}
    for number, name in enumerate(names.values()):
        if name:
            expected.setdefault(unicodedata.normalize(form, name), {"row": number})
    assert metadata.values == expected
    messages = {problem.message for problem in metadata.problems if problem.kind == "other name"}
    assert any("1 names differ in its Unicode form" in line for line in messages)
    assert any("names differ in upper and lower case" in line for line in messages)
    assert any("names differ in slashes" in line for line in messages)
    # By absolute paths, and beside the table.
    (folder / "link").symlink_to(folder)
    for path in (str(folder / "plain.png"), str(folder / "link" / "plain.png"), "pictures/plain.png"):
        assert set(read(folder, written(tmp_path / "told.csv", [["image", "row"], [path, "1"]])).values) == {
            "plain.png"
        }


def test_the_column_of_paths_is_the_one_that_names_images(image_folder, tmp_path):
    table = written(
        tmp_path / "told.csv", [["image", "file_name", "year"], ["yes", "p0.png", "1"], ["no", "p1.png", "2"]]
    )
    metadata = read(image_folder, table)
    assert metadata.values["p1.png"] == {"image": "no", "year": 2}


@pytest.mark.slow
@settings(deadline=None, max_examples=150, derandomize=True)
@given(tables())
def test_any_table_is_read_or_refused_in_words(tmp_path_factory, table: Table):
    check_table(table, tmp_path_factory.getbasetemp() / "fuzzed metadata")


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=8), st.from_regex(r"[-+]?[0-9_.eE]{1,20}"))
    )
)
def test_no_two_cells_become_one_and_each_is_given_back(cells):
    from clipvisionalign.search.metadata import _clean_cell, _text

    given_cells = [_clean_cell(cell) for cell in cells]
    kind, _ = infer_column_type(given_cells)
    typed_cells = [cast_cell(cell, kind) for cell in given_cells]
    if kind == "text":
        assert typed_cells == [None if cell is None else _text(cell) for cell in given_cells]
    pairs = {(value, _text(cell)) for value, cell in zip(typed_cells, given_cells, strict=True) if value is not None}
    for value, text in pairs:
        assert kind == "text" or float(text) == value
        if kind == "integer":
            assert str(value) == text


# --- updates -----------------------------------------------------------------------------------------------------------

#: Tables of `--metadata`, by a letter: one of the columns may have the name of a data set's.
TABLES = {
    "A": [["file_name", "year", "title"], ["p0.png", "2001", "a"], ["p1.png", "2002", "b"]],
    "B": [["file_name", "stars"], ["p2.png", "3"]],
    "S": [["file_name", "split"], ["p0.png", "own"]],
    "N": [["file_name", "split", "taken"], ["p0.png", "7", "dawn"]],
}
SPLITS = {f"p{number}.png": split for number, split in enumerate(("train", "dev", "test", "train"))}


def expected_values(calls: list[str]) -> dict[str, dict[str, object]]:
    """By image the values after some updates: those of the last table, and of the data set if one was ever read."""
    table = next((TABLES[call[-1]] for call in reversed(calls) if call[-1] in TABLES), [[]])
    names = table[0][1:]
    values: dict[str, dict[str, object]] = {image: dict.fromkeys(names) for image in SPLITS}
    for image, *cells in table[1:]:
        cast = [int(cell) if cell.isdecimal() else cell for cell in cells]
        values[image].update(zip(names, cast, strict=True))
    # A table's column takes the place of the data set's, which comes back once that is read again.
    tables = [number for number, call in enumerate(calls) if call[-1] in TABLES]
    splits = [number for number in tables if "split" in TABLES[calls[number][-1]][0]]
    later = [number for number in tables if splits and number > splits[-1]]
    since = (later or splits or [0])[0 if later else -1]
    for image, row in values.items():
        if any(call[0] in "cd" for call in calls[since:]) and row.get("split") is None:
            row["split"] = SPLITS[image]
    return values


@pytest.mark.parametrize(
    ("calls", "shards"),
    [
        (["folder A", "captions", "data"], None),
        pytest.param(["captions A", "captions", "folder B", "captions"], 2, marks=pytest.mark.slow),
        pytest.param(["captions S", "captions", "folder", "data A"], 2, marks=pytest.mark.slow),
        pytest.param(["folder S", "captions", "captions B", "folder"], None, marks=pytest.mark.slow),
        pytest.param(["folder", "data", "folder A", "captions"], None, marks=pytest.mark.slow),
        pytest.param(["captions S", "folder A", "captions"], None, marks=pytest.mark.slow),
        pytest.param(["captions", "folder S", "folder A", "data"], 2, marks=pytest.mark.slow),
    ],
)
def test_an_update_keeps_the_columns_of_what_it_does_not_read(tmp_path, tiny_model, image_folder, calls, shards):
    Aligner(tiny_model()).save(tmp_path / "run")
    rows = [[f"pictures/{name}", f"a {name}", split] for name, split in SPLITS.items()]
    data = written(tmp_path / "set.csv", [["image", "caption", "split"], *rows])
    index = tmp_path / "index"
    for number, call in enumerate(calls):
        # A row that is written again keeps them too.
        Image.new("RGB", (16, 16), (0, 90, 30 * number)).save(image_folder / "p0.png")
        table = written(tmp_path / "table.csv", TABLES[call[-1]]) if call[-1] in TABLES else ""
        source = image_folder if call.startswith("folder") else data
        captions = call.startswith("captions")
        build_index(tmp_path / "run", source, index, captions=captions, metadata=table, shards=shards)
        kept = {}
        for part in sorted(index.glob("shard-*")) or [index]:
            for row in open_image_table(part).search().limit(10).to_list():
                kept[row["path"]] = {key: row[key] for key in row if key not in (*BASE_COLUMNS, "_distance")}
        assert kept == expected_values(calls[: number + 1]), call


def test_a_column_of_an_earlier_table_keeps_its_type_beside_that_of_a_data_set(tmp_path, tiny_model, image_folder):
    """Numbers under the name of a data set's texts, and a text under that of a date that cameras write."""
    Aligner(tiny_model()).save(tmp_path / "run")
    rows = [[f"pictures/{name}", f"a {name}", split] for name, split in SPLITS.items()]
    data = written(tmp_path / "set.csv", [["image", "caption", "split"], *rows])
    table, index = written(tmp_path / "table.csv", TABLES["N"]), tmp_path / "index"
    build_index(tmp_path / "run", image_folder, index, metadata=table)
    build_index(tmp_path / "run", data, index, captions=True)
    # And both in one call.
    build_index(tmp_path / "run", data, tmp_path / "at once", captions=True, metadata=table)
    for each in (index, tmp_path / "at once"):
        rows = open_image_table(each).search().limit(10).to_list()
        kept = {row["path"]: (row["split"], row["taken"]) for row in rows}
        assert kept == {"p0.png": (7, "dawn")} | dict.fromkeys(("p1.png", "p2.png", "p3.png"), (None, None))


def test_an_empty_cell_of_a_table_is_filled_by_the_data_set_in_one_call_as_in_two(tmp_path, tiny_model, image_folder):
    Aligner(tiny_model()).save(tmp_path / "run")
    rows = [[f"pictures/{name}", f"a {name}", split] for name, split in SPLITS.items()]
    data = written(tmp_path / "set.csv", [["image", "caption", "split"], *rows])
    table = written(tmp_path / "table.csv", [["file_name", "split"], ["p0.png", "own"], ["p1.png", ""]])
    build_index(tmp_path / "run", data, tmp_path / "one", captions=True, metadata=table)
    build_index(tmp_path / "run", image_folder, tmp_path / "two", metadata=table)
    lines: list[str] = []
    with log_to(lines.append):
        build_index(tmp_path / "run", data, tmp_path / "two", captions=True)
    for index in ("one", "two"):
        kept = {row["path"]: row["split"] for row in open_image_table(tmp_path / index).search().limit(10).to_list()}
        assert kept == SPLITS | {"p0.png": "own"}
    assert not [line for line in lines if "column split" in line]
    # What is dropped is said.
    other = written(tmp_path / "other.csv", TABLES["A"])
    with log_to(lines.append):
        build_index(tmp_path / "run", image_folder, tmp_path / "two", metadata=other)
    (line,) = (line for line in lines if "column split" in line)
    assert line == "note: values of the column split were of an earlier table; they are of a data set once that is read"


def test_the_format_of_an_index_names_its_files_and_columns(tmp_path, tiny_model, image_folder):
    Aligner(tiny_model()).save(tmp_path / "run")
    rows = [[f"pictures/{name}", f"a {name}", split] for name, split in SPLITS.items()]
    data = written(tmp_path / "set.csv", [["image", "caption", "split"], *rows])
    build_index(tmp_path / "run", data, tmp_path / "index", captions=True)
    page = (Path(__file__).parents[1] / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    described = page.partition("## Index")[2].partition("## Report")[0]
    names = [f"{each.name}/" if each.name == "text" else each.name for each in (tmp_path / "index").iterdir()]
    assert [name for name in (*names, *BASE_COLUMNS) if f"`{name}`" not in described] == []
