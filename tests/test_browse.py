"""Browsing an index: every image once, newest first, page by page, whatever is added or dropped meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

import pyarrow as arrow

from clipvisionalign.search.browse import Browser
from clipvisionalign.search.filters import FilterError
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import LanceDBReader
from clipvisionalign.search.tables import create_image_table, delete_rows

SECOND = 10**9


def rows(ids, times, taken=None):
    values = {
        "id": ids, "path": [f"{each}.jpg" for each in ids], "raw": [b"%d.jpg" % each for each in ids], "size": [9] * len(ids),
        "mtime_ns": times, "hash": [""] * len(ids), "width": [each % 7 for each in ids], "height": [1] * len(ids),
        "thumbnail": [b""] * len(ids), "vector": [[0.0, 1.0]] * len(ids),
    }  # fmt: skip
    return values if taken is None else values | {"taken": taken}


def add(table, *values):
    table.add(arrow.Table.from_pydict(rows(*values), schema=table.schema))


def browse(browser: Browser, count: int, where: str = "") -> list[int]:
    """The numbers of all images, page by page."""
    ids, cursor = [], ""
    while True:
        page = browser.page(count, cursor, where)
        ids += [image["id"] for image in page.images]
        assert len(page.images) == count or not page.next_cursor
        if not (cursor := page.next_cursor):
            return ids


@pytest.fixture
def table(tmp_path):
    return create_image_table(Storage(tmp_path), 2)


@pytest.mark.parametrize("count", [1, 7, 50, 100])
def test_pages_hold_every_image_once_newest_first(table, count):
    rng = np.random.default_rng(count)
    ids = rng.permutation(60).tolist()
    # Many images of one second, and some from before 1970.
    times = (rng.integers(-5, 10, 60) * SECOND).tolist()
    add(table, ids, times)
    expected = [image_id for _, image_id in sorted(zip(times, ids, strict=True), reverse=True)]
    browser = Browser(LanceDBReader(table))
    assert browse(browser, count) == expected
    filtered = [image_id for image_id in expected if image_id % 7 >= 4]
    assert browse(browser, count, "width >= 4") == filtered
    assert browser.page(1, where="width >= 4").total == len(filtered)
    assert browser.page(5, where="width > 100").images == []


def test_what_is_added_or_dropped_meanwhile_neither_repeats_nor_hides_an_image(table):
    add(table, list(range(30)), [each * SECOND for each in range(30)])
    browser = Browser(LanceDBReader(table))
    first = browser.page(10)
    add(table, [100, 101], [500 * SECOND, 501 * SECOND])
    # The last image of the page is dropped too: its successor is found by its time.
    delete_rows(table, [20, 19, 25])
    second = browser.page(10, first.next_cursor)
    assert [image["id"] for image in first.images] == list(range(29, 19, -1))
    assert [image["id"] for image in second.images] == list(range(18, 8, -1))
    assert second.total == 29
    assert [image["id"] for image in browser.page(2).images] == [101, 100]


def test_the_time_is_that_of_the_photograph_where_it_is_known(tmp_path):
    import lancedb

    taken = ["2023-05-17 12:30:01", None, "no date", "2024-01-01T00:00:00+02:00", "0000:00:00 00:00:00", "2025-06-01"]
    table = lancedb.connect(tmp_path).create_table(
        "images", arrow.Table.from_pydict(rows(list(range(6)), [SECOND * each for each in range(6)], taken))
    )
    images = Browser(LanceDBReader(table)).page(10).images
    assert [image["id"] for image in images] == [5, 3, 0, 4, 2, 1]
    assert [image["time"] for image in images] == [
        "2025-06-01T00:00:00", "2023-12-31T22:00:00", "2023-05-17T12:30:01", "1970-01-01T00:00:04", "1970-01-01T00:00:02",
        "1970-01-01T00:00:01",
    ]  # fmt: skip
    assert images[2]["metadata"] == {"taken": "2023-05-17 12:30:01"}
    assert "score" not in images[0]


@pytest.mark.parametrize("cursor", ["1", "a.b", "1.", ".1", "1.1.1", "9" * 19 + ".1", "1.-1", "\u0661.1", "1.1\n"])
def test_what_is_no_cursor_is_told(table, cursor):
    add(table, [1], [1])
    with pytest.raises(ValueError, match="not a cursor"):
        Browser(LanceDBReader(table)).page(1, cursor)
    with pytest.raises(FilterError):
        Browser(LanceDBReader(table)).page(1, where="colour = 1")
