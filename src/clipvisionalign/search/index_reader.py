"""Searching an index by vectors, without any model: what a single index and each shard of one do.

Rows come nearest first; of equal cosines those of the least numbers first, whichever engine finds them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.search.late import LateReader
from clipvisionalign.search.manifest import IndexManifest, read_manifest
from clipvisionalign.search.mapped import MappedReader
from clipvisionalign.search.patches import PatchReader, open_patch_reader
from clipvisionalign.search.storage import Storage, as_storage
from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import read_caption_table, read_image_table
from clipvisionalign.search.unreachable import MissingShard
from clipvisionalign.search.vectors import InMemoryVectors, exact_cosines

#: Queries that the database answers at a time.
TABLE_SEARCH_THREADS = 8
#: Rows beyond those that are wanted, by which it is noticed that others have the last one's cosine.
TIED_ROWS = 8
#: What distances may differ by from those that the database orders its rows by, in float32.
DATABASE_ROUNDING = 1e-6
CAPTION_COLUMNS = ("id", "text", "path")


@dataclass(frozen=True)
class VectorQuery:
    """A query as an index is searched with it.

    Attributes:
        vector: (D,), unit length, float32.
        count: Number of rows at most.
        where: A condition in SQL (`filters.filter_sql`), "" for none.
        captions: Whether captions are searched for.
    """

    vector: np.ndarray
    count: int
    where: str = ""
    captions: bool = False


@dataclass(frozen=True)
class NearestRows:
    """The rows of a query.

    Attributes:
        rows: Nearest first; "_distance" is 1 - cosine.
        missing: Shards that have not answered; none of a single index.
    """

    rows: list[dict[str, Any]]
    missing: tuple[MissingShard, ...] = ()


class IndexReader:
    """An index that is read and searched by vectors.

    Args:
        index: Path, URL or storage of the index.

    Attributes:
        manifest: Of the index.
        table: Reads the images.
        caption_table: Reads the captions; None for an index without any.
        mapped: Searches the memory-mapped files of an approximate index, where it has some.
        in_memory: The vectors of an exact index, once several queries have been searched for together.

    Raises:
        InvalidIndexError: There is no index, or it cannot be opened.
    """

    def __init__(self, index: str | Path | Storage) -> None:
        self.storage = as_storage(index)
        self.manifest: IndexManifest = read_manifest(index)
        self.table: TableReader = read_image_table(index)
        self.caption_table = read_caption_table(index)
        self.mapped = MappedReader(self.storage, self.table)
        self.in_memory: InMemoryVectors | None = None
        self._loading = threading.Lock()
        self._patches: tuple[PatchReader | None] | None = None

    @property
    def patches(self) -> PatchReader | None:
        """The patches that re-ranking reads; None for an index without any, on this machine until it has some."""
        if self._patches is None or (self._patches[0] is None and self.storage.is_local):
            self._patches = (open_patch_reader(self.storage),)
        return self._patches[0]

    @cached_property
    def late(self) -> LateReader:
        """What ranks all images by late interaction, where the index has the files for it."""
        return LateReader(self.storage, self.table)

    def search(self, queries: Sequence[VectorQuery], columns: Sequence[str]) -> list[NearestRows | Exception]:
        """Search for several queries.

        Args:
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            For each query its rows, or what the database cannot answer.
        """
        results: dict[int, NearestRows | Exception] = {}
        in_memory = [position for position, query in enumerate(queries) if self._searched_in_memory(query)]
        # Of one query the database finds the nearest as fast as it reads all vectors.
        if len(in_memory) > 1 or (in_memory and self.in_memory is not None):
            stored = self._load_in_memory(columns)
            vectors = np.stack([queries[position].vector for position in in_memory])
            nearest = stored.search(vectors, [queries[position].count for position in in_memory])
            results = {position: NearestRows(each) for position, each in zip(in_memory, nearest, strict=True)}
        others = [position for position in range(len(queries)) if position not in results]
        if len(others) == 1:
            # A thread takes as long to begin as a search of the lists.
            results[others[0]] = self._search_table(queries[others[0]], columns)
        elif others:
            with ThreadPoolExecutor(min(len(others), TABLE_SEARCH_THREADS)) as pool:
                rows = pool.map(lambda position: self._search_table(queries[position], columns), others)
                results |= dict(zip(others, rows, strict=True))
        return [results[position] for position in range(len(queries))]

    def _searched_in_memory(self, query: VectorQuery) -> bool:
        return self.manifest.kind == "exact" and not query.captions and not query.where

    def _load_in_memory(self, columns: Sequence[str]) -> InMemoryVectors:
        # Threads that ask at the same time wait for one to read all vectors.
        with self._loading:
            cached = self.in_memory
            if cached is None or (cached.version, cached.columns) != (self.table.version, tuple(columns)):
                cached = self.in_memory = InMemoryVectors(self.table, columns)
            return cached

    def _search_table(self, query: VectorQuery, columns: Sequence[str]) -> NearestRows | Exception:
        """The rows of one query by the database; or its error, which other queries do not have."""
        try:
            if query.captions:
                captions = self.caption_table
                if captions is None:
                    return NearestRows([])
                return NearestRows(
                    nearest_in_order(
                        lambda count: captions.nearest(query.vector, count, columns=CAPTION_COLUMNS), query.count
                    )
                )
            rows = self.mapped.nearest(query.vector, query.count, columns, query.where)
            if rows is None:
                rows = self._nearest(query, columns)
            return NearestRows(rows)
        except Exception as error:
            return error

    def _nearest(self, query: VectorQuery, columns: Sequence[str]) -> list[dict[str, Any]]:
        kind = self.manifest.kind

        def nearest(count: int) -> list[dict[str, Any]]:
            rows = self.table.nearest(query.vector, count, kind, (*columns, "vector"), query.where)
            vectors = np.array([row.pop("vector") for row in rows], dtype=np.float32).reshape(
                len(rows), len(query.vector)
            )
            # As in memory: the cosine of a row does not depend on who computes it.
            return [
                row | {"_distance": 1.0 - cosine}
                for row, cosine in zip(rows, exact_cosines(vectors, query.vector).tolist(), strict=True)
            ]

        return nearest_in_order(nearest, query.count)


def nearest_in_order(nearest: Callable[[int], list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The nearest rows; of equal distances those of the least numbers, which a database does not see to.

    Args:
        nearest: Gives so many of the nearest rows.
        count: Number of rows at most.

    Returns:
        Rows, nearest first.
    """
    more = TIED_ROWS
    while True:
        rows = sorted(nearest(count + more), key=_distance_and_number)
        if len(rows) < count + more or rows[-1]["_distance"] > rows[count - 1]["_distance"] + DATABASE_ROUNDING:
            return rows[:count]
        more *= 4


def merge_rows(parts: Sequence[Sequence[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The nearest rows of several lists of the nearest: those of a single index that holds all their rows.

    Args:
        parts: For each shard its nearest rows, `count` of them where it has so many.
        count: Number of rows at most.

    Returns:
        Rows, nearest first; of equal distances those of the least numbers first.

    >>> merge_rows([[{"id": 3, "_distance": 0.1}], [{"id": 1, "_distance": 0.1}, {"id": 2, "_distance": 0.2}]], 2)
    [{'id': 1, '_distance': 0.1}, {'id': 3, '_distance': 0.1}]
    """
    return sorted((row for rows in parts for row in rows), key=_distance_and_number)[:count]


def _distance_and_number(row: dict[str, Any]) -> tuple[float, int]:
    return row["_distance"], row["id"]
