"""The vectors of an exact index in memory, to search for many queries by one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def __init__(self, table: Any, columns: Sequence[str]) -> None:
        self.version, self.columns = table.version, tuple(columns)
        rows = table.search().select([*columns, "vector"]).limit(max(1, table.count_rows())).to_arrow()
        self.vectors = torch.from_numpy(vector_column(rows))
        self.rows = rows.select(list(columns))

    def search(self, vectors: np.ndarray, counts: Sequence[int]) -> list[list[dict[str, Any]]]:
        """The rows whose vectors are nearest, for several queries.

        Args:
            vectors: Q queries, (Q, D), float32.
            counts: Numbers of rows, one for each query.

        Returns:
            For each query what `ann.search_table` returns.
        """
        max_count = min(max(counts), len(self.vectors))
        scores, row_indices = (torch.from_numpy(vectors) @ self.vectors.T).topk(max_count, dim=1)
        return [self._to_rows(*row_matches) for row_matches in zip(scores, row_indices, counts, strict=True)]

    def _to_rows(self, scores: Tensor, row_indices: Tensor, count: int) -> list[dict[str, Any]]:
        rows = self.rows.take(row_indices[:count].numpy()).to_pylist()
        return [row | {"_distance": 1.0 - score} for row, score in zip(rows, scores[:count].tolist(), strict=True)]
