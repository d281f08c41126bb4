"""Browsing an index without a query: its images newest first, page by page.

The time of an image is when it was photographed, where the index has a column `taken`, else that of its file.
A page is continued by a cursor, the time and number of its last image, so that images which are added or dropped
meanwhile neither repeat nor hide others.
"""

from __future__ import annotations

import datetime
import re
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.search.filters import FILTER_COLUMNS, filter_sql
from clipvisionalign.search.hits import HIT_COLUMNS, cell_value
from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import metadata_columns
from clipvisionalign.search.unreachable import MissingShard, is_unreadable

#: The metadata column with the time at which an image was photographed.
TAKEN_COLUMN = "taken"
_CURSOR = re.compile(r"(-?[0-9]{1,19})\.([0-9]{1,19})", re.ASCII)


@dataclass(frozen=True)
class BrowsePage:
    """Some images of an index, newest first.

    Attributes:
        images: One dictionary an image: `HIT_COLUMNS`, "time" (ISO 8601) and "metadata", where there is any.
        total: Number of images that the filter leaves, all pages together.
        next_cursor: Continues after the last image; "" where that is the oldest.
        missing: Shards that cannot be read now, whose images are not among them.
    """

    images: list[dict[str, Any]]
    total: int
    next_cursor: str
    missing: tuple[MissingShard, ...] = ()


class Browser:
    """The order of an index's images by time, read once for each version of its table.

    Args:
        table: Reads the images.
    """

    def __init__(self, table: TableReader) -> None:
        self.table, self._lock = table, threading.Lock()
        self._version: Any = None
        self._times = self._ids = np.zeros(0, dtype=np.int64)

    def page(self, count: int, cursor: str = "", where: str = "") -> BrowsePage:
        """Some images, newest first.

        Args:
            count: Number of images at most.
            cursor: `next_cursor` of the page before; "" for the newest.
            where: A filter (`filters.py`), "" for none.

        Returns:
            The page.

        Raises:
            ValueError: The cursor is not one of a page, or the filter has an error (FilterError).
        """
        try:
            return self._page(count, cursor, where, bool(self.table.unreachable))
        except Exception as error:
            if not is_unreadable(error):
                raise
            # A shard that could be read when the order was.
            return self._page(count, cursor, where, is_fresh=True)

    def _page(self, count: int, cursor: str, where: str, is_fresh: bool) -> BrowsePage:
        after = _parse_cursor(cursor)
        columns = metadata_columns(self.table)
        times, ids, missing = self._order(is_fresh)
        if where.strip():
            rows, others = self.table.read_reachable(("id",), filter_sql(where, FILTER_COLUMNS | columns))
            missing = tuple(dict.fromkeys((*missing, *others)))
            selected = np.isin(ids, rows["id"].to_numpy())
            times, ids = times[selected], ids[selected]
        total = len(ids)
        if after is not None:
            later = (times < after[0]) | ((times == after[0]) & (ids < after[1]))
            times, ids = times[later], ids[later]
        is_last = len(ids) <= count
        times, ids = times[:count], ids[:count]
        images = self._images(times, ids, list(columns))
        return BrowsePage(images, total, "" if is_last else f"{times[-1]}.{ids[-1]}", missing)

    def _order(self, is_fresh: bool) -> tuple[np.ndarray, np.ndarray, tuple[MissingShard, ...]]:
        """Times in nanoseconds and numbers of all images, newest first; and the shards whose images are not there."""
        with self._lock:
            version = self.table.version
            if is_fresh or version != self._version:
                has_taken = TAKEN_COLUMN in metadata_columns(self.table)
                rows, missing = self.table.read_reachable(("id", "mtime_ns", *((TAKEN_COLUMN,) if has_taken else ())))
                ids, times = rows["id"].to_numpy(), rows["mtime_ns"].to_numpy().copy()
                for row, taken in enumerate(rows[TAKEN_COLUMN].to_pylist() if has_taken else ()):
                    taken_ns = _to_nanoseconds(taken)
                    times[row] = times[row] if taken_ns is None else taken_ns
                newest_first = np.lexsort((ids, times))[::-1]
                if missing:
                    # Read once more for each page, until all shards are there.
                    return times[newest_first], ids[newest_first], missing
                self._times, self._ids, self._version = times[newest_first], ids[newest_first], version
            return self._times, self._ids, ()

    def _images(self, times: np.ndarray, ids: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
        if not len(ids):
            return []
        rows = self.table.rows(ids, (*HIT_COLUMNS, *columns))
        by_id = {row["id"]: row for row in rows}
        return [
            {name: by_id[image_id][name] for name in HIT_COLUMNS}
            | {"time": _to_iso(time)}
            | ({"metadata": {name: cell_value(by_id[image_id][name]) for name in columns}} if columns else {})
            for time, image_id in zip(times.tolist(), ids.tolist(), strict=True)
            if image_id in by_id
        ]


def _parse_cursor(cursor: str) -> tuple[int, int] | None:
    if not cursor:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None or not all(-(2**63) <= int(each) < 2**63 for each in match.groups()):
        raise ValueError(f"'{cursor[:40]}': not a cursor of a page; leave it out to begin with the newest")
    return int(match[1]), int(match[2])


def _to_nanoseconds(taken: Any) -> int | None:
    """The time of a cell of `taken`, with or without a time of day; None for what is no date."""
    if isinstance(taken, str):
        try:
            taken = datetime.datetime.fromisoformat(taken.strip())
        except ValueError:
            return None
    if not isinstance(taken, datetime.datetime):
        return None
    # A camera's clock has no time zone: it is compared as if it were UTC.
    taken = taken if taken.tzinfo else taken.replace(tzinfo=datetime.UTC)
    seconds = (taken - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)).total_seconds()
    return int(seconds) * 10**9 if abs(seconds) < 9.2e9 else None


def _to_iso(time_ns: int) -> str:
    return str(np.datetime64(time_ns, "ns").astype("datetime64[s]"))
