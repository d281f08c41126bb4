"""Patch vectors beside an index, in 8 bits: what re-ranking reads of an image, so that it opens none.

A patch (E,) is stored as int8 codes with a scale of its own in half precision: E + 2 bytes. `pool` groups an image's
patches by Ward's clustering, and stores the mean of each group: 1 / pool of the bytes. Rows are kept by the number of
an image and the hash of its content, so that a row of before never stands for another image.

Sources: PLAID (Santhanam et al., arXiv:2205.09707) for stored vectors of few bits in late interaction; Clavié, Chaffin
and Adams, arXiv:2409.14683, for pooling by clusters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import connect, open_reader, rows_condition, try_open_table
from clipvisionalign.search.tables import delete_rows, read_columns

logger = logging.getLogger(__name__)

#: The table, and the file of its settings, in the folder of the index.
PATCH_TABLE, PATCH_FILE = "patches", "patches.json"
PATCH_FORMAT = 1


@dataclass(frozen=True)
class PatchSettings:
    """How the patches of an index are stored.

    Attributes:
        space: "late", where the late interaction compares them with tokens; "common", from which the late interaction
            and the fusion project them.
        width: E, numbers of a patch's vector.
        pool: Patches that are stored as one, on average.
        format: Version of the file.
    """

    space: Literal["late", "common"]
    width: int
    pool: int = 1
    format: int = PATCH_FORMAT


def pack_patches(patches: np.ndarray) -> bytes:
    """Patches in 8 bits.

    Args:
        patches: (P, E) float32.

    Returns:
        P scales in float16, then P x E codes in int8, each as bytes.

    >>> len(pack_patches(np.eye(3, 4, dtype=np.float32)))
    18
    """
    # Rounded up, so that no code exceeds 127 by the rounding of its scale.
    scales = np.nextafter((np.abs(patches).max(axis=1) / 127).astype(np.float16), np.float16(np.inf))
    codes = np.rint(patches / scales[:, None].astype(np.float32)).astype(np.int8)
    return scales.tobytes() + codes.tobytes()


def unpack_patches(packed: bytes, width: int) -> np.ndarray:
    """What `pack_patches` stored.

    Args:
        packed: The bytes.
        width: E.

    Returns:
        (P, E) float32.

    Raises:
        ValueError: They are not those of whole patches.

    >>> patches = np.eye(3, 4, dtype=np.float32)
    >>> np.allclose(unpack_patches(pack_patches(patches), 4), patches, atol=1e-3)
    True
    """
    count, rest = divmod(len(packed), width + 2)
    if rest:
        raise ValueError(f"{len(packed)} bytes are no patches of {width} numbers")
    scales = np.frombuffer(packed, np.float16, count).astype(np.float32)
    return np.frombuffer(packed, np.int8, offset=2 * count).reshape(count, width) * scales[:, None]


def pool_patches(patches: np.ndarray, pool: int) -> np.ndarray:
    """Means of groups of similar patches.

    Args:
        patches: (P, E) float32.
        pool: Patches of a group, on average; 1 leaves them as they are.

    Returns:
        (ceil(P / pool), E) float32.

    >>> pool_patches(np.repeat(np.eye(2, dtype=np.float32), 2, axis=0), 2)
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    groups = -(-len(patches) // pool)
    if groups >= len(patches):
        return patches
    from scipy.cluster.hierarchy import cut_tree, linkage

    labels = cut_tree(linkage(patches, "ward"), n_clusters=groups)[:, 0]
    sums = np.zeros((groups, patches.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, patches)
    return (sums / np.bincount(labels, minlength=groups)[:, None]).astype(np.float32)


def read_patch_settings(index: Storage) -> PatchSettings | None:
    """How the patches of an index are stored.

    Args:
        index: The storage of the index.

    Returns:
        The settings; None for an index without patches.

    Raises:
        InvalidIndexError: The file cannot be read, or is of another version.
    """
    text = index.read(PATCH_FILE)
    if text is None:
        return None
    try:
        settings = PatchSettings(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{PATCH_FILE}: cannot be read: {error}") from None
    if settings.format != PATCH_FORMAT:
        raise InvalidIndexError(
            f"{index}/{PATCH_FILE}: of another version (format {settings.format}, not {PATCH_FORMAT})"
        )
    return settings


class PatchWriter:
    """The patches of an index that is being written.

    They are written before the rows of their images: a row of an image always has its patches. What an interrupted
    update left is taken out when the next one begins, before numbers of images are given again.

    Args:
        index: The storage of the index.
        settings: How patches are stored.
    """

    def __init__(self, index: Storage, settings: PatchSettings) -> None:
        import pyarrow as arrow

        self.settings = settings
        schema = arrow.schema([("id", arrow.int64()), ("hash", arrow.string()), ("patches", arrow.binary())])
        table = try_open_table(index, PATCH_TABLE)
        self.table = connect(index).create_table(PATCH_TABLE, schema=schema) if table is None else table
        index.write(PATCH_FILE, json.dumps(asdict(settings), indent=2) + "\n")

    def write(self, rows: Sequence[tuple[int, str, bytes]]) -> None:
        """Add the patches of some images.

        Args:
            rows: Of each image its number, the hash of its content, and what `pack_patches` gave.
        """
        import pyarrow as arrow

        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            self.table.add(arrow.Table.from_arrays(
                [arrow.array(column, type_) for column, type_ in zip(columns, self.table.schema.types, strict=True)],
                schema=self.table.schema,
            ))  # fmt: skip

    def drop_others(self, images: Mapping[int, str]) -> set[int]:
        """Delete the patches that belong to no image.

        Args:
            images: By the number of each image of the index, the hash of its content.

        Returns:
            The numbers of the images without patches.
        """
        rows = read_columns(self.table, ("id", "hash"))
        others = {row["id"] for row in rows if images.get(row["id"]) != row["hash"]}
        delete_rows(self.table, sorted(others))
        return images.keys() - ({row["id"] for row in rows} - others)


def open_patch_writer(index: Storage, wanted: PatchSettings | None) -> PatchWriter | None:
    """Open the patches of an index to write to, or make the table.

    Args:
        index: The storage of the index.
        wanted: The settings that are asked for; None keeps patches where there are some already.

    Returns:
        The writer; None for an index without patches.

    Raises:
        InvalidIndexError: The index has patches with other settings.
    """
    existing = read_patch_settings(index)
    if existing is not None and wanted is not None and existing != wanted:
        raise InvalidIndexError(
            f"{index}: keeps patches by --patches {existing.pool}, not {wanted.pool}: leave the number out, or give "
            "another --out"
        )
    settings = existing or wanted
    return None if settings is None else PatchWriter(index, settings)


class PatchReader:
    """The patches of an index, to re-rank with.

    Args:
        index: The storage of the index.
        settings: How they are stored.
        table: Reads the table.
    """

    def __init__(self, index: Storage, settings: PatchSettings, table: Any) -> None:
        self.index, self.settings, self.table = index, settings, table

    def read(self, images: Mapping[int, str]) -> dict[int, np.ndarray]:
        """The patches of some images.

        Args:
            images: By the number of each image, the hash of its content.

        Returns:
            For each number (P, E) float32; an image without patches is left out.

        Raises:
            InvalidIndexError: A row is damaged.
        """
        if not images:
            return {}
        rows = self.table.read(("id", "hash", "patches"), rows_condition(images)).to_pylist()
        try:
            return {
                row["id"]: unpack_patches(row["patches"], self.settings.width)
                for row in rows
                if images[row["id"]] == row["hash"]
            }
        except ValueError as error:
            raise InvalidIndexError(f"{self.index}: its patches are damaged: {error}; index the folder again") from None


def open_patch_reader(index: Storage) -> PatchReader | None:
    """Open the patches of an index to re-rank with.

    Args:
        index: The storage of the index.

    Returns:
        The reader; None for an index without patches.

    Raises:
        InvalidIndexError: Their settings cannot be read.
    """
    settings = read_patch_settings(index)
    table = open_reader(index, PATCH_TABLE) if settings is not None else None
    return None if settings is None or table is None else PatchReader(index, settings, table)


class StoredImages(NamedTuple):
    """What an index holds of images for pair scores.

    Attributes:
        settings: How their patches are stored.
        vectors: By the number of an image its vector, (D,).
        patches: By the number of an image its patches, (P, E); those that are read from their files are left out.
    """

    settings: PatchSettings
    vectors: Mapping[int, np.ndarray]
    patches: Mapping[int, np.ndarray]


#: Columns of the table of images that `read_stored` needs beside "id".
STORED_COLUMNS = ("hash", "vector")


def read_stored(reader: PatchReader, rows: Sequence[Mapping[str, Any]]) -> StoredImages:
    """What an index holds of some images for pair scores.

    Args:
        reader: Reads their patches.
        rows: "id" and `STORED_COLUMNS` of each image.

    Returns:
        Vectors and patches by the numbers of the images.
    """
    patches = reader.read({row["id"]: row["hash"] for row in rows})
    vectors = {row["id"]: np.asarray(row["vector"], dtype=np.float32) for row in rows}
    return StoredImages(reader.settings, vectors, patches)
