"""The rows of a table: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.columns import IMAGE_COLUMNS, column_named
from clipvisionalign.data.names import NameLikeness
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

Row = tuple[str, dict[str, Any]]


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
