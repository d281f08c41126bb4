"""Writing the table of images: changed, new and missing rows, and metadata columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clipvisionalign.search.broken_files import BROKEN_FILES_NAME, BrokenFiles
from clipvisionalign.search.camera_columns import CameraColumns, camera_values, valued_columns
from clipvisionalign.search.collection import Collection
from clipvisionalign.search.diff import Changes, exceeds_drop_limit
from clipvisionalign.search.embed import IndexRow, unpack_camera_metadata
from clipvisionalign.search.index_report import IndexReport
from clipvisionalign.search.metadata import Metadata
from clipvisionalign.search.patches import PatchWriter
from clipvisionalign.search.storage import FileListing, InvalidIndexError, Storage, decode_path
from clipvisionalign.search.tables import BASE_COLUMNS, delete_rows, metadata_columns, read_columns, update_rows

#: Images that are written at a time.
IMAGES_PER_WRITE = 512
#: Rows whose metadata is updated at a time.
ROWS_PER_UPDATE = 10_000


def sync_metadata_columns(table: Any, metadata: Metadata | None, owned: Sequence[str] = ()) -> None:
    """Add the columns of the metadata to the table, and drop metadata columns that it does not have.

    Args:
        table: The table of images.
        metadata: The metadata; None leaves the columns as they are.
        owned: Columns that the index fills itself, which are none of the metadata.
    """
    import pyarrow as arrow

    if metadata is None:
        return
    existing = {name: kind for name, kind in metadata_columns(table).items() if name not in owned}
    obsolete = [name for name, kind in existing.items() if metadata.column_types.get(name) != kind]
    if obsolete:
        table.drop_columns(obsolete)
    types = {"integer": arrow.int64(), "number": arrow.float64(), "text": arrow.string(), "date": arrow.timestamp("s")}
    added = [
        arrow.field(name, types[kind]) for name, kind in metadata.column_types.items() if existing.get(name) != kind
    ]
    if added:
        table.add_columns(added)


def sync_metadata_values(table: Any, collection: Collection) -> None:
    """Update the rows whose metadata differs from that of the collection.

    Args:
        table: The table of images.
        collection: The images and their metadata.
    """
    metadata = collection.metadata
    if metadata is None or not metadata.column_types:
        return
    names = ["raw", *metadata.column_types]
    rows = read_columns(table, ["path", *names])
    new_rows = [{"raw": row["raw"]} | metadata.row_for(row.pop("path")) for row in rows]
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


def write_rows(
    table: Any, index: Storage, batches: Iterator[list[IndexRow]], metadata: Metadata | None,
    broken: BrokenFiles, report: IndexReport, last_id: int, camera: CameraColumns, patches: PatchWriter | None = None,
) -> Iterator[int]:  # fmt: skip
    """Write encoded images, `IMAGES_PER_WRITE` at a time; a row of the same path is replaced.

    Args:
        table: The table of images.
        index: The storage of the index.
        batches: Rows as `embed.embed_files` yields them.
        metadata: Values of the metadata columns; None keeps those of a replaced row.
        broken: Receives the files without a vector.
        report: Its `encoded` is counted up.
        last_id: The greatest id of the table.
        camera: The columns that the images' own metadata fills.
        patches: Receives the patches of the images; None where none are kept.

    Yields:
        The number of images written so far.
    """
    import pyarrow as arrow

    rows: list[dict[str, Any]] = []
    packed: list[tuple[int, str, bytes]] = []

    def flush() -> int:
        if rows:
            camera_names = valued_columns(table, rows, camera.owned)
            names = (*BASE_COLUMNS, *(metadata.column_types if metadata else ()), *camera_names)
            schema = arrow.schema([table.schema.field(name) for name in names])
            data = arrow.Table.from_pylist(rows, schema=schema)
            if patches:
                patches.write(packed)
            table.merge_insert("raw").when_matched_update_all().when_not_matched_insert_all().execute(data)
            report.encoded += len(rows)
            rows.clear()
            packed.clear()
        broken.write(index)
        return report.encoded

    for batch in batches:
        for row in batch:
            raw, reason, fault, decoder = (row["raw"], *map(row.pop, ("reason", "fault", "missing_decoder")))
            from_camera, own_patches = unpack_camera_metadata(row.pop("camera_metadata")), row.pop("patches")
            if reason:
                broken.add(raw, reason, fault, row["size"], row["mtime_ns"], decoder)
                continue
            broken.remove(raw)
            last_id += 1
            name = decode_path(raw)
            camera.count(from_camera)
            values = camera_values(from_camera, camera.owned) | (metadata.row_for(name) if metadata else {})
            rows.append(row | {"id": last_id, "path": name} | values)
            packed.append((last_id, row["hash"], own_patches))
        if len(rows) >= IMAGES_PER_WRITE:
            yield flush()
    flush()


def drop_missing(
    table: Any, index: Storage, listing: FileListing, changes: Changes, broken: BrokenFiles, report: IndexReport,
    allowed: bool,
) -> None:  # fmt: skip
    """Delete the rows of files that are gone or can no longer be decoded, and forget broken files that are gone.

    A row whose file cannot be read at the moment stays.

    Args:
        table: The table of images.
        index: The storage of the index.
        listing: The files of the source.
        changes: Their difference from the index.
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
    rows = [row for row in read_columns(table, ("id", "raw")) if row["raw"] in broken]
    undecodable_ids = [row["id"] for row in rows if broken.is_undecodable(row["raw"])]
    count = table.count_rows()
    if not allowed and exceeds_drop_limit(len(undecodable_ids), count):
        raise InvalidIndexError(
            f"{index}: the files of {len(undecodable_ids):,} of its {count:,} rows can no longer be decoded "
            f"({index}/{BROKEN_FILES_NAME} has "
            "each): were they damaged? No row was dropped. If they are to be, give --allow-drop"
        )
    dropped_ids = {*changes.deleted, *undecodable_ids}
    delete_rows(table, sorted(dropped_ids))
    report.dropped, report.kept = len(dropped_ids), sum(row["id"] not in dropped_ids for row in rows)
