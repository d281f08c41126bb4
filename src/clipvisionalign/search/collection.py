"""What is to be indexed: a folder of pictures or a data set, with captions and with whatever else is known of each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.formats.tables import IMAGE_COLUMNS, column_named, table_rows
from clipvisionalign.search.files import PictureFile, Place

Value = float | str | None


@dataclass(frozen=True)
class Metadata:
    """What a table says of pictures. numbers: column -> whether it holds numbers; values: picture's path -> its row."""

    numbers: dict[str, bool] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)

    def of(self, name: str) -> dict[str, Value]:
        """A picture's values; None where nothing is known."""
        return dict.fromkeys(self.numbers) | self.values.get(name, {})

    def and_also(self, other: Metadata) -> Metadata:
        """Both; the other's where both have a column."""
        names = [*self.values, *(name for name in other.values if name not in self.values)]
        return Metadata(
            self.numbers | other.numbers,
            {name: self.values.get(name, {}) | other.values.get(name, {}) for name in names},
        )


@dataclass(frozen=True)
class Collection:
    """Pictures to index. captions: by the picture's path, None where none are wanted; metadata: None leaves what an
    index has as it is."""

    place: Place
    files: list[PictureFile]
    captions: dict[str, tuple[str, ...]] | None = None
    metadata: Metadata | None = None


def read_collection(
    source: str | Path, captions: bool = False, layout: str = "auto", metadata: str | Path = "",
    taken: Iterable[str] = (),
) -> Collection:  # fmt: skip
    """The pictures below a folder or URL; or those of a data set, where `source` is a file or its captions are wanted.

    metadata: a table with a column of paths and others, which may not have the names `taken`. Raises DataError,
    FileNotFoundError.
    """
    if captions or Path(source).is_file():
        found = _of_data(read_captioned_images(source, layout))
        found = found if captions else replace(found, captions=None)
    else:
        place = Place(source)
        found = Collection(place, place.pictures())
    if not metadata:
        return found
    more = read_metadata(metadata, found.place, taken)
    return replace(found, metadata=found.metadata.and_also(more) if found.metadata else more)


def _of_data(data: CaptionedImages) -> Collection:
    paths: list[Path] = []
    for row in data:
        if isinstance(row.image, bytes):
            raise DataError(f"{data.source}: pictures inside a table have no place of their own: write them to files")
        paths.append(Path(os.path.abspath(row.image)))
    root = Path(os.path.commonpath([path.parent for path in paths]))
    files, captions = [], {}
    numbers = {"split": False} | ({"identity": False} if any(row.identity for row in data) else {})
    values: dict[str, dict[str, Value]] = {}
    for row, path in zip(data, paths, strict=True):
        try:
            about = path.stat()
            size, changed = about.st_size, about.st_mtime_ns
        except OSError:
            size, changed = -1, 0  # listed as broken when its turn comes
        file = PictureFile(os.fsencode(path.relative_to(root)), size, changed)
        files.append(file)
        captions[file.name] = row.captions
        values[file.name] = {"split": row.split, "identity": row.identity} if len(numbers) > 1 else {"split": row.split}
    return Collection(Place(root), files, captions, Metadata(numbers, values))


def read_metadata(path: str | Path, place: Place, taken: Iterable[str] = ()) -> Metadata:
    """A CSV, TSV, JSONL or Parquet table: one column of paths below `place`, and others.

    A column whose every cell is a number holds numbers, any other holds texts. Of several rows for one picture the
    first counts. Raises DataError: not such a table, no column of paths, a column that an index has itself.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    notes = CaptionTable(source, "metadata")
    rows = list(table_rows(source, notes))
    if notes.problems or not rows:
        told = f"{notes.problems[0]}" if notes.problems else "no row in it"
        raise DataError(f"{source}: {told}")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    image = column_named(columns, IMAGE_COLUMNS)
    if image is None:
        raise DataError(
            f"{source}: no column of pictures' paths ({', '.join(IMAGE_COLUMNS)}); there are: {', '.join(columns)}"
        )
    names = {name: re.sub(r"\W+", "_", name.strip().lower(), flags=re.ASCII).strip("_") for name in columns}
    for name in columns:
        if name != image and (names[name] in set(taken) or not re.match(r"[a-z]", names[name])):
            raise DataError(
                f"{source}: a column cannot be called '{name}': an index has one itself, or no filter can name it"
            )
    cells: dict[str, dict[str, Value]] = {}
    for _, row in rows:
        where = str(row.get(image) or "")
        if os.path.isabs(where) and place.is_local:
            where = os.path.relpath(where, place.folder)
        cells.setdefault(
            os.path.normpath(where), {names[name]: _cell(row.get(name)) for name in columns if name != image}
        )
    numbers = {names[name]: _all_numbers(cells, names[name]) for name in columns if name != image}
    return Metadata(numbers, {where: _typed(row, numbers) for where, row in cells.items()})


def _cell(value: Any) -> Value:
    """A cell as a number or a text; None for an empty one."""
    if value is None or value == "":
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value).strip()


def _all_numbers(cells: Mapping[str, Mapping[str, Value]], column: str) -> bool:
    found = [row[column] for row in cells.values() if row[column] is not None]
    return bool(found) and all(_number(value) is not None for value in found)


def _number(value: Value) -> float | None:
    try:
        found = math.nan if value is None else float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _typed(row: Mapping[str, Value], numbers: Mapping[str, bool]) -> dict[str, Value]:
    def text(value: Value) -> Value:
        return f"{value:g}" if isinstance(value, float) else value

    return {column: _number(value) if numbers[column] else text(value) for column, value in row.items()}
