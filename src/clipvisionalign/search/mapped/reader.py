"""Searching an index by its memory-mapped files, with the rows of the table as it is now."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from clipvisionalign.search.mapped.files import MAPPED, RECORD_FILE, MappedFiles, Selection, can_map
from clipvisionalign.search.mapped.search import search_files
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import TableReader, rows_condition
from clipvisionalign.search.tables import content_checksums, vector_column

logger = logging.getLogger(__name__)

#: Rows of the table that the files may lack: so many are compared exactly.
MAX_UNMAPPED_ROWS = 50_000
#: Filters whose rows are kept.
KEPT_FILTERS = 32


@dataclass
class _Snapshot:
    """Mapped files, and the table at one version.

    Attributes:
        stamp: Identity of the record's file.
        version: Of the table.
        files: The files.
        alive: The rows of the table; None for all.
        other_ids: Rows of the table that the files lack, (M,).
        other_vectors: Their vectors, (M, D).
        current: Whether the files are of this version.
        filters: For each filter in SQL which rows of the files and which others it leaves.
    """

    stamp: tuple[int, int]
    version: int
    files: MappedFiles
    alive: Selection | None
    other_ids: np.ndarray
    other_vectors: np.ndarray
    current: bool
    filters: OrderedDict[str, tuple[Selection, np.ndarray]] = field(default_factory=OrderedDict)


class MappedReader:
    """The mapped files of an index, in step with its table.

    They are opened when they are first needed, and again when another process has written them.

    Args:
        index: The storage of the index.
        table: Reads its images.
    """

    def __init__(self, index: Storage, table: TableReader) -> None:
        self.index, self.table = index, table
        self._snapshot: _Snapshot | None = None
        self._refused: tuple[tuple[int, int], int] | None = None
        self._lock = Lock()
        self._possible = can_map(index)

    def search(
        self, vector: np.ndarray, count: int, kind: str, columns: Sequence[str], where: str = ""
    ) -> list[dict[str, Any]]:
        """The rows whose vectors are nearest to a query's, by the files where they fit the table, else by the table.

        Args:
            vector: The query, (D,), unit length.
            count: Number of rows at most.
            kind: Kind of the index, as in the manifest.
            columns: The columns that are read.
            where: A condition in SQL, "" for none.

        Returns:
            Rows, nearest first; "_distance" is 1 - cosine.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        rows = self.nearest(vector, count, columns, where)
        return self.table.nearest(vector, count, kind, columns, where) if rows is None else rows

    def nearest(
        self, vector: np.ndarray, count: int, columns: Sequence[str], where: str = ""
    ) -> list[dict[str, Any]] | None:
        """The rows whose vectors are nearest to a query's, as `TableReader.nearest` gives them.

        Args:
            vector: The query, (D,), unit length.
            count: Number of rows at most.
            columns: The columns that are read.
            where: A condition in SQL, "" for none.

        Returns:
            Rows, nearest first; "_distance" is 1 - cosine. None where the index has no such files, or others than fit
            its table: then the table itself is searched.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        snapshot = self._current_snapshot()
        if snapshot is None:
            return None
        vector = np.asarray(vector, dtype=np.float32)
        selection, others = snapshot.alive, np.ones(len(snapshot.other_ids), dtype=bool)
        if where:
            selection, others = self._filtered(snapshot, where)
        positions, scores = search_files(snapshot.files, vector, count, selection, is_filtered=bool(where))
        ids = np.asarray(snapshot.files.ids[positions])
        other_ids = snapshot.other_ids[others]
        if len(other_ids):
            ids = np.concatenate([ids, other_ids])
            scores = np.concatenate([scores, snapshot.other_vectors[others] @ vector])
            first = np.lexsort((ids, -scores))[:count]
            ids, scores = ids[first], scores[first]
        if snapshot.current and set(columns) <= set(snapshot.files.columns):
            rows = snapshot.files.rows(positions)
            rows = [{name: row[name] for name in columns} for row in rows]
        else:
            rows, scores = self._read_rows(ids, scores, columns)
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, scores.tolist(), strict=True)]

    def _read_rows(
        self, ids: np.ndarray, scores: np.ndarray, columns: Sequence[str]
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Columns of rows as the table has them now; a row that is gone meanwhile is left out."""
        if not len(ids):
            return [], scores
        names = list(dict.fromkeys(("id", *columns)))
        by_id = {row["id"]: row for row in self.table.read(names, rows_condition(ids)).to_pylist()}
        there = [number for number, row_id in enumerate(ids.tolist()) if row_id in by_id]
        return [{name: by_id[int(ids[number])][name] for name in columns} for number in there], scores[there]

    def _filtered(self, snapshot: _Snapshot, where: str) -> tuple[Selection, np.ndarray]:
        """Which rows of the files a filter leaves, and which others."""
        kept = snapshot.filters.get(where)
        if kept is None:
            ids = np.asarray(self.table.read(["id"], where)["id"].to_numpy(), dtype=np.int64)
            positions = snapshot.files.positions_of(ids)
            allowed = np.zeros(snapshot.files.record.positions, dtype=bool)
            allowed[positions[positions >= 0]] = True
            if snapshot.alive is not None:
                allowed &= snapshot.alive.mask
            kept = (Selection(snapshot.files, allowed), np.isin(snapshot.other_ids, ids))
            with self._lock:
                snapshot.filters[where] = kept
                while len(snapshot.filters) > KEPT_FILTERS:
                    snapshot.filters.popitem(last=False)
        return kept

    def _current_snapshot(self) -> _Snapshot | None:
        """The files with the table as it is now; None where the table has to be searched itself."""
        if not self._possible:
            return None
        stamp = MAPPED.stamp(self.index)
        if stamp is None:
            return None
        key = stamp, self.table.version
        snapshot = self._snapshot
        if snapshot is not None and (snapshot.stamp, snapshot.version) == key:
            return snapshot
        with self._lock:
            snapshot = self._snapshot
            if snapshot is not None and (snapshot.stamp, snapshot.version) == key:
                return snapshot
            if self._refused == key:
                return None
            self._snapshot = self._open(*key, former=snapshot)
            self._refused = key if self._snapshot is None else None
            return self._snapshot

    def _open(self, stamp: tuple[int, int], version: int, former: _Snapshot | None) -> _Snapshot | None:
        files = former.files if former is not None and former.stamp == stamp else self._open_files()
        if files is None:
            return None
        none = np.empty(0, dtype=np.int64), np.empty((0, files.record.width), dtype=np.float32)
        if files.record.version == version and files.record.live == self.table.count_rows():
            alive = None if files.record.live == files.record.positions else Selection(files, ~files.deleted)
            return _Snapshot(stamp, version, files, alive, *none, current=True)
        rows = self.table.read(["id", "hash"])
        ids = np.asarray(rows["id"].to_numpy(), dtype=np.int64)
        positions = files.positions_of(ids)
        same = (positions >= 0) & (files.contents[positions] == content_checksums(rows["hash"]))
        kept = np.zeros(files.record.positions, dtype=bool)
        kept[positions[same]] = True
        others = ids[~same]
        if len(others) > MAX_UNMAPPED_ROWS:
            logger.info(
                f"note: {self.index}: {len(others):,} of its images are new to its lists of vectors, which are not "
                "used until 'clipvisionalign index' has brought them up to date"
            )
            return None
        other_ids, other_vectors = self._read_vectors(others) if len(others) else none
        return _Snapshot(stamp, version, files, Selection(files, kept), other_ids, other_vectors, current=False)

    def _open_files(self) -> MappedFiles | None:
        files = MAPPED.open(self.index, MappedFiles)
        if files is None:
            logger.info(
                f"note: {self.index}/{RECORD_FILE}: its files are not there whole, and are not used: "
                "'clipvisionalign index' writes them again"
            )
        return files

    def _read_vectors(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        where = rows_condition(ids) if len(ids) < self.table.count_rows() / 2 else ""
        rows = self.table.read(["id", "vector"], where)
        read_ids, vectors = np.asarray(rows["id"].to_numpy(), dtype=np.int64), vector_column(rows)
        wanted = np.isin(read_ids, ids)
        return read_ids[wanted], vectors[wanted]
