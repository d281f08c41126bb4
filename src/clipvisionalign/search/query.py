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

from clipvisionalign.images import Picture, PictureError
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.files import Place, printable
from clipvisionalign.search.filters import filter_sql
from clipvisionalign.search.index import (
    About,
    BadIndex,
    aligner_fingerprint,
    metadata_columns,
    open_captions,
    open_table,
    read_about,
)
from clipvisionalign.search.metadata import Value

#: What a result tells; thumbnails and vectors only on demand.
COLUMNS = ("id", "path", "width", "height", "size")
#: Columns that a filter may name, and whether they hold numbers; an index's metadata besides.
FILTERS = {"path": False, "width": True, "height": True, "size": True, "id": True}
#: How near two pictures are that show nearly the same.
NEAR = 0.985


#: Weights that a term can have, and the form that has one: no sentence begins with it.
LEAST_WEIGHT, GREATEST_WEIGHT = 0.001, 1000.0
_WEIGHTED = re.compile(r"\^(\S+)\s+(.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_MEANT_AS_NUMBER = re.compile(r"[+-]?(\.?[0-9].*|inf(inity)?|nan)", re.IGNORECASE | re.DOTALL)
#: How weights were written before; after the colon of a time, a ratio or a sentence stands no letter.
_OLD = re.compile(r"([0-9]+(?:\.[0-9]+)?):(\s*)(\D.*|)", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A part of a query: words or a picture, and how much it counts; below zero it is not wanted. note: what a user
    should know of how it was understood, "" for nothing."""

    what: str | Picture
    weight: float = 1.0
    is_picture: bool = False
    note: str = field(default="", compare=False)


@dataclass(frozen=True)
class Found:
    """One picture found. score: cosine with the query; metadata: the index's other columns; pair_score: of the second
    stage, None without."""

    id: int
    path: str
    score: float
    width: int
    height: int
    size: int
    metadata: dict[str, Value] = field(default_factory=dict)
    pair_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = {name: getattr(self, name) for name in ("id", "path", "score", "width", "height", "size")}
        found |= {"metadata": self.metadata} if self.metadata else {}
        return found | ({} if self.pair_score is None else {"pair_score": self.pair_score})


@dataclass(frozen=True)
class FoundCaption:
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

    >>> parse_term("^2 red"), parse_term("10:30 on a clock").what
    (Term(what='red', weight=2.0, is_picture=False, note=''), '10:30 on a clock')
    """
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"'{printable(_short(text))}': words with bytes that are no UTF-8")
    weight, words, note = "1", text.strip(), ""
    if (found := _WEIGHTED.fullmatch(words + " ")) and _MEANT_AS_NUMBER.fullmatch(found[1]):
        weight, words = found[1], found[2].strip()
    elif found := _OLD.fullmatch(words):
        if not found[3]:
            words = ""
        elif found[2]:
            note = f"'{_short(text)}' is taken as words; a weight is written '^{found[1]} {_short(found[3])}'"
        else:
            weight, words = found[1], found[3]
            note = f"'{_short(text)}' counts {weight} times; write '^{weight} {_short(words)}', which is no sentence"
    number = float(weight) if _NUMBER.fullmatch(weight) else float("nan")
    if not LEAST_WEIGHT <= number <= GREATEST_WEIGHT:
        raise ValueError(
            f"'{_short(text)}': a weight is a number from {LEAST_WEIGHT:g} to {GREATEST_WEIGHT:g}, such as '^2 red'"
        )
    if not words:
        raise ValueError(f"'{_short(text)}': a term needs words, after its weight where it has one, such as '^2 red'")
    return Term(words, sign * number, note=note)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def nearest(
    table: Any, vector: np.ndarray, count: int, kind: str = "exact", columns: Sequence[str] = COLUMNS, where: str = ""
) -> list[dict[str, Any]]:
    """The `count` rows whose vectors are nearest, by the kind of index that there is; "_distance" is 1 - cosine."""
    asked = table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector").distance_type("dot")
    asked = asked.select([*columns, "_distance"]).limit(count)
    if where:
        asked = asked.where(where, prefilter=True)
    # Wide enough that hardly one of the nearest is missed; the first found are compared again by their exact vectors.
    if kind == "exact":
        asked = asked.bypass_vector_index()
    elif kind == "IVF_PQ":
        asked = asked.nprobes(48).refine_factor(20)
    else:
        asked = asked.nprobes(32).ef(max(200, 4 * count)).refine_factor(4)
    return asked.to_list()


def combined(terms: Sequence[Term], vectors: np.ndarray) -> np.ndarray:
    """The vector (D,) of a query by those of its terms (T, D), unit length. Raises ValueError for no terms, or terms
    that take each other away."""
    if not all(math.isfinite(term.weight) for term in terms):
        raise ValueError("a weight is a number, neither infinite nor nan")
    if not any(term.weight > 0 for term in terms):
        raise ValueError("a query needs something to look for, not only what is not wanted")
    total = np.array([term.weight for term in terms], dtype=np.float32) @ vectors
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise ValueError("the terms take each other away: nothing is left to look for")
    return np.asarray(total / length, dtype=np.float32)


def _found(rows: Sequence[dict[str, Any]], metadata: Iterable[str]) -> list[Found]:
    return [
        Found(
            score=round(1.0 - row["_distance"], 6), metadata={name: row[name] for name in metadata},
            **{name: row[name] for name in COLUMNS},
        )
        for row in rows
    ]  # fmt: skip


class InMemory:
    """The vectors of an exact index, 1 KiB each, and what is told of its pictures, as they were at one version.

    For many queries at once one matrix product is as exact as the database's search, and far quicker.
    """

    def __init__(self, table: Any, columns: Sequence[str]) -> None:
        self.version, self.columns = table.version, tuple(columns)
        rows = table.search().select([*columns, "vector"]).limit(max(1, table.count_rows())).to_arrow()
        self.vectors = torch.from_numpy(vectors_of(rows))
        self.rows = rows.select(list(columns))

    def nearest(self, vectors: np.ndarray, counts: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What the function `nearest` gives, for each of the vectors (Q, D)."""
        most = min(max(counts), len(self.vectors))
        scores, places = (torch.from_numpy(vectors) @ self.vectors.T).topk(most, dim=1)
        return [self._told(*found) for found in zip(scores, places, counts, strict=True)]

    def _told(self, scores: Tensor, places: Tensor, count: int) -> list[dict[str, Any]]:
        rows = self.rows.take(places[:count].numpy()).to_pylist()
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, scores[:count].tolist(), strict=True)]


def vectors_of(rows: Any) -> np.ndarray:
    """The column "vector" of an Arrow table, (N, D)."""
    width = rows.schema.field("vector").type.list_size
    found = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(found.reshape(-1, width))


class Searcher:
    """An opened index with the aligner that made it.

    run: where the aligner is now, if it was moved. Raises BadIndex where it is another one than the index was made by.
    """

    def __init__(self, index: str | Path, run: str | Path = "", device: str = "auto") -> None:
        self.about: About = read_about(index)
        self.run = Path(run or self.about.run)
        if not (self.run / "model.safetensors").is_file():
            raise BadIndex(f"{index}: its aligner {self.run} is not there; say where it is with --run")
        if aligner_fingerprint(self.run) != self.about.aligner:
            raise BadIndex(f"{index}: it was made by another aligner than {self.run}")
        self.aligner: Aligner = load_aligner(self.run, device)
        self.table, self.caption_table = open_table(index), open_captions(index)
        self.place = Place(self.about.folder)
        self.in_memory: InMemory | None = None

    @property
    def metadata(self) -> dict[str, bool]:
        """The columns that came as metadata, and whether they hold numbers."""
        return metadata_columns(self.table)

    def encode(self, terms: Sequence[Term]) -> np.ndarray:
        """The query's vector (D,), unit length. Raises ValueError for no terms, or terms that take each other away;
        PictureError."""
        words = [term for term in terms if not term.is_picture]
        pictures = [term for term in terms if term.is_picture]
        vectors = [self.aligner.encode_captions([str(term.what) for term in words]).numpy()] if words else []
        vectors += [self.aligner.encode_images([term.what for term in pictures]).numpy()] if pictures else []
        return combined([*words, *pictures], np.concatenate(vectors) if vectors else np.empty((0, self.about.width)))

    def answers(self, queries: Sequence[tuple[Sequence[Term], int]]) -> list[list[Found] | np.ndarray | ValueError]:
        """Several queries of words, with the number of pictures that each wants: encoded together.

        Where the index is exact they are searched together too; else, and for 0 pictures, a query's vector is given.
        What is wrong with one query stands in its place.
        """
        encoded = self.aligner.encode_captions([str(term.what) for terms, _ in queries for term in terms]).numpy()
        vectors: list[np.ndarray | ValueError] = []
        start = 0
        for terms, _ in queries:
            try:
                vectors.append(combined(terms, encoded[start : start + len(terms)]))
            except ValueError as error:
                vectors.append(error)
            start += len(terms)
        found: list[list[Found] | np.ndarray | ValueError] = [*vectors]
        good = [(place, vector, queries[place][1]) for place, vector in enumerate(vectors)
                if isinstance(vector, np.ndarray) and queries[place][1]]  # fmt: skip
        if self.about.kind == "exact" and good:
            places, these, counts = zip(*good, strict=True)
            metadata = self.metadata
            rows = self._memory((*COLUMNS, *metadata)).nearest(np.stack(these), counts)
            for place, own in zip(places, rows, strict=True):
                found[place] = _found(own, metadata)
        return found

    def _memory(self, columns: Sequence[str]) -> InMemory:
        held = self.in_memory
        if held is None or (held.version, held.columns) != (self.table.version, tuple(columns)):
            held = self.in_memory = InMemory(self.table, columns)
        return held

    def search(self, terms: Sequence[Term], count: int = 10, where: str = "", rerank: int = 0) -> list[Found]:
        """The `count` best pictures. where: a filter (`search/filters.py`); rerank: so many first ones are put into a
        new order by pair scores. Raises ValueError and what `encode` raises."""
        return self.search_vector(self.encode(terms), count, where, rerank, terms)

    def search_vector(
        self, vector: np.ndarray, count: int = 10, where: str = "", rerank: int = 0, terms: Sequence[Term] = ()
    ) -> list[Found]:
        """`search` by a vector that is known already."""
        if count < 1:
            raise ValueError(f"at least 1 picture can be found, not {count}")
        metadata = self.metadata
        sql = filter_sql(where, FILTERS | metadata) if where.strip() else ""
        columns = (*COLUMNS, *metadata)
        found = _found(nearest(self.table, vector, max(count, rerank), self.about.kind, columns, sql), metadata)
        return (self.reranked(found, terms, rerank) if rerank else found)[:count]

    def captions(self, vector: np.ndarray, count: int = 10) -> list[FoundCaption]:
        """The `count` captions nearest to a vector, such as a picture's. Raises ValueError for an index without any."""
        if self.caption_table is None:
            raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
        rows = nearest(self.caption_table, vector, count, columns=("id", "text", "path"))
        return [FoundCaption(row["id"], row["text"], row["path"], round(1.0 - row["_distance"], 6)) for row in rows]

    def reranked(self, found: list[Found], terms: Sequence[Term], first: int) -> list[Found]:
        """The first ones in the order of their pair scores; pictures that have vanished go behind them.

        Raises ValueError for an aligner that scores no pairs, and for a query that is not of words alone.
        """
        if self.aligner.late is None:
            raise ValueError(f"{self.run}: its design '{self.aligner.config.design}' has nothing to re-rank with")
        wanted = [term for term in terms if not term.is_picture]
        if not wanted or len(wanted) < len(terms):
            raise ValueError("re-ranking compares words with pictures: give words only")
        raws = self.values([each.id for each in found[:first]], "raw")
        good: list[Found] = []
        gone: list[Found] = []
        for each in found[:first]:
            (good if self.place.has(raws[each.id]) else gone).append(each)
        if not good:
            return found
        try:
            pairs = self.aligner.pair_scorer(
                [self.place.picture(raws[each.id]) for each in good], [str(term.what) for term in wanted]
            )
        except PictureError as error:
            raise ValueError(f"{error}; index the folder again") from None
        images = np.repeat(np.arange(len(good)), len(wanted))
        captions = np.tile(np.arange(len(wanted)), len(good))
        scores = pairs(images, captions).reshape(len(good), len(wanted)) @ np.array([term.weight for term in wanted])
        order = np.argsort(-scores, kind="stable")
        return [replace(good[i], pair_score=round(float(scores[i]), 5)) for i in order] + gone + found[first:]

    def picture(self, number: int) -> Path | bytes:
        """The picture with this number, as what `open_picture` takes. Raises KeyError where it is not there, or no
        longer."""
        raw = self.value(number, "raw")
        if not self.place.has(raw):
            raise KeyError(f"picture {number} is no longer where it was; index the folder again")
        return self.place.picture(raw)

    def value(self, number: int, column: str) -> Any:
        """What a column has for the picture with this number. Raises KeyError for a number that is not there."""
        rows = self.rows([number], (column,))
        if not rows:
            raise KeyError(f"no picture {number} in this index")
        return rows[0][column]

    def rows(self, ids: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of the pictures with these numbers, in no order."""
        if not ids:
            return []
        told = ", ".join(str(int(number)) for number in ids)
        return self.table.search().where(f"id IN ({told})").select(list(columns)).limit(len(ids)).to_arrow().to_pylist()

    def values(self, ids: Sequence[int], column: str) -> dict[int, Any]:
        """What a column has for each of some pictures."""
        return {row["id"]: row[column] for row in self.rows(sorted(set(ids)), ("id", column))}

    def vector_of(self, number: int) -> np.ndarray:
        """The vector of a picture. Raises KeyError for a number that is not there."""
        return np.asarray(self.value(number, "vector"), dtype=np.float32)


def duplicates(searcher: Searcher, near: float = NEAR, block: int = 2048) -> list[list[dict[str, Any]]]:
    """Groups of pictures that are the same, byte for byte, or nearly: a cosine of `near` or more; largest first."""
    count = searcher.table.count_rows()
    if not count:
        return []
    columns = ["id", "path", "hash", "size", "vector"]
    found = searcher.table.search().select(columns).limit(count).to_arrow()
    vectors = vectors_of(found)
    rows = found.drop_columns(["vector"]).to_pylist()
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        parent[root(place)] = root(first.setdefault(row["hash"], place))
    for start in range(0, count, block):
        for begin in range(start, count, block):
            close = vectors[start : start + block] @ vectors[begin : begin + block].T >= near
            for a, b in zip(*np.nonzero(close), strict=True):
                if start + a < begin + b:
                    parent[root(begin + int(b))] = root(start + int(a))
    groups: dict[int, list[dict[str, Any]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(root(place), []).append(row)
    return sorted(
        (group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]["path"])
    )
