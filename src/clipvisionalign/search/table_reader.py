"""Reading the tables of an index by pylance (`import lance`), which loads much faster than LanceDB's client.

Both read the same files by the same engine. LanceDB's client takes its place where pylance is not installed, or is
older than the tables.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from clipvisionalign.search.storage import Storage
from clipvisionalign.search.unreachable import MissingShard

#: Delay after which an open index returns what another process has written.
READ_CONSISTENCY_INTERVAL = timedelta(seconds=5)
#: Kinds of an index whose table has no approximate index of its own: of "IVF" that is beside it
#: (`mapped/`), as that of "HNSW" was.
EXACT_KINDS = ("exact", "IVF", "HNSW")


def rows_condition(ids: Iterable[int]) -> str:
    """The condition that selects rows by their numbers.

    Args:
        ids: Values of the column "id", one or more.

    Returns:
        A condition in SQL.

    >>> rows_condition([3, 7])
    'id IN (3, 7)'
    """
    return f"id IN ({', '.join(str(int(each)) for each in ids)})"


class TableReader(ABC):
    """A table of an index, to read from."""

    @property
    @abstractmethod
    def source(self) -> Any:
        """What is read: an object with the schema, the version and the number of rows of the table as it is now."""

    @property
    def schema(self) -> Any:
        """Its Arrow schema."""
        return self.source.schema

    @property
    def version(self) -> int:
        """The version that is read; another process's writes raise it."""
        return int(self.source.version)

    def count_rows(self) -> int:
        """The number of rows."""
        return int(self.source.count_rows())

    @abstractmethod
    def read(self, columns: Sequence[str], where: str = "", limit: int | None = None) -> Any:
        """Some columns of some rows.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.
            limit: Number of rows at most; None for all.

        Returns:
            An Arrow table.

        Raises:
            RuntimeError: The engine cannot answer.
        """

    @property
    def unreachable(self) -> tuple[MissingShard, ...]:
        """The shards that cannot be read now, as far as is known; none of a table without shards."""
        return ()

    def read_reachable(self, columns: Sequence[str], where: str = "") -> tuple[Any, tuple[MissingShard, ...]]:
        """Some columns of some rows, of a table in shards without those that cannot be read now.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.

        Returns:
            An Arrow table, and the shards that it lacks.

        Raises:
            RuntimeError: The engine cannot answer.
            OSError: Nothing can be read.
        """
        return self.read(columns, where), ()

    def rows(self, ids: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of rows by their numbers.

        Args:
            ids: Values of the column "id", one or more, each once.
            columns: The columns.

        Returns:
            The rows that there are, in no particular order.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        return list(self.read(columns, rows_condition(ids)).to_pylist())

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, a part at a time.

        Args:
            columns: Their names.

        Yields:
            Arrow tables, of which all rows together are those of `read`.
        """

    @abstractmethod
    def nearest(
        self, vector: np.ndarray, count: int, kind: str = "exact", columns: Sequence[str] = (), where: str = ""
    ) -> list[dict[str, Any]]:
        """The rows whose vectors are nearest to a query's.

        Args:
            vector: The query, (D,).
            count: Number of rows at most.
            kind: Kind of the index, as in the manifest.
            columns: The columns that are read.
            where: A condition in SQL (`filters.filter_sql`), "" for none.

        Returns:
            Rows, nearest first; "_distance" is 1 - cosine.

        Raises:
            RuntimeError: The engine cannot answer.
        """


def ann_options(kind: str, count: int) -> dict[str, int]:
    """How widely an approximate index is searched.

    Wide enough that hardly one of the nearest is missed; the first candidates are compared again by exact vectors.

    Args:
        kind: Kind of the index, as in the manifest.
        count: Number of rows that are wanted.

    Returns:
        "nprobes", "refine_factor", and for graphs "ef"; empty for an exact search.
    """
    if kind in EXACT_KINDS:
        return {}
    if kind == "IVF_PQ":
        return {"nprobes": 48, "refine_factor": 20}
    return {"nprobes": 32, "ef": max(200, 4 * count), "refine_factor": 4}


def _as_tables(batches: Iterable[Any]) -> Iterator[Any]:
    """Record batches as Arrow tables."""
    import pyarrow as arrow

    for batch in batches:
        yield arrow.Table.from_batches([batch])


class LanceReader(TableReader):
    """A table that pylance reads.

    Args:
        location: Its path or URL.

    Raises:
        ModuleNotFoundError: pylance is not installed.
        ValueError: There is no table.
        OSError: The table cannot be read.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._dataset = self._open()
        self._checked = time.monotonic()

    def _open(self) -> Any:
        import lance

        return lance.dataset(self.location)

    @property
    def source(self) -> Any:
        """The table as it was `READ_CONSISTENCY_INTERVAL` ago, or is now."""
        now = time.monotonic()
        if now - self._checked >= READ_CONSISTENCY_INTERVAL.total_seconds():
            if self._dataset.latest_version != self._dataset.version:
                # Another object: searches that are running keep the former.
                self._dataset = self._open()
            # Not before: while it cannot be read, each query finds so, as what memory holds may be of another version.
            self._checked = now
        return self._dataset

    def read(self, columns: Sequence[str], where: str = "", limit: int | None = None) -> Any:
        """Some columns of some rows, see `TableReader`.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.
            limit: Number of rows at most; None for all.

        Returns:
            An Arrow table.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        return self._scan(columns=list(columns), filter=where or None, limit=limit)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, a part at a time, see `TableReader`.

        Args:
            columns: Their names.

        Returns:
            Arrow tables, one after another.
        """
        return _as_tables(self.source.to_batches(columns=list(columns)))

    def nearest(
        self, vector: np.ndarray, count: int, kind: str = "exact", columns: Sequence[str] = (), where: str = ""
    ) -> list[dict[str, Any]]:
        """The rows whose vectors are nearest to a query's, see `TableReader`.

        Args:
            vector: The query, (D,).
            count: Number of rows at most.
            kind: Kind of the index, as in the manifest.
            columns: The columns that are read.
            where: A condition in SQL, "" for none.

        Returns:
            Rows, nearest first; "_distance" is 1 - cosine.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        nearest = {
            "column": "vector", "q": np.asarray(vector, dtype=np.float32), "k": count, "metric": "dot",
            "use_index": kind not in EXACT_KINDS, **ann_options(kind, count),
        }  # fmt: skip
        rows = self._scan(
            columns=[*columns, "_distance"], nearest=nearest, filter=where or None, prefilter=bool(where)
        ).to_pylist()
        return list(rows)

    def _scan(self, **options: Any) -> Any:
        try:
            return self.source.to_table(**options)
        except ValueError as error:
            # What a user may have to correct was checked before.
            raise RuntimeError(f"lance error: {error}") from error


class LanceDBReader(TableReader):
    """A table that LanceDB's client reads.

    Args:
        table: The LanceDB table.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    @property
    def source(self) -> Any:
        """The LanceDB table."""
        return self.table

    def read(self, columns: Sequence[str], where: str = "", limit: int | None = None) -> Any:
        """Some columns of some rows, see `TableReader`.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.
            limit: Number of rows at most; None for all.

        Returns:
            An Arrow table.
        """
        query = self._select(columns, limit)
        return (query.where(where) if where else query).to_arrow()

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, a part at a time, see `TableReader`.

        Args:
            columns: Their names.

        Returns:
            Arrow tables, one after another.
        """
        return _as_tables(self._select(columns).to_batches())

    def _select(self, columns: Sequence[str], limit: int | None = None) -> Any:
        """A query of some columns of all rows, or of so many."""
        return self.table.search().select(list(columns)).limit(limit or max(1, self.count_rows()))

    def nearest(
        self, vector: np.ndarray, count: int, kind: str = "exact", columns: Sequence[str] = (), where: str = ""
    ) -> list[dict[str, Any]]:
        """The rows whose vectors are nearest to a query's, see `TableReader`.

        Args:
            vector: The query, (D,).
            count: Number of rows at most.
            kind: Kind of the index, as in the manifest.
            columns: The columns that are read.
            where: A condition in SQL, "" for none.

        Returns:
            Rows, nearest first; "_distance" is 1 - cosine.
        """
        query = self.table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
        query = query.distance_type("dot").select([*columns, "_distance"]).limit(count)
        if where:
            query = query.where(where, prefilter=True)
        if kind in EXACT_KINDS:
            query = query.bypass_vector_index()
        for name, value in ann_options(kind, count).items():
            query = getattr(query, name)(value)
        return list(query.to_list())


def open_reader(index: Storage, name: str) -> TableReader | None:
    """Open a table of an index to read from.

    Args:
        index: The storage of the index.
        name: The table.

    Returns:
        The reader; None where there is no such table that can be opened.

    Raises:
        ModuleNotFoundError: Neither pylance nor LanceDB is installed.
    """
    folder = f"{name}.lance"
    if not index.has_folder(folder):
        return None
    try:
        return LanceReader(f"{index.location}/{folder}")
    except (ImportError, ValueError, OSError):
        table = try_open_table(index, name)
        return None if table is None else LanceDBReader(table)


def connect(index: Storage) -> Any:
    """Open an index with LanceDB's client, to write to it.

    Args:
        index: The storage of the index.

    Returns:
        The LanceDB connection.

    Raises:
        ModuleNotFoundError: LanceDB is not installed.
    """
    with warnings.catch_warnings():
        # LanceDB warns of forked processes when it is imported; none is forked here.
        warnings.simplefilter("ignore")
        import lancedb

    return lancedb.connect(index.location, read_consistency_interval=READ_CONSISTENCY_INTERVAL)


def try_open_table(index: Storage, name: str) -> Any:
    """A table of LanceDB's client.

    Args:
        index: The storage of the index.
        name: The table.

    Returns:
        The LanceDB table; None where there is none of that name that can be opened.
    """
    try:
        return connect(index).open_table(name)
    except (ValueError, OSError):
        return None
