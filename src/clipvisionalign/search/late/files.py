"""The files by which a whole index is ranked by late interaction, and the record that names them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from clipvisionalign.search.recorded_files import RecordedFiles
from clipvisionalign.search.storage import Storage

RECORD_FILE = "late.json"
#: Version of the files.
RECORD_FORMAT = 1
#: The arrays, as files of NumPy.
ARRAYS = (
    "ids", "contents", "vectors", "offsets", "codes", "norms", "centroids", "assigned", "list_offsets", "list_images",
)  # fmt: skip


@dataclass(frozen=True)
class LateRecord:
    """The content of late.json.

    Attributes:
        folder: Name of the folder of files.
        images: N, images with patches.
        patches: R, patches of all of them.
        width: E, numbers of a patch's vector.
        centroids: K.
        clustered: Images that the centroids were made of.
        version: Version of the table of images that the files are of.
        patch_version: Version of the table of patches.
        sizes: Bytes of each file.
        format: Version of the files.
    """

    folder: str
    images: int
    patches: int
    width: int
    centroids: int
    clustered: int
    version: int
    patch_version: int
    sizes: dict[str, int]
    format: int = RECORD_FORMAT

    def to_json(self) -> str:
        """The record as text.

        Returns:
            JSON.
        """
        return json.dumps(asdict(self), indent=2) + "\n"


#: The folders of files, and late.json.
LATE = RecordedFiles(RECORD_FILE, "late-files-", LateRecord, RECORD_FORMAT, ARRAYS, ".npy")


def read_late_record(index: Storage) -> LateRecord | None:
    """Read late.json.

    Args:
        index: The storage of the index.

    Returns:
        The record; None where there is none that this version understands, or one of its files is not there whole.
    """
    return LATE.read(index)


def remove_late(index: Storage) -> None:
    """Remove the files of an index, where it has some: its table is re-created, or no image of it has patches.

    A record without files stays, by which the next update writes them.

    Args:
        index: The storage of the index.
    """
    if index.is_local and index.read(RECORD_FILE) is not None:
        index.write(RECORD_FILE, json.dumps({"format": RECORD_FORMAT, "images": 0}) + "\n")
        LATE.remove_others(index)


class LateFiles:
    """The files of a record, mapped into memory.

    Args:
        index: The storage of the index.
        record: The record.

    Attributes:
        record: The record.
        ids: Number of each image, (N,), ascending.
        contents: A checksum of its content hash, (N,).
        vectors: (N, D) unit length, float32.
        offsets: The patches of image n are `offsets[n]` to `offsets[n + 1]`, (N + 1,).
        codes: (R, E) int8.
        norms: (R,) float32, 1 / the length of each row of `codes`: a patch is `codes` times it, of unit length.
        centroids: (K, E) float32, unit length.
        assigned: The nearest centroid of each patch, (R,).
        list_offsets: The images of centroid k are `list_offsets[k]` to `list_offsets[k + 1]` of the next, (K + 1,).
        list_images: Positions of images, each once a centroid.

    Raises:
        OSError: A file is no longer there.
    """

    ids: np.ndarray
    contents: np.ndarray
    vectors: np.ndarray
    offsets: np.ndarray
    codes: np.ndarray
    norms: np.ndarray
    centroids: np.ndarray
    assigned: np.ndarray
    list_offsets: np.ndarray
    list_images: np.ndarray

    def __init__(self, index: Storage, record: LateRecord) -> None:
        self.record = record
        for name, path in LATE.paths(index.folder / record.folder).items():
            # Plain arrays, which are indexed faster than NumPy's own class of mapped ones; they stay mapped.
            setattr(self, name, np.asarray(np.load(path, mmap_mode="r")))

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """The positions of images.

        Args:
            ids: Their numbers, (M,).

        Returns:
            (M,); -1 for an image that the files do not have.
        """
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, at, -1)
