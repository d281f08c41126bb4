"""The rows of a table: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.columns import IMAGE_COLUMNS, find_column
from clipvisionalign.data.image_names import ImageNameMatcher
from clipvisionalign.data.json_text import parse_json, unique_names
from clipvisionalign.data.text_files import (
    Decoded,
    decode,
    detect_delimiter,
    read_delimited,
    split_cells,
    split_lines,
)

LocatedRow = tuple[str, dict[str, Any]]


def table_rows(path: Path, table: CaptionTable) -> Iterator[LocatedRow]:
    """The rows of a table; those that cannot be read are left out, and listed.

    Args:
        path: A CSV, TSV, JSONL or Parquet file, by its ending.
        table: Receives the problems.

    Yields:
        The location of each row and its cells by column; a cell that cannot be read is None, and listed.

    Raises:
        DataError: It is no Parquet file, or pyarrow is not installed.
    """
    for location, row in read_table_rows(path, table):
        for name, cell in row.items():
            if isinstance(cell, BrokenCell):
                table.report("broken cell", location, f"{name}: {cell}", "warning")
        yield location, {name: None if isinstance(cell, BrokenCell) else cell for name, cell in row.items()}


def read_table_rows(path: Path, table: CaptionTable) -> Iterator[LocatedRow]:
    """The rows of a table; those that cannot be read are left out, and listed.

    Args:
        path: A CSV, TSV, JSONL or Parquet file, by its ending; any other ending is read as CSV.
        table: Receives the problems.

    Returns:
        The location of each row and its cells by column, with a `BrokenCell` for each cell that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, table)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_rows(path, table)
    return _delimited_rows(path, table, "\t" if suffix == ".tsv" else ",")


def read_text(path: Path, table: CaptionTable) -> str:
    """Read a text file in whatever encoding it is; what had to be mended in it is listed.

    Args:
        path: The file.
        table: Receives the problem.

    Returns:
        The text.

    Raises:
        OSError: It cannot be read.
    """
    decoded = decode(path.read_bytes())
    if decoded.repair:
        table.report("broken encoding", f"{path.name}, line {decoded.line}", decoded.repair, "mended")
    return decoded.text


def _delimited_rows(path: Path, table: CaptionTable, default: str) -> Iterator[LocatedRow]:
    lines = split_lines(read_text(path, table))
    header_index = next((number for number, line in enumerate(lines) if line.strip()), None)
    if header_index is None:
        return
    if re.fullmatch(r"sep=.", lines[header_index].strip()):
        # Excel's own word for the delimiter.
        default, header_index = lines[header_index].strip()[-1], header_index + 1
    delimiter = detect_delimiter(lines[header_index] if header_index < len(lines) else "", _has_columns, default)
    columns: list[str] = []
    image = 0
    names = ImageNameMatcher([path.parent, *table.folders])

    def is_row(cells: list[str]) -> bool:
        """A line with a name where the images' names stand, and a caption: as few cells as a row is read with."""
        return 2 <= len(cells) <= len(columns) and image < len(cells) and names.matches(cells[image])

    for record in read_delimited(lines[header_index:], delimiter, is_row, header_index + 1):
        location = f"{path.name}, line {record.line}"
        if not columns:
            columns = unique_names([cell.strip() for cell in record.cells])
            named = find_column(columns, IMAGE_COLUMNS)
            image = columns.index(named) if named else 0
            # A quote that is open in the first row of all has this row's name to go by.
            after = next((line for line in lines[record.line :] if line.strip()), "")
            names.add("".join(split_cells(after, delimiter)[0][image : image + 1]))
            continue
        names.add("".join(record.cells[image : image + 1]))
        if record.unclosed:
            table.report("open quote", location, "a quote that is never closed, kept as part of the cell", "mended")
        if len(record.cells) > len(columns) and any(cell.strip() for cell in record.cells[len(columns) :]):
            extra = len(record.cells) - len(columns)
            message = f"{extra} more cells than the header has; is a caption with '{delimiter}' not quoted?"
            table.skip_row("wrong columns", location, message)
        elif len(record.cells) < len(columns) and len(record.cells) < 2:
            table.skip_row("wrong columns", location, f"no '{delimiter}' between the cells of '{record.cells[0][:60]}'")
        else:
            yield location, dict(zip(columns, record.cells, strict=False))


def _has_columns(names: Sequence[str]) -> bool:
    return len(names) > 1 and bool(find_column(names, IMAGE_COLUMNS))


def _jsonl_rows(path: Path, table: CaptionTable) -> Iterator[LocatedRow]:
    for line_number, line in enumerate(split_lines(read_text(path, table)), 1):
        if not line.strip():
            continue
        location = f"{path.name}, line {line_number}"
        try:
            row, repeated = parse_json(line)
        except (ValueError, RecursionError) as error:
            table.skip_row("broken row", location, f"not valid JSON: {getattr(error, 'msg', error)}")
            continue
        if repeated:
            table.report(
                "repeated key", location, f"{repeated}; the second is read under the name behind the colon", "warning"
            )
        if isinstance(row, dict):
            yield location, row
        else:
            table.skip_row("broken row", location, f"expected an object, found {type(row).__name__}")


@dataclass(frozen=True)
class BrokenCell:
    """A cell that cannot be read.

    Attributes:
        reason: Why.
    """

    reason: str

    def __str__(self) -> str:
        return self.reason


def _parquet_rows(path: Path, table: CaptionTable) -> Iterator[LocatedRow]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        hint = 'pip install "clipvisionalign[parquet]"'
        raise DataError(f"{path}: reading Parquet needs pyarrow, which is not installed: {hint}") from None
    row_index = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Two columns of one name keep their cells each.
            names = unique_names(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256):
                columns = [_parquet_cells(batch.column(column_index)) for column_index in range(batch.num_columns)]
                for cells in zip(*columns, strict=True):
                    column_index = f"{path.name}, row {row_index}"
                    yield (
                        column_index,
                        dict(zip(names, (_cell_text(cell, column_index, table) for cell in cells), strict=True)),
                    )
                    row_index += 1
    except (OSError, ValueError) as error:
        message = f"not a whole Parquet file, from row {row_index} on" if row_index else "not a Parquet file"
        raise DataError(f"{path}: {message}: {error}") from None


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


def _cell_text(cell: Any, location: str, table: CaptionTable) -> Any:
    """A cell; where its text had to be mended, that is listed."""
    if not isinstance(cell, Decoded):
        return cell
    table.report("broken encoding", location, cell.repair, "mended")
    return cell.text
