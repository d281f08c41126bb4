"""Searching an index by words, by images, or by several of both, weighted, and without unwanted terms.

A query is one vector (`queries.py`); the images with the greatest cosine are the result. Re-ranking orders the first of
them by pair scores of the late interaction or the fusion, by the patches that the index keeps, or from the images
themselves (`rerank.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvisionalign.search.calibration_files import (
    calibration_time,
    read_calibration,
    read_null_cosines,
    read_short_null_cosines,
)
from clipvisionalign.search.encoder import QueryEncoder
from clipvisionalign.search.hit_reranker import UNCALIBRATED_NOTE, HitReranker
from clipvisionalign.search.hits import HIT_COLUMNS, CaptionHit, Hit, to_caption_hits, to_hits
from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery
from clipvisionalign.search.promise import ResultAssessor
from clipvisionalign.search.queries import EncodedQuery, SearchQuery, encode_queries
from clipvisionalign.search.sharded_reader import ShardedReader, open_index_reader
from clipvisionalign.search.storage import Storage, as_storage
from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import metadata_columns
from clipvisionalign.search.terms import Term
from clipvisionalign.search.whole_index import asked_where, rank_whole_index

if TYPE_CHECKING:
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.search.metadata import ColumnType
    from clipvisionalign.search.vectors import InMemoryVectors

#: Images or captions, best first.
Hits = list[Hit] | list[CaptionHit]


class Searcher:
    """An open index.

    Words are searched for without PyTorch where the index has a text tower; the aligner that encoded the index is
    loaded when it is needed (`encoder.py`).

    Args:
        index: Path or URL of the index, in shards or not.
        run: Where the aligner is, if it was moved.
        device: Of the aligner.
        reader: Searches the index by vectors; None for `open_index_reader` of it.

    Attributes:
        index: Path or URL of the index.
        reader: Likewise.
        manifest: Of the index.
        encoder: Encodes the queries.
        table: Reads the images.
        caption_table: Reads the captions; None for an index without any.
        storage: Where the images are.

    Raises:
        InvalidIndexError: There is no index, the run has other weights, or it is not there and needed.
    """

    def __init__(
        self, index: str | Path, run: str | Path = "", device: str = "auto",
        reader: IndexReader | ShardedReader | None = None,
    ) -> None:  # fmt: skip
        self.index, self.reader = index, reader or open_index_reader(index)
        self.manifest = self.reader.manifest
        self.encoder = QueryEncoder(index, self.manifest, run, device, lambda: self.reader.patches is not None)
        self.table: TableReader = self.reader.table
        self.caption_table: TableReader | None = self.reader.caption_table
        self.storage = Storage(self.manifest.folder)
        self._index_storage = as_storage(index)
        self._assessor: tuple[int, ResultAssessor] | None = None
        self._metadata: tuple[int, dict[str, ColumnType]] = (-1, {})
        self._reranker = HitReranker(
            self.encoder, self.storage, self.rows, lambda: self.reader.patches,
            lambda: None if isinstance(self.reader, ShardedReader) else self.reader.late,
        )  # fmt: skip

    @property
    def run(self) -> Path:
        """The run folder of the aligner, or the name of a pretrained dual encoder."""
        return self.encoder.run

    @property
    def aligner(self) -> Aligner:
        """The aligner of the index, which is loaded when it is first asked for.

        Raises:
            InvalidIndexError: It is not there.
        """
        return self.encoder.aligner

    @property
    def metadata(self) -> dict[str, ColumnType]:
        """The metadata columns, and what they hold."""
        if self._metadata[0] != self.table.version:
            self._metadata = self.table.version, metadata_columns(self.table)
        return self._metadata[1]

    @property
    def assessor(self) -> ResultAssessor:
        """Adds to results up to where they hold what is meant, and that nothing fits; by the calibration of now."""
        written = calibration_time(self._index_storage)
        if self._assessor is not None and self._assessor[0] == written:
            return self._assessor[1]
        assessor = ResultAssessor(
            str(self.index), read_calibration(self.index, self.manifest.aligner), self.tokenizer,
            read_null_cosines(self.index), self.table.count_rows, read_short_null_cosines(self.index),
            self.encoder.token_limit,
        )  # fmt: skip
        self._assessor = written, assessor
        return assessor

    @property
    def in_memory(self) -> InMemoryVectors | None:
        """The vectors of an exact index, once several queries have been searched for together; None in shards."""
        return None if isinstance(self.reader, ShardedReader) else self.reader.in_memory

    def tokenizer(self) -> Any:
        """The tokenizer of the model's captions."""
        return self.encoder.tokenizer

    def search_batch(self, queries: Sequence[SearchQuery], waited: float = 0.0) -> list[Hits | Exception]:
        """Search for several queries, which are encoded together; each with its own count, filter and re-ranking.

        All searches take this way. A caption is tokenised and encoded once a call, re-ranking included.

        Args:
            queries: Any number.
            waited: Seconds that they have waited, which count in the time of a query that has one.

        Returns:
            For each query its hits, best first, as a `SearchResult`; or the error that it alone has: a ValueError (such
            as FilterError or ImageError) for what the user can correct, any other for what the database cannot answer.
        """
        if any(query.within for query in queries):
            # Loaded once in a process, and not counted.
            self.encoder.load()
            _ = self.assessor
        start, metadata = time.perf_counter(), self.metadata
        encoded = encode_queries(self.encoder, queries)
        asked: dict[int, VectorQuery] = {}
        results: dict[int, Hits | Exception] = {}
        for position, (query, each) in enumerate(zip(queries, encoded, strict=True)):
            try:
                if isinstance(each, ValueError):
                    raise each
                asked[position] = self._vector_query(
                    query, each, query.count if query.captions else query.depth, metadata
                )
            except Exception as error:
                results[position] = error
        nearest = self.reader.search(list(asked.values()), (*HIT_COLUMNS, *metadata))
        # Of several queries with a time each has its own, with its share of what was done for all together.
        share = waited + (time.perf_counter() - start) / max(1, len(queries))
        for position, answer in zip(asked, nearest, strict=True):
            each = encoded[position]
            assert isinstance(each, EncodedQuery)
            begun = time.perf_counter() - share
            results[position] = self._finish(queries[position], each, answer, metadata, begun)
        return [results[position] for position in range(len(queries))]

    def _vector_query(
        self, query: SearchQuery, encoded: EncodedQuery, count: int, metadata: dict[str, ColumnType]
    ) -> VectorQuery:
        """A query as the index is searched with it. Raises ValueError for what it cannot be searched for."""
        if query.captions and self.caption_table is None:
            raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
        return VectorQuery(encoded.vector, count, asked_where(query, metadata), query.captions)

    def _finish(
        self, query: SearchQuery, encoded: EncodedQuery, answer: NearestRows | Exception,
        metadata: dict[str, ColumnType], start: float,
    ) -> Hits | Exception:  # fmt: skip
        """The hits of one query, which began at `start`, with their verdict, re-ranked, up to its count."""
        if isinstance(answer, Exception):
            return answer
        missing = dict.fromkeys(answer.missing)

        def deeper(depth: int) -> Hits:
            """So many of the nearest images, for a promise that needs more than were read."""
            asked = self._vector_query(query, encoded, depth, metadata)
            (rows,) = self.reader.search([asked], (*HIT_COLUMNS, *metadata))
            if isinstance(rows, Exception):
                raise rows
            missing.update(dict.fromkeys(rows.missing))
            return to_hits(rows.rows, metadata)

        try:
            hits: Hits = to_caption_hits(answer.rows) if query.captions else to_hits(answer.rows, metadata)
            result = self.assessor.assess(query, hits, deeper).without_shards(list(missing))
            if query.within:
                margin = self.assessor.rerank_margin
                reordered, spent = self._reranker.rerank_within(query, encoded.captions, result, margin, start)
                result = result.with_hits(reordered).with_time(spent, "" if margin else UNCALIBRATED_NOTE)
            elif query.late and (result or not result.reason):
                where = asked_where(query, metadata)
                ranked = rank_whole_index(self.encoder, self.reader, query, encoded, where, metadata)
                result = result.ranked_otherwise(*ranked)
            elif query.rerank:
                result = result.with_hits(self._reranker.rerank(query, encoded.captions, result))
        except Exception as error:
            return error
        return result.with_hits(result[: query.count])

    def search_one(self, query: SearchQuery, waited: float = 0.0) -> Hits:
        """`search_batch` of one query.

        Args:
            query: The query.
            waited: As in `search_batch`.

        Returns:
            Its hits, best first.

        Raises:
            Exception: Its error.
        """
        (result,) = self.search_batch([query], waited)
        if isinstance(result, Exception):
            raise result
        return result

    def search(self, terms: Sequence[Term], count: int = 10, where: str = "", rerank: int = 0) -> list[Hit]:
        """Search for images by terms.

        Args:
            terms: Words and images, unwanted ones included.
            count: Number of images.
            where: A filter (`filters.py`), "" for none.
            rerank: Number of first images that are ordered by pair scores, 0 for none.

        Returns:
            The hits, best first.

        Raises:
            ValueError: The query cannot be answered; FilterError and ImageError are such errors.
        """
        hits = self.search_one(SearchQuery(terms, count, where, rerank))
        return [hit for hit in hits if isinstance(hit, Hit)]

    def search_vector(
        self, vector: np.ndarray, count: int = 10, where: str = "", rerank: int = 0, terms: Sequence[Term] = ()
    ) -> list[Hit]:
        """Search for images by a vector.

        Args:
            vector: Unit length, (D,).
            count: Number of images.
            where: A filter, "" for none.
            rerank: Number of first images that are ordered by pair scores with `terms`, 0 for none.
            terms: Words, for re-ranking.

        Returns:
            The hits, best first.

        Raises:
            ValueError: As `search`.
        """
        hits = self.search_one(SearchQuery(terms, count, where, rerank, vector=vector))
        return [hit for hit in hits if isinstance(hit, Hit)]

    def rerank(self, hits: Sequence[Hit], terms: Sequence[Term], first: int) -> list[Hit]:
        """Order the first of some hits by their pair scores with words; images that are gone come after them.

        Args:
            hits: N hits.
            terms: Words, unwanted ones included.
            first: Number of hits that are ordered.

        Returns:
            The N hits.

        Raises:
            ValueError: The design has nothing to re-rank with, or a term is an image.
        """
        query = SearchQuery(terms, max(1, len(hits)), rerank=first)
        (encoded,) = encode_queries(self.encoder, [query])
        if isinstance(encoded, ValueError):
            raise encoded
        return self._reranker.rerank(query, encoded.captions, hits)

    def captions(self, vector: np.ndarray, count: int = 10) -> list[CaptionHit]:
        """Search for captions by a vector, such as that of an image.

        Args:
            vector: Unit length, (D,).
            count: Number of captions.

        Returns:
            The hits, best first.

        Raises:
            ValueError: The index has no captions.
        """
        hits = self.search_one(SearchQuery(count=count, captions=True, vector=vector))
        return [hit for hit in hits if isinstance(hit, CaptionHit)]

    def encode(self, terms: Sequence[Term]) -> np.ndarray:
        """The vector of a query.

        Args:
            terms: Words and images, unwanted ones included.

        Returns:
            The vector, (D,), unit length, float32.

        Raises:
            ValueError: There is nothing to search for, or the terms cancel each other.
            ImageError: An image cannot be opened.
        """
        (encoded,) = encode_queries(self.encoder, [SearchQuery(terms)])
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded.vector

    def image_source(self, image_id: int) -> Path | bytes:
        """The source of an image.

        Args:
            image_id: Its number in the index.

        Returns:
            What `open_image` takes.

        Raises:
            KeyError: The index has no such image, or its file is gone.
        """
        raw = self.value(image_id, "raw")
        if not self.storage.has_file(raw):
            raise KeyError(f"image {image_id} is no longer where it was; index the folder again")
        return self.storage.image_source(raw)

    def value(self, image_id: int, column: str) -> Any:
        """The value of a column for an image.

        Args:
            image_id: Its number in the index.
            column: The column.

        Returns:
            The value.

        Raises:
            KeyError: The index has no such image.
        """
        rows = self.rows([image_id], (column,))
        if not rows:
            raise KeyError(f"no image {image_id} in this index")
        return rows[0][column]

    def rows(self, ids: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of some images.

        Args:
            ids: Numbers of images.
            columns: The columns.

        Returns:
            Rows in no particular order.
        """
        return self.table.rows(ids, columns) if ids else []

    def values(self, ids: Sequence[int], column: str) -> dict[int, Any]:
        """The value of a column for each of some images.

        Args:
            ids: Numbers of images.
            column: The column.

        Returns:
            For each number the value.
        """
        return {row["id"]: row[column] for row in self.rows(sorted(set(ids)), ("id", column))}

    def vector_of(self, image_id: int) -> np.ndarray:
        """The vector of an image.

        Args:
            image_id: Its number in the index.

        Returns:
            The vector, (D,), float32.

        Raises:
            KeyError: The index has no such image.
        """
        return np.asarray(self.value(image_id, "vector"), dtype=np.float32)
