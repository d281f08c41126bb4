"""The rows of an index among which duplicates are looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.search.duplicates.quality import ImageFile
from clipvisionalign.search.hits import cell_value
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.tables import read_image_table, vector_column

_COLUMNS = ("id", "path", "raw", "hash", "size", "mtime_ns", "width", "height")
_TAKEN = "taken"


@dataclass(frozen=True)
class IndexRows:
    """The rows of an index of N images.

    Attributes:
        columns: `id`, `path`, `raw`, `hash`, `size`, `mtime_ns`, `width`, `height`, and `taken` where there is one: an
            Arrow array each.
        vectors: (N, D) float32.
    """

    columns: dict[str, Any]
    vectors: np.ndarray

    @classmethod
    def read(cls, index: Storage) -> IndexRows:
        """Read the rows of an index.

        Args:
            index: The storage of the index.

        Returns:
            The rows.

        Raises:
            InvalidIndexError: There is no index.
        """
        reader = read_image_table(index)
        names = [*_COLUMNS, *((_TAKEN,) if _TAKEN in reader.schema.names else ())]
        table = reader.read([*names, "vector"])
        return cls({name: table[name].combine_chunks() for name in names}, vector_column(table))

    def value(self, name: str, row: int) -> Any:
        """A value.

        Args:
            name: Of the column.
            row: Position of the row.

        Returns:
            The value.
        """
        return self.columns[name][row].as_py()

    def image(self, row: int) -> ImageFile:
        """The image of a row.

        Args:
            row: Position of the row.

        Returns:
            The image.
        """
        values = {name: self.value(name, row) for name in _COLUMNS}
        taken = cell_value(self.value(_TAKEN, row)) if _TAKEN in self.columns else None
        return ImageFile(**values, taken="" if taken is None else str(taken))
