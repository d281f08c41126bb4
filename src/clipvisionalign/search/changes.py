"""What has become of a folder since it was indexed: what is new, changed, moved, gone; and what may be dropped.

A row is dropped where its file is known to be gone. Many rows that lose their files at once, and any below a folder
that cannot be looked into, are more likely a drive that is not mounted than files that were deleted: they are kept, and
the run is refused before it has changed anything, unless that is what was asked for (`--allow-drop`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipvisionalign.images import PictureError
from clipvisionalign.progress import progress
from clipvisionalign.search.broken import BrokenFiles, fault_of
from clipvisionalign.search.encode import Todo, why_not
from clipvisionalign.search.files import BadIndex, Listing, PictureFile, Place, content_hash, name_of, printable

#: The share of all rows up to which they may be dropped unasked. Of fewer than five one may: more than that share of so
#: few is any file that somebody deletes.
SHARE = 0.2


@dataclass
class Changes:
    """What to do with an index. Rows are named by their numbers.

    todo: files to encode; rewritten: rows with the path, size and time that their files have now; renamed: old path ->
    new path of those that were moved; gone: rows without a file; surplus: rows of a file that has another row;
    hidden: folder -> rows below it, which cannot be looked into; unchanged, moved: how many.
    """

    todo: list[Todo] = field(default_factory=list)
    rewritten: list[dict[str, Any]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    hidden: dict[bytes, list[int]] = field(default_factory=dict)
    unchanged: int = 0
    moved: int = 0


def compare(
    place: Place, listing: Listing, rows: Sequence[dict[str, Any]], broken: BrokenFiles, verify: bool = False
) -> Changes:
    """What has become of the files since `rows` were written. verify: by the content of every file, not by its size and
    time. What cannot be read is put into `broken`."""
    changes = Changes()
    known: dict[bytes, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        if known.setdefault(row["raw"], row) is not row:
            changes.surplus.append(row["id"])
    vanished = _without_file(listing, known, changes)
    for raw, reason in (listing.unreadable | listing.missing).items():
        broken.add(raw, reason, "io")
    files: Iterable[PictureFile] = listing.files
    if verify:
        files = progress(files, "comparing the contents of files", len(listing.files))
    for file in files:
        _compare_one(place, file, known.get(file.raw), vanished, broken, changes, verify)
    for row in (row for same in vanished.values() for row in same):
        kind = changes.surplus if row["raw"] in listing.other_names else changes.gone
        kind.append(row["id"])
    return changes


def _without_file(listing: Listing, known: dict[bytes, dict[str, Any]], changes: Changes) -> dict[str, list[Any]]:
    """Rows whose files are not where they were, by the hash of their content; not those of which nobody can tell."""
    there = {*(file.raw for file in listing.files), *listing.unreadable}
    vanished: dict[str, list[Any]] = {}
    for raw, row in known.items():
        if raw in there:
            continue
        folder = listing.hidden_below(raw)
        if folder is None:
            vanished.setdefault(row["hash"], []).append(row)
        else:
            changes.hidden.setdefault(folder, []).append(row["id"])
    return vanished


def _compare_one(
    place: Place, file: PictureFile, row: dict[str, Any] | None, vanished: dict[str, list[Any]], broken: BrokenFiles,
    changes: Changes, verify: bool,
) -> None:  # fmt: skip
    if not verify and row and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns):
        changes.unchanged += 1
        broken.remove(file.raw)
        return
    if not verify and broken.stays(file.raw, file.size, file.mtime_ns):
        return
    if not row and not vanished:
        # It can be no file that was moved: its hash is taken when it is read to be decoded.
        changes.todo.append((file, ""))
        return
    try:
        content = content_hash(place.picture(file.raw))
    except (OSError, PictureError) as error:
        broken.add(file.raw, why_not(error, place, file.raw), fault_of(error), file.size, file.mtime_ns)
        return
    now = {"path": file.name, "raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns}
    if row and row["hash"] == content:
        changes.unchanged += 1
        broken.remove(file.raw)
        if (row["size"], row["mtime_ns"]) != (file.size, file.mtime_ns):
            changes.rewritten.append({"id": row["id"]} | now)
    elif not row and vanished.get(content):
        before = vanished[content].pop(0)
        changes.rewritten.append({"id": before["id"]} | now)
        changes.renamed[before["path"]] = file.name
        changes.moved += 1
        broken.remove(file.raw)
    else:
        changes.todo.append((file, content))


def too_many(gone: int, rows: int) -> bool:
    """Whether so many of the rows of an index are more than may be dropped unasked."""
    return gone > max(1, SHARE * rows)


def check_drop(changes: Changes, listing: Listing, place: Place, index: Place, rows: int, allowed: bool) -> None:
    """Raises BadIndex where rows would be dropped that are too many, or of whose files nobody can tell; rows: those of
    the index. Where it is `allowed`, these are gone as well."""
    if allowed:
        changes.gone += [number for below in changes.hidden.values() for number in below]
        changes.hidden = {}
        return
    way_out = "Nothing was changed. If they are to be dropped, give --allow-drop"
    if changes.hidden:
        folder, below = next(iter(changes.hidden.items()))
        why = listing.unlisted.get(folder) or listing.unreadable.get(folder) or "a link that leads nowhere"
        count = sum(map(len, changes.hidden.values()))
        others = f" ({len(below):,} of them) and {len(changes.hidden) - 1:,} other folders" if len(
            changes.hidden) > 1 else ""  # fmt: skip
        raise BadIndex(
            f"{index}: {count:,} of its {rows:,} rows are of files below {place}/{printable(name_of(folder))}{others}, "
            f"which cannot be listed: {why}. {way_out}"
        )
    gone, found = len(changes.gone), len(listing.files)
    if too_many(gone, rows) or (gone and not found):
        raise BadIndex(
            f"{index}: {gone:,} of its {rows:,} rows have no file below {place} any more, where {found:,} images are "
            f"now: is a drive not mounted, a folder moved away? {way_out}"
        )
