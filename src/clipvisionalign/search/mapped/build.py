"""Writing the memory-mapped files of an index from its table of images, or updating them by the difference."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.files import create_array, fsync_paths, remove
from clipvisionalign.search.hits import HIT_COLUMNS
from clipvisionalign.search.mapped.codes import Encoder, VectorSettings, int8_scale, make_encoder
from clipvisionalign.search.mapped.files import (
    CENTROID_FILE,
    CODE_FILE,
    KEY_FILE,
    LIST_FILES,
    MAPPED,
    MEMBER_FILE,
    OFFSET_FILE,
    RECORD_FILE,
    ROW_FILE,
    ROWS_PER_BLOCK,
    VECTOR_FILE,
    MappedFiles,
    MappedRecord,
    read_record,
)
from clipvisionalign.search.mapped.recall import choose_reach
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import TableReader, rows_condition
from clipvisionalign.search.tables import content_checksums, metadata_columns, read_image_table, vector_column

logger = logging.getLogger(__name__)

#: Share of deleted rows from which on the files are rebuilt.
MAX_DELETED = 0.2
#: Share of the rows that centroids were made of by which an index may have grown before they are made again.
MAX_GROWTH = 2.0
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
        settings: How the lists keep vectors.
        text_vectors: Gives vectors of words (M, D), by which the search is made wide enough.

    Returns:
        The record of the files.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    table, former = read_image_table(index), read_record(index)
    if former is not None and (former.settings, former.width) != (settings, width):
        former = None
    if former is not None and former.version == table.version and _is_whole(index, former, table.count_rows()):
        MAPPED.remove_others(index, former.folder)
        return former
    columns = tuple(dict.fromkeys((*HIT_COLUMNS, *metadata_columns(table))))
    rows = table.read([*columns, "hash"])
    plan = _plan(index, former, rows)
    with MAPPED.new_folder(index) as folder:
        record = _write_files(folder, table, plan, settings, width)
        _write_rows(folder / ROW_FILE, rows.select(list(columns)), plan.ids)
        record = replace(record, sizes=MAPPED.sizes(folder))
        if plan.former is not None and not len(plan.new):
            record = replace(
                record, reach=plan.former.record.reach, recall=plan.former.record.recall,
                filtered_reach=plan.former.record.filtered_reach,
            )  # fmt: skip
        else:
            record = replace(record, **choose_reach(MappedFiles(index, record), text_vectors)._asdict())
        fsync_paths(*MAPPED.paths(folder).values(), folder, index.folder)
    index.write(RECORD_FILE, record.to_json())
    MAPPED.remove_others(index, record.folder)
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
        MAPPED.remove_others(index)


def _plan(index: Storage, former: MappedRecord | None, rows: Any) -> _Plan:
    """What the files have to become for some rows of the table."""
    ids, contents = np.asarray(rows["id"].to_numpy(), dtype=np.int64), content_checksums(rows["hash"])
    whole = _Plan(None, ids, contents, ids)
    if former is None:
        return whole
    try:
        files = MappedFiles(index, former)
    except (OSError, ValueError, RuntimeError):
        # Damaged: the table has all.
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
    """Vectors, keys and lists; the record has neither sizes nor how far a search reads on."""
    count, former = len(plan.ids), plan.former
    start = 0 if former is None else former.record.positions
    np.save(folder / KEY_FILE, np.stack([plan.ids, plan.contents]))
    live = int((plan.ids >= 0).sum())
    if former is not None and not len(plan.new):
        for name in (VECTOR_FILE, *LIST_FILES):
            _link(table_folder(folder, former) / name, folder / name)
        scale, centroids, clustered = former.record.scale, former.record.centroids, former.record.clustered
    else:
        vectors = create_array(folder / VECTOR_FILE, np.float32, (count, width))
        if former is not None:
            for first in range(0, start, _ROWS_PER_COPY):
                vectors[first : min(first + _ROWS_PER_COPY, start)] = former.vectors[first : first + _ROWS_PER_COPY]
        _read_vectors(table, plan.new, vectors[start:])
        scale = int8_scale(vectors, settings)
        centroids, clustered = _write_lists(
            folder, vectors, plan.ids >= 0, make_encoder(settings, width, scale), former
        )
        vectors.flush()
    return MappedRecord(
        folder.name, table.version, count, live, width, settings.code, settings.width, scale, centroids, clustered,
        reach=0.0, recall=0.0, sizes={},
    )  # fmt: skip


def _write_lists(
    folder: Path, vectors: np.ndarray, live: np.ndarray, encoder: Encoder, former: MappedFiles | None
) -> tuple[int, int]:
    """Centroids, and the vectors of the live rows, list after list; the number of lists, and of the rows that they were
    made of."""
    # Here, as it imports PyTorch, which a search does without.
    from clipvisionalign.search.centroids import (
        SAMPLE_PER_CENTROID,
        centroid_count,
        find_centroids,
        nearest_centroids,
    )

    assigned, rows = np.full(len(vectors), -1, dtype=np.int32), np.flatnonzero(live)
    if former is not None and len(rows) <= MAX_GROWTH * former.record.clustered:
        centroids, clustered = np.array(former.centroids), former.record.clustered
        assigned[: former.record.positions] = former.assigned()
        assigned[~live] = -1
    else:
        # The power of two that is nearest, in ratio, to four times the square root.
        count, clustered = centroid_count(2 * len(rows)), len(rows)
        sample = np.random.default_rng(0).permutation(rows)[: max(1, count * SAMPLE_PER_CENTROID)]
        read = encoder.shorten(np.asarray(vectors[np.sort(sample)]))
        centroids = find_centroids(read, min(count, len(read)), "vectors") if len(read) else read
    pending = rows[assigned[rows] < 0]
    if len(pending):
        lists = nearest_centroids(
            len(pending), lambda first, last: encoder.shorten(vectors[pending[first:last]]), centroids, "vectors"
        )
        for first, nearest in lists:
            assigned[pending[first : first + len(nearest)]] = nearest
    members = rows[np.argsort(assigned[rows], kind="stable")]
    sizes = np.bincount(assigned[rows], minlength=len(centroids))
    np.save(folder / CENTROID_FILE, centroids)
    np.save(folder / MEMBER_FILE, members.astype(np.int32))
    np.save(folder / OFFSET_FILE, np.concatenate([[0], np.cumsum(sizes)]))
    one = encoder.encode(np.zeros((1, vectors.shape[1]), dtype=np.float32))
    codes = create_array(folder / CODE_FILE, one.dtype, (len(members), one.shape[1]))
    slots = np.empty(len(vectors), dtype=np.int64)
    slots[members] = np.arange(len(members))
    for first in range(0, len(rows), _ROWS_PER_COPY):
        block = rows[first : first + _ROWS_PER_COPY]
        codes[slots[block]] = encoder.encode(vectors[block])
    codes.flush()
    return len(centroids), clustered


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
        block = vector_column(rows)[wanted]
        # A vector that is no direction is near to none.
        block[~np.isfinite(block).all(axis=1)] = 0.0
        vectors[order[at[wanted]]] = block
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
