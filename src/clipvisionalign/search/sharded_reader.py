"""Reading and searching an index in shards as if it were a single one.

What every shard answers is merged here, whether they are read by this process or asked
elsewhere (`ask`). A shard that does not answer, or cannot be read, is named with the result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipvisionalign.search.hits import MissingShard
from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery, merge_rows
from clipvisionalign.search.manifest import read_shards, read_whole_manifest, shard_storage
from clipvisionalign.search.patches import PatchReader
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import ShardUnavailable, TableReader, is_unreadable

logger = logging.getLogger(__name__)

#: Seconds for which a shard is down after it could not be read.
FAILURE_SECONDS = 10.0


class PendingRows(Protocol):
    """The answer of a shard that has been asked."""

    def result(self) -> list[NearestRows | Exception]:
        """Wait for the answer.

        Returns:
            The rows of each query, or its error.

        Raises:
            ShardUnavailable: There is none.
        """


#: Asks a shard: by its number, the queries and the columns that are read.
AskShard = Callable[[int, Sequence[VectorQuery], Sequence[str]], PendingRows]


class ShardedTable(TableReader):
    """The tables of all shards as one; its columns are those that all of them have.

    Args:
        tables: One for each shard.
    """

    _ASK: Mapping[str, Callable[[TableReader], Any]] = {
        "schema": lambda table: table.schema,
        "version": lambda table: table.version,
        "count": lambda table: table.count_rows(),
    }

    def __init__(self, tables: Sequence[TableReader]) -> None:
        self.tables = tuple(tables)
        #: What each answered last, which holds while it cannot be read.
        self._last = {name: [ask(table) for table in self.tables] for name, ask in self._ASK.items()}

    def _of_each(self, name: str) -> list[Any]:
        known = self._last[name]
        for position, table in enumerate(self.tables):
            try:
                known[position] = self._ASK[name](table)
            except Exception as error:
                if not is_unreadable(error):
                    raise
        return list(known)

    @property
    def source(self) -> Any:
        """The table of the first shard."""
        return self.tables[0].source

    @property
    def schema(self) -> Any:
        """The columns that all shards have, an Arrow schema."""
        import pyarrow as arrow

        first, *others = self._of_each("schema")
        types = [{field.name: field.type for field in schema} for schema in others]
        return arrow.schema([field for field in first if all(each.get(field.name) == field.type for each in types)])

    @property
    def version(self) -> int:
        """A number that changes with the version of any shard."""
        return hash(tuple(self._of_each("version")))

    @property
    def counts(self) -> list[int]:
        """The number of rows of each shard."""
        return self._of_each("count")

    def count_rows(self) -> int:
        """The number of rows of all shards."""
        return sum(self.counts)

    def rows(self, ids: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of rows by their numbers, see `TableReader`; a shard that cannot be read may have none of them.

        Args:
            ids: Values of the column "id", one or more, each once.
            columns: The columns.

        Returns:
            The rows that there are, in no particular order.

        Raises:
            OSError: A row may be in a shard that cannot be read.
            RuntimeError: The engine cannot answer.
        """
        ids, rows, unreadable = list(ids), [], None
        for table in self.tables:
            try:
                rows += table.rows(ids, columns)
            except Exception as error:
                if not is_unreadable(error):
                    raise
                unreadable = error
        if unreadable is not None and len(rows) < len(ids):
            raise OSError(f"a shard cannot be read: {unreadable}") from unreadable
        return rows

    def read(self, columns: Sequence[str], where: str = "", limit: int | None = None) -> Any:
        """Some columns of some rows, shard after shard, see `TableReader`.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.
            limit: Number of rows at most; None for all.

        Returns:
            An Arrow table.

        Raises:
            RuntimeError: The engine cannot answer.
        """
        import pyarrow as arrow

        parts = [table.read(columns, where, limit) for table in self.tables]
        whole = arrow.concat_tables(parts)
        return whole if limit is None else whole.slice(0, limit)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, a part at a time, see `TableReader`.

        Args:
            columns: Their names.

        Yields:
            Arrow tables.
        """
        for table in self.tables:
            yield from table.batches(columns)

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
        read = tuple(dict.fromkeys(("id", *columns)))
        return merge_rows([table.nearest(vector, count, kind, read, where) for table in self.tables], count)


class ShardedPatches(PatchReader):
    """The patches of all shards as one.

    Args:
        readers: Those of the shards that have patches, stored alike.
    """

    def __init__(self, readers: Sequence[PatchReader]) -> None:
        super().__init__(readers[0].index, readers[0].settings, readers[0].table)
        self.readers = tuple(readers)

    def read(self, images: Mapping[int, str]) -> dict[int, np.ndarray]:
        """The patches of some images, see `PatchReader`.

        Args:
            images: By the number of each image, the hash of its content.

        Returns:
            For each number its patches; an image without is left out.

        Raises:
            InvalidIndexError: A row is damaged.
        """
        read: dict[int, np.ndarray] = {}
        for reader in self.readers:
            try:
                read |= reader.read(images)
            except Exception as error:
                # Damage is an error; what a shard that cannot be read holds is left out.
                if isinstance(error, InvalidIndexError) or not is_unreadable(error):
                    raise
        return read


class ShardedReader:
    """An index in shards that is read and searched as a single one (`IndexReader`).

    Args:
        index: Path, URL or storage of the index.
        ask: Asks a shard for its nearest rows; None where this process searches them.
        is_up: Whether a shard, by its number, answers; None where this process searches them.

    Attributes:
        manifest: Of all shards together.
        names: Of the shards.
        readers: One for each shard.
        table: Reads the images.
        caption_table: Reads the captions; None for an index without any.

    Raises:
        InvalidIndexError: There is no index in shards, or a shard is missing or cannot be opened.
    """

    def __init__(
        self, index: str | Path | Storage, ask: AskShard | None = None,
        is_up: Callable[[int], bool] | None = None,
    ) -> None:  # fmt: skip
        self.manifest = read_whole_manifest(index)
        shards = read_shards(index)
        self.names = shards.shards if shards else [""]
        self.readers = [IndexReader(shard_storage(index, name)) for name in self.names]
        self.table = ShardedTable([reader.table for reader in self.readers])
        captions = [reader.caption_table for reader in self.readers if reader.caption_table is not None]
        self.caption_table = ShardedTable(captions) if captions else None
        self.ask: AskShard = ask or self._ask_here
        self._is_up = is_up
        #: When a shard last could not be read that has not answered since.
        self._failures: dict[int, float] = {}
        self._pool = ThreadPoolExecutor(len(self.names), thread_name_prefix="shard")

    @cached_property
    def patches(self) -> ShardedPatches | None:
        """The patches that re-ranking reads; None where no shard has any."""
        readers = [reader.patches for reader in self.readers if reader.patches is not None]
        alike = [each for each in readers if each.settings == readers[0].settings]
        return ShardedPatches(alike) if alike else None

    def states(self) -> list[dict[str, Any]]:
        """The shards as JSON.

        Returns:
            For each its "shard", a name, its number of "images", and whether it is "up".
        """
        return [
            {"shard": name, "images": images, "up": self._is_readable(shard)}
            for shard, (name, images) in enumerate(zip(self.names, self.table.counts, strict=True))
        ]

    def _is_readable(self, shard: int) -> bool:
        failed = self._failures.get(shard, -FAILURE_SECONDS)
        return time.monotonic() - failed >= FAILURE_SECONDS and (self._is_up is None or self._is_up(shard))

    def _ask_here(
        self, shard: int, queries: Sequence[VectorQuery], columns: Sequence[str]
    ) -> Future[list[NearestRows | Exception]]:
        return self._pool.submit(self.readers[shard].search, queries, columns)

    def search(self, queries: Sequence[VectorQuery], columns: Sequence[str]) -> list[NearestRows | Exception]:
        """Search all shards for several queries, at the same time.

        Args:
            queries: Any number.
            columns: The columns of images that are read, "id" among them.

        Returns:
            For each query the rows that a single index would have, and the shards that have not answered; or the error
            that a shard has with it, or all shards where none has answered.
        """
        pending = [self.ask(shard, queries, columns) for shard in range(len(self.names))] if queries else []
        responses = [self._wait(shard, each, len(queries)) for shard, each in enumerate(pending)]
        return [
            self._merge([each[position] for each in responses], query.count) for position, query in enumerate(queries)
        ]

    def _wait(self, shard: int, pending: PendingRows, count: int) -> list[NearestRows | Exception]:
        """What a shard answers to each of so many queries."""
        try:
            responses = pending.result()
        except Exception as error:
            responses = [error] * count
        failure = next((each for each in responses if isinstance(each, Exception) and is_unreadable(each)), None)
        was_readable = shard not in self._failures
        if failure is None:
            self._failures.pop(shard, None)
        else:
            self._failures[shard] = time.monotonic()
            if was_readable and not isinstance(failure, ShardUnavailable):
                name = self.names[shard] or "its only shard"
                logger.warning(f"{name} cannot be read, until then results are incomplete: {failure}")
        return responses

    def _merge(self, responses: Sequence[NearestRows | Exception], count: int) -> NearestRows | Exception:
        errors = {shard: each for shard, each in enumerate(responses) if isinstance(each, Exception)}
        for error in errors.values():
            if len(errors) == len(responses) or not is_unreadable(error):
                return error
        counts = self.table.counts if errors else []
        missing = tuple(MissingShard(self.names[shard], counts[shard]) for shard in errors)
        rows = [each.rows for each in responses if isinstance(each, NearestRows)]
        return NearestRows(merge_rows(rows, count), missing)


def open_index_reader(index: str | Path | Storage) -> IndexReader | ShardedReader:
    """Open an index to read and to search by vectors.

    Args:
        index: Path, URL or storage of an index, in shards or not.

    Returns:
        The reader.

    Raises:
        InvalidIndexError: There is no index, or it cannot be opened.
    """
    return IndexReader(index) if read_shards(index) is None else ShardedReader(index)
