"""The vectors of an exact index in memory, to search for many queries by one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import vector_column

#: What the sums of a product of unit vectors in float32 may be off by, many times over.
ROUNDING = 1e-5


def exact_cosines(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Cosines that do not depend on how they are computed: each row is summed by itself, in float64.

    Args:
        vectors: N rows, (N, D), float32, unit length.
        vector: The query, (D,), unit length.

    Returns:
        (N,) float64.
    """
    cosines: np.ndarray = (vectors.astype(np.float64) * vector.astype(np.float64)).sum(axis=1)
    return cosines


class InMemoryVectors:
    """The vectors and some columns of an exact index, as they are at one version of its table.

    For many queries at once, one matrix product is as exact as the database's search, and faster.

    Args:
        table: A table of N images.
        columns: The columns of a result.

    Attributes:
        version: Of the table.
        vectors: (N, D), float32.
        ids: (N,), the numbers of the rows.
        rows: The columns, an Arrow table of N rows.
    """

    def __init__(self, table: TableReader, columns: Sequence[str]) -> None:
        self.version, self.columns = table.version, tuple(columns)
        rows = table.read([*dict.fromkeys(("id", *columns)), "vector"])
        self.vectors, self.ids = vector_column(rows), rows["id"].to_numpy()
        self.rows = rows.select(list(columns))

    def search(self, vectors: np.ndarray, counts: Sequence[int]) -> list[list[dict[str, Any]]]:
        """The rows whose vectors are nearest, for several queries.

        Args:
            vectors: Q queries, (Q, D), float32.
            counts: Numbers of rows, one for each query.

        Returns:
            For each query what `TableReader.nearest` returns.
        """
        scores = vectors @ self.vectors.T
        return [self._nearest(*each) for each in zip(vectors, scores, counts, strict=True)]

    def _nearest(self, vector: np.ndarray, scores: np.ndarray, count: int) -> list[dict[str, Any]]:
        """The rows with the `count` greatest cosines, greatest first; of equal ones those of the least numbers first.

        A matrix product rounds a row's sum by where the row is in it: those that may be among the first are summed
        again, each by itself, so that a row has the same cosine in any table.
        """
        candidates = np.arange(len(scores))
        if count < len(scores) and np.isfinite(scores).all():
            least = np.partition(scores, len(scores) - count)[len(scores) - count]
            candidates = np.flatnonzero(scores >= least - ROUNDING)
        exact = exact_cosines(self.vectors[candidates], vector)
        first = np.lexsort((self.ids[candidates], -exact))[:count]
        rows = self.rows.take(candidates[first]).to_pylist()
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, exact[first].tolist(), strict=True)]
