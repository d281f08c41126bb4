"""Writing the table of images: changed, new and missing rows, and metadata columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clipvisionalign.images import CameraMetadata
from clipvisionalign.search.broken_files import BROKEN_FILES_NAME, BrokenFiles
from clipvisionalign.search.camera_columns import CameraColumns, camera_values, valued_columns
from clipvisionalign.search.collection import DATA_SET_COLUMNS, Collection
from clipvisionalign.search.diff import Changes, exceeds_drop_limit
from clipvisionalign.search.embed import IndexRow, unpack_camera_metadata
from clipvisionalign.search.index_parts import IndexPart
from clipvisionalign.search.index_report import IndexReport
from clipvisionalign.search.metadata import Metadata
from clipvisionalign.search.storage import FileListing, InvalidIndexError, Storage, decode_path
from clipvisionalign.search.tables import BASE_COLUMNS, delete_rows, metadata_columns, read_columns, update_rows

#: Images that are written at a time.
IMAGES_PER_WRITE = 512
#: Rows whose metadata is updated at a time.
ROWS_PER_UPDATE = 10_000


def sync_metadata_columns(table: Any, collection: Collection, camera: CameraColumns) -> None:
    """Add the columns of the metadata to the table, and drop those that a source which is read again no longer has.

    Columns of a data set change only where one is read, all others only where a table is.

    Args:
        table: The table of images.
        collection: The images and their metadata.
        camera: Which columns the index fills itself, and which an earlier table gave.
    """
    import pyarrow as arrow

    metadata = collection.metadata
    if metadata is None:
        return
    existing = {name: kind for name, kind in metadata_columns(table).items() if name not in camera.owned}
    kept = camera.kept_columns(metadata)
    wanted = {name: kind for name, kind in metadata.column_types.items() if name not in kept}

    def is_read(name: str) -> bool:
        of_data_set = name in DATA_SET_COLUMNS and name not in camera.user_columns
        return collection.data is not None if of_data_set else metadata.table_columns is not None

    obsolete = [
        name for name, kind in existing.items() if (wanted[name] != kind if name in wanted else is_read(name))
    ]  # fmt: skip
    if obsolete:
        table.drop_columns(obsolete)
    types = {"integer": arrow.int64(), "number": arrow.float64(), "text": arrow.string(), "date": arrow.timestamp("s")}
    added = [arrow.field(name, types[kind]) for name, kind in wanted.items() if existing.get(name) != kind]
    if added:
        table.add_columns(added)


def sync_metadata_values(table: Any, metadata: Metadata | None, camera: CameraColumns) -> None:
    """Update the rows whose metadata differs from that of the update.

    Args:
        table: The table of images.
        metadata: The metadata; None leaves the values as they are.
        camera: Which columns an earlier table gave: a data set's value counts where an image has none.
    """
    if metadata is None or not metadata.column_types:
        return
    kept, existing = camera.kept_columns(metadata), metadata_columns(table)
    # A column of another type has no room for a data set's values.
    names = ["raw", *(name for name, kind in metadata.column_types.items() if existing[name] == kind)]
    rows = read_columns(table, ["path", *names])
    new_rows = []
    for row in rows:
        new = {"raw": row["raw"]} | metadata.row_for(row.pop("path"))
        new |= {name: row[name] for name in kept if row.get(name) is not None}
        new_rows.append({name: new[name] for name in names})
    changed = [new for new, row in zip(new_rows, rows, strict=True) if new != row]
    for start in range(0, len(changed), ROWS_PER_UPDATE):
        update_rows(table, "raw", changed[start : start + ROWS_PER_UPDATE], names)


def apply_changes(table: Any, changes: Changes) -> None:
    """Update rows of touched and moved files, and delete surplus rows of a file.

    Args:
        table: The table of images.
        changes: The difference between files and index.
    """
    delete_rows(table, changes.surplus)
    update_rows(table, "id", changes.updated, ("id", "path", "raw", "size", "mtime_ns"))


class _PartWriter:
    """Collects the rows of one part, and writes them at once.

    Args:
        part: The part.
        metadata: Values of the metadata columns; None keeps those of a replaced row.
    """

    def __init__(self, part: IndexPart, metadata: Metadata | None) -> None:
        self.part, self.metadata = part, metadata or Metadata()
        kept = part.camera.kept_columns(self.metadata)
        self.columns = [name for name in self.metadata.column_types if name not in kept]
        self.rows: list[dict[str, Any]] = []
        self.patches: list[tuple[int, str, bytes]] = []

    def add(self, number: int, row: dict[str, Any], camera_metadata: CameraMetadata, patches: bytes) -> None:
        """Collect an encoded image."""
        camera, name = self.part.camera, decode_path(row["raw"])
        camera.count(camera_metadata)
        values = self.metadata.row_for(name)
        self.rows.append(
            row | {"id": number, "path": name} | camera_values(camera_metadata, camera.owned)
            | {column: values[column] for column in self.columns}
        )  # fmt: skip
        self.patches.append((number, row["hash"], patches))

    def flush(self) -> int:
        """Write what was collected; the number of rows."""
        import pyarrow as arrow

        written, table = len(self.rows), self.part.table
        if written:
            camera_names = valued_columns(table, self.rows, self.part.camera.owned)
            names = (*BASE_COLUMNS, *self.columns, *camera_names)
            schema = arrow.schema([table.schema.field(name) for name in names])
            data = arrow.Table.from_pylist(self.rows, schema=schema)
            if self.part.patches:
                self.part.patches.write(self.patches)
            table.merge_insert("raw").when_matched_update_all().when_not_matched_insert_all().execute(data)
            self.rows.clear()
            self.patches.clear()
        return written


def write_rows(
    index: Storage, parts: Sequence[IndexPart], part_of: Callable[[bytes], IndexPart],
    number_of: Callable[[bytes], int], batches: Iterator[list[IndexRow]], metadata: Metadata | None,
    broken: BrokenFiles, report: IndexReport,
) -> Iterator[int]:  # fmt: skip
    """Write encoded images, `IMAGES_PER_WRITE` of a part at a time; a row of the same path is replaced.

    Args:
        index: The storage of the index.
        parts: Its parts.
        part_of: The part of an image, by its path in bytes.
        number_of: The number of an image that has none yet, by its path in bytes.
        batches: Rows as `embed.embed_files` yields them.
        metadata: Values of the metadata columns; None keeps those of a replaced row.
        broken: Receives the files without a vector.
        report: Its `encoded` is counted up.

    Yields:
        The number of images written so far.
    """
    writers = {part.name: _PartWriter(part, metadata) for part in parts}
    for batch in batches:
        for row in batch:
            raw, reason, fault, decoder = (row["raw"], *map(row.pop, ("reason", "fault", "missing_decoder")))
            from_camera, patches = unpack_camera_metadata(row.pop("camera_metadata")), row.pop("patches")
            if reason:
                broken.add(raw, reason, fault, row["size"], row["mtime_ns"], decoder)
                continue
            broken.remove(raw)
            writers[part_of(raw).name].add(number_of(raw), row, from_camera, patches)
        full = [writer for writer in writers.values() if len(writer.rows) >= IMAGES_PER_WRITE]
        if full:
            report.encoded += sum(writer.flush() for writer in full)
            broken.write(index)
            yield report.encoded
    report.encoded += sum(writer.flush() for writer in writers.values())
    broken.write(index)


def drop_missing(
    index: Storage, parts: Sequence[IndexPart], listing: FileListing, broken: BrokenFiles, report: IndexReport,
    allowed: bool,
) -> None:  # fmt: skip
    """Delete the rows of files that are gone or can no longer be decoded, and forget broken files that are gone.

    A row whose file cannot be read at the moment stays.

    Args:
        index: The storage of the index.
        parts: Its parts, with their changes.
        listing: The files of the source.
        broken: Files that could not be read or decoded.
        report: `broken`, `missing_decoders`, `dropped` and `kept` are set.
        allowed: Whether any number of rows may be dropped.

    Raises:
        InvalidIndexError: Too many files can no longer be decoded.
    """
    present_paths = {*(file.raw for file in listing.files), *listing.unreadable, *listing.missing}
    for raw in broken:
        if raw not in present_paths and not listing.inaccessible_parent(raw):
            broken.remove(raw)
    broken.write(index)
    report.broken = sum(raw in present_paths for raw in broken)
    report.missing_decoders = broken.missing_decoders()
    rows = [[row for row in read_columns(part.table, ("id", "raw")) if row["raw"] in broken] for part in parts]
    undecodable = [[row["id"] for row in part_rows if broken.is_undecodable(row["raw"])] for part_rows in rows]
    count, undecodable_count = sum(part.table.count_rows() for part in parts), sum(map(len, undecodable))
    if not allowed and exceeds_drop_limit(undecodable_count, count):
        raise InvalidIndexError(
            f"{index}: the files of {undecodable_count:,} of its {count:,} rows can no longer be decoded "
            f"({index}/{BROKEN_FILES_NAME} has "
            "each): were they damaged? No row was dropped. If they are to be, give --allow-drop"
        )
    for part, part_rows, ids in zip(parts, rows, undecodable, strict=True):
        dropped_ids = {*part.changes.deleted, *ids}
        delete_rows(part.table, sorted(dropped_ids))
        report.dropped += len(dropped_ids)
        report.kept += sum(row["id"] not in dropped_ids for row in part_rows)
