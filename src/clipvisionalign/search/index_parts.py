"""The parts that an index is written in: one, or as many as it has shards, which one update fills together.

The difference from the folder is taken over all shards at once, so that an update of shards drops, moves and encodes
what one of a single index does. A row stays in the shard that it is in; a new file is dealt by a hash of its path.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from clipvisionalign.search.camera_columns import CAMERA_COLUMNS, CameraColumns, add_camera_columns, user_columns
from clipvisionalign.search.collection import Collection
from clipvisionalign.search.diff import Changes
from clipvisionalign.search.embed import PendingFile
from clipvisionalign.search.manifest import MANIFEST_FILE, IndexManifest, read_shards, recorded_folder, shard_storage
from clipvisionalign.search.patches import PatchWriter
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import try_open_table
from clipvisionalign.search.tables import (
    IMAGE_TABLE,
    create_image_table,
    metadata_columns,
    open_caption_table,
    read_columns,
)

logger = logging.getLogger(__name__)

#: Numbers that an update of shards has given to files that may not all be written yet.
NUMBERS_FILE = "numbers.json"


@dataclass
class IndexPart:
    """One table of images that an update writes.

    Attributes:
        name: Of the shard; "" for an index without shards.
        storage: Of the part.
        manifest: Of the part.
        table: Its LanceDB table of images.
        rows: Its rows before the update: id, path, raw, size, mtime_ns, hash.
        changes: What the update does to its rows, and the files that it encodes for it.
        camera: Columns that the images' own metadata fills.
        patches: Receives the patches of the images; None where none are kept.
    """

    name: str
    storage: Storage
    manifest: IndexManifest
    table: Any
    rows: list[dict[str, Any]]
    changes: Changes = field(default_factory=Changes)
    camera: CameraColumns = field(default_factory=CameraColumns)
    patches: PatchWriter | None = None


def open_part(index: Storage, name: str, manifest: IndexManifest) -> IndexPart:
    """Open a part to write to; its table is created where there is none yet.

    Args:
        index: The storage of the index.
        name: Of the shard; "" for an index without shards.
        manifest: Of the part.

    Returns:
        The part.
    """
    storage = shard_storage(index, name)
    table = create_image_table(storage, manifest.width)
    rows = read_columns(table, ("id", "path", "raw", "size", "mtime_ns", "hash"))
    return IndexPart(name, storage, manifest, table, rows)


def data_set_folder(index: Storage) -> str:
    """Where the images of an index of a data set are.

    Args:
        index: The storage of what may be an index.

    Returns:
        Path or URL; "" where there is no index, or one of a folder.
    """
    whole = read_shards(index)
    for storage in [shard_storage(index, name) for name in whole.shards] if whole else [index]:
        table = try_open_table(storage, IMAGE_TABLE) if storage.read(MANIFEST_FILE) is not None else None
        if table is None:
            continue
        # Every data set gives its images a split.
        if not all(user_columns(storage, table).values()) or open_caption_table(storage) is not None:
            return recorded_folder(index)
    return ""


def refuse_lost_columns(index: Storage, collection: Collection) -> None:
    """Check that no shard lacks metadata columns or captions that others have and this update does not bring.

    An update encodes the images of a lost shard: without the flags that the index was made with, they would lose the
    rest.

    Args:
        index: The storage of the index.
        collection: The images, with what the update brings.

    Raises:
        InvalidIndexError: One does; nothing was written.
    """
    whole = read_shards(index)
    if whole is None:
        return
    storages = {name: shard_storage(index, name) for name in whole.shards}
    # LanceDB would make the folder of one that is missing.
    there = {name: storage for name, storage in storages.items() if storage.read(MANIFEST_FILE) is not None}
    images = {name: try_open_table(storage, IMAGE_TABLE) for name, storage in there.items()}
    captions = {name: open_caption_table(storage) for name, storage in there.items()}
    columns = {name: user_columns(there[name], table) for name, table in images.items() if table is not None}
    expected = list(dict.fromkeys(column for each in columns.values() for column in each))
    from_table = {column for each in columns.values() for column, is_of_table in each.items() if is_of_table}
    given = collection.metadata.column_types if collection.metadata is not None else ()
    has_captions = any(table is not None and table.count_rows() for table in captions.values())
    for name in whole.shards:
        lacking = {}
        missing = [column for column in expected if column not in columns.get(name, ())]
        of_table = [column for column in missing if column in from_table]
        if of_table and (collection.metadata is None or collection.metadata.table_columns is None):
            lacking["--metadata FILE"] = f"the metadata columns {', '.join(of_table)}"
        if has_captions and captions.get(name) is None and collection.captions is None:
            lacking["--captions"] = "the captions"
        elif collection.data is None and set(missing) - {*of_table, *given}:
            lacking["--captions" if has_captions else "the data set's file"] = "the columns of the data set"
        if lacking:
            state = "lacks" if name in columns else "is missing, and its images would be encoded without"
            raise InvalidIndexError(
                f"{index}: its {name} {state} {' and '.join(lacking.values())} that other shards have: "
                f"give {' and '.join(lacking)} as when the index was made"
            )


def deal(raw: bytes, shards: int) -> int:
    """The shard of a new file, by its path alone: whatever else is there, it is the same.

    Args:
        raw: Its path below the folder, in bytes.
        shards: Number of shards.

    Returns:
        0 to `shards` - 1.

    >>> [deal(b"a.jpg", 4), deal(b"b.jpg", 4), deal(b"c.jpg", 4)]
    [1, 2, 2]
    """
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") % shards


def deal_changes(parts: Sequence[IndexPart], changes: Changes) -> Callable[[bytes], IndexPart]:
    """Give each part what an update does to it.

    Args:
        parts: The parts; their `changes` are set.
        changes: The difference between the files and the rows of all parts.

    Returns:
        The part of a file that is encoded, by its path in bytes: that of its row, or the one that it is dealt to.
    """
    part_of_id = {row["id"]: part for part in parts for row in part.rows}
    part_of_path = {row["raw"]: part for part in parts for row in part.rows}

    def part_of(raw: bytes) -> IndexPart:
        return part_of_path.get(raw) or parts[deal(raw, len(parts))]

    for part in parts:
        part.changes = replace(changes, pending=[], updated=[], deleted=[], surplus=[])
    for file, content in changes.pending:
        part_of(file.raw).changes.pending.append((file, content))
    for row in changes.updated:
        part_of_id[row["id"]].changes.updated.append(row)
    for row_id in changes.deleted:
        part_of_id[row_id].changes.deleted.append(row_id)
    for row_id in changes.surplus:
        part_of_id[row_id].changes.surplus.append(row_id)
    return part_of


def plan_numbers(index: Storage, parts: Sequence[IndexPart], pending: Sequence[PendingFile]) -> Callable[[bytes], int]:
    """The numbers of the images that are about to be encoded.

    Those of a single index follow each other as rows are written. Shards are written at different times: their images
    have numbers in order of their paths, which are written down first, so that an update that was interrupted gives
    each image the number that it would have had.

    Args:
        index: The storage of the index.
        parts: Its parts.
        pending: The files that are encoded, in order.

    Returns:
        The number of an image by the path of its file in bytes; called once for each image that is written, in order.
    """
    last = max((row["id"] for part in parts for row in part.rows), default=-1)
    if not parts[0].name:
        following = count(last + 1)
        return lambda raw: next(following)
    taken = {row["id"] for part in parts for row in part.rows}
    numbers = {raw: number for raw, number in _read_numbers(index).items() if number not in taken}
    following = count(max([last, *numbers.values()]) + 1)
    paths = [file.raw for file, _ in pending]
    numbers = {raw: numbers[raw] if raw in numbers else next(following) for raw in paths}
    if numbers:
        named = {raw.decode("utf-8", "surrogateescape"): number for raw, number in numbers.items()}
        index.write(NUMBERS_FILE, json.dumps(named) + "\n")
    return lambda raw: numbers[raw]


def forget_numbers(index: Storage) -> None:
    """Take back what `plan_numbers` wrote, once every image is written.

    Args:
        index: The storage of the index.
    """
    if _read_numbers(index):
        index.write(NUMBERS_FILE, "{}\n")


def _read_numbers(index: Storage) -> dict[bytes, int]:
    try:
        named = json.loads(index.read(NUMBERS_FILE) or "{}")
        return {name.encode("utf-8", "surrogateescape"): int(number) for name, number in named.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def align_columns(parts: Sequence[IndexPart]) -> None:
    """Give every shard the columns that the images' own metadata has filled in another one.

    Args:
        parts: The parts.
    """
    used = [
        name
        for name in CAMERA_COLUMNS
        if any(name in part.camera.owned and name in metadata_columns(part.table) for part in parts)
    ]
    for part in parts:
        add_camera_columns(part.table, used)
