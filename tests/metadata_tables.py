"""Metadata tables as people and programs may write them, for tests and for `benchmarks/fuzz.py`: rows that name images,
or others, or none, with cells of any kind; as CSV, TSV and JSON lines."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: What lies in the folder that the tables are of.
IMAGES = ("a.png", "b.png", "sub/c.png", "ü.png", "[x].png", " d.png ")


@dataclass(frozen=True)
class Table:
    """columns: names; rows: cells, the first the image's; ending: the format."""

    columns: list[str]
    rows: list[list[Any]]
    ending: str


_PLAIN = st.characters(blacklist_categories=("Cs",))
_TEXT = st.one_of(
    st.text(_PLAIN, max_size=12),
    st.from_regex(r"\A[-+]?[0-9]{1,25}(\.[0-9]{0,25})?([eE][-+]?[0-9]{1,4})?\Z"),
    st.sampled_from(
        ["007", "1_000", "NaN", "inf", "N/A", "null", "1e5", "1.10", "1.1", "'", '"', "\u2028", "a\x0bb", "\x85", " x "]
    ),
)
_NAME = st.one_of(
    st.sampled_from(
        [
            *IMAGES,
            "./a.png",
            "SUB\\C.PNG",
            "u\u0308.png",
            "x/../b.png",
            "",
            " ",
            ".",
            "..",
            "/",
            "nothing.png",
            " a.png",
            "d.png",
        ]
    ),
    st.text(_PLAIN, max_size=6),
)
_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)
_COLUMN = st.one_of(
    st.sampled_from(
        [
            "year",
            "Year",
            "Shot year",
            "shot_year",
            "id",
            "width",
            "vector",
            "標題",
            "Année",
            "select",
            "and",
            "1",
            "a.b",
        ]
    ),
    st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=8).filter(str.strip),
)


@st.composite
def tables(draw: Any) -> Table:
    """Any table with a column of paths."""
    ending = draw(st.sampled_from(["csv", "tsv", "jsonl"]))
    image = draw(st.sampled_from(["file_name", "image", "path", "Filename"]))
    others = draw(st.lists(_COLUMN, max_size=4, unique=True))
    columns = [image, *(name for name in others if name.strip().lower() != image.lower())]
    cell = _VALUE if ending == "jsonl" else _TEXT
    first = st.one_of(_NAME, st.none(), st.integers(), _VALUE) if ending == "jsonl" else _NAME
    rows = draw(st.lists(st.tuples(first, *[cell] * (len(columns) - 1)), min_size=1, max_size=8))
    return Table(columns, [list(row) for row in rows], ending)


def _folder(base: Path) -> Path:
    for name in IMAGES:
        path = base / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return base / "pictures"


def check_table(table: Table, base: Path) -> None:
    """Write a table and read it: each row is an image's or listed, or the table is refused by a DataError."""
    from clipvisionalign.data.captioned import DataError
    from clipvisionalign.search.filters import filter_sql
    from clipvisionalign.search.metadata import read_metadata
    from clipvisionalign.search.storage import Storage
    from clipvisionalign.search.tables import BASE_COLUMNS

    storage, path = Storage(_folder(base)), base / f"told.{table.ending}"
    if table.ending == "jsonl":
        lines = [json.dumps(dict(zip(table.columns, row, strict=True))) for row in table.rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if table.ending == "tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writerows([table.columns, *table.rows])
    try:
        metadata = read_metadata(path, storage, storage.list_files(), BASE_COLUMNS)
    except DataError:
        return
    assert metadata.rows == len(table.rows) == metadata.matched + len(metadata.left_out)
    assert metadata.matched == len(metadata.values)
    assert set(metadata.values) <= set(IMAGES)
    assert len(metadata.column_types) == len(table.columns) - 1
    assert not set(metadata.column_types) & set(BASE_COLUMNS)
    for name, kind in metadata.column_types.items():
        filter_sql(f"{name} = 1", {name: kind != "text"})
        for row in metadata.values.values():
            assert row[name] is None or type(row[name]) is {"integer": int, "number": float, "text": str}[kind]
            str(row[name]).encode()
    if table.ending != "jsonl":
        _assert_as_written(table, metadata)


def _assert_as_written(table: Table, metadata: Any) -> None:
    """No value that no cell of its column has: texts to the letter, numbers to the last digit."""
    from clipvisionalign.search.metadata import column_names
    from clipvisionalign.search.tables import BASE_COLUMNS

    new = column_names(table.columns, BASE_COLUMNS)
    for column, name in enumerate(table.columns):
        # A line within a cell ends as any other: how it ended is not kept.
        cells = {re.sub(r"\r\n?", "\n", row[column]).strip() for row in table.rows}
        values = [row[new[name]] for row in metadata.values.values() if row.get(new[name]) is not None]
        for value in values if new[name] in metadata.column_types else []:
            if isinstance(value, str):
                assert value in cells
            else:
                numbers = {Decimal(cell) for cell in cells if re.fullmatch(r"[-0-9.eE+]+", cell) and _is_number(cell)}
                assert Decimal(repr(value)) in numbers


def _is_number(text: str) -> bool:
    try:
        Decimal(text)
    except ArithmeticError:
        return False
    return True
