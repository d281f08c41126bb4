"""Searching an index by words, by images, or by several of both, weighted, and without unwanted terms.

The query is one vector (`terms.py`); the images with the greatest cosine are the result. Re-ranking orders the first of
them by pair scores of the late interaction or the fusion, which read the images themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.images import ImageError
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.ann import search_table
from clipvisionalign.search.filters import FILTER_COLUMNS, filter_sql
from clipvisionalign.search.hits import HIT_COLUMNS, CaptionHit, Hit, to_hits
from clipvisionalign.search.manifest import IndexManifest, aligner_fingerprint, read_manifest
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.tables import metadata_columns, open_caption_table, open_image_table
from clipvisionalign.search.terms import Term, combine_terms
from clipvisionalign.search.vectors import InMemoryVectors


class Searcher:
    """An opened index with the aligner that made it.

    run: where the aligner is now, if it was moved. Raises InvalidIndexError where it is another one than the index was
    made by.
    """

    def __init__(self, index: str | Path, run: str | Path = "", device: str = "auto") -> None:
        self.manifest: IndexManifest = read_manifest(index)
        self.run = Path(run or self.manifest.run)
        if not (self.run / "model.safetensors").is_file():
            raise InvalidIndexError(f"{index}: its aligner {self.run} is not there; say where it is with --run")
        if aligner_fingerprint(self.run) != self.manifest.aligner:
            raise InvalidIndexError(f"{index}: it was made by another aligner than {self.run}")
        self.aligner: Aligner = load_aligner(self.run, device)
        self.table, self.caption_table = open_image_table(index), open_caption_table(index)
        self.storage = Storage(self.manifest.folder)
        self.in_memory: InMemoryVectors | None = None

    @property
    def metadata(self) -> dict[str, bool]:
        """The columns that came as metadata, and whether they hold numbers."""
        return metadata_columns(self.table)

    def encode(self, terms: Sequence[Term]) -> np.ndarray:
        """The query's vector (D,), unit length. Raises ValueError for no terms, or terms that take each other away;
        ImageError."""
        text_terms = [term for term in terms if not term.is_image]
        image_terms = [term for term in terms if term.is_image]
        vectors = (
            [self.aligner.encode_captions([str(term.content) for term in text_terms]).numpy()] if text_terms else []
        )
        vectors += [self.aligner.encode_images([term.content for term in image_terms]).numpy()] if image_terms else []
        return combine_terms(
            [*text_terms, *image_terms], np.concatenate(vectors) if vectors else np.empty((0, self.manifest.width))
        )

    def search_batch(self, queries: Sequence[tuple[Sequence[Term], int]]) -> list[list[Hit] | np.ndarray | ValueError]:
        """Several queries of words, with the number of pictures that each wants: encoded together.

        Where the index is exact they are searched together too; else, and for 0 pictures, a query's vector is given.
        What is wrong with one query stands in its place.
        """
        encoded = self.aligner.encode_captions([str(term.content) for terms, _ in queries for term in terms]).numpy()
        vectors: list[np.ndarray | ValueError] = []
        start = 0
        for terms, _ in queries:
            try:
                vectors.append(combine_terms(terms, encoded[start : start + len(terms)]))
            except ValueError as error:
                vectors.append(error)
            start += len(terms)
        results: list[list[Hit] | np.ndarray | ValueError] = [*vectors]
        exact_queries = [(position, vector, queries[position][1]) for position, vector in enumerate(vectors)
                if isinstance(vector, np.ndarray) and queries[position][1]]  # fmt: skip
        if self.manifest.kind == "exact" and exact_queries:
            positions, query_vectors, counts = zip(*exact_queries, strict=True)
            metadata = self.metadata
            rows = self._load_in_memory((*HIT_COLUMNS, *metadata)).search(np.stack(query_vectors), counts)
            for position, query_rows in zip(positions, rows, strict=True):
                results[position] = to_hits(query_rows, metadata)
        return results

    def _load_in_memory(self, columns: Sequence[str]) -> InMemoryVectors:
        cached = self.in_memory
        if cached is None or (cached.version, cached.columns) != (self.table.version, tuple(columns)):
            cached = self.in_memory = InMemoryVectors(self.table, columns)
        return cached

    def search(self, terms: Sequence[Term], count: int = 10, where: str = "", rerank: int = 0) -> list[Hit]:
        """The `count` best pictures. where: a filter (`search/filters.py`); rerank: so many first ones are put into a
        new order by pair scores. Raises ValueError and what `encode` raises."""
        return self.search_vector(self.encode(terms), count, where, rerank, terms)

    def search_vector(
        self, vector: np.ndarray, count: int = 10, where: str = "", rerank: int = 0, terms: Sequence[Term] = ()
    ) -> list[Hit]:
        """`search` by a vector that is known already."""
        if count < 1:
            raise ValueError(f"at least 1 picture can be found, not {count}")
        metadata = self.metadata
        sql = filter_sql(where, FILTER_COLUMNS | metadata) if where.strip() else ""
        columns = (*HIT_COLUMNS, *metadata)
        hits = to_hits(search_table(self.table, vector, max(count, rerank), self.manifest.kind, columns, sql), metadata)
        return (self.rerank(hits, terms, rerank) if rerank else hits)[:count]

    def captions(self, vector: np.ndarray, count: int = 10) -> list[CaptionHit]:
        """The `count` captions nearest to a vector, such as a picture's. Raises ValueError for an index without any."""
        if self.caption_table is None:
            raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
        rows = search_table(self.caption_table, vector, count, columns=("id", "text", "path"))
        return [CaptionHit(row["id"], row["text"], row["path"], round(1.0 - row["_distance"], 6)) for row in rows]

    def rerank(self, hits: list[Hit], terms: Sequence[Term], depth: int) -> list[Hit]:
        """The first ones in the order of their pair scores; pictures that have vanished go behind them.

        Raises ValueError for an aligner that scores no pairs, and for a query that is not of words alone.
        """
        if self.aligner.late is None:
            raise ValueError(f"{self.run}: its design '{self.aligner.config.design}' has nothing to re-rank with")
        text_terms = [term for term in terms if not term.is_image]
        if not text_terms or len(text_terms) < len(terms):
            raise ValueError("re-ranking compares words with pictures: give words only")
        raw_paths = self.values([each.id for each in hits[:depth]], "raw")
        available: list[Hit] = []
        missing: list[Hit] = []
        for each in hits[:depth]:
            (available if self.storage.has_file(raw_paths[each.id]) else missing).append(each)
        if not available:
            return hits
        try:
            pairs = self.aligner.pair_scorer(
                [self.storage.image_source(raw_paths[each.id]) for each in available],
                [str(term.content) for term in text_terms],
            )
        except ImageError as error:
            raise ValueError(f"{error}; index the folder again") from None
        images = np.repeat(np.arange(len(available)), len(text_terms))
        captions = np.tile(np.arange(len(text_terms)), len(available))
        scores = pairs(images, captions).reshape(len(available), len(text_terms)) @ np.array(
            [term.weight for term in text_terms]
        )
        order = np.argsort(-scores, kind="stable")
        return [replace(available[i], pair_score=round(float(scores[i]), 5)) for i in order] + missing + hits[depth:]

    def image_source(self, image_id: int) -> Path | bytes:
        """The picture with this number, as what `open_image` takes. Raises KeyError where it is not there, or no
        longer."""
        raw = self.value(image_id, "raw")
        if not self.storage.has_file(raw):
            raise KeyError(f"picture {image_id} is no longer where it was; index the folder again")
        return self.storage.image_source(raw)

    def value(self, image_id: int, column: str) -> Any:
        """What a column has for the picture with this number. Raises KeyError for a number that is not there."""
        rows = self.rows([image_id], (column,))
        if not rows:
            raise KeyError(f"no picture {image_id} in this index")
        return rows[0][column]

    def rows(self, ids: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of the pictures with these numbers, in no order."""
        if not ids:
            return []
        id_list = ", ".join(str(int(image_id)) for image_id in ids)
        return (
            self.table.search().where(f"id IN ({id_list})").select(list(columns)).limit(len(ids)).to_arrow().to_pylist()
        )

    def values(self, ids: Sequence[int], column: str) -> dict[int, Any]:
        """What a column has for each of some pictures."""
        return {row["id"]: row[column] for row in self.rows(sorted(set(ids)), ("id", column))}

    def vector_of(self, image_id: int) -> np.ndarray:
        """The vector of a picture. Raises KeyError for a number that is not there."""
        return np.asarray(self.value(image_id, "vector"), dtype=np.float32)
