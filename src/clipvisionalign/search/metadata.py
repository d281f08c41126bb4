"""What a table says of images: read as it is written, put to the images that it names, and told where it cannot be.

- A row belongs to one image, or is listed with its line and the reason; rows read and rows listed add up to the table.
- A column holds numbers only where each cell is one in the form that a program writes it in, and none loses a digit as
  a number; any other column holds texts: 007, 1_000, 1.10 beside 1.1, an id of 19 digits stay what they are.
- A name is that of an image as it stands there, or one that `data/names.py` reads otherwise, which is told.
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
from clipvisionalign.data.names import NameResolver, clean_name
from clipvisionalign.search.files import Listing, Place, name_of

Value = int | float | str | None
#: What a column holds.
Kind = Literal["integer", "number", "text"]

#: The greatest integer up to which every number format, JavaScript's included, tells all integers apart.
GREATEST = 2**53 - 1
#: Cells of a column of numbers that stand for no number.
MISSING = frozenset({
    "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "inf", "-inf", "+inf", "infinity", "-infinity",
})  # fmt: skip

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
#: As programs write decimals; 12e45 without a sign is rather an id.
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?|[eE][+-][0-9]{1,3})")


@dataclass(frozen=True)
class Metadata:
    """What is known of images. kinds: column -> what it holds; values: image's path -> its row.

    rows, matched: rows of the table, and those of them that an image has; problems: the rows that none has, and what
    was taken otherwise than it is written.
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    rows: int = 0
    matched: int = 0
    problems: list[Problem] = field(default_factory=list)

    def of(self, name: str) -> dict[str, Value]:
        """An image's values; None where nothing is known."""
        return dict.fromkeys(self.kinds) | self.values.get(name, {})

    def and_also(self, other: Metadata) -> Metadata:
        """Both; the other's where both have a column."""
        names = [*self.values, *(name for name in other.values if name not in self.values)]
        return Metadata(
            self.kinds | other.kinds,
            {name: self.values.get(name, {}) | other.values.get(name, {}) for name in names},
            self.rows + other.rows, self.matched + other.matched, [*self.problems, *other.problems],
        )  # fmt: skip

    @property
    def left_out(self) -> list[Problem]:
        """The rows that no image has."""
        return [problem for problem in self.problems if problem.rows]


def read_metadata(path: str | Path, place: Place, listing: Listing, taken: Iterable[str] = ()) -> Metadata:
    """A CSV, TSV, JSONL or Parquet table: one column of images' paths below `place`, and others.

    taken: names that no column may have; such a column is renamed. Of several rows for one image the first counts.
    Raises DataError: no such table, no column of paths, no row that names an image.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    notes = CaptionTable(source, "metadata")
    rows = list(table_rows(source, notes))
    if not rows:
        raise DataError(f"{source}: {notes.problems[0] if notes.problems else 'no row in it'}")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    image = _image_column(source, columns, rows, _Names(place, listing, source))
    names = _Names(place, listing, source)
    own = {name: new for name, new in column_names(columns, taken).items() if name != image}
    problems = [*notes.problems, *_renamed(source, own)]
    first: dict[str, str] = {}
    cells: dict[str, dict[str, Value]] = {}
    for where, row in rows:
        told = _path_in(row.get(image))
        found = names.find(told)
        if found is None:
            is_named = bool(told.strip())
            reason = f"no image '{told}' below {place}" if is_named else "the row names no image"
            problems.append(Problem("no such image" if is_named else "no image name", where, reason, rows=1))
        elif found in cells:
            reason = f"{first[found]} has told of {found} already: the first row counts"
            problems.append(Problem("repeated row", where, reason, rows=1))
        else:
            first[found] = where
            cells[found] = {new: _cell(row.get(name)) for name, new in own.items()}
    every = len(rows) + notes.rows
    if not cells:
        raise DataError(
            f"{source}: none of its {every:,} rows names an image below {place}: its column '{image}' has such as "
            f"'{_path_in(rows[0][1].get(image))}', the images are called such as '{names.example}'"
        )
    kinds: dict[str, Kind] = {}
    for new in own.values():
        kinds[new], reason = kind_of([row[new] for row in cells.values()])
        if reason:
            problems.append(Problem("cells of a column", source.name, f"column '{new}': {reason}", "warning"))
    values = {name: {new: typed(value, kinds[new]) for new, value in row.items()} for name, row in cells.items()}
    return Metadata(kinds, values, every, len(cells), [*problems, *names.told()])


# --- columns ---------------------------------------------------------------------------------------------------------


def column_name(text: str) -> str:
    """A column's name as a filter has it: lower case, in Unicode's NFC form, anything but letters and digits a line.

    >>> column_name("Place name"), column_name("Année (fin)"), column_name("2020 sales")
    ('place_name', 'année_fin', '2020_sales')
    """
    folded = unicodedata.normalize("NFC", text.strip().lower())
    kept = "".join(each if f"a{each}".isidentifier() else "_" for each in folded)
    return re.sub("_+", "_", kept).strip("_")


def column_names(columns: Sequence[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """For each column a name of its own that a filter can have. A column whose name is one already keeps it; one that
    an index has itself (`taken`), or that begins with a digit, gets `meta_` before it."""
    reserved = set(taken)

    def wanted(place: int) -> str:
        name = column_name(columns[place]) or f"column_{place + 1}"
        return f"meta_{name}" if name in reserved or not name.isidentifier() else name

    used, names = set(reserved), {}
    for place in sorted(range(len(columns)), key=lambda place: wanted(place) != columns[place]):
        free, number = wanted(place), 1
        while free in used:
            number += 1
            free = f"{wanted(place)}_{number}"
        used.add(free)
        names[columns[place]] = free
    return {name: names[name] for name in columns}


def _renamed(source: Path, names: Mapping[str, str]) -> list[Problem]:
    """Columns that are called otherwise than anybody would think who knows that blanks become lines."""
    return [
        Problem("renamed column", source.name, f"column '{name}' is called '{new}' in filters", "mended")
        for name, new in names.items() if new != column_name(name)
    ]  # fmt: skip


def _image_column(source: Path, columns: Sequence[str], rows: Sequence[tuple[str, Any]], names: _Names) -> str:
    """Of the columns that may hold paths, the one that names most images."""
    folded = {name.strip().lower(): name for name in reversed(columns)}
    usual = [folded[name] for name in IMAGE_COLUMNS if name in folded]
    if not usual:
        raise DataError(
            f"{source}: no column of images' paths ({', '.join(IMAGE_COLUMNS)}); there are: {', '.join(columns)}"
        )
    if len(usual) == 1:
        return usual[0]
    return max(usual, key=lambda name: sum(names.find(_path_in(row.get(name))) is not None for _, row in rows))


# --- cells -----------------------------------------------------------------------------------------------------------


def _path_in(value: Any) -> str:
    """The path that a cell holds, "" for none."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return name_of(value)
    return "" if value is None else str(value)


def _cell(value: Any) -> Value:
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
        text = name_of(value) if isinstance(value, bytes) else str(value).strip()
    # What is no Unicode text, such as half of a pair of surrogates, is written out.
    return text.encode("utf-8", "backslashreplace").decode() or None


def kind_of(cells: Iterable[Value]) -> tuple[Kind, str]:
    """What a column holds, and what is to be told of it, "" for nothing.

    >>> kind_of([2016, 2018]), kind_of(["3.5", "NaN", "7"])[0], kind_of(["007", "7"]), kind_of(["1_000"])
    (('integer', ''), 'number', ('text', ''), ('text', ''))
    """
    given = [cell for cell in cells if cell is not None]
    texts = [_text(cell) for cell in given]
    missing = Counter(text for text in texts if text.casefold() in MISSING)
    numbers = [text for text in texts if text.casefold() not in MISSING]
    if not numbers or not all(_INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text) for text in numbers):
        return "text", ""
    whole = [text for text in numbers if _INTEGER.fullmatch(text)]
    long = next((text for text in whole if len(text) > 17 or abs(int(text)) > GREATEST), None)
    decimals = [text for text in numbers if "." in text or "e" in text.lower()]
    lossy = next((text for text in decimals if not _is_exact(text)), None)
    equal = _two_of_one_number(decimals)
    if long or lossy:
        return "text", f"texts, as {long or lossy} would lose digits as a number"
    if equal:
        return "text", f"texts, as {equal[0]} and {equal[1]} would be one number"
    told = f"numbers; {missing.total():,} cells ({', '.join(list(missing)[:5])}) are none, and left empty"
    return ("number" if decimals else "integer"), told if missing else ""


def _text(value: int | float | str) -> str:
    """A cell's number in the shortest form that gives it back; a text as it is."""
    return value if isinstance(value, str) else repr(value)


def _is_exact(text: str) -> bool:
    found = float(text)
    return math.isfinite(found) and Decimal(repr(found)) == Decimal(text)


def _two_of_one_number(decimals: Iterable[str]) -> tuple[str, str] | None:
    """Two ways in which a column writes one number, such as 1.1 and 1.10, which may be versions; None where there are
    none."""
    first: dict[float, str] = {}
    for text in decimals:
        if first.setdefault(float(text), text) != text:
            return first[float(text)], text
    return None


def typed(value: Value, kind: Kind) -> Value:
    """A cell as its column holds it."""
    if value is None or kind == "text":
        return None if value is None else _text(value)
    text = _text(value)
    if text.casefold() in MISSING:
        return None
    return int(text) if kind == "integer" else float(text)


# --- names -----------------------------------------------------------------------------------------------------------


class _Names:
    """The images of a listing, to be found by the names that a table has for them: as they stand there, or as
    `NameResolver` reads them below the place and beside the table. Behind a URL a name is an image's own, or none."""

    def __init__(self, place: Place, listing: Listing, source: Path) -> None:
        self.place, self.listing, self.table = place, listing, source.name
        self.images = {file.name: file.name for file in listing.files}
        self.images |= {name_of(raw): name_of(raw) for raw in (*listing.unreadable, *listing.missing)}
        self.images |= {name_of(raw): name_of(first) for raw, first in listing.other_names.items()}
        self.example = next(iter(self.images), "")
        self.resolver = NameResolver([place.folder, Path(os.path.abspath(source)).parent])
        self.used: dict[str, list[str]] = {}

    def find(self, text: str) -> str | None:
        """The image that a name means; None where there is none, or several. Blanks around it count only where an image
        is called so."""
        if text in self.images:
            return self.images[text]
        image, how = self._otherwise(text.strip())
        if image is not None and how:
            self.used.setdefault(how, []).append(f"'{text}' is {image}")
        return image

    def _otherwise(self, text: str) -> tuple[str | None, str]:
        """The image, and in what its name is read otherwise than it is written."""
        if not text:
            return None, ""
        if not self.place.is_local:
            below = text.removeprefix(f"{self.place.location}/")
            return self.images.get(clean_name(below)), ""
        if (clean := clean_name(text)) in self.images:
            return self.images[clean], ""
        try:
            found = self.resolver.resolve(text)
            about = os.stat(found.path)
        except (OSError, ValueError):
            return None, ""
        raw = self.listing.known.get((about.st_dev, about.st_ino))
        return (None, "") if raw is None else (name_of(raw), found.how)

    def told(self) -> list[Problem]:
        """One line for each way in which names were other than those of the images."""
        return [
            Problem("other name", self.table, f"{len(names):,} names differ in {how}, such as {names[0]}", "mended")
            for how, names in self.used.items()
        ]  # fmt: skip
