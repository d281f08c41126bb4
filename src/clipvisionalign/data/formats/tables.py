"""Tables with an image and a caption column: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, CaptionTable, DataError, decode_text

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

#: The columns' usual names, the first that is there counts.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "filepath", "image_name", "img", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "description", "sentence", "raw", "title")
SPLIT_COLUMNS = ("split", "partition", "set")
IDENTITY_COLUMNS = ("identity", "person_id", "pid")

_SPLIT_WORDS = {"training": "train", "val": "dev", "valid": "dev", "validation": "dev", "development": "dev"}

Row = tuple[str, dict[str, Any]]


def _table_file(source: Path) -> Path | None:
    """`source` itself, or the only table in the folder."""
    if source.is_file():
        return source if source.suffix.lower() in TABLE_SUFFIXES else None
    found = [path for path in source.iterdir() if path.suffix.lower() in TABLE_SUFFIXES] if source.is_dir() else []
    return found[0] if len(found) == 1 else None


def is_table(source: Path) -> bool:
    """One CSV, TSV, JSONL or Parquet file, or a folder with one of them."""
    return _table_file(source) is not None


def read_table(source: Path) -> CaptionedImages:
    """A table with an image and a caption column, and perhaps a split and an identity column.

    An image is a path beside the table, or bytes (Parquet: also the struct {bytes, path} that `datasets` writes). A
    caption cell may hold a list of captions. Raises DataError naming the columns that are there where one is missing.
    """
    path = _table_file(source)
    if path is None:
        endings = ", ".join(TABLE_SUFFIXES)
        raise DataError(f"{source}: no single table there (one file with an ending of {endings}); name the file itself")
    table = CaptionTable(source, "table")
    fill_from_rows(table, path, table_rows(path, table))
    return table.finish([path.parent, path.parent / "images", path.parent / "Images"])


def table_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    """The rows of a table, each with its place."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".jsonl":
        return _jsonl_rows(path, table)
    return _csv_rows(path, table, "\t" if suffix == ".tsv" else ",")


def _csv_rows(path: Path, table: CaptionTable, delimiter: str) -> Iterator[Row]:
    lines = decode_text(path, table).splitlines(keepends=True)
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        for row in reader:
            place = f"{path.name}, line {reader.line_num}"
            extra = row.pop(None, None)
            if extra:
                told = f"{len(extra)} more cells than the header has; is a caption with '{delimiter}' not quoted?"
                table.report("wrong columns", place, told)
                continue
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def _jsonl_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    for number, line in enumerate(decode_text(path, table).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            table.report("broken row", place, f"not valid JSON: {error.msg}")
            continue
        if isinstance(row, dict):
            yield place, row
        else:
            table.report("broken row", place, f"expected an object, found {type(row).__name__}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        way_out = 'pip install "clipvisionalign[parquet]"'
        raise DataError(f"{path}: reading Parquet needs pyarrow, which is not installed: {way_out}") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            yield f"{path.name}, row {number}", row
            number += 1


def column_named(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The first of `candidates` that is among `names`, whatever its case; None where none is."""
    folded = {name.strip().lower(): name for name in names}
    return next((folded[candidate] for candidate in candidates if candidate in folded), None)


def fill_from_rows(table: CaptionTable, path: Path, rows: Iterable[Row]) -> None:
    """Put rows with an image and a caption column into `table`; images not given as bytes are looked for by name."""
    columns: dict[str, str | None] | None = None
    for place, row in rows:
        if columns is None:
            columns = _find_columns(path, list(row))
        image, caption = row.get(columns["image"] or ""), row.get(columns["caption"] or "")
        name = _place_image(table, image, place)
        if name is None:
            continue
        if columns["split"] and row.get(columns["split"]):
            told = str(row[columns["split"]]).strip().lower()
            table.splits[name] = _SPLIT_WORDS.get(told, told)
        if columns["identity"] and row.get(columns["identity"]) is not None:
            table.identities[name] = str(row[columns["identity"]])
        for text in caption if isinstance(caption, list) else [caption]:
            table.add(name, None if text is None else str(text), place)


def _find_columns(path: Path, names: list[str]) -> dict[str, str | None]:
    found = {
        "image": column_named(names, IMAGE_COLUMNS),
        "caption": column_named(names, CAPTION_COLUMNS),
        "split": column_named(names, SPLIT_COLUMNS),
        "identity": column_named(names, IDENTITY_COLUMNS),
    }
    for column, usual in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        if found[column] is None:
            there = ", ".join(name for name in names if name)
            raise DataError(f"{path}: no {column} column (one of: {', '.join(usual)}); its columns are: {there}")
    return found


def _place_image(table: CaptionTable, image: Any, place: str) -> str | None:
    """The image's name, its bytes put into the table where the cell holds them; None where there is no image."""
    if isinstance(image, dict):
        content, name = image.get("bytes"), image.get("path") or place
        if content is None and image.get("path"):
            return str(name)
        image = content
    elif isinstance(image, bytes):
        name = place
    else:
        name = str(image).strip() if image is not None else ""
        if not name:
            table.report("no image name", place, "the image cell is empty")
            return None
        return name
    if image is None:
        table.report("no image name", place, "the image cell is empty")
        return None
    table.images[name] = bytes(image)
    return str(name)
