"""The LanceDB tables of an index: images and captions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.storage import InvalidIndexError, Storage, as_storage
from clipvisionalign.search.table_reader import TableReader, connect, open_reader, rows_condition, try_open_table

if TYPE_CHECKING:
    from clipvisionalign.search.metadata import ColumnType

#: Names of the tables. Indexes on disk have them.
IMAGE_TABLE, CAPTION_TABLE = "pictures", "captions"
#: Columns of every table of images; any others are metadata.
BASE_COLUMNS = ("id", "path", "raw", "size", "mtime_ns", "hash", "width", "height", "thumbnail", "vector")


def open_image_table(index: str | Path | Storage) -> Any:
    """Open the images of an index.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The LanceDB table.

    Raises:
        InvalidIndexError: There is no index, or its table cannot be opened.
        ModuleNotFoundError: LanceDB is not installed.
    """
    read_manifest(index)
    table = try_open_table(as_storage(index), IMAGE_TABLE)
    if table is None:
        raise InvalidIndexError(f"{index}: its table cannot be opened: give the command that made it again")
    return table


def open_caption_table(index: str | Path | Storage) -> Any:
    """Open the captions of an index.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The LanceDB table; None for an index without captions.
    """
    return try_open_table(as_storage(index), CAPTION_TABLE)


def read_image_table(index: str | Path | Storage) -> TableReader:
    """Open the images of an index to read from, without LanceDB's client where pylance is installed.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The reader.

    Raises:
        InvalidIndexError: There is no index, or its table cannot be opened.
        ModuleNotFoundError: Neither pylance nor LanceDB is installed.
    """
    read_manifest(index)
    reader = open_reader(as_storage(index), IMAGE_TABLE)
    if reader is None:
        raise InvalidIndexError(f"{index}: its table cannot be opened: give the command that made it again")
    return reader


def read_caption_table(index: str | Path | Storage) -> TableReader | None:
    """Open the captions of an index to read from.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The reader; None for an index without captions.
    """
    return open_reader(as_storage(index), CAPTION_TABLE)


def create_image_table(index: Storage, width: int) -> Any:
    """Open the images of an index, or create the table where there is none yet.

    Args:
        index: The storage of the index.
        width: D, the width of a vector.

    Returns:
        The LanceDB table.
    """
    import pyarrow as arrow

    columns = [
        ("id", arrow.int64()), ("path", arrow.string()), ("raw", arrow.binary()), ("size", arrow.int64()),
        ("mtime_ns", arrow.int64()), ("hash", arrow.string()), ("width", arrow.int32()), ("height", arrow.int32()),
        ("thumbnail", arrow.binary()), ("vector", _vector_type(width)),
    ]  # fmt: skip
    return _open_or_create_table(index, IMAGE_TABLE, columns)


def create_caption_table(index: Storage, width: int) -> Any:
    """Open the captions of an index, or create the table where there is none yet.

    Args:
        index: The storage of the index.
        width: D, the width of a vector.

    Returns:
        The LanceDB table.
    """
    import pyarrow as arrow

    columns = [
        ("id", arrow.int64()), ("text", arrow.string()), ("path", arrow.string()), ("vector", _vector_type(width)),
    ]  # fmt: skip
    return _open_or_create_table(index, CAPTION_TABLE, columns)


def _open_or_create_table(index: Storage, name: str, columns: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as arrow

    table = try_open_table(index, name)
    return connect(index).create_table(name, schema=arrow.schema(columns)) if table is None else table


def _vector_type(width: int) -> Any:
    import pyarrow as arrow

    return arrow.list_(arrow.float32(), width)


def metadata_columns(table: Any) -> dict[str, ColumnType]:
    """The metadata columns of a table of images.

    Args:
        table: A table of images.

    Returns:
        For each column "integer", "number", "text" or "date".
    """
    import pyarrow as arrow

    def column_type(type_: Any) -> ColumnType:
        if arrow.types.is_timestamp(type_):
            return "date"
        return "number" if arrow.types.is_floating(type_) else "integer" if arrow.types.is_integer(type_) else "text"

    return {each.name: column_type(each.type) for each in table.schema if each.name not in BASE_COLUMNS}


def vector_column(rows: Any) -> np.ndarray:
    """The column "vector" as an array.

    Args:
        rows: An Arrow table of N rows.

    Returns:
        The vectors, (N, D), float32.
    """
    width = rows.schema.field("vector").type.list_size
    values = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(values.reshape(-1, width))


def content_checksums(hashes: Any) -> np.ndarray:
    """Checksums of content hashes: a number that an index gives to a second row belongs to another content.

    Args:
        hashes: An Arrow column of texts.

    Returns:
        (N,), int64.
    """
    return np.array([zlib.crc32((text or "").encode()) for text in hashes.to_pylist()], dtype=np.int64)


def read_columns(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of all rows.

    Args:
        table: A LanceDB table.
        names: The columns.

    Returns:
        One dictionary a row.
    """
    return table.search().select(list(names)).limit(max(1, table.count_rows())).to_arrow().to_pylist()


def update_rows(table: Any, key: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Replace values in existing rows.

    Args:
        table: A LanceDB table.
        key: The column by which rows are matched.
        rows: The new values of the columns `names`, `key` among them.
        names: The columns.
    """
    import pyarrow as arrow

    if rows:
        schema = arrow.schema([table.schema.field(name) for name in names])
        table.merge_insert(key).when_matched_update_all().execute(arrow.Table.from_pylist(list(rows), schema=schema))


def delete_rows(table: Any, ids: Sequence[int]) -> None:
    """Delete rows by their ids.

    Args:
        table: A LanceDB table.
        ids: Values of its column "id".
    """
    for start in range(0, len(ids), 1000):
        table.delete(rows_condition(ids[start : start + 1000]))
