"""Results of a search: images and captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipvisionalign.search.metadata import CellValue

#: Columns of a result; thumbnails and vectors are read only on demand.
HIT_COLUMNS = ("id", "path", "width", "height", "size")


@dataclass(frozen=True)
class Hit:
    """One image of a result.

    Attributes:
        id: Its number in the index.
        path: Below the folder of the index.
        score: Cosine with the query.
        width: In pixels.
        height: In pixels.
        size: Of the file, in bytes.
        metadata: Values of the index's metadata columns.
        pair_score: Of the re-ranking; None without.
    """

    id: int
    path: str
    score: float
    width: int
    height: int
    size: int
    metadata: dict[str, CellValue] = field(default_factory=dict)
    pair_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The hit as JSON.

        Returns:
            Its fields; `metadata` and `pair_score` only where there are any.
        """
        fields = {name: getattr(self, name) for name in ("id", "path", "score", "width", "height", "size")}
        fields |= {"metadata": self.metadata} if self.metadata else {}
        return fields | ({} if self.pair_score is None else {"pair_score": self.pair_score})


@dataclass(frozen=True)
class CaptionHit:
    """One caption of a result.

    Attributes:
        id: Its number in the table of captions.
        text: The caption.
        path: Of its image, below the folder of the index.
        score: Cosine with the query.
    """

    id: int
    text: str
    path: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """The hit as JSON.

        Returns:
            Its fields.
        """
        return asdict(self)


def to_hits(rows: Sequence[dict[str, Any]], metadata: Iterable[str]) -> list[Hit]:
    """Rows of a search as hits.

    Args:
        rows: Rows with the columns `HIT_COLUMNS`, those of `metadata`, and "_distance", 1 - cosine.
        metadata: Names of the metadata columns.

    Returns:
        One hit a row, in the same order.
    """
    return [
        Hit(
            score=round(1.0 - row["_distance"], 6), metadata={name: cell_value(row[name]) for name in metadata},
            **{name: row[name] for name in HIT_COLUMNS},
        )
        for row in rows
    ]  # fmt: skip


def to_caption_hits(rows: Sequence[dict[str, Any]]) -> list[CaptionHit]:
    """Rows of a search for captions as hits.

    Args:
        rows: Rows with the columns "id", "text", "path", and "_distance", 1 - cosine.

    Returns:
        One hit a row, in the same order.
    """
    return [CaptionHit(row["id"], row["text"], row["path"], round(1.0 - row["_distance"], 6)) for row in rows]


def cell_value(value: Any) -> CellValue:
    """A value of a metadata column as results hold it.

    Args:
        value: As the table has it.

    Returns:
        A number, a text or None; of a date its ISO form.

    >>> cell_value(datetime(2023, 5, 1, 12, 30))
    '2023-05-01T12:30:00'
    """
    result: CellValue = value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
    return result
