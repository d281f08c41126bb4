"""The files of a memory-mapped index, and the record that names them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.search.mapped.codes import CODES, VectorSettings, byte_products, int8_scale, make_encoder
from clipvisionalign.search.recorded_files import RecordedFiles
from clipvisionalign.search.storage import Storage

#: Kind of an index with such files, in index.json.
MAPPED_KIND = "IVF"
RECORD_FILE = "vectors.json"
VECTOR_FILE, KEY_FILE, ROW_FILE = "vectors.npy", "keys.npy", "rows.arrow"
CODE_FILE, MEMBER_FILE, OFFSET_FILE, CENTROID_FILE = "codes.npy", "members.npy", "offsets.npy", "centroids.npy"
#: The files of the lists, of which those of rows are independent.
LIST_FILES = (CODE_FILE, MEMBER_FILE, OFFSET_FILE, CENTROID_FILE)
FILES = (VECTOR_FILE, KEY_FILE, ROW_FILE, *LIST_FILES)
#: Version of the files; those of 1 had a graph of neighbours in the place of the lists.
RECORD_FORMAT = 2
#: One of so many rows, or fewer, are taken from the lists one by one: a row takes so many times as long as in a list.
SPARSE = 6
#: Rows of a block of the file of rows.
ROWS_PER_BLOCK = 65_536


@dataclass(frozen=True)
class MappedRecord:
    """The content of vectors.json.

    Attributes:
        folder: Name of the folder of files.
        version: Version of the table of images that they are of.
        positions: Rows of the files, deleted ones included.
        live: Rows of the table at that version.
        width: D, the width of a vector.
        code: Form of the vectors in the lists.
        code_width: Numbers of a vector in the lists, 0 for all.
        scale: Of int8.
        centroids: K, the number of lists.
        clustered: Rows that the centroids were made of.
        reach: How far a search reads on: while the cosine of a list's centroid is within so many standard deviations of
            the centroids' cosines of that of the last row that is wanted.
        recall: Share of the exact first ten that a search finds, 0 to 1, the least over several kinds of queries.
        sizes: Bytes of each file.
        format: Version of the files.
        filtered_reach: `reach` of a search among rows that a filter leaves, no less than `reach`; None for the same.
    """

    folder: str
    version: int
    positions: int
    live: int
    width: int
    code: str
    code_width: int
    scale: float
    centroids: int
    clustered: int
    reach: float
    recall: float
    sizes: dict[str, int]
    format: int = RECORD_FORMAT
    filtered_reach: float | None = None

    @property
    def settings(self) -> VectorSettings:
        """Form and width of the vectors in the lists."""
        return VectorSettings(next(code for code in CODES if code == self.code), self.code_width)

    def to_json(self) -> str:
        """The record as text.

        Returns:
            JSON.
        """
        return json.dumps(asdict(self), indent=2) + "\n"


def can_map(index: Storage) -> bool:
    """Whether an index can have memory-mapped files: on a disk of this machine, with NumKong installed.

    Args:
        index: The storage of the index.

    Returns:
        Whether it can.
    """
    return index.is_local and find_spec("numkong") is not None


def _parse(**fields: Any) -> MappedRecord:
    record = MappedRecord(**fields)
    if record.code not in CODES or not np.isfinite([record.scale, record.reach, record.filtered_reach or 0.0]).all():
        raise ValueError(f"unknown form of vectors {record.code!r}, or a number that is none")
    return record


#: The folders of files, and vectors.json.
MAPPED = RecordedFiles(RECORD_FILE, "vectors-", _parse, RECORD_FORMAT, FILES)


def read_settings(index: Storage) -> VectorSettings | None:
    """How the files of an index keep vectors, also where they are of another format or not whole.

    Args:
        index: The storage of the index.

    Returns:
        The settings; None where there are none.
    """
    try:
        fields = json.loads((index.read(RECORD_FILE) if index.is_local else None) or "{}")
        return VectorSettings(next(code for code in CODES if code == fields["code"]), int(fields["code_width"]))
    except (TypeError, ValueError, KeyError, StopIteration):
        return None


def read_record(index: Storage) -> MappedRecord | None:
    """Read vectors.json.

    Args:
        index: The storage of the index.

    Returns:
        The record; None where there is none that this version understands, or one of its files is not there whole.
    """
    return MAPPED.read(index)


class MappedFiles:
    """The files of a record, mapped into memory.

    Args:
        index: The storage of the index.
        record: The record.

    Attributes:
        record: The record.
        vectors: (positions, D), float32.
        ids: The id of the row at each position, -1 for a deleted one.
        contents: A checksum of the content hash of the row at each position.
        codes: The vectors of the lists, list after list, in their form, (M, ...).
        members: The position of each of these, (M,).
        offsets: The vectors of list k are `offsets[k]` to `offsets[k + 1]`, (K + 1,).
        centroids: (K, W) float32, unit length.

    Raises:
        OSError: A file is no longer there.
        ValueError: A file is damaged.
    """

    def __init__(self, index: Storage, record: MappedRecord) -> None:
        self.record = record
        paths = MAPPED.paths(index.folder / record.folder)

        def mapped(name: str) -> np.ndarray:
            # Plain arrays, which are indexed faster than NumPy's own class of mapped ones; they stay mapped.
            return np.asarray(np.load(paths[name], mmap_mode="r"))

        self.vectors: np.ndarray = mapped(VECTOR_FILE)
        self.ids, self.contents = mapped(KEY_FILE)
        self.codes, self.members, self.offsets = mapped(CODE_FILE), mapped(MEMBER_FILE), mapped(OFFSET_FILE)
        self.centroids = mapped(CENTROID_FILE)
        self.encoder = make_encoder(record.settings, record.width, record.scale)
        self._rows = _open_rows(paths[ROW_FILE])

    @cached_property
    def deleted(self) -> np.ndarray:
        """Whether the row at each position was deleted before the files were written, (positions,)."""
        return np.asarray(self.ids < 0)

    @cached_property
    def _ids_in_order(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.ids, kind="stable")
        return order, self.ids[order]

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """The positions of rows.

        Args:
            ids: Numbers of rows, (M,).

        Returns:
            (M,); -1 for a row that the files do not have.
        """
        order, ordered = self._ids_in_order
        if not len(ordered):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        return np.where(ordered[at] == ids, order[at], -1)

    @property
    def columns(self) -> list[str]:
        """The columns of `rows`."""
        return list(self._rows.schema.names)

    @cached_property
    def _blocks(self) -> list[Any]:
        return [self._rows.get_batch(number) for number in range(self._rows.num_record_batches)]

    def rows(self, positions: np.ndarray) -> list[dict[str, Any]]:
        """The columns of a result.

        Args:
            positions: Positions of rows, (M,).

        Returns:
            M rows.
        """
        blocks, within = np.divmod(positions, ROWS_PER_BLOCK)
        rows: list[dict[str, Any]] = [{}] * len(positions)
        for block in np.unique(blocks):
            of_block = np.flatnonzero(blocks == block)
            part = self._blocks[int(block)].take(within[of_block])
            for number, row in zip(of_block, part.to_pylist(), strict=True):
                rows[number] = row
        return rows

    @cached_property
    def _centroid_codes(self) -> tuple[np.ndarray, float]:
        settings = VectorSettings("int8")
        scale = int8_scale(self.centroids, settings)
        return make_encoder(settings, self.centroids.shape[1], scale).encode(self.centroids), scale

    def centroid_cosines(self, vector: np.ndarray) -> np.ndarray:
        """The cosines of a query with the centroids, about: by bytes.

        Args:
            vector: The query, (D,), unit length.

        Returns:
            (K,), float32.
        """
        codes, scale = self._centroid_codes
        products, unit = byte_products(self.encoder.shorten(vector[None])[0], scale)
        return np.asarray(products(codes) * unit)

    def assigned(self) -> np.ndarray:
        """The list of each position.

        Returns:
            (positions,) int32; -1 for one that is in none.
        """
        lists = np.full(self.record.positions, -1, dtype=np.int32)
        lists[self.members] = np.repeat(np.arange(len(self.centroids), dtype=np.int32), np.diff(self.offsets))
        return lists


class Selection:
    """Rows of mapped files that may be found.

    Args:
        files: The files.
        mask: Which positions, (positions,).

    Attributes:
        mask: Likewise.
        count: Their number.
    """

    def __init__(self, files: MappedFiles, mask: np.ndarray) -> None:
        self._files, self.mask, self.count = files, mask, int(mask.sum())

    @property
    def is_sparse(self) -> bool:
        """Whether they are so few that each is taken from its list, where else lists are compared whole."""
        return self.count * SPARSE <= len(self.mask)

    @cached_property
    def members(self) -> np.ndarray:
        """The same in the order of the lists, (M,)."""
        return np.asarray(self.mask[self._files.members])

    @cached_property
    def slots(self) -> np.ndarray:
        """Where they are in the lists, ascending, (count,) int32."""
        return np.flatnonzero(self.mask[self._files.members]).astype(np.int32)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Those of list k are `slots[offsets[k]]` to `slots[offsets[k + 1]]`, (K + 1,)."""
        if self.is_sparse:
            return np.searchsorted(self.slots, self._files.offsets)
        return np.concatenate([[0], np.cumsum(self.members)])[self._files.offsets]

    @cached_property
    def lists(self) -> np.ndarray:
        """Which lists have some of them, (K,)."""
        return np.asarray(np.diff(self.offsets) > 0)


def _open_rows(path: Path) -> Any:
    import pyarrow as arrow

    return arrow.ipc.open_file(arrow.memory_map(str(path)))
