"""What is to be indexed: a folder of pictures or a data set, with captions and with whatever else is known of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages, DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.search.files import Listing, PictureFile, Place, name_of, time_ns
from clipvisionalign.search.metadata import Kind, Metadata, Value, read_metadata


@dataclass(frozen=True)
class Collection:
    """Pictures to index. captions: by the picture's path, None where none are wanted; metadata: None leaves what an
    index has as it is; data: the data set that they are of, None for a folder; rows: how many of its files'
    rows are of a picture, by its path in bytes."""

    place: Place
    listing: Listing
    captions: dict[str, tuple[str, ...]] | None = None
    metadata: Metadata | None = None
    data: CaptionedImages | None = None
    rows: dict[bytes, int] = field(default_factory=dict)


def read_collection(
    source: str | Path, captions: bool = False, layout: str = "auto", metadata: str | Path = "",
    taken: Iterable[str] = (), group: str = "", split_rule: int = SPLIT_RULE,
) -> Collection:  # fmt: skip
    """The pictures below a folder or URL; or those of a data set, where `source` is a file or its captions are wanted.

    metadata: a table with a column of paths and others, which are renamed where they have the names `taken`. group,
    split_rule: see `read_captioned_images`. Raises DataError, FileNotFoundError, and OSError where the
    folder itself cannot be listed.
    """
    if is_data_set(source, captions):
        found = _of_data(read_captioned_images(source, layout, group, split_rule))
        found = found if captions else replace(found, captions=None)
    elif group:
        raise DataError(f"{source}: --group names a column of a data set: give a table's file, or --captions")
    else:
        place = Place(source)
        found = Collection(place, place.listing())
    if not metadata:
        return found
    more = read_metadata(metadata, found.place, found.listing, taken)
    return replace(found, metadata=found.metadata.and_also(more) if found.metadata else more)


def is_data_set(source: str | Path, captions: bool) -> bool:
    """Whether `source` is read as a data set, and not as a folder of images."""
    return captions or Path(source).is_file()


def _of_data(data: CaptionedImages) -> Collection:
    """The files that a data set names, each once, under the name that comes first."""
    paths = [_path_of(row, data) for row in data]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    listing = Listing()
    captions: dict[str, tuple[str, ...]] = {}
    values: dict[str, dict[str, Value]] = {}
    rows: Counter[bytes] = Counter()
    kinds: dict[str, Kind] = {"split": "text"}
    if any(row.identity for row in data):
        kinds["identity"] = "text"
    for row, path in zip(data, paths, strict=True):
        raw = _put(listing, path, os.fsencode(path.relative_to(root)))
        rows[raw] += row.rows
        name = name_of(raw)
        captions[name] = (*captions.get(name, ()), *row.captions)
        values[name] = {"split": row.split, "identity": row.identity} if len(kinds) > 1 else {"split": row.split}
    return Collection(Place(root), listing, captions, Metadata(kinds, values), data, rows)


def _path_of(row: CaptionedImage, data: CaptionedImages) -> Path:
    """Where an image is, without `.` and `..`."""
    if isinstance(row.image, bytes):
        raise DataError(f"{data.source}: pictures inside a table have no place of their own: write them to files")
    path = os.path.abspath(row.image)
    try:
        # After a link `..` is not the folder that the text says.
        return Path(path if os.path.samefile(path, row.image) else os.path.realpath(row.image))
    except OSError:
        return Path(path)


def _put(listing: Listing, path: Path, raw: bytes) -> bytes:
    """Put a file that a data set names into the listing; the path under which it stands there."""
    if raw in listing.known:
        return listing.known[raw]
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        listing.missing[raw] = f"{name_of(raw)}: no such picture file"
    except OSError as error:
        listing.unreadable[raw] = f"{name_of(raw)}: cannot be read: {error.strerror}"
    else:
        file = PictureFile(raw, about.st_size, time_ns(about.st_mtime_ns))
        listing.known[raw] = listing.add(file, (about.st_dev, about.st_ino))
    return listing.known.setdefault(raw, raw)
