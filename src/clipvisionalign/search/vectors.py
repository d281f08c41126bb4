"""The vectors of an exact index in memory, to search for many queries by one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import vector_column


class InMemoryVectors:
    """The vectors and some columns of an exact index, as they are at one version of its table.

    For many queries at once, one matrix product is as exact as the database's search, and faster.

    Args:
        table: A table of N images.
        columns: The columns of a result.

    Attributes:
        version: Of the table.
        vectors: (N, D), float32.
        rows: The columns, an Arrow table of N rows.
    """

    def __init__(self, table: TableReader, columns: Sequence[str]) -> None:
        self.version, self.columns = table.version, tuple(columns)
        rows = table.read([*columns, "vector"])
        self.vectors = vector_column(rows)
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
        return [self._nearest(*each) for each in zip(scores, counts, strict=True)]

    def _nearest(self, scores: np.ndarray, count: int) -> list[dict[str, Any]]:
        """The rows with the `count` greatest of N scores, greatest first; of equal ones the first row."""
        if count < len(scores):
            candidates = np.argpartition(scores, len(scores) - count)[-count:]
        else:
            candidates = np.arange(len(scores))
        order = candidates[np.lexsort((candidates, -scores[candidates]))]
        rows = self.rows.take(order).to_pylist()
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, scores[order].tolist(), strict=True)]
