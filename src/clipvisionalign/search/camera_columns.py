"""Columns of an index that its images' own metadata fills: when, with which camera, where.

- A column is added with the first value of it: images without such metadata leave no columns of missing values.
- A column of a user's metadata table wins over one of the same name, of an image's header or of a data set;
  `camera.json` of the index lists these, and whether the headers of all rows have been read. An index of before is
  filled by its next update, from headers alone.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from clipvisionalign.images import CameraMetadata, ImageError, camera_metadata, open_header
from clipvisionalign.progress import progress
from clipvisionalign.search.collection import DATA_SET_COLUMNS
from clipvisionalign.search.diff import Changes
from clipvisionalign.search.metadata import ColumnType, Metadata
from clipvisionalign.search.places import has_gazetteer, nearest_towns
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.tables import metadata_columns, read_columns, update_rows

logger = logging.getLogger(__name__)

#: The columns, and what they hold.
CAMERA_COLUMNS: dict[str, ColumnType] = {
    "taken": "date", "camera": "text", "lens": "text", "latitude": "number", "longitude": "number", "place": "text",
}  # fmt: skip
CAMERA_FILE = "camera.json"
#: Rows that are read and written at a time.
_ROWS_PER_UPDATE = 2_000
_READER_THREADS = 8


@dataclass
class CameraColumns:
    """Which of `CAMERA_COLUMNS` an index fills itself, and what was read.

    Attributes:
        user_columns: Of `CAMERA_COLUMNS` and `DATA_SET_COLUMNS` those that the user's metadata table gave.
        is_complete: Whether the headers of all rows have been read.
        counts: Images by what their headers hold: "values", "none", "damaged"; "unreadable" could not be opened, and
            "filled" are those of them all that were read without being encoded.
    """

    user_columns: list[str] = field(default_factory=list)
    is_complete: bool = True
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def owned(self) -> list[str]:
        """The columns that the index fills."""
        return [name for name in CAMERA_COLUMNS if name not in self.user_columns]

    @property
    def user_camera_columns(self) -> list[str]:
        """The columns of a camera's names that the user's metadata table gave."""
        return [name for name in CAMERA_COLUMNS if name in self.user_columns]

    def kept_columns(self, metadata: Metadata) -> list[str]:
        """Of the columns of a data set those that an earlier table gave, whose values count more.

        Args:
            metadata: Of an update.

        Returns:
            Their names; none where the update brings a table.
        """
        return [name for name in metadata.column_types if metadata.table_columns is None and name in self.user_columns]

    def count(self, metadata: CameraMetadata) -> None:
        """Count one image.

        Args:
            metadata: What its header holds.
        """
        values = {name: value for name, value in asdict(metadata).items() if name != "is_damaged"}
        has_values = any(value is not None for value in values.values())
        self.counts["damaged" if metadata.is_damaged else "values" if has_values else "none"] += 1

    def write(self, index: Storage) -> None:
        """Write camera.json.

        Args:
            index: The storage of the index.
        """
        index.write(CAMERA_FILE, json.dumps({"user_columns": self.user_columns, "is_complete": self.is_complete}))


def open_camera_columns(index: Storage, table: Any, metadata: Metadata | None) -> CameraColumns:
    """Which columns the index fills, given the metadata of this update; a user's column takes the place of one.

    Args:
        index: The storage of the index.
        table: The table of images.
        metadata: Of this update; without a user's table the columns of an earlier one count.

    Returns:
        The columns; camera.json is written.
    """
    existing = metadata_columns(table)
    recorded, is_complete = _read_camera_file(index, table, existing)
    # One that is not there is what an interrupted update left.
    before = [name for name in recorded if name in existing]
    from_table = None if metadata is None else metadata.table_columns
    names = (*CAMERA_COLUMNS, *DATA_SET_COLUMNS)
    after = before if from_table is None else [name for name in names if name in from_table]
    columns = CameraColumns(after, is_complete and not set(recorded) & set(CAMERA_COLUMNS) - set(after))
    columns.write(index)
    # What passes from one side to the other is filled again; another type is what an interrupted update left.
    obsolete = [
        name for name in names if name in existing and (
            (name in before) != (name in after)
            or (name not in after and existing[name] != CAMERA_COLUMNS.get(name, existing[name]))
        )
    ]  # fmt: skip
    if obsolete:
        table.drop_columns(obsolete)
    for name in DATA_SET_COLUMNS:
        if name in obsolete and (name in before) != (name in after):
            was, is_now = ("an earlier table", "a data set") if name in before else ("a data set", "the table")
            logger.info(f"note: values of the column {name} were of {was}; they are of {is_now} once that is read")
    return columns


def _read_camera_file(index: Storage, table: Any, existing: Mapping[str, ColumnType]) -> tuple[list[str], bool]:
    """Columns of the camera's or a data set's names that are the user's, and whether all headers have been read."""
    text = index.read(CAMERA_FILE)
    try:
        recorded = json.loads(text) if text else {}
        return [str(name) for name in recorded["user_columns"]], bool(recorded["is_complete"])
    except (ValueError, KeyError, TypeError):
        # An index of before: whatever has such a name is the user's.
        return [name for name in CAMERA_COLUMNS if name in existing], table.count_rows() == 0


def user_columns(index: Storage, table: Any) -> dict[str, bool]:
    """The metadata columns that came from the user, and none that the images' own metadata has filled.

    Args:
        index: The storage of the index.
        table: Its table of images.

    Returns:
        For each, in the order of the table, whether a metadata table gave it; else a data set did.
    """
    existing = metadata_columns(table)
    of_table, _ = _read_camera_file(index, table, existing)
    return {
        name: name in of_table or name not in DATA_SET_COLUMNS
        for name in existing if name not in CAMERA_COLUMNS or name in of_table
    }  # fmt: skip


def add_camera_columns(table: Any, names: Iterable[str]) -> None:
    """Add columns that are not there yet.

    Args:
        table: The table of images.
        names: Names of `CAMERA_COLUMNS`.
    """
    import pyarrow as arrow

    types = {"date": arrow.timestamp("s"), "number": arrow.float64(), "text": arrow.string()}
    existing = set(table.schema.names)
    added = [arrow.field(name, types[CAMERA_COLUMNS[name]]) for name in names if name not in existing]
    if added:
        table.add_columns(added)


def camera_values(metadata: CameraMetadata, owned: Sequence[str]) -> dict[str, Any]:
    """The values of the columns that an index fills; the place is none yet (`fill_places`).

    Args:
        metadata: Of one image.
        owned: The columns.

    Returns:
        Values by column.
    """
    return {name: getattr(metadata, name, None) for name in owned}


def valued_columns(table: Any, rows: Sequence[dict[str, Any]], owned: Sequence[str]) -> list[str]:
    """The columns that the table has in the end: those of its own, and those that a row has a value of, added.

    Args:
        table: The table of images.
        rows: New rows.
        owned: The columns that the index fills.

    Returns:
        Their names, in order.
    """
    add_camera_columns(table, [name for name in owned if any(row[name] is not None for row in rows)])
    return [name for name in owned if name in table.schema.names]


def fill_old_rows(table: Any, index: Storage, storage: Storage, columns: CameraColumns, changes: Changes) -> None:
    """Read the headers of rows that were indexed before there were such columns; nothing is encoded.

    Args:
        table: The table of images.
        index: The storage of the index.
        storage: The folder or URL of the images.
        columns: Their counts are added to.
        changes: Of this update: rows that are encoded or dropped are left out.
    """
    if columns.is_complete:
        return
    pending, dropped = {file.raw for file, _ in changes.pending}, {*changes.deleted, *changes.surplus}
    rows = [row for row in read_columns(table, ("id", "raw")) if row["raw"] not in pending and row["id"] not in dropped]

    def read(row: dict[str, Any]) -> CameraMetadata | None:
        try:
            with open_header(storage.image_source(row["raw"])) as opened:
                return camera_metadata(opened)
        except (ImageError, OSError):
            return None

    batches = [rows[start : start + _ROWS_PER_UPDATE] for start in range(0, len(rows), _ROWS_PER_UPDATE)]
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        for batch in progress(batches, "reading what cameras wrote", len(rows), units_per_item=len):
            new_rows = []
            for row, metadata in zip(batch, pool.map(read, batch), strict=True):
                if metadata is None:
                    columns.counts["unreadable"] += 1
                    continue
                columns.count(metadata)
                columns.counts["filled"] += 1
                new_rows.append({"id": row["id"]} | camera_values(metadata, columns.owned))
            if names := valued_columns(table, new_rows, columns.owned):
                update_rows(
                    table, "id", [{name: row[name] for name in ("id", *names)} for row in new_rows], ("id", *names)
                )
    # What could not be opened is tried again by the next update.
    columns.is_complete = not columns.counts["unreadable"]
    columns.write(index)


def fill_places(table: Any, columns: CameraColumns) -> None:
    """Name the nearest town of each position, where the gazetteer is installed and one has none yet.

    Towns that are named already are compared too: earlier versions named the nearest one by degrees.

    Args:
        table: The table of images.
        columns: The columns that the index fills.
    """
    needed = {"place", "latitude", "longitude"}
    if not needed <= set(columns.owned) or not {"latitude", "longitude"} <= set(table.schema.names):
        return
    names = ["id", "latitude", "longitude", *(["place"] if "place" in table.schema.names else [])]
    rows = [row for row in read_columns(table, names) if row["latitude"] is not None]
    unnamed = sum(row.get("place") is None for row in rows)
    if not unnamed:
        return
    if not has_gazetteer():
        hint = 'pip install "clipvisionalign[photos]" and the same command once more'
        logger.info(f"{unnamed:,} images have a position; the nearest towns are named after {hint}")
        return
    towns = nearest_towns([(row["latitude"], row["longitude"]) for row in rows])
    named = [
        {"id": row["id"], "place": town}
        for row, town in zip(rows, towns, strict=True)
        if town and town != row.get("place")
    ]
    if named:
        add_camera_columns(table, ["place"])
        update_rows(table, "id", named, ("id", "place"))
