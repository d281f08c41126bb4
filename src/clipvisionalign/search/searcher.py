"""Search an index: by words, by a picture, by several of both, weighted, and without what is not wanted.

One vector is made of all terms, the sum of theirs by weight, those that are not wanted taken away; the nearest
pictures are found by their cosine with it. A second stage may put the first of them into a new order by the late
interaction or the fusion of the aligner, which reads the pictures themselves once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.images import ImageError, ImageSource
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.filters import filter_sql
from clipvisionalign.search.indexer import (
    IndexManifest,
    InvalidIndexError,
    aligner_fingerprint,
    metadata_columns,
    open_caption_table,
    open_image_table,
    read_manifest,
)
from clipvisionalign.search.metadata import CellValue
from clipvisionalign.search.storage import Storage, printable

#: What a result tells; thumbnails and vectors only on demand.
HIT_COLUMNS = ("id", "path", "width", "height", "size")
#: Columns that a filter may name, and whether they hold numbers; an index's metadata besides.
FILTER_COLUMNS = {"path": False, "width": True, "height": True, "size": True, "id": True}
#: How near two pictures are that show nearly the same.
DUPLICATE_THRESHOLD = 0.985


#: Weights that a term can have, and the form that has one: no sentence begins with it.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
_WEIGHTED = re.compile(r"\^(\S+)\s+(.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_NUMBER_LIKE = re.compile(r"[+-]?(\.?[0-9].*|inf(inity)?|nan)", re.IGNORECASE | re.DOTALL)
#: How weights were written before; after the colon of a time, a ratio or a sentence stands no letter.
_OLD_WEIGHTED = re.compile(r"([0-9]+(?:\.[0-9]+)?):(\s*)(\D.*|)", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A part of a query: words or a picture, and how much it counts; below zero it is not wanted. note: what a user
    should know of how it was understood, "" for nothing."""

    content: str | ImageSource
    weight: float = 1.0
    is_image: bool = False
    note: str = field(default="", compare=False)


@dataclass(frozen=True)
class Hit:
    """One picture found. score: cosine with the query; metadata: the index's other columns; pair_score: of the second
    stage, None without."""

    id: int
    path: str
    score: float
    width: int
    height: int
    size: int
    metadata: dict[str, CellValue] = field(default_factory=dict)
    pair_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        fields = {name: getattr(self, name) for name in ("id", "path", "score", "width", "height", "size")}
        fields |= {"metadata": self.metadata} if self.metadata else {}
        return fields | ({} if self.pair_score is None else {"pair_score": self.pair_score})


@dataclass(frozen=True)
class CaptionHit:
    """One caption found. path: of its picture; score: cosine with the query."""

    id: int
    text: str
    path: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def parse_term(text: str, sign: float = 1.0) -> Term:
    """ "^2 red" is red, counted twice; without a weight it counts once. The form that weights had before, "2:red", is
    taken where a letter follows the colon, with a note.

    Raises ValueError for no words, and for a weight that is none or out of bounds.

    >>> parse_term("^2 red"), parse_term("10:30 on a clock").content
    (Term(content='red', weight=2.0, is_image=False, note=''), '10:30 on a clock')
    """
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"'{printable(_shorten(text))}': words with bytes that are no UTF-8")
    weight, phrase, note = "1", text.strip(), ""
    if (match := _WEIGHTED.fullmatch(phrase + " ")) and _NUMBER_LIKE.fullmatch(match[1]):
        weight, phrase = match[1], match[2].strip()
    elif match := _OLD_WEIGHTED.fullmatch(phrase):
        if not match[3]:
            phrase = ""
        elif match[2]:
            note = f"'{_shorten(text)}' is taken as words; a weight is written '^{match[1]} {_shorten(match[3])}'"
        else:
            weight, phrase = match[1], match[3]
            note = (
                f"'{_shorten(text)}' counts {weight} times; write '^{weight} {_shorten(phrase)}', which is no sentence"
            )
    number = float(weight) if _NUMBER.fullmatch(weight) else float("nan")
    if not MIN_WEIGHT <= number <= MAX_WEIGHT:
        raise ValueError(
            f"'{_shorten(text)}': a weight is a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, such as '^2 red'"
        )
    if not phrase:
        raise ValueError(f"'{_shorten(text)}': a term needs words, after its weight where it has one, such as '^2 red'")
    return Term(phrase, sign * number, note=note)


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def search_table(
    table: Any,
    vector: np.ndarray,
    count: int,
    kind: str = "exact",
    columns: Sequence[str] = HIT_COLUMNS,
    where: str = "",
) -> list[dict[str, Any]]:
    """The `count` rows whose vectors are nearest, by the kind of index that there is; "_distance" is 1 - cosine."""
    query = table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector").distance_type("dot")
    query = query.select([*columns, "_distance"]).limit(count)
    if where:
        query = query.where(where, prefilter=True)
    # Wide enough that hardly one of the nearest is missed; the first found are compared again by their exact vectors.
    if kind == "exact":
        query = query.bypass_vector_index()
    elif kind == "IVF_PQ":
        query = query.nprobes(48).refine_factor(20)
    else:
        query = query.nprobes(32).ef(max(200, 4 * count)).refine_factor(4)
    return query.to_list()


def combine_terms(terms: Sequence[Term], vectors: np.ndarray) -> np.ndarray:
    """The vector (D,) of a query by those of its terms (T, D), unit length. Raises ValueError for no terms, or terms
    that take each other away."""
    if not all(math.isfinite(term.weight) for term in terms):
        raise ValueError("a weight is a number, neither infinite nor nan")
    if not any(term.weight > 0 for term in terms):
        raise ValueError("a query needs something to look for, not only what is not wanted")
    vector = np.array([term.weight for term in terms], dtype=np.float32) @ vectors
    length = float(np.linalg.norm(vector))
    if length < 1e-6:
        raise ValueError("the terms take each other away: nothing is left to look for")
    return np.asarray(vector / length, dtype=np.float32)


def _to_hits(rows: Sequence[dict[str, Any]], metadata: Iterable[str]) -> list[Hit]:
    return [
        Hit(
            score=round(1.0 - row["_distance"], 6), metadata={name: row[name] for name in metadata},
            **{name: row[name] for name in HIT_COLUMNS},
        )
        for row in rows
    ]  # fmt: skip


class InMemoryVectors:
    """The vectors of an exact index, 1 KiB each, and what is told of its pictures, as they were at one version.

    For many queries at once one matrix product is as exact as the database's search, and far quicker.
    """

    def __init__(self, table: Any, columns: Sequence[str]) -> None:
        self.version, self.columns = table.version, tuple(columns)
        rows = table.search().select([*columns, "vector"]).limit(max(1, table.count_rows())).to_arrow()
        self.vectors = torch.from_numpy(vector_column(rows))
        self.rows = rows.select(list(columns))

    def search(self, vectors: np.ndarray, counts: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What the function `nearest` gives, for each of the vectors (Q, D)."""
        max_count = min(max(counts), len(self.vectors))
        scores, row_indices = (torch.from_numpy(vectors) @ self.vectors.T).topk(max_count, dim=1)
        return [self._to_rows(*row_matches) for row_matches in zip(scores, row_indices, counts, strict=True)]

    def _to_rows(self, scores: Tensor, row_indices: Tensor, count: int) -> list[dict[str, Any]]:
        rows = self.rows.take(row_indices[:count].numpy()).to_pylist()
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, scores[:count].tolist(), strict=True)]


def vector_column(rows: Any) -> np.ndarray:
    """The column "vector" of an Arrow table, (N, D)."""
    width = rows.schema.field("vector").type.list_size
    values = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(values.reshape(-1, width))


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
                results[position] = _to_hits(query_rows, metadata)
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
        hits = _to_hits(
            search_table(self.table, vector, max(count, rerank), self.manifest.kind, columns, sql), metadata
        )
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


def find_duplicates(
    searcher: Searcher, threshold: float = DUPLICATE_THRESHOLD, block: int = 2048
) -> list[list[dict[str, Any]]]:
    """Groups of pictures that are the same, byte for byte, or nearly: a cosine of `near` or more; largest first."""
    count = searcher.table.count_rows()
    if not count:
        return []
    columns = ["id", "path", "hash", "size", "vector"]
    table = searcher.table.search().select(columns).limit(count).to_arrow()
    vectors = vector_column(table)
    rows = table.drop_columns(["vector"]).to_pylist()
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first_by_hash: dict[str, int] = {}
    for row_index, row in enumerate(rows):
        parent[root(row_index)] = root(first_by_hash.setdefault(row["hash"], row_index))
    for start in range(0, count, block):
        for column_start in range(start, count, block):
            close = vectors[start : start + block] @ vectors[column_start : column_start + block].T >= threshold
            for a, b in zip(*np.nonzero(close), strict=True):
                if start + a < column_start + b:
                    parent[root(column_start + int(b))] = root(start + int(a))
    groups: dict[int, list[dict[str, Any]]] = {}
    for row_index, row in enumerate(rows):
        groups.setdefault(root(row_index), []).append(row)
    return sorted(
        (group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]["path"])
    )
