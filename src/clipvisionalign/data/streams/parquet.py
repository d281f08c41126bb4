"""Parquet files with a column of images and one of captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.huggingface import SampleColumns
from clipvisionalign.data.streams.samples import Sample

#: Rows of a Parquet file that are in memory at a time.
PARQUET_BATCH_ROWS = 64


def read_parquet(path: Path, start: int) -> Iterator[Sample]:
    """The rows of a Parquet file as samples.

    Args:
        path: The file.
        start: First row, from 0; groups of rows before it are not read.

    Yields:
        The samples, invalid ones too.

    Raises:
        DataError: The file is not whole, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns_of(file, path)
            begin = 0
            for group_index in range(file.num_row_groups):
                size = file.metadata.row_group(group_index).num_rows
                row_index, begin = begin, begin + size
                if begin <= start:
                    continue
                for rows in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group_index], columns=columns.names):
                    for row in rows.to_pylist():
                        if row_index >= start:
                            yield columns.to_sample(row, f"{path.name}, row {row_index}")
                        row_index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None


def _columns_of(file: Any, path: Path) -> SampleColumns:
    import datasets

    return SampleColumns.detect(datasets.Features.from_arrow_schema(file.schema_arrow), str(path))


def parquet_columns(path: Path) -> SampleColumns:
    """The columns of a Parquet file that was read before.

    Args:
        path: The file.

    Returns:
        The columns.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return _columns_of(file, path)
