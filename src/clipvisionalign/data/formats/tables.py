"""Tables with an image and a caption column: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.columns import TableColumns
from clipvisionalign.data.formats.table_rows import BrokenCell, LocatedRow, read_table_rows
from clipvisionalign.data.split_file import SPLIT_FILE
from clipvisionalign.data.splits import SPLIT_RULE, canonical_split

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

#: Cells that are longer hold no name.
_LONGEST_NAME = 1024


def is_hidden(path: Path) -> bool:
    """Whether a file was put there by a system, such as the `._x` of macOS.

    Args:
        path: The file.

    Returns:
        Whether its name begins with a dot.
    """
    return path.name.startswith(".")


def _table_file(source: Path) -> Path | None:
    """`source` itself, or the only table in the folder."""
    if source.is_file():
        return source if source.suffix.lower() in TABLE_SUFFIXES else None
    tables = tables_in(source)
    return tables[0] if len(tables) == 1 else None


def tables_in(source: Path) -> list[Path]:
    """The tables in a folder itself, without hidden files and the file of splits.

    Args:
        source: A folder; a file has none.

    Returns:
        Their paths, sorted.
    """
    return sorted(
        path for path in (source.iterdir() if source.is_dir() else ())
        if path.suffix.lower() in TABLE_SUFFIXES and not is_hidden(path) and path.name != SPLIT_FILE and path.is_file()
    )  # fmt: skip


#: Files that lie beside captions and hold none: other annotations of COCO, what `datasets` and `draw-scenes` write.
_NO_CAPTIONS = re.compile(
    r"(instances|person_keypoints|panoptic|stuff|image_info)_.*|dataset_infos?|state|scenes|dataset_dict|(?:tokenizer_)?config"
)


def caption_files(folder: Path) -> list[Path]:
    """Files that may hold captions in a folder and in the folders directly below it: tables, and JSON files.

    Args:
        folder: The folder.

    Returns:
        Their paths, without files that are known to hold none, or that stand beside an image of their name.
    """
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))]
    return [
        path for each in folders for path in _list_folder(each)
        if path.suffix.lower() in (*TABLE_SUFFIXES, ".json") and not is_hidden(path) and path.name != SPLIT_FILE
        and not _has_no_captions(path) and path.is_file()
    ]  # fmt: skip


def _has_no_captions(path: Path) -> bool:
    """A JSON file that holds no captions, or that stands beside an image of its name."""
    if not path.suffix.lower().startswith(".json"):
        return False
    return bool(_NO_CAPTIONS.fullmatch(path.stem)) or any(
        path.with_suffix(ending).exists() for ending in (".jpg", ".jpeg", ".png", ".webp")
    )


def _list_folder(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        # Reported by the lister of images.
        return []


def is_table(source: Path) -> bool:
    """Whether it is one CSV, TSV, JSONL or Parquet file, or a folder with one of them.

    Args:
        source: A folder or a file.

    Returns:
        Whether it is.
    """
    return _table_file(source) is not None


def read_table(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read a table with an image and a caption column, and perhaps a split and an identity column.

    An image is a path beside the table, or bytes (Parquet: also the struct {bytes, path} that `datasets` writes). A
    caption cell may hold a list of captions.

    Args:
        source: The table, or a folder with one table.
        group: A column: without splits of its own, all images with one value of it are in one split. "" for none.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: There is no single table, it lacks a column, or no row of it can be used.
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


def fill_from_table(
    table: CaptionTable, path: Path, *, subfolder: str = "", split: str = "", group: str = ""
) -> None:  # fmt: skip
    """Put the rows of a table into a `CaptionTable`; columns are those of all rows together.

    Args:
        table: Receives the rows, and the rows that are left out.
        path: The table.
        subfolder: Name of a folder to put before the names of images; "" for none.
        split: Split of the rows; "" for that of a column.
        group: Column whose values are kept within one split; "" for none.

    Raises:
        DataError: A column is missing, or a row contradicts `split` or another row.
    """
    rows = list(read_table_rows(path, table))
    table.files_read.add(path)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not rows:
        return
    columns = TableColumns.detect(names, path, group)
    if len(columns.images) > 1:
        columns = replace(columns, images=_order_image_columns(columns.images, rows, table, subfolder))
    if unused := columns.unused(names):
        table.note(f"{path.name}: columns that are not read: {', '.join(unused)}")
    images = (_image_cell(row, columns.images) for _, row in rows)
    table.expect_names(_join_folder(subfolder, cell) for cell in images if isinstance(cell, str))
    for location, row in rows:
        broken = next((row[name] for name in columns.used if isinstance(row.get(name), BrokenCell)), None)
        if broken is not None:
            table.skip_row("broken cell", location, str(broken))
            continue
        name, image, error = _parse_image_cell(_image_cell(row, columns.images))
        if error:
            table.skip_row("no image name", location, error)
            continue
        row_split = canonical_split(_cell(row, columns.split))
        if split and row_split and row_split != split:
            raise DataError(
                f"{path}: {location} has the split '{row_split}', and its folder is '{split}': an image has one"
            )
        cells = [row[each] for each in columns.captions if row.get(each) not in (None, "")]
        table.add_row(
            _join_folder(subfolder, name), cells[0] if len(cells) == 1 else cells, location,
            split=row_split or split, identity=_cell(row, columns.identity), group=_cell(row, columns.group),
            image=image, folders=[path.parent, *table.folders] if subfolder and _is_absolute(name) else (),
        )  # fmt: skip


#: Rows by which it is decided which of several columns names the images.
_PROBED_ROWS = 20


def _order_image_columns(
    columns: Sequence[str], rows: Sequence[LocatedRow], table: CaptionTable, subfolder: str
) -> tuple[str, ...]:
    """Columns that may name images, those with more files to their names first: `image` may be a number, and the file
    stand in `file_name`."""

    def file_count(column: str) -> int:
        cells = [row[column] for _, row in rows[:_PROBED_ROWS] if row.get(column) not in (None, "")]
        return sum(
            table.has_file(_join_folder(subfolder, str(each))) if isinstance(each, (str, int)) else 1 for each in cells
        )

    return tuple(sorted(columns, key=file_count, reverse=True))


def _is_absolute(name: str) -> bool:
    return bool(re.match(r"[A-Za-z]:[\\/]|[\\/]", name))


def _join_folder(folder: str, name: str) -> str:
    """A name in a folder, from the folder above it; an absolute one stays."""
    return f"{folder}/{name}" if folder and name and not _is_absolute(name) else name


def _cell(row: dict[str, Any], column: str) -> Any:
    """A row's cell in a column that the table has; the column called "", such as pandas' index, is none of them."""
    return row.get(column) if column else None


def _image_cell(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """The first cell that names or holds an image; a number, only where no other cell does."""
    cells = [row[name] for name in columns if row.get(name) not in (None, "")]
    return next((cell for cell in cells if isinstance(cell, (str, bytes, bytearray, dict))), next(iter(cells), None))


def _parse_image_cell(cell: Any) -> tuple[str, bytes | None, str]:
    """An image's name, its bytes where the cell holds them, and what is wrong with the cell."""
    if isinstance(cell, dict):
        content, name = cell.get("bytes"), cell.get("path")
        name = name if isinstance(name, str) else ""
        if isinstance(content, (bytes, bytearray)) and content:
            return name, bytes(content), ""
        return (name, None, "") if name else ("", None, "the image cell is empty")
    if isinstance(cell, (bytes, bytearray)):
        # A short one is a name that was stored as binary.
        text = _path_from_bytes(bytes(cell))
        return (text, None, "") if text else ("", bytes(cell), "")
    name = str(cell).strip() if cell is not None else ""
    if len(name) > _LONGEST_NAME or name.startswith("data:image/") or _is_base64_image(name):
        content = _decode_base64(name)
        return ("", content, "") if content else ("", None, f"{len(name):,} characters where a name belongs")
    return (name, None, "") if name else ("", None, "the image cell is empty")


def _path_from_bytes(content: bytes) -> str:
    """The path that bytes spell; "" where they are an image's own."""
    if len(content) > _LONGEST_NAME:
        return ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() and re.search(r"\.[A-Za-z0-9]{2,5}$", text) else ""


#: How a PNG, JPEG, GIF and a WebP begin in base 64.
_BASE64_IMAGE_PREFIXES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")


def _is_base64_image(text: str) -> bool:
    """Whether a text as short as a name spells an image in base 64."""
    return len(text) > 60 and text.startswith(_BASE64_IMAGE_PREFIXES) and _decode_base64(text) is not None


def _decode_base64(text: str) -> bytes | None:
    """The bytes that a text spells in base 64, also as a data URL, in the alphabet of URLs and without padding; None
    where it spells none."""
    plain = re.sub(r"\s", "", text.partition("base64,")[2] or text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None
