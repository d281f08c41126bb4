"""Tables with an image and a caption column: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.captions import CAPTION_NAMES
from clipvisionalign.data.splits import SPLIT_FILE, SPLIT_RULE, split_word
from clipvisionalign.data.text_files import decode, delimited, delimiter_of, split_lines

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

#: The columns' usual names, the first that is there counts.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "filepath", "image_name", "img", "file")
CAPTION_COLUMNS = CAPTION_NAMES
SPLIT_COLUMNS = ("split", "partition", "set")
IDENTITY_COLUMNS = ("identity", "person_id", "pid")

#: Columns that hold a caption each, such as caption_1 to caption_5.
_NUMBERED = re.compile(r"(captions?|sentences?|texts?|descriptions?|comments?)[ _.-]?\d+")

#: Cells that are longer hold no name.
_LONGEST_NAME = 1024

Row = tuple[str, dict[str, Any]]


def is_hidden(path: Path) -> bool:
    """A file that a system put there, such as the `._x` of macOS, not a person."""
    return path.name.startswith(".")


def _table_file(source: Path) -> Path | None:
    """`source` itself, or the only table in the folder."""
    if source.is_file():
        return source if source.suffix.lower() in TABLE_SUFFIXES else None
    found = [
        path for path in (source.iterdir() if source.is_dir() else ())
        if path.suffix.lower() in TABLE_SUFFIXES and not is_hidden(path) and path.name != SPLIT_FILE and path.is_file()
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def is_table(source: Path) -> bool:
    """One CSV, TSV, JSONL or Parquet file, or a folder with one of them."""
    return _table_file(source) is not None


def read_table(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """A table with an image and a caption column, and perhaps a split and an identity column.

    An image is a path beside the table, or bytes (Parquet: also the struct {bytes, path} that `datasets` writes). A
    caption cell may hold a list of captions. Raises DataError naming the columns that are there where one is missing.
    """
    path = _table_file(source)
    if path is None:
        endings = ", ".join(TABLE_SUFFIXES)
        raise DataError(f"{source}: no single table there (one file with an ending of {endings}); name the file itself")
    folders = [path.parent, path.parent / "images", path.parent / "Images"]
    table = CaptionTable(source, "table", folders, split_rule)
    fill_from_table(table, path, group=group)
    return table.finish()


def table_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    """The rows of a table, each with its place; those that cannot be read are left out of it, and listed in `table`."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_rows(path, table)
    return _delimited_rows(path, table, "\t" if suffix == ".tsv" else ",")


def read_text(path: Path, table: CaptionTable) -> str:
    """A text file in whatever encoding it is; what had to be mended in it is listed in `table`."""
    found = decode(path.read_bytes())
    if found.mended:
        table.report("broken encoding", f"{path.name}, line {found.line}", found.mended, "mended")
    return found.text


def _delimited_rows(path: Path, table: CaptionTable, usual: str) -> Iterator[Row]:
    lines = split_lines(read_text(path, table))
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return
    if re.fullmatch(r"sep=.", lines[first].strip()):
        # Excel's own word for the delimiter.
        usual, first = lines[first].strip()[-1], first + 1
    delimiter = delimiter_of(lines[first] if first < len(lines) else "", _has_columns, usual)
    columns: list[str] = []
    image = 0

    def is_row(cells: list[str]) -> bool:
        """A line with a cell for each column, and a file's name where the images' names stand."""
        return len(cells) == len(columns) and bool(re.search(r"\S\.[A-Za-z0-9]{2,5}\s*$", cells[image]))

    for record in delimited(lines[first:], delimiter, is_row, first + 1):
        place = f"{path.name}, line {record.line}"
        if not columns:
            columns = _distinct([cell.strip() for cell in record.cells])
            named = column_named(columns, IMAGE_COLUMNS)
            image = columns.index(named) if named else 0
            continue
        if record.unclosed:
            table.report("open quote", place, "a quote that is never closed, kept as part of the cell", "mended")
        if len(record.cells) > len(columns) and any(cell.strip() for cell in record.cells[len(columns) :]):
            more = len(record.cells) - len(columns)
            told = f"{more} more cells than the header has; is a caption with '{delimiter}' not quoted?"
            table.skip_row("wrong columns", place, told)
        elif len(record.cells) < len(columns) and len(record.cells) < 2:
            table.skip_row("wrong columns", place, f"no '{delimiter}' between the cells of '{record.cells[0][:60]}'")
        else:
            yield place, dict(zip(columns, record.cells, strict=False))


def _has_columns(names: Sequence[str]) -> bool:
    return len(names) > 1 and bool(column_named(names, IMAGE_COLUMNS))


def _distinct(columns: Sequence[str]) -> list[str]:
    """Columns' names, those that come again numbered: each keeps its cells."""
    found: list[str] = []
    for name in columns:
        again = sum(each == name or each.startswith(f"{name}.") for each in found)
        found.append(f"{name}.{again + 1}" if name in found else name)
    return found


def _jsonl_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    for number, line in enumerate(split_lines(read_text(path, table)), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            table.skip_row("broken row", place, f"not valid JSON: {getattr(error, 'msg', error)}")
            continue
        if isinstance(row, dict):
            yield place, row
        else:
            table.skip_row("broken row", place, f"expected an object, found {type(row).__name__}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        way_out = 'pip install "clipvisionalign[parquet]"'
        raise DataError(f"{path}: reading Parquet needs pyarrow, which is not installed: {way_out}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"{path.name}, row {number}", row
                    number += 1
    except (OSError, ValueError) as error:
        told = f"not a whole Parquet file, from row {number} on" if number else "not a Parquet file"
        raise DataError(f"{path}: {told}: {error}") from None


def column_named(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The first of `candidates` that is among `names`, whatever its case; None where none is."""
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(str(name).strip().lower(), name)
    return next((folded[candidate] for candidate in candidates if candidate in folded), None)


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what; "" for what it has not. captions: each of them holds captions."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    split: str = ""
    identity: str = ""
    group: str = ""

    @classmethod
    def of(cls, names: Sequence[str], path: Path, group: str = "") -> TableColumns:
        """Found by their usual names. Raises DataError naming the columns that are there where one is missing."""
        folded = {str(name).strip().lower(): name for name in reversed(names)}
        images = tuple(folded[each] for each in IMAGE_COLUMNS if each in folded)
        first = column_named(names, CAPTION_COLUMNS)
        numbered = [name for name in names if _NUMBERED.fullmatch(str(name).strip().lower()) and name != first]
        for what, found, usual in (
            ("image", images, IMAGE_COLUMNS),
            ("caption", first or numbered, CAPTION_COLUMNS),
        ):
            if not found:
                there = ", ".join(str(name) for name in names if str(name))
                raise DataError(f"{path}: no {what} column (one of: {', '.join(usual)}); its columns are: {there}")
        if group and group not in names:
            raise DataError(f"{path}: no column '{group}' to group by; its columns are: {', '.join(map(str, names))}")
        return cls(
            images, tuple([first] if first else []) + tuple(numbered), column_named(names, SPLIT_COLUMNS) or "",
            column_named(names, IDENTITY_COLUMNS) or "", group,
        )  # fmt: skip

    def unused(self, names: Iterable[str]) -> list[str]:
        """The columns that nothing is read from."""
        used = {*self.images, *self.captions, self.split, self.identity, self.group}
        return [str(name) for name in names if name not in used and str(name)]


def fill_from_table(
    table: CaptionTable, path: Path, *, below: str = "", split: str = "", group: str = ""
) -> None:  # fmt: skip
    """Put the rows of a table into `table`. Columns are those of all rows together.

    below: a folder's name before all images' names; split: where the rows stand if they do not say themselves.
    """
    rows = list(table_rows(path, table))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not rows:
        return
    columns = TableColumns.of(names, path, group)
    if unused := columns.unused(names):
        table.note(f"{path.name}: columns that are not read: {', '.join(unused)}")
    for place, row in rows:
        name, image, wrong = _image_of(_image_cell(row, columns.images))
        if wrong:
            table.skip_row("no image name", place, wrong)
            continue
        told = split_word(row.get(columns.split))
        if split and told and told != split:
            raise DataError(
                f"{path}: {place} says the split '{told}', and its folder '{split}': an image stands in one"
            )
        cells = [row[each] for each in columns.captions if row.get(each) not in (None, "")]
        table.add_row(
            f"{below}/{name}" if below and name else name, cells[0] if len(cells) == 1 else cells, place,
            split=told or split, identity=row.get(columns.identity), group=row.get(columns.group),
            image=image,
        )  # fmt: skip


def _image_cell(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """The first cell that names or holds an image; a number, only where no other cell does."""
    cells = [row[name] for name in columns if row.get(name) not in (None, "")]
    return next((cell for cell in cells if isinstance(cell, (str, bytes, bytearray, dict))), next(iter(cells), None))


def _image_of(cell: Any) -> tuple[str, bytes | None, str]:
    """An image's name, its bytes where the cell holds them, and what is wrong with the cell."""
    if isinstance(cell, dict):
        content, name = cell.get("bytes"), cell.get("path")
        name = name if isinstance(name, str) else ""
        if isinstance(content, (bytes, bytearray)) and content:
            return name, bytes(content), ""
        return (name, None, "") if name else ("", None, "the image cell is empty")
    if isinstance(cell, (bytes, bytearray)):
        # A short one is a name that was stored as binary.
        text = _path_in(bytes(cell))
        return (text, None, "") if text else ("", bytes(cell), "")
    name = str(cell).strip() if cell is not None else ""
    if len(name) > _LONGEST_NAME or name.startswith("data:image/"):
        content = _base64(name)
        return ("", content, "") if content else ("", None, f"{len(name):,} characters where a name belongs")
    return (name, None, "") if name else ("", None, "the image cell is empty")


def _path_in(content: bytes) -> str:
    """The path that bytes spell; "" where they are an image's own."""
    if len(content) > _LONGEST_NAME:
        return ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() and re.search(r"\.[A-Za-z0-9]{2,5}$", text) else ""


def _base64(text: str) -> bytes | None:
    """The bytes that a text spells in base 64, also as a data URL; None where it spells none."""
    try:
        return base64.b64decode(re.sub(r"\s", "", text.partition("base64,")[2] or text), validate=True) or None
    except (binascii.Error, ValueError):
        return None
