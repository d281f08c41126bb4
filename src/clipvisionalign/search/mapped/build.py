"""Writing the memory-mapped files of an index from its table of images, or updating them by the difference."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.files import create_array, fsync_paths, new_folder, remove
from clipvisionalign.search.graph import add_rows, unreached_rows
from clipvisionalign.search.hits import HIT_COLUMNS
from clipvisionalign.search.mapped.codes import VectorSettings, int8_scale, make_encoder
from clipvisionalign.search.mapped.files import (
    FILES,
    FOLDER_PREFIX,
    GRAPH_FILE,
    KEY_FILE,
    RECORD_FILE,
    ROW_FILE,
    ROWS_PER_BLOCK,
    UNREACHED_FILE,
    VECTOR_FILE,
    MappedFiles,
    MappedRecord,
    new_graph,
    read_record,
)
from clipvisionalign.search.mapped.recall import choose_expansion
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import TableReader, rows_condition
from clipvisionalign.search.tables import content_checksums, metadata_columns, read_image_table, vector_column

logger = logging.getLogger(__name__)

#: Share of deleted rows from which on the files are rebuilt.
MAX_DELETED = 0.2
#: Rows that are copied at a time.
_ROWS_PER_COPY = 65_536
#: New rows up to which their vectors are read by their ids, and how many at a time.
_MAX_READ_BY_ID, _IDS_PER_READ = 20_000, 1000


@dataclass
class _Plan:
    """Which rows the files are to have.

    Attributes:
        former: The files that they begin with; None to rebuild them.
        ids: The id at each position, -1 for a deleted row.
        contents: The checksum of its content hash.
        new: Ids of the rows behind those of `former`.
    """

    former: MappedFiles | None
    ids: np.ndarray
    contents: np.ndarray
    new: np.ndarray


def build_mapped(
    index: Storage, width: int, settings: VectorSettings, text_vectors: Callable[[], np.ndarray] | None = None
) -> MappedRecord:
    """Write the memory-mapped files of an index, where they are not of its table as it is now.

    Only the process that holds the index's lock may.

    Args:
        index: The storage of the index, a folder.
        width: D, the width of its vectors.
        settings: How the graph keeps vectors.
        text_vectors: Gives vectors of words (M, D), by which the search of the graph is made wide enough.

    Returns:
        The record of the files.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    table, former = read_image_table(index), read_record(index)
    if former is not None and (former.settings, former.width) != (settings, width):
        former = None
    if former is not None and former.version == table.version and _is_whole(index, former, table.count_rows()):
        _remove_others(index, former.folder)
        return former
    columns = tuple(dict.fromkeys((*HIT_COLUMNS, *metadata_columns(table))))
    rows = table.read([*columns, "hash"])
    plan = _plan(index, former, rows)
    folder = index.folder / f"{FOLDER_PREFIX}{uuid.uuid4().hex[:12]}"
    with new_folder(folder):
        record = _write_files(folder, table, plan, settings, width)
        _write_rows(folder / ROW_FILE, rows.select(list(columns)), plan.ids)
        record = replace(record, sizes={name: (folder / name).stat().st_size for name in FILES})
        if plan.former is not None and not len(plan.new):
            record = replace(record, expansion=plan.former.record.expansion, recall=plan.former.record.recall)
        else:
            expansion, recall = choose_expansion(MappedFiles(index, record), text_vectors)
            record = replace(record, expansion=expansion, recall=recall)
        fsync_paths(*(folder / name for name in FILES), folder, index.folder)
    index.write(RECORD_FILE, record.to_json())
    _remove_others(index, record.folder)
    return record


def _is_whole(index: Storage, record: MappedRecord, rows: int) -> bool:
    """Whether files can be opened, and are of so many rows."""
    try:
        return MappedFiles(index, record).record.live == rows
    except (OSError, ValueError, RuntimeError):
        return False


def remove_mapped(index: Storage) -> None:
    """Remove the memory-mapped files of an index that needs none.

    Args:
        index: The storage of the index.
    """
    if index.is_local:
        remove(index.folder / RECORD_FILE)
        _remove_others(index, "")


def _remove_others(index: Storage, folder: str) -> None:
    for path in index.folder.glob(f"{FOLDER_PREFIX}*"):
        if path.name != folder and path.is_dir():
            remove(path)


def _plan(index: Storage, former: MappedRecord | None, rows: Any) -> _Plan:
    """What the files have to become for some rows of the table."""
    ids, contents = np.asarray(rows["id"].to_numpy(), dtype=np.int64), content_checksums(rows["hash"])
    whole = _Plan(None, ids, contents, ids)
    if former is None:
        return whole
    try:
        files = MappedFiles(index, former)
    except (OSError, ValueError, RuntimeError):
        # Of another version of USearch, or damaged: the table has all.
        return whole
    positions = files.positions_of(ids)
    kept = (positions >= 0) & (files.contents[positions] == contents)
    deleted = former.positions - int(kept.sum())
    if deleted > MAX_DELETED * former.positions or len(ids) > 2 * former.positions:
        return whole
    merged = np.full(former.positions, -1, dtype=np.int64)
    merged[positions[kept]] = ids[kept]
    return _Plan(
        files, np.concatenate([merged, ids[~kept]]), np.concatenate([files.contents, contents[~kept]]), ids[~kept]
    )


def _write_files(folder: Path, table: TableReader, plan: _Plan, settings: VectorSettings, width: int) -> MappedRecord:
    """Vectors, keys and graph; the record has neither sizes nor the width of a search."""
    count, former = len(plan.ids), plan.former
    start = 0 if former is None else former.record.positions
    np.save(folder / KEY_FILE, np.stack([plan.ids, plan.contents]))
    if former is not None and not len(plan.new):
        for name in (VECTOR_FILE, GRAPH_FILE, UNREACHED_FILE):
            _link(table_folder(folder, former) / name, folder / name)
        scale = former.record.scale
    else:
        vectors = create_array(folder / VECTOR_FILE, np.float32, (count, width))
        if former is not None:
            for first in range(0, start, _ROWS_PER_COPY):
                vectors[first : min(first + _ROWS_PER_COPY, start)] = former.vectors[first : first + _ROWS_PER_COPY]
        _read_vectors(table, plan.new, vectors[start:])
        scale = int8_scale(vectors, settings) if former is None else former.record.scale
        encoder = make_encoder(settings, width, scale)
        graph = new_graph(encoder)
        if former is not None:
            graph.load(table_folder(folder, former) / GRAPH_FILE)
        add_rows(graph, encoder.encode, vectors, start)
        missed = unreached_rows(graph, encoder.encode, vectors, start)
        np.save(folder / UNREACHED_FILE, missed if former is None else np.concatenate([former.unreached, missed]))
        try:
            graph.save(folder / GRAPH_FILE)
        except RuntimeError as error:
            raise OSError(errno.EIO, f"the graph of vectors: {error}") from error
        vectors.flush()
    return MappedRecord(
        folder.name, table.version, count, int((plan.ids >= 0).sum()), width, settings.code, settings.width, scale,
        expansion=0, recall=0.0, sizes={},
    )  # fmt: skip


def table_folder(folder: Path, files: MappedFiles) -> Path:
    """The folder of other files of the same index.

    Args:
        folder: A folder of files.
        files: The others.

    Returns:
        Their folder.
    """
    return folder.with_name(files.record.folder)


def _read_vectors(table: TableReader, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Read the vectors of some rows, in the order of their ids, (M,), into an array (M, D)."""
    order = np.argsort(ids, kind="stable")
    ordered, read = ids[order], 0
    for rows in _vector_batches(table, ids):
        batch_ids = np.asarray(rows["id"].to_numpy(), dtype=np.int64)
        at = np.minimum(np.searchsorted(ordered, batch_ids), max(0, len(ordered) - 1))
        wanted = ordered[at] == batch_ids
        vectors[order[at[wanted]]] = vector_column(rows)[wanted]
        read += int(wanted.sum())
    if read != len(ids):
        raise OSError(errno.EIO, f"{len(ids) - read:,} rows have no vector: another process may be writing the index")


def _vector_batches(table: TableReader, ids: np.ndarray) -> Iterator[Any]:
    if len(ids) > _MAX_READ_BY_ID or len(ids) == table.count_rows():
        yield from table.batches(["id", "vector"])
        return
    for first in range(0, len(ids), _IDS_PER_READ):
        yield table.read(["id", "vector"], rows_condition(ids[first : first + _IDS_PER_READ]))


def _write_rows(path: Path, rows: Any, ids: np.ndarray) -> None:
    """The columns of a result, a row for each position, empty for deleted ones."""
    import pyarrow as arrow

    table_ids = np.asarray(rows["id"].to_numpy(), dtype=np.int64)
    if not np.array_equal(table_ids, ids):
        order = np.argsort(table_ids, kind="stable")
        at = np.searchsorted(table_ids[order], np.maximum(ids, 0))
        at = order[np.minimum(at, max(0, len(order) - 1))]
        rows = rows.take(arrow.array(at, mask=ids < 0))
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, rows.schema) as writer:
        for first in range(0, len(ids), ROWS_PER_BLOCK):
            writer.write_table(rows.slice(first, ROWS_PER_BLOCK).combine_chunks(), max_chunksize=ROWS_PER_BLOCK)


def _link(source: Path, target: Path) -> None:
    """A second name of a file that nothing changes any more; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
