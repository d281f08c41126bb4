"""The files of a memory-mapped index, and the record that names them.

vectors.json is written last, at once: it names a folder of files that nothing changes any more. A process that is
killed leaves the former record with its folder, and a process that has mapped the former files keeps them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from clipvisionalign.search.mapped.codes import CODES, Encoder, VectorSettings, make_encoder
from clipvisionalign.search.storage import Storage

#: Kind of an index with such files, in index.json.
MAPPED_KIND = "HNSW"
RECORD_FILE, FOLDER_PREFIX = "vectors.json", "vectors-"
GRAPH_FILE, VECTOR_FILE, KEY_FILE, ROW_FILE = "graph.usearch", "vectors.npy", "keys.npy", "rows.arrow"
UNREACHED_FILE = "unreached.npy"
FILES = (GRAPH_FILE, VECTOR_FILE, KEY_FILE, ROW_FILE, UNREACHED_FILE)
#: Version of the files.
RECORD_FORMAT = 1
#: Neighbours of a node, and candidates while a node is added, as in HNSW.
CONNECTIVITY, EXPANSION_ADD = 16, 128
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
        code: Form of the vectors in the graph.
        code_width: Numbers of a vector in the graph, 0 for all.
        scale: Of int8.
        expansion: Candidates of a search of the graph.
        recall: Share of the exact first ten that a search finds, 0 to 1, the least over several kinds of queries.
        sizes: Bytes of each file.
        format: Version of the files.
    """

    folder: str
    version: int
    positions: int
    live: int
    width: int
    code: str
    code_width: int
    scale: float
    expansion: int
    recall: float
    sizes: dict[str, int]
    format: int = RECORD_FORMAT

    @property
    def settings(self) -> VectorSettings:
        """Form and width of the vectors in the graph."""
        return VectorSettings(next(code for code in CODES if code == self.code), self.code_width)

    def to_json(self) -> str:
        """The record as text.

        Returns:
            JSON.
        """
        return json.dumps(asdict(self), indent=2) + "\n"


def can_map(index: Storage) -> bool:
    """Whether an index can have memory-mapped files: on a disk of this machine, with USearch installed.

    Args:
        index: The storage of the index.

    Returns:
        Whether it can.
    """
    return index.is_local and find_spec("usearch") is not None


def read_record(index: Storage) -> MappedRecord | None:
    """Read vectors.json.

    Args:
        index: The storage of the index.

    Returns:
        The record; None where there is none that this version understands, or one of its files is not there whole.
    """
    text = index.read(RECORD_FILE) if index.is_local else None
    if text is None:
        return None
    try:
        record = MappedRecord(**json.loads(text))
        folder = index.folder / record.folder
        whole = all((folder / name).stat().st_size == record.sizes[name] for name in FILES)
    except (TypeError, ValueError, KeyError, OSError):
        return None
    return record if whole and record.format == RECORD_FORMAT and record.code in CODES else None


def new_graph(encoder: Encoder, key_lookups: bool = False) -> Any:
    """An empty graph.

    Args:
        encoder: Of the vectors that it is to hold.
        key_lookups: Whether vectors can be looked up by their keys, which takes memory.

    Returns:
        A USearch index.
    """
    from usearch.index import Index

    bits = encoder.code == "binary"
    names = {"float32": "f32", "float16": "f16", "int8": "i8", "binary": "b1"}
    return Index(
        ndim=encoder.width, metric="hamming" if bits else "ip", dtype=names[encoder.code], connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD, enable_key_lookups=key_lookups,
    )  # fmt: skip


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
        unreached: Positions that no search of the graph comes to: they are compared with every query, (U,).

    Raises:
        OSError: A file is no longer there.
    """

    def __init__(self, index: Storage, record: MappedRecord) -> None:
        self.record, folder = record, index.folder / record.folder
        # Plain arrays, which are indexed faster than numpy's own class of mapped ones; they stay mapped.
        self.vectors: np.ndarray = np.asarray(np.load(folder / VECTOR_FILE, mmap_mode="r"))
        self.ids, self.contents = np.asarray(np.load(folder / KEY_FILE, mmap_mode="r"))
        self.unreached = np.load(folder / UNREACHED_FILE)
        self.encoder = make_encoder(record.settings, record.width, record.scale)
        self._graph = new_graph(self.encoder)
        self._graph.view(folder / GRAPH_FILE)
        self._lock = Lock()
        self._rows = _open_rows(folder / ROW_FILE)

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
            part = self._rows.get_batch(int(block)).take(within[of_block])
            for number, row in zip(of_block, part.to_pylist(), strict=True):
                rows[number] = row
        return rows

    def candidates(self, vector: np.ndarray, count: int, expansion: int) -> np.ndarray:
        """The positions that the graph finds near a query.

        Args:
            vector: The query, (D,).
            count: Number of positions at most.
            expansion: Candidates of the search.

        Returns:
            Positions, nearest first by the form of the graph.
        """
        code = self.encoder.encode(vector[None])[0]
        with self._lock:
            # One search at a time: its working memory is that of the graph.
            self._graph.expansion_search = expansion
            keys = self._graph.search(code, min(count, self.record.positions), threads=1).keys
        return np.asarray(keys).astype(np.int64)


def _open_rows(path: Path) -> Any:
    import pyarrow as arrow

    return arrow.ipc.open_file(arrow.memory_map(str(path)))
