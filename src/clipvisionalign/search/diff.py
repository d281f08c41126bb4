"""The difference between a folder and its index: new, changed, moved and missing files, and what may be dropped.

A row is dropped where its file is known to be gone. Many rows that lose their files at once, and any below a folder
that cannot be looked into, are more likely a drive that is not mounted than files that were deleted: they are kept, and
the run is refused before it has changed anything, unless that is what was asked for (`--allow-drop`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipvisionalign.images import ImageError
from clipvisionalign.progress import progress
from clipvisionalign.search.broken_files import BrokenFiles, classify_fault
from clipvisionalign.search.embed import PendingFile, decode_error_message
from clipvisionalign.search.storage import (
    FileListing,
    ImageFile,
    InvalidIndexError,
    Storage,
    content_hash,
    decode_path,
    printable,
)

#: The share of all rows up to which they may be dropped unasked. Of fewer than five one may: more than that share of so
#: few is any file that somebody deletes.
MAX_DROP_SHARE = 0.2


@dataclass
class Changes:
    """What an update does to an index; rows are given by their ids.

    Attributes:
        pending: Files to encode.
        updated: Rows with the path, size and time that their files have now.
        renamed: Old path and new path of files that were moved.
        deleted: Rows without a file.
        surplus: Rows of a file that has another row.
        inaccessible: Folders that cannot be listed, with the rows below them.
        unchanged: Number of files whose rows stay.
        moved: Number of files that were recognised by their content under another path.
    """

    pending: list[PendingFile] = field(default_factory=list)
    updated: list[dict[str, Any]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    deleted: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    inaccessible: dict[bytes, list[int]] = field(default_factory=dict)
    unchanged: int = 0
    moved: int = 0


def diff_files(
    storage: Storage, listing: FileListing, rows: Sequence[dict[str, Any]], broken: BrokenFiles, verify: bool = False
) -> Changes:
    """The difference between files and the rows of an index.

    Args:
        storage: The folder or URL of the images.
        listing: Its files.
        rows: The rows: id, path, raw, size, mtime_ns, hash.
        broken: Files that could not be read or decoded; files that cannot be read now are added.
        verify: Whether the content of every file is compared, not only size and time.

    Returns:
        The changes; nothing is written.
    """
    changes = Changes()
    row_by_path: dict[bytes, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        if row_by_path.setdefault(row["raw"], row) is not row:
            changes.surplus.append(row["id"])
    vanished = _rows_without_file(listing, row_by_path, changes)
    for raw, reason in (listing.unreadable | listing.missing).items():
        broken.add(raw, reason, "io")
    files: Iterable[ImageFile] = listing.files
    if verify:
        files = progress(files, "comparing the contents of files", len(listing.files))
    for file in files:
        _diff_file(storage, file, row_by_path.get(file.raw), vanished, broken, changes, verify)
    for row in (row for same in vanished.values() for row in same):
        target = changes.surplus if row["raw"] in listing.other_names else changes.deleted
        target.append(row["id"])
    return changes


def _rows_without_file(
    listing: FileListing, row_by_path: dict[bytes, dict[str, Any]], changes: Changes
) -> dict[str, list[Any]]:
    """Rows whose files are not where they were, by the hash of their content; not those whose state is unknown."""
    present_paths = {*(file.raw for file in listing.files), *listing.unreadable}
    vanished: dict[str, list[Any]] = {}
    for raw, row in row_by_path.items():
        if raw in present_paths:
            continue
        folder = listing.inaccessible_parent(raw)
        if folder is None:
            vanished.setdefault(row["hash"], []).append(row)
        else:
            changes.inaccessible.setdefault(folder, []).append(row["id"])
    return vanished


def _diff_file(
    storage: Storage, file: ImageFile, row: dict[str, Any] | None, vanished: dict[str, list[Any]], broken: BrokenFiles,
    changes: Changes, verify: bool,
) -> None:  # fmt: skip
    if not verify and row and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns):
        changes.unchanged += 1
        broken.remove(file.raw)
        return
    if not verify and broken.is_unchanged(file.raw, file.size, file.mtime_ns):
        return
    if not row and not vanished:
        # It can be no file that was moved: its hash is taken when it is read to be decoded.
        changes.pending.append((file, ""))
        return
    try:
        content = content_hash(storage.image_source(file.raw))
    except (OSError, ImageError) as error:
        broken.add(
            file.raw, decode_error_message(error, storage, file.raw), classify_fault(error), file.size, file.mtime_ns
        )
        return
    current = {"path": file.name, "raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns}
    if row and row["hash"] == content:
        changes.unchanged += 1
        broken.remove(file.raw)
        if (row["size"], row["mtime_ns"]) != (file.size, file.mtime_ns):
            changes.updated.append({"id": row["id"]} | current)
    elif not row and vanished.get(content):
        moved_row = vanished[content].pop(0)
        changes.updated.append({"id": moved_row["id"]} | current)
        changes.renamed[moved_row["path"]] = file.name
        changes.moved += 1
        broken.remove(file.raw)
    else:
        changes.pending.append((file, content))


def exceeds_drop_limit(dropped: int, rows: int) -> bool:
    """Whether so many rows of an index are more than may be dropped unasked.

    Args:
        dropped: Number of rows to drop.
        rows: Number of rows of the index.

    Returns:
        Whether they are more than `MAX_DROP_SHARE`, and more than one.

    >>> exceeds_drop_limit(1, 3), exceeds_drop_limit(20, 100), exceeds_drop_limit(21, 100)
    (False, False, True)
    """
    return dropped > max(1, MAX_DROP_SHARE * rows)


def check_drop(
    changes: Changes, listing: FileListing, storage: Storage, index: Storage, rows: int, allowed: bool
) -> None:
    """Refuse to drop rows that are too many, or whose files are in folders that cannot be listed.

    Args:
        changes: The changes; if `allowed`, rows below such folders are added to `deleted`.
        listing: The files of the source.
        storage: The folder or URL of the images, for the message.
        index: The storage of the index, for the message.
        rows: Number of rows of the index.
        allowed: Whether `--allow-drop` was given.

    Raises:
        InvalidIndexError: They would be dropped, and it is not allowed; nothing was changed.
    """
    if allowed:
        changes.deleted += [row_id for row_ids in changes.inaccessible.values() for row_id in row_ids]
        changes.inaccessible = {}
        return
    hint = "Nothing was changed. If they are to be dropped, give --allow-drop"
    if changes.inaccessible:
        folder, row_ids = next(iter(changes.inaccessible.items()))
        reason = listing.unlisted.get(folder) or listing.unreadable.get(folder) or "a link that leads nowhere"
        count = sum(map(len, changes.inaccessible.values()))
        other_folders = f" ({len(row_ids):,} of them) and {len(changes.inaccessible) - 1:,} other folders" if len(
            changes.inaccessible) > 1 else ""  # fmt: skip
        raise InvalidIndexError(
            f"{index}: {count:,} of its {rows:,} rows are of files below "
            f"{storage}/{printable(decode_path(folder))}{other_folders}, "
            f"which cannot be listed: {reason}. {hint}"
        )
    deleted_count, file_count = len(changes.deleted), len(listing.files)
    if exceeds_drop_limit(deleted_count, rows) or (deleted_count and not file_count):
        raise InvalidIndexError(
            f"{index}: {deleted_count:,} of its {rows:,} rows have no file below {storage} any more, where "
            f"{file_count:,} images are "
            f"now: is a drive not mounted, a folder moved away? {hint}"
        )
