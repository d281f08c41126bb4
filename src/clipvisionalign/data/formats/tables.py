"""Tables with an image and a caption column: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.captions import CAPTION_NAMES
from clipvisionalign.data.names import NameLikeness
from clipvisionalign.data.splits import SPLIT_FILE, SPLIT_RULE, split_word
from clipvisionalign.data.text_files import (
    Decoded,
    decode,
    delimited,
    delimiter_of,
    distinct,
    read_json,
    split_cells,
    split_lines,
)

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
    found = tables_in(source)
    return found[0] if len(found) == 1 else None


def tables_in(source: Path) -> list[Path]:
    """The tables in a folder; none in a file."""
    return sorted(
        path for path in (source.iterdir() if source.is_dir() else ())
        if path.suffix.lower() in TABLE_SUFFIXES and not is_hidden(path) and path.name != SPLIT_FILE and path.is_file()
    )  # fmt: skip


#: Files that lie beside captions and hold none: other annotations of COCO, what `datasets` and `draw-scenes` write.
_NO_CAPTIONS = re.compile(
    r"(instances|person_keypoints|panoptic|stuff|image_info)_.*|dataset_infos?|state|scenes|dataset_dict|(?:tokenizer_)?config"
)


def caption_files(folder: Path) -> list[Path]:
    """Files that may hold captions in a folder and in the folders below it: tables, and JSON files."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))]
    return [
        path for each in folders for path in _listed(each)
        if path.suffix.lower() in (*TABLE_SUFFIXES, ".json") and not is_hidden(path) and path.name != SPLIT_FILE
        and not _is_no_captions(path) and path.is_file()
    ]  # fmt: skip


def _is_no_captions(path: Path) -> bool:
    """A JSON file that is known to hold no captions, or that stands beside an image of its name."""
    if not path.suffix.lower().startswith(".json"):
        return False
    return bool(_NO_CAPTIONS.fullmatch(path.stem)) or any(
        path.with_suffix(ending).exists() for ending in (".jpg", ".jpeg", ".png", ".webp")
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        # Told by whoever lists the images.
        return []


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
    if source.is_dir():
        table.report_unread(caption_files(source))
    return table.finish()


def table_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    """The rows of a table, each with its place; those that cannot be read are left out of it, and listed in `table`. A
    cell that cannot be read is None, and listed."""
    for place, row in _rows(path, table):
        for name, cell in row.items():
            if isinstance(cell, BrokenCell):
                table.report("broken cell", place, f"{name}: {cell}", "warning")
        yield place, {name: None if isinstance(cell, BrokenCell) else cell for name, cell in row.items()}


def _rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    """The rows of a table, with a `BrokenCell` for each cell that cannot be read."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, table)
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
    names = NameLikeness([path.parent, *table.folders])

    def is_row(cells: list[str]) -> bool:
        """A line with a name where the images' names stand, and a caption: as few cells as a row is read with."""
        return 2 <= len(cells) <= len(columns) and image < len(cells) and names.fits(cells[image])

    for record in delimited(lines[first:], delimiter, is_row, first + 1):
        place = f"{path.name}, line {record.line}"
        if not columns:
            columns = distinct([cell.strip() for cell in record.cells])
            named = column_named(columns, IMAGE_COLUMNS)
            image = columns.index(named) if named else 0
            # A quote that is open in the first row of all has this row's name to go by.
            after = next((line for line in lines[record.line :] if line.strip()), "")
            names.add("".join(split_cells(after, delimiter)[0][image : image + 1]))
            continue
        names.add("".join(record.cells[image : image + 1]))
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


def _jsonl_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    for number, line in enumerate(split_lines(read_text(path, table)), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row, repeated = read_json(line)
        except (ValueError, RecursionError) as error:
            table.skip_row("broken row", place, f"not valid JSON: {getattr(error, 'msg', error)}")
            continue
        if repeated:
            table.report(
                "repeated key", place, f"{repeated}; the second is read under the name behind the colon", "warning"
            )
        if isinstance(row, dict):
            yield place, row
        else:
            table.skip_row("broken row", place, f"expected an object, found {type(row).__name__}")


@dataclass(frozen=True)
class BrokenCell:
    """A cell that cannot be read, and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def _parquet_rows(path: Path, table: CaptionTable) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        way_out = 'pip install "clipvisionalign[parquet]"'
        raise DataError(f"{path}: reading Parquet needs pyarrow, which is not installed: {way_out}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Two columns of one name keep their cells each.
            names = distinct(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256):
                columns = [_parquet_cells(batch.column(place)) for place in range(batch.num_columns)]
                for cells in zip(*columns, strict=True):
                    place = f"{path.name}, row {number}"
                    yield place, dict(zip(names, (_mended(cell, place, table) for cell in cells), strict=True))
                    number += 1
    except (OSError, ValueError) as error:
        told = f"not a whole Parquet file, from row {number} on" if number else "not a Parquet file"
        raise DataError(f"{path}: {told}: {error}") from None


def _parquet_cells(column: Any) -> list[Any]:
    """A column's values; where one of them is none that Python has, such as a date out of its range, `BrokenCell`."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, ArithmeticError, KeyError, NotImplementedError):
        return [_parquet_cell(cell) for cell in column]


def _parquet_cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        # A text that is not UTF-8 is whatever other text files are.
        content = cell.as_buffer() if hasattr(cell, "as_buffer") else None
        return decode(content.to_pybytes()) if content is not None else BrokenCell(str(error))
    except (ValueError, OverflowError, ArithmeticError, KeyError, NotImplementedError) as error:
        return BrokenCell(f"{cell.type} that cannot be read: {error}")


def _mended(cell: Any, place: str, table: CaptionTable) -> Any:
    """A cell; where its text had to be mended, that is listed."""
    if not isinstance(cell, Decoded):
        return cell
    table.report("broken encoding", place, cell.mended, "mended")
    return cell.text


def column_named(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The first of `candidates` that is among `names`, whatever its case; None where none is."""
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(str(name).strip().lower(), name)
    return next((folded[candidate] for candidate in candidates if candidate in folded), None)


def caption_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold captions: the first of the usual names, and those that are numbered."""
    names = list(names)
    first = column_named(names, CAPTION_COLUMNS)
    numbered = [name for name in names if _NUMBERED.fullmatch(str(name).strip().lower()) and name != first]
    return tuple([first] if first else []) + tuple(numbered)


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
        captions = caption_columns(names)
        for what, found, usual in (
            ("image", images, IMAGE_COLUMNS),
            ("caption", captions, CAPTION_COLUMNS),
        ):
            if not found:
                there = ", ".join(str(name) for name in names if str(name))
                raise DataError(f"{path}: no {what} column (one of: {', '.join(usual)}); its columns are: {there}")
        if group and group not in names:
            raise DataError(f"{path}: no column '{group}' to group by; its columns are: {', '.join(map(str, names))}")
        return cls(
            images, captions, column_named(names, SPLIT_COLUMNS) or "",
            column_named(names, IDENTITY_COLUMNS) or "", group,
        )  # fmt: skip

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that something is read from."""
        found = (*self.images, *self.captions, self.split, self.identity, self.group)
        return tuple(dict.fromkeys(name for name in found if name))

    def unused(self, names: Iterable[str]) -> list[str]:
        """The columns that nothing is read from."""
        return [str(name) for name in names if name not in self.used and str(name)]


def fill_from_table(
    table: CaptionTable, path: Path, *, below: str = "", split: str = "", group: str = ""
) -> None:  # fmt: skip
    """Put the rows of a table into `table`. Columns are those of all rows together.

    below: a folder's name before all images' names; split: where the rows stand if they do not say themselves.
    """
    rows = list(_rows(path, table))
    table.files_read.add(path)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not rows:
        return
    columns = TableColumns.of(names, path, group)
    if len(columns.images) > 1:
        columns = replace(columns, images=_with_files_first(columns.images, rows, table, below))
    if unused := columns.unused(names):
        table.note(f"{path.name}: columns that are not read: {', '.join(unused)}")
    images = (_image_cell(row, columns.images) for _, row in rows)
    table.expect(_below(below, cell) for cell in images if isinstance(cell, str))
    for place, row in rows:
        broken = next((row[name] for name in columns.used if isinstance(row.get(name), BrokenCell)), None)
        if broken is not None:
            table.skip_row("broken cell", place, str(broken))
            continue
        name, image, wrong = _image_of(_image_cell(row, columns.images))
        if wrong:
            table.skip_row("no image name", place, wrong)
            continue
        told = split_word(_cell(row, columns.split))
        if split and told and told != split:
            raise DataError(
                f"{path}: {place} says the split '{told}', and its folder '{split}': an image stands in one"
            )
        cells = [row[each] for each in columns.captions if row.get(each) not in (None, "")]
        table.add_row(
            _below(below, name), cells[0] if len(cells) == 1 else cells, place,
            split=told or split, identity=_cell(row, columns.identity), group=_cell(row, columns.group),
            image=image, folders=[path.parent, *table.folders] if below and _is_absolute(name) else (),
        )  # fmt: skip


#: Rows by which it is decided which of several columns names the images.
_ASKED_ROWS = 20


def _with_files_first(columns: Sequence[str], rows: Sequence[Row], table: CaptionTable, below: str) -> tuple[str, ...]:
    """Columns that may name images, those with more files to their names first: `image` may be a number, and the file
    stand in `file_name`."""

    def files(column: str) -> int:
        cells = [row[column] for _, row in rows[:_ASKED_ROWS] if row.get(column) not in (None, "")]
        return sum(table.has_file(_below(below, str(each))) if isinstance(each, (str, int)) else 1 for each in cells)

    return tuple(sorted(columns, key=files, reverse=True))


def _is_absolute(name: str) -> bool:
    return bool(re.match(r"[A-Za-z]:[\\/]|[\\/]", name))


def _below(folder: str, name: str) -> str:
    """A name in a folder, from the folder above it; an absolute one stays."""
    return f"{folder}/{name}" if folder and name and not _is_absolute(name) else name


def _cell(row: dict[str, Any], column: str) -> Any:
    """A row's cell in a column that the table has; the column called "", such as pandas' index, is none of them."""
    return row.get(column) if column else None


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
    if len(name) > _LONGEST_NAME or name.startswith("data:image/") or _is_small_image(name):
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


#: How a PNG, JPEG, GIF and a WebP begin in base 64.
_IMAGE_IN_BASE_64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")


def _is_small_image(text: str) -> bool:
    """Whether a text as short as a name spells an image in base 64."""
    return len(text) > 60 and text.startswith(_IMAGE_IN_BASE_64) and _base64(text) is not None


def _base64(text: str) -> bytes | None:
    """The bytes that a text spells in base 64, also as a data URL, in the alphabet of URLs and without padding; None
    where it spells none."""
    plain = re.sub(r"\s", "", text.partition("base64,")[2] or text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None
