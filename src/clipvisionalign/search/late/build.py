"""Writing the files by which a whole index is ranked by late interaction, from its tables; or updating them.

An update keeps the centroids and what was computed of images that stayed; it reads the patches of new images alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.files import create_array, fsync_paths
from clipvisionalign.search.centroids import (
    SAMPLE_PER_CENTROID,
    centroid_count,
    find_centroids,
    nearest_centroids,
)
from clipvisionalign.search.late.files import (
    LATE,
    RECORD_FILE,
    LateFiles,
    LateRecord,
    read_late_record,
    remove_late,
)
from clipvisionalign.search.patches import PATCH_TABLE, read_patch_settings
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import TableReader, open_reader, rows_condition
from clipvisionalign.search.tables import content_checksums, read_image_table, vector_column

#: Share of the images that centroids were made of by which an index may have grown before they are made again.
MAX_GROWTH = 2.0
#: New images up to which their patches are read by their numbers, and how many at a time.
_MAX_READ_BY_ID, _IDS_PER_READ = 20_000, 500


def build_late(index: Storage) -> LateRecord | None:
    """Write the files of an index, where they are not of its tables as they are now.

    Only the process that holds the index's lock may.

    Args:
        index: The storage of the index, a folder, which keeps patches as the late interaction compares them.

    Returns:
        The record of the files; None where no image has patches, and there are none.

    Raises:
        InvalidIndexError: The index keeps no such patches, or they are damaged.
        OSError: The disk is full, or refuses to write.
    """
    settings, patches = read_patch_settings(index), open_reader(index, PATCH_TABLE)
    if settings is None or patches is None or settings.space != "late":
        raise InvalidIndexError(f"{index}: keeps no patches of the design late")
    table, record = read_image_table(index), read_late_record(index)
    versions = table.version, patches.version
    if record is not None and (record.version, record.patch_version) == versions:
        LATE.remove_others(index, record.folder)
        return record
    if not patches.count_rows():
        remove_late(index)
        return None
    former = _open(index, record, settings.width)
    with LATE.new_folder(index) as folder:
        counts = _write_patches(folder, table, patches, settings.width, former)
        if not all(counts):
            # What the table of patches has is of other images: the folder is one of those that are removed.
            remove_late(index)
            return None
        clustered = write_lists(folder, former)
        record = LateRecord(
            folder.name, *counts, settings.width, len(np.load(folder / "centroids.npy", mmap_mode="r")), clustered,
            *versions, LATE.sizes(folder),
        )  # fmt: skip
        fsync_paths(*LATE.paths(folder).values(), folder, index.folder)
    index.write(RECORD_FILE, record.to_json())
    LATE.remove_others(index, record.folder)
    return record


def _open(index: Storage, record: LateRecord | None, width: int) -> LateFiles | None:
    """The files of a record, where they are of patches of this width and can be opened."""
    try:
        return None if record is None or record.width != width else LateFiles(index, record)
    except (OSError, ValueError):
        return None


def _write_patches(
    folder: Path, table: TableReader, patches: TableReader, width: int, former: LateFiles | None
) -> tuple[int, int]:
    """Numbers, contents, vectors and patches of the images that have some, in the order of their numbers; N and R."""
    rows, stored = table.read(["id", "hash", "vector"]), patches.read(["id", "hash"])
    image_ids = np.asarray(rows["id"].to_numpy(), dtype=np.int64)
    image_contents = content_checksums(rows["hash"])
    there = np.isin(_keys(image_ids, image_contents), _keys(np.asarray(stored["id"].to_numpy(), dtype=np.int64),
                                                            content_checksums(stored["hash"])))  # fmt: skip
    order = np.flatnonzero(there)
    order = order[np.argsort(image_ids[order], kind="stable")]
    ids, contents = image_ids[order], image_contents[order]
    kept = np.full(len(ids), -1)
    if former is not None:
        positions = former.positions_of(ids)
        kept = np.where((positions >= 0) & (former.contents[positions] == contents), positions, -1)
    counts = np.zeros(len(ids), dtype=np.int64)
    if former is not None:
        counts[kept >= 0] = np.diff(former.offsets)[kept[kept >= 0]]
    packed = dict(_read_packed(patches, ids[kept < 0], contents[kept < 0], width))
    counts[kept < 0] = [len(packed[number]) for number in ids[kept < 0].tolist()]
    used = np.flatnonzero(counts)
    ids, contents, kept, counts = ids[used], contents[used], kept[used], counts[used]
    if not len(used):
        return 0, 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    codes = create_array(folder / "codes.npy", np.int8, (int(offsets[-1]), width))
    assigned = create_array(folder / "assigned.npy", np.int32, (int(offsets[-1]),))
    for position, (number, before) in enumerate(zip(ids.tolist(), kept.tolist(), strict=True)):
        to = slice(offsets[position], offsets[position + 1])
        if before < 0:
            codes[to], assigned[to] = packed[number], -1
        else:
            assert former is not None
            at = slice(former.offsets[before], former.offsets[before + 1])
            codes[to], assigned[to] = former.codes[at], former.assigned[at]
    arrays = {"ids": ids, "contents": contents, "offsets": offsets, "vectors": vector_column(rows)[order[used]]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "norms.npy", _inverse_norms(codes))
    return len(ids), len(codes)


def write_lists(folder: Path, former: LateFiles | None) -> int:
    """Write the centroids, the nearest one of each patch, and the images of each, beside the other arrays.

    Args:
        folder: Of the arrays; of a patch whose nearest centroid is to be computed "assigned" has -1.
        former: Files whose centroids are kept, unless the index has outgrown them; None for none.

    Returns:
        The number of images that the centroids were made of.
    """
    codes, assigned = np.load(folder / "codes.npy", mmap_mode="r"), np.load(folder / "assigned.npy", mmap_mode="r+")
    norms, offsets = np.load(folder / "norms.npy"), np.load(folder / "offsets.npy")
    images = len(offsets) - 1

    def read(rows: np.ndarray) -> np.ndarray:
        return codes[rows].astype(np.float32) * norms[rows, None]

    pending = np.flatnonzero(assigned < 0)
    if former is not None and len(former.centroids) and images <= MAX_GROWTH * former.record.clustered:
        centroids, clustered = np.array(former.centroids), former.record.clustered
    else:
        count, rng = centroid_count(len(codes)), np.random.default_rng(0)
        sample = np.sort(rng.permutation(len(codes))[: count * SAMPLE_PER_CENTROID])
        centroids = find_centroids(read(sample), min(count, len(sample)), "patches") if len(sample) else read(sample)
        clustered, pending = images, np.arange(len(codes))
    if len(pending):
        for start, nearest in nearest_centroids(
            len(pending), lambda first, last: read(pending[first:last]), centroids, "patches"
        ):
            assigned[pending[start : start + len(nearest)]] = nearest
    # Each image once in a list.
    owners = np.repeat(np.arange(images), np.diff(offsets))
    pairs = np.unique(assigned.astype(np.int64) * max(1, images) + owners)
    np.save(folder / "centroids.npy", centroids)
    np.save(folder / "list_images.npy", (pairs % max(1, images)).astype(np.int32))
    np.save(folder / "list_offsets.npy", np.searchsorted(pairs, np.arange(len(centroids) + 1) * max(1, images)))
    assigned.flush()
    return clustered


def _read_packed(
    patches: TableReader, ids: np.ndarray, contents: np.ndarray, width: int
) -> Iterator[tuple[int, np.ndarray]]:
    """By the number of each image its patches, (P, E) int8; of rows with the same content hash alone."""
    wanted = dict(zip(ids.tolist(), contents.tolist(), strict=True))
    for rows in _row_batches(patches, ids):
        columns = rows["id"].to_pylist(), content_checksums(rows["hash"]).tolist(), rows["patches"].to_pylist()
        for number, content, packed in zip(*columns, strict=True):
            if wanted.get(number) == content:
                count, rest = divmod(len(packed), width + 2)
                if rest:
                    raise InvalidIndexError(f"patches of image {number} are damaged; index the folder again")
                yield number, np.frombuffer(packed, np.int8, offset=2 * count).reshape(count, width)


def _row_batches(patches: TableReader, ids: np.ndarray) -> Iterator[Any]:
    columns = ["id", "hash", "patches"]
    if len(ids) > _MAX_READ_BY_ID or len(ids) == patches.count_rows():
        yield from patches.batches(columns)
        return
    for first in range(0, len(ids), _IDS_PER_READ):
        yield patches.read(columns, rows_condition(ids[first : first + _IDS_PER_READ]))


def _keys(ids: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """One number of an image's number and its content's checksum."""
    return ids * np.int64(2**32) + contents


def _inverse_norms(codes: np.ndarray) -> np.ndarray:
    norms = np.empty(len(codes), dtype=np.float32)
    for start in range(0, len(codes), 2**18):
        block = codes[start : start + 2**18].astype(np.float32)
        norms[start : start + 2**18] = 1.0 / np.maximum(np.linalg.norm(block, axis=1), 1e-12)
    return norms
