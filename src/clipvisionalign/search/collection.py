"""The images to index, from a folder or a data set, with captions and metadata."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages, DataError
from clipvisionalign.data.formats import UNLISTED_LAYOUTS, read_captioned_images
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.images import exclusion_reason, first_bytes
from clipvisionalign.search.metadata import CellValue, ColumnType, Metadata, read_metadata
from clipvisionalign.search.storage import FileListing, ImageFile, Storage, clamp_time_ns, decode_path

#: Metadata columns that a data set gives to its images.
DATA_SET_COLUMNS = ("split", "identity")


@dataclass(frozen=True)
class Collection:
    """Images to index.

    Attributes:
        storage: The folder or URL of the images.
        listing: Its files.
        captions: Captions by the image's path; None where none are wanted.
        metadata: Values by the image's path; of what is not read (a data set, a table), an index keeps its columns.
        data: The data set of the images; None for a folder.
        row_counts: Number of rows of the data set's files for each image, by its path in bytes.
    """

    storage: Storage
    listing: FileListing
    captions: dict[str, tuple[str, ...]] | None = None
    metadata: Metadata | None = None
    data: CaptionedImages | None = None
    row_counts: dict[bytes, int] = field(default_factory=dict)


def read_collection(
    source: str | Path, captions: bool = False, layout: str = "auto", metadata: str | Path = "",
    reserved_names: Iterable[str] = (), group: str = "", split_rule: int = SPLIT_RULE, folder: str = "",
) -> Collection:  # fmt: skip
    """The images below a folder or URL; or those of a data set, where `source` is a file or its captions are wanted.

    Args:
        source: A folder, a URL, or a data set.
        captions: Whether captions are wanted.
        layout: The dataset layout; "auto" recognises it.
        metadata: A table with a column of paths and others; "" for none.
        reserved_names: Names that no metadata column may have; such a column is renamed.
        group: A column of a table whose images stay in one split, see `read_captioned_images`; "" for none.
        split_rule: How images without a split are assigned, see `data/splits.py`.
        folder: Where the index that is updated has its images: so it remains for those of a data set that are all
            below it. "" for a new index.

    Returns:
        The images; no image is opened.

    Raises:
        DataError: The data set or the metadata cannot be read, or `group` is given for a folder.
        FileNotFoundError: There is no such folder.
        OSError: The folder itself cannot be listed.
    """
    path = Path(source)
    if path.is_file() and not exclusion_reason(path.name, partial(first_bytes, path)):
        raise DataError(f"{source}: one image; give the folder that it is in, such as {path.parent}")
    if is_data_set(source, captions):
        collection = _collect_data_set(read_captioned_images(source, layout, group, split_rule), folder)
        collection = collection if captions else replace(collection, captions=None)
    elif group:
        raise DataError(f"{source}: --group names a column of a data set: give a table's file, or --captions")
    else:
        storage = Storage(source)
        collection = Collection(storage, storage.list_files())
    if not metadata:
        return collection
    extra_metadata = read_metadata(metadata, collection.storage, collection.listing, reserved_names)
    return replace(
        collection, metadata=collection.metadata.merge(extra_metadata) if collection.metadata else extra_metadata
    )


def is_data_set(source: str | Path, captions: bool) -> bool:
    """Whether a source is read as a data set, and not as a folder of images.

    Args:
        source: A folder, a URL, or a data set.
        captions: Whether captions are wanted.

    Returns:
        Whether captions are wanted, or it is a file.
    """
    return captions or Path(source).is_file()


def _image_folder(data: CaptionedImages, paths: Sequence[Path], recorded: str) -> Path:
    """The folder below which the paths of a data set's images are those of an index."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    source = Path(os.path.abspath(data.source))
    source = source if source.is_dir() else source.parent
    within = [folder for folder in (common, *common.parents) if folder.is_relative_to(source)]
    by_default = source if within and data.layout in UNLISTED_LAYOUTS else common
    return next((folder for folder in within if Storage(folder).location == recorded), by_default)


def _collect_data_set(data: CaptionedImages, recorded: str) -> Collection:
    """The files that a data set names, each once, under the name that comes first."""
    paths = [_absolute_image_path(row, data) for row in data]
    root = _image_folder(data, paths, recorded)
    listing = FileListing()
    captions: dict[str, tuple[str, ...]] = {}
    values: dict[str, dict[str, CellValue]] = {}
    row_counts: Counter[bytes] = Counter()
    column_types: dict[str, ColumnType] = {"split": "text"}
    if any(row.identity for row in data):
        column_types["identity"] = "text"
    for row, path in zip(data, paths, strict=True):
        raw = _add_file(listing, path, os.fsencode(path.relative_to(root)))
        row_counts[raw] += row.row_count
        name = decode_path(raw)
        captions[name] = (*captions.get(name, ()), *row.captions)
        values[name] = {"split": row.split, "identity": row.identity} if len(column_types) > 1 else {"split": row.split}
    return Collection(Storage(root), listing, captions, Metadata(column_types, values), data, row_counts)


def _absolute_image_path(row: CaptionedImage, data: CaptionedImages) -> Path:
    """Where an image is, without `.` and `..`."""
    if isinstance(row.image, bytes):
        raise DataError(f"{data.source}: images inside a table have no place of their own: write them to files")
    path, folder = Path(os.path.abspath(row.image)), row.image.parent
    try:
        # After a link `..` is not the parent in the text.
        return path if os.path.samefile(path.parent, folder) else Path(os.path.realpath(folder)) / path.name
    except OSError:
        return path


def _add_file(listing: FileListing, path: Path, raw: bytes) -> bytes:
    """Put a file that a data set names into the listing; the path under which it stands there."""
    if raw in listing.path_by_file_id:
        return listing.path_by_file_id[raw]
    try:
        file_stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        listing.missing[raw] = f"{decode_path(raw)}: no such image file"
    except OSError as error:
        listing.unreadable[raw] = f"{decode_path(raw)}: cannot be read: {error.strerror}"
    else:
        file = ImageFile(raw, file_stat.st_size, clamp_time_ns(file_stat.st_mtime_ns))
        listing.path_by_file_id[raw] = listing.add(file, (file_stat.st_dev, file_stat.st_ino))
    return listing.path_by_file_id.setdefault(raw, raw)
