"""Reading and searching an index in shards as if it were a single one.

What every shard answers is merged here, whether they are read by this process or asked
elsewhere (`ask`). A shard that does not answer, or cannot be read, is named with the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery, merge_rows
from clipvisionalign.search.manifest import read_shards, read_whole_manifest, shard_storage
from clipvisionalign.search.patches import PatchReader
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.unreachable import MissingShard, ShardUnavailable, is_unreadable

logger = logging.getLogger(__name__)

_Shard = TypeVar("_Shard")
_Part = TypeVar("_Part", bound=Sized)


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


def _read_all(shards: Iterable[_Shard], read: Callable[[_Shard], _Part], wanted: int) -> list[_Part]:
    """What shards hold of so many images; one that cannot be read is passed over where the others hold them all."""
    parts: list[_Part] = []
    unreadable: Exception | None = None
    for shard in shards:
        try:
            parts.append(read(shard))
        except Exception as error:
            if not is_unreadable(error):
                raise
            unreadable = error
    if unreadable is not None and sum(map(len, parts)) < wanted:
        raise unreadable
    return parts


class ShardedTable(TableReader):
    """The tables of all shards as one; its columns are those that all of them have.

    Args:
        tables: One for each shard.
        names: Of the shards.

    Attributes:
        is_readable: Of each shard, whether it could be read when it was last asked for something.
    """

    _ASK: Mapping[str, Callable[[TableReader], Any]] = {
        "schema": lambda table: table.schema,
        "version": lambda table: table.version,
        "count": lambda table: table.count_rows(),
    }

    def __init__(self, tables: Sequence[TableReader], names: Sequence[str] = ()) -> None:
        self.tables, self.names = tuple(tables), tuple(names)
        self.is_readable = [True] * len(self.tables)
        #: What each answered last, which holds while it cannot be read.
        self._last = {name: [ask(table) for table in self.tables] for name, ask in self._ASK.items()}

    def _of_each(self, name: str) -> list[Any]:
        for position, table in enumerate(self.tables):
            try:
                self._last[name][position] = self._ASK[name](table)
                self.is_readable[position] = True
            except Exception as error:
                if not is_unreadable(error):
                    raise
                self.is_readable[position] = False
        return list(self._last[name])

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
        ids = list(ids)
        parts = _read_all(self.tables, lambda table: table.rows(ids, columns), len(ids))
        return [row for part in parts for row in part]

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

    @property
    def unreachable(self) -> tuple[MissingShard, ...]:
        """The shards that cannot be read now, as far as is known."""
        counts = self.counts
        return tuple(
            MissingShard(name, count)
            for name, count, up in zip(self.names, counts, self.is_readable, strict=False)
            if not up
        )

    def read_reachable(self, columns: Sequence[str], where: str = "") -> tuple[Any, tuple[MissingShard, ...]]:
        """Some columns of some rows of the shards that can be read now, see `TableReader`.

        Args:
            columns: Their names.
            where: A condition in SQL, "" for none.

        Returns:
            An Arrow table, and the shards that it lacks.

        Raises:
            RuntimeError: The engine cannot answer.
            ShardUnavailable: No shard can be read.
        """
        import pyarrow as arrow

        parts, errors = [], {}
        for position, table in enumerate(self.tables):
            try:
                parts.append(table.read(columns, where))
            except Exception as error:
                if not is_unreadable(error):
                    raise
                errors[position] = error
        if not parts:
            raise ShardUnavailable(f"no shard answers now: {next(iter(errors.values()))}")
        counts = self.counts if errors else []
        missing = tuple(MissingShard(self.names[position], counts[position]) for position in errors)
        return arrow.concat_tables(parts), missing

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
            OSError: A shard that may have some cannot be read.
        """
        parts = _read_all(self.readers, lambda reader: reader.read(images), len(images))
        return {number: patches for part in parts for number, patches in part.items()}


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
        self.table = ShardedTable([reader.table for reader in self.readers], self.names)
        captions = [reader.caption_table for reader in self.readers if reader.caption_table is not None]
        self.caption_table = ShardedTable(captions) if captions else None
        self.ask: AskShard = ask or self._ask_here
        self._is_up = is_up
        #: Shards that could not be read, and have not answered since.
        self._unreadable: set[int] = set()
        self._pool = ThreadPoolExecutor(len(self.names), thread_name_prefix="shard")

    @property
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
        counts = self.table.counts
        if self._is_up is None:
            up = self.table.is_readable
        else:
            up = [self._is_up(shard) and shard not in self._unreadable for shard in range(len(self.names))]
        return [
            {"shard": name, "images": images, "up": each}
            for name, images, each in zip(self.names, counts, up, strict=True)
        ]

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
        failures = [each for each in responses if isinstance(each, Exception) and is_unreadable(each)]
        # One that does not answer may be slow and no more; whoever asks it knows whether it runs.
        unreadable = [each for each in failures if not isinstance(each, ShardUnavailable)]
        if unreadable and shard not in self._unreadable:
            self._unreadable.add(shard)
            name = self.names[shard] or "its only shard"
            logger.warning(f"{name} cannot be read, until then results are incomplete: {unreadable[0]}")
        elif not failures:
            self._unreadable.discard(shard)
        return responses

    def _merge(self, responses: Sequence[NearestRows | Exception], count: int) -> NearestRows | Exception:
        errors = {shard: each for shard, each in enumerate(responses) if isinstance(each, Exception)}
        of_query = [each for each in errors.values() if not is_unreadable(each)]
        if of_query:
            return of_query[0]
        if len(errors) == len(responses):
            return ShardUnavailable(f"no shard answers now: {next(iter(errors.values()))}")
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
