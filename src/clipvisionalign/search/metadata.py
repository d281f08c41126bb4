"""A metadata table, read as written and matched to images; rows that do not match are listed.

- A row belongs to one image, or is listed with its line and the reason; rows read and rows listed add up to the table.
- A column holds numbers only where each cell is one in the form that a program writes it in, and none loses a digit as
  a number; any other column holds texts: 007, 1_000, 1.10 beside 1.1, an id of 19 digits stay what they are.
- A name is that of an image as it stands there, or one that `data/image_names.py` resolves, which is reported.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import DataError, Problem
from clipvisionalign.data.columns import IMAGE_COLUMNS
from clipvisionalign.data.formats.table_rows import table_rows
from clipvisionalign.data.image_names import NameResolver, clean_name
from clipvisionalign.search.storage import FileListing, Storage, decode_path

CellValue = int | float | str | None
#: What a column holds.
ColumnType = Literal["integer", "number", "text", "date"]

#: The greatest integer up to which every format of numbers, JavaScript's included, represents all integers.
MAX_SAFE_INTEGER = 2**53 - 1
#: Cells of a column of numbers that stand for no number.
MISSING_MARKERS = frozenset({
    "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "inf", "-inf", "+inf", "infinity", "-infinity",
})  # fmt: skip

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
#: As programs write decimals; 12e45 without a sign is rather an id.
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?|[eE][+-][0-9]{1,3})")


@dataclass(frozen=True)
class Metadata:
    """Metadata of images.

    Attributes:
        column_types: What each column holds: "integer", "number" or "text".
        values: By the image's path its values by column.
        rows: Number of rows of the table.
        matched: Number of those that name an image.
        problems: Rows that name none, and what is read otherwise than it is written.
        table_columns: Names of the columns that a user's table gave; None where none was read.
    """

    column_types: dict[str, ColumnType] = field(default_factory=dict)
    values: dict[str, dict[str, CellValue]] = field(default_factory=dict)
    rows: int = 0
    matched: int = 0
    problems: list[Problem] = field(default_factory=list)
    table_columns: tuple[str, ...] | None = None

    def row_for(self, name: str) -> dict[str, CellValue]:
        """The values of an image.

        Args:
            name: Path of the image.

        Returns:
            A value for each column; None where the image has none.
        """
        return dict.fromkeys(self.column_types) | self.values.get(name, {})

    def merge(self, other: Metadata) -> Metadata:
        """Both metadata of the same images.

        Args:
            other: A table's, whose values count where both have one.

        Returns:
            All columns and images.
        """
        types = self.column_types | other.column_types
        # A value of another type has no room in the other one's column.
        own = {name for name, kind in self.column_types.items() if types[name] == kind}
        values = {name: {key: row[key] for key in row if key in own} for name, row in self.values.items()}
        for name, row in other.values.items():
            merged = values.setdefault(name, {})
            merged |= {key: value for key, value in row.items() if value is not None or key not in merged}
        return Metadata(
            types, values,
            self.rows + other.rows, self.matched + other.matched, [*self.problems, *other.problems],
            other.table_columns,
        )  # fmt: skip

    @property
    def left_out(self) -> list[Problem]:
        """The rows that name no image."""
        return [problem for problem in self.problems if problem.rows]


def read_metadata(
    path: str | Path, storage: Storage, listing: FileListing, reserved_names: Iterable[str] = ()
) -> Metadata:
    """Read a CSV, TSV, JSONL or Parquet table with one column of images' paths, and others.

    Of several rows for one image the first counts; the others are problems.

    Args:
        path: The table.
        storage: The folder or URL of the images.
        listing: Its files.
        reserved_names: Names that no column may have; such a column is renamed.

    Returns:
        The metadata.

    Raises:
        DataError: There is no such table, no column of paths, or no row names an image.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    notes = CaptionTable(source, "metadata")
    rows = list(table_rows(source, notes))
    if not rows:
        raise DataError(f"{source}: {notes.problems[0] if notes.problems else 'no row in it'}")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    image_column = _image_column(source, columns, rows, _ImageNames(storage, listing, source))
    names = _ImageNames(storage, listing, source)
    new_names = {name: new for name, new in column_names(columns, reserved_names).items() if name != image_column}
    problems = [*notes.problems, *_rename_problems(source, new_names)]
    first_location: dict[str, str] = {}
    cells: dict[str, dict[str, CellValue]] = {}
    for location, row in rows:
        path_text = _cell_path(row.get(image_column))
        image_path = names.find(path_text)
        if image_path is None:
            is_named = bool(path_text.strip())
            reason = f"no image '{path_text}' below {storage}" if is_named else "the row names no image"
            problems.append(Problem("no such image" if is_named else "no image name", location, reason, rows=1))
        elif image_path in cells:
            reason = f"{first_location[image_path]} has values of {image_path} already: the first row counts"
            problems.append(Problem("repeated row", location, reason, rows=1))
        else:
            first_location[image_path] = location
            cells[image_path] = {new: _clean_cell(row.get(name)) for name, new in new_names.items()}
    row_count = len(rows) + notes.rows
    if not cells:
        raise DataError(
            f"{source}: none of its {row_count:,} rows names an image below {storage}: its column "
            f"'{image_column}' has such as "
            f"'{_cell_path(rows[0][1].get(image_column))}', the images are called such as '{names.example}'"
        )
    column_types: dict[str, ColumnType] = {}
    for new in new_names.values():
        column_types[new], reason = infer_column_type([row[new] for row in cells.values()])
        if reason:
            problems.append(Problem("cells of a column", source.name, f"column '{new}': {reason}", "warning"))
    values = {
        name: {new: cast_cell(value, column_types[new]) for new, value in row.items()} for name, row in cells.items()
    }
    problems += names.problems()
    return Metadata(column_types, values, row_count, len(cells), problems, tuple(column_types))


# --- columns ---------------------------------------------------------------------------------------------------------


def column_name(text: str) -> str:
    """The name of a column as a filter has it: small letters in Unicode's NFC form, underscores for other characters.

    Args:
        text: The name in the table.

    Returns:
        The name; "" where nothing is left of it.

    >>> column_name("Place name"), column_name("Année (fin)"), column_name("2020 sales")
    ('place_name', 'année_fin', '2020_sales')
    """
    folded = unicodedata.normalize("NFC", text.strip().lower())
    cleaned = "".join(each if f"a{each}".isidentifier() else "_" for each in folded)
    return re.sub("_+", "_", cleaned).strip("_")


def column_names(columns: Sequence[str], reserved_names: Iterable[str] = ()) -> dict[str, str]:
    """A different name for each column, in the form that filters take.

    A column that has such a name already keeps it; a reserved one, or one that begins with a digit, gets `meta_` before
    it.

    Args:
        columns: Names in the table.
        reserved_names: Names that an index has itself.

    Returns:
        For each name in the table the new one.

    >>> column_names(["Place", "place", "id"], ["id"])
    {'Place': 'place_2', 'place': 'place', 'id': 'meta_id'}
    """
    reserved = set(reserved_names)

    def preferred(index: int) -> str:
        name = column_name(columns[index]) or f"column_{index + 1}"
        return f"meta_{name}" if name in reserved or not name.isidentifier() else name

    used, names = set(reserved), {}
    for index in sorted(range(len(columns)), key=lambda position: preferred(position) != columns[position]):
        candidate, suffix = preferred(index), 1
        while candidate in used:
            suffix += 1
            candidate = f"{preferred(index)}_{suffix}"
        used.add(candidate)
        names[columns[index]] = candidate
    return {name: names[name] for name in columns}


def _rename_problems(source: Path, names: Mapping[str, str]) -> list[Problem]:
    """Columns whose names differ from the expected ones, in which blanks become underscores."""
    return [
        Problem("renamed column", source.name, f"column '{name}' is called '{new}' in filters", "mended")
        for name, new in names.items() if new != column_name(name)
    ]  # fmt: skip


def _image_column(source: Path, columns: Sequence[str], rows: Sequence[tuple[str, Any]], names: _ImageNames) -> str:
    """Of the columns that may hold paths, the one that names most images."""
    folded = {name.strip().lower(): name for name in reversed(columns)}
    candidates = [folded[name] for name in IMAGE_COLUMNS if name in folded]
    if not candidates:
        raise DataError(
            f"{source}: no column of images' paths ({', '.join(IMAGE_COLUMNS)}); there are: {', '.join(columns)}"
        )
    if len(candidates) == 1:
        return candidates[0]
    return max(candidates, key=lambda name: sum(names.find(_cell_path(row.get(name))) is not None for _, row in rows))


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell_path(value: Any) -> str:
    """The path that a cell holds, "" for none."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return decode_path(value)
    return "" if value is None else str(value)


def _clean_cell(value: Any) -> CellValue:
    """A cell as it is written; None for an empty one, and for a float that is no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, dict)):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = decode_path(value) if isinstance(value, bytes) else str(value).strip()
    # What is no Unicode text, such as half of a pair of surrogates, is written out.
    return text.encode("utf-8", "backslashreplace").decode() or None


def infer_column_type(cells: Iterable[CellValue]) -> tuple[ColumnType, str]:
    """What a column holds: numbers only where each cell is written as programs write them, and none loses a digit.

    Args:
        cells: The cells; None is ignored.

    Returns:
        "integer", "number" or "text", and a note; "" for none.

    >>> infer_column_type([2016, 2018]), infer_column_type(["3.5", "NaN", "7"])[0]
    (('integer', ''), 'number')
    >>> infer_column_type(["007", "7"]), infer_column_type(["1_000"])
    (('text', ''), ('text', ''))
    """
    present = [cell for cell in cells if cell is not None]
    texts = [_text(cell) for cell in present]
    missing = Counter(text for text in texts if text.casefold() in MISSING_MARKERS)
    numbers = [text for text in texts if text.casefold() not in MISSING_MARKERS]
    if not numbers or not all(_INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text) for text in numbers):
        return "text", ""
    integers = [text for text in numbers if _INTEGER.fullmatch(text)]
    long_integer = next((text for text in integers if len(text) > 17 or abs(int(text)) > MAX_SAFE_INTEGER), None)
    decimals = [text for text in numbers if "." in text or "e" in text.lower()]
    lossy_decimal = next((text for text in decimals if not _is_exact(text)), None)
    equal_decimals = _find_equal_decimals(decimals)
    if long_integer or lossy_decimal:
        return "text", f"texts, as {long_integer or lossy_decimal} would lose digits as a number"
    if equal_decimals:
        return "text", f"texts, as {equal_decimals[0]} and {equal_decimals[1]} would be one number"
    message = f"numbers; {missing.total():,} cells ({', '.join(list(missing)[:5])}) are none, and left empty"
    return ("number" if decimals else "integer"), message if missing else ""


def _text(value: int | float | str) -> str:
    """A cell's number in the shortest form that gives it back; a text as it is."""
    return value if isinstance(value, str) else repr(value)


def _is_exact(text: str) -> bool:
    parsed = float(text)
    return math.isfinite(parsed) and Decimal(repr(parsed)) == Decimal(text)


def _find_equal_decimals(decimals: Iterable[str]) -> tuple[str, str] | None:
    """Two ways in which a column writes one number, such as 1.1 and 1.10, which may be versions; None where there are
    none."""
    first_text: dict[float, str] = {}
    for text in decimals:
        if first_text.setdefault(float(text), text) != text:
            return first_text[float(text)], text
    return None


def cast_cell(value: CellValue, column_type: ColumnType) -> CellValue:
    """A cell as its column holds it.

    Args:
        value: The cell.
        column_type: What the column holds.

    Returns:
        A number or a text; None for an empty cell, and for a marker such as "NaN" in a column of numbers.
    """
    if value is None or column_type == "text":
        return None if value is None else _text(value)
    text = _text(value)
    if text.casefold() in MISSING_MARKERS:
        return None
    return int(text) if column_type == "integer" else float(text)


# --- names -----------------------------------------------------------------------------------------------------------


class _ImageNames:
    """The images of a listing, to be found by the names that a table has for them: as they stand there, or as
    `NameResolver` reads them below the place and beside the table. Behind a URL a name is an image's own, or none."""

    def __init__(self, storage: Storage, listing: FileListing, source: Path) -> None:
        self.storage, self.listing, self.table_name = storage, listing, source.name
        self.path_by_name = {file.name: file.name for file in listing.files}
        self.path_by_name |= {decode_path(raw): decode_path(raw) for raw in (*listing.unreadable, *listing.missing)}
        self.path_by_name |= {
            decode_path(raw): decode_path(canonical_raw) for raw, canonical_raw in listing.other_names.items()
        }
        self.example = next(iter(self.path_by_name), "")
        self.resolver = NameResolver([storage.folder, Path(os.path.abspath(source)).parent])
        self.examples_by_difference: dict[str, list[str]] = {}

    def find(self, text: str) -> str | None:
        """The image that a name means; None where there is none, or several.

        Blanks around it count only where an image is called so.
        """
        if text in self.path_by_name:
            return self.path_by_name[text]
        image, difference = self._resolve(text.strip())
        if image is not None and difference:
            self.examples_by_difference.setdefault(difference, []).append(f"'{text}' is {image}")
        return image

    def _resolve(self, text: str) -> tuple[str | None, str]:
        """The image, and in what its name is read otherwise than it is written."""
        if not text:
            return None, ""
        if not self.storage.is_local:
            relative_name = text.removeprefix(f"{self.storage.location}/")
            return self.path_by_name.get(clean_name(relative_name)), ""
        if (clean := clean_name(text)) in self.path_by_name:
            return self.path_by_name[clean], ""
        try:
            resolution = self.resolver.resolve(text)
            file_stat = os.stat(resolution.path)
        except (OSError, ValueError):
            return None, ""
        raw = self.listing.path_by_file_id.get((file_stat.st_dev, file_stat.st_ino))
        return (None, "") if raw is None else (decode_path(raw), resolution.difference)

    def problems(self) -> list[Problem]:
        """One line for each way in which names were other than those of the images."""
        return [
            Problem(
                "other name",
                self.table_name,
                f"{len(names):,} names differ in {difference}, such as {names[0]}",
                "mended",
            )
            for difference, names in self.examples_by_difference.items()
        ]
