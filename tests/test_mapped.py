"""The memory-mapped files of an index: the table's rows and no others, whatever was written and whoever was killed.

Tables of vectors without images: an index of them is written as `index` writes it after the encoding. KILLS says how often
a process that writes is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
pytest.importorskip("numkong", reason="no numkong: pip install 'clipvisionalign[search]'")
import pyarrow as arrow
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clipvisionalign.search import centroids, mapped
from clipvisionalign.search.ann import build_ann_index
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.manifest import IndexManifest, read_manifest, write_manifest
from clipvisionalign.search.mapped import MappedReader, VectorSettings, read_record, recall
from clipvisionalign.search.mapped import search as mapped_search
from clipvisionalign.search.mapped.codes import int8_scale, make_encoder
from clipvisionalign.search.mapped.files import FILES, MappedFiles, Selection
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.tables import create_image_table, delete_rows, read_image_table, update_rows, vector_column

WIDTH, ROWS, SIZES = 32, 1500, (100, 10_000_000)
COLUMNS = ("id", "path", "size")
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(autouse=True)
def _always_by_lists(monkeypatch):
    """So few rows would be compared exactly; and another process's writes are seen at once."""
    from datetime import timedelta

    from clipvisionalign.search import table_reader

    monkeypatch.setattr(mapped_search, "MAX_EXACT_ROWS", 0)
    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(0))


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in 30 clusters, (count, D)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(30, WIDTH))
    rows = centres[rng.integers(30, size=count)] + 0.6 * rng.normal(size=(count, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def add(table, ids: np.ndarray, seed: int) -> None:
    names = [f"{number}.jpg" for number in ids]
    rows = {
        "id": ids, "path": names, "raw": [f"{seed}-{name}".encode() for name in names], "size": ids * 10,
        "mtime_ns": ids, "hash": [f"{seed}-{number}" for number in ids], "width": np.full(len(ids), 4, np.int32),
        "height": np.full(len(ids), 3, np.int32), "thumbnail": [b""] * len(ids),
        "vector": arrow.FixedSizeListArray.from_arrays(arrow.array(vectors(len(ids), seed).reshape(-1)), WIDTH),
    }  # fmt: skip
    table.add(arrow.table(rows, schema=table.schema))


def write(folder: Path, settings: VectorSettings | None = None):
    """Bring the files of an index up to date, as `index` does last."""
    storage = Storage(folder)
    table = create_image_table(storage, WIDTH)
    build_ann_index(table, storage, read_manifest(folder), table.count_rows(), sizes=SIZES, settings=settings)
    return table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped") / "index"
    storage = Storage(folder)
    write_manifest(storage, IndexManifest("", "", "", WIDTH))
    add(create_image_table(storage, WIDTH), np.arange(ROWS), 0)
    write(folder)
    return folder


@pytest.fixture
def index(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "index"))


def open_reader(folder: Path) -> MappedReader:
    return MappedReader(Storage(folder), read_image_table(folder))


def assert_as_exact(
    folder: Path, reader: MappedReader, where: str = "", count: int = 10, least: float = 0.98, queries: int = 20
) -> None:
    """The reader finds what comparing every row of the table finds, with its columns and cosines."""
    table = read_image_table(folder).read([*COLUMNS, "vector"], where)
    there, stored = table.select(list(COLUMNS)).to_pylist(), vector_column(table)
    by_id = {row["id"]: (row, vector) for row, vector in zip(there, stored, strict=True)}
    shares = []
    for query in vectors(queries, seed=7):
        rows = reader.nearest(query, count, COLUMNS, where)
        assert rows is not None
        distances = [row.pop("_distance") for row in rows]
        assert len(rows) == len({row["id"] for row in rows}) == min(count, len(there))
        for row, distance in zip(rows, distances, strict=True):
            same, vector = by_id[row["id"]]
            assert row == same
            assert distance == pytest.approx(1 - vector @ query, abs=1e-6)
        assert distances == sorted(distances)
        best = np.argsort(-(stored @ query))[:count]
        common = {there[number]["id"] for number in best} & {row["id"] for row in rows}
        shares.append(len(common) / len(best) if len(best) else 1.0)
    assert np.mean(shares) >= least


FILTERS = ["", f"id < {ROWS // 2}", f"id < {ROWS // 20}", "id < 3", "id < 0", "path LIKE '1%'"]


@pytest.mark.parametrize("where", FILTERS)
def test_a_filter_counts_before_the_search(written, where):
    assert read_manifest(written).kind == mapped.MAPPED_KIND
    assert_as_exact(written, open_reader(written), where)


@pytest.mark.parametrize("where", FILTERS[:4])
def test_few_rows_are_compared_exactly(written, where, monkeypatch):
    monkeypatch.setattr(mapped_search, "MAX_EXACT_ROWS", ROWS)
    assert_as_exact(written, open_reader(written), where, least=1.0)


def test_more_than_there_are(written):
    rows = open_reader(written).nearest(vectors(1)[0], 10 * ROWS, COLUMNS)
    assert sorted(row["id"] for row in rows) == list(range(ROWS))


@pytest.mark.parametrize("updated", [False, True], ids=["before the update", "after it"])
def test_rows_that_are_gone_are_not_found_and_new_ones_are(index, updated):
    reader = open_reader(index)
    query = vectors(1)[0]
    first = reader.nearest(query, 5, COLUMNS)
    table = create_image_table(Storage(index), WIDTH)
    gone = [row["id"] for row in first]
    delete_rows(table, [*gone, ROWS - 1])
    add(table, np.array([ROWS - 1, ROWS, ROWS + 1]), seed=5)  # the number of a row that was deleted, for another image
    if updated:
        write(index)
    for each in (reader, open_reader(index)):
        assert not {row["id"] for row in each.nearest(query, 50, COLUMNS)} & set(gone)
        for number, vector in zip((ROWS - 1, ROWS, ROWS + 1), vectors(3, seed=5), strict=True):
            row = each.nearest(vector, 1, COLUMNS)[0]
            assert (row["id"], round(row["_distance"], 5)) == (number, 0.0)
        for where in FILTERS:
            assert_as_exact(index, each, where)
    assert (read_record(Storage(index)).version == int(table.version)) == updated


def test_an_update_adds_the_difference_alone(index, monkeypatch):
    added, original = [], centroids.nearest_centroids

    def counted(count, *given):
        added.append(count)
        return original(count, *given)

    monkeypatch.setattr(centroids, "nearest_centroids", counted)
    table = create_image_table(Storage(index), WIDTH)
    before = read_record(Storage(index))
    write(index)
    assert read_record(Storage(index)) == before, "nothing has changed, nothing is written"
    update_rows(table, "id", [{"id": 3, "size": 77}], ("id", "size"))
    write(index)
    after = read_record(Storage(index))
    assert after.folder != before.folder
    assert not added
    assert next(row for row in open_reader(index).nearest(vectors(ROWS)[3], 3, COLUMNS) if row["id"] == 3)["size"] == 77
    delete_rows(table, range(10))
    write(index)
    assert not added
    add(table, np.arange(ROWS, ROWS + 5), seed=3)
    write(index)
    assert added == [5]
    delete_rows(table, range(10, ROWS // 2))
    write(index)
    assert added == [5, ROWS // 2 + 5], "with many deleted rows they are rebuilt"


def test_an_index_that_has_doubled_has_other_centroids(index):
    table, storage = create_image_table(Storage(index), WIDTH), Storage(index)
    before = MappedFiles(storage, read_record(storage))
    add(table, np.arange(ROWS, 2 * ROWS), seed=3)
    write(index)
    record = read_record(storage)
    assert (record.clustered, record.centroids) == (ROWS, len(before.centroids))
    assert np.array_equal(MappedFiles(storage, record).centroids, before.centroids)
    assert_as_exact(index, open_reader(index))
    add(table, np.arange(2 * ROWS, 2 * ROWS + 1), seed=4)
    write(index)
    record = read_record(storage)
    assert record.clustered == 2 * ROWS + 1
    assert not np.array_equal(MappedFiles(storage, record).centroids, before.centroids)
    assert_as_exact(index, open_reader(index))


def test_each_row_is_in_one_list_with_its_vector(index):
    table, storage = create_image_table(Storage(index), WIDTH), Storage(index)
    for step in ("as it was written", "with some gone and some new", "with some gone"):
        files = MappedFiles(storage, read_record(storage))
        live = np.flatnonzero(~files.deleted)
        assert set(live) <= set(files.members.tolist()), step
        assert len(set(files.members.tolist())) == len(files.members) == files.offsets[-1] == len(files.codes)
        assert np.array_equal(files.codes, files.encoder.encode(files.vectors[files.members]))
        lists = np.repeat(np.arange(len(files.centroids)), np.diff(files.offsets))
        cosines = files.vectors[files.members] @ files.centroids.T
        assert (cosines[np.arange(len(lists)), lists] >= cosines.max(axis=1) - 1e-6).all()
        delete_rows(table, [int(files.ids[live[0]]), int(files.ids[live[-1]])])
        if step == "as it was written":
            add(table, np.arange(5000, 5003), seed=9)
        write(index)


@given(seed=st.integers(0, 1000), kept=st.integers(1, ROWS), depth=st.integers(1, 50))
@hypothesis_settings(max_examples=30, deadline=None)
def test_with_all_lists_it_is_what_comparing_all_rows_gives(written, seed, kept, depth):
    files = MappedFiles(Storage(written), read_record(Storage(written)))
    # Without rounding, so that what is left is the choice of rows.
    files.encoder, files.codes = make_encoder(VectorSettings("float32"), WIDTH, 1.0), files.vectors[files.members]
    rng = np.random.default_rng(seed)
    mask = np.zeros(ROWS, dtype=bool)
    mask[rng.choice(ROWS, kept, replace=False)] = True
    query = vectors(1, seed)[0]
    for selection, rows in ((Selection(files, mask), np.flatnonzero(mask)), (None, np.arange(ROWS))):
        positions, cosines = mapped_search.by_lists(files, query, depth, np.inf, selection)
        true = files.vectors[rows] @ query
        expected = np.sort(true)[::-1][: min(depth, len(rows))]
        assert len(positions) == len(expected)
        assert set(positions.tolist()) <= set(rows.tolist())
        np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_of_images_that_tie_those_of_the_least_numbers_are_found_and_any_counts_as_recall(index):
    """Bursts and black frames: neither more lists nor other images, however many are equal."""
    table, storage = create_image_table(Storage(index), WIDTH), Storage(index)
    query = vectors(1)[0]
    for first in range(0, ROWS, 30):
        same = vectors(1, seed=first)[0].tolist() if first else query.tolist()
        update_rows(
            table, "id", [{"id": number, "vector": same, "hash": f"x{number}"} for number in range(first, first + 30)],
            ("id", "vector", "hash"),
        )  # fmt: skip
    write(index)
    record = read_record(storage)
    assert record.recall >= 0.99
    assert record.reach < 3
    for count in (5, 20, 30):
        rows = open_reader(index).nearest(query, count, COLUMNS)
        assert [row["id"] for row in rows] == list(range(count))
        rows = open_reader(index).nearest(query, count, COLUMNS, "id > 3")
        assert [row["id"] for row in rows][:20] == list(range(4, 4 + count))[:20]


def test_an_update_with_greater_numbers_has_another_scale(index):
    table, storage = create_image_table(Storage(index), WIDTH), Storage(index)
    before = read_record(storage)
    add(table, np.arange(ROWS, ROWS + 40), seed=3)
    spikes = np.eye(WIDTH, dtype=np.float32)[np.arange(40) % WIDTH]
    rows = [{"id": ROWS + number, "vector": vector.tolist()} for number, vector in enumerate(spikes)]
    update_rows(table, "id", rows, ("id", "vector"))
    write(index)
    assert read_record(storage).scale == pytest.approx(127)
    assert before.scale > 150
    assert_as_exact(index, open_reader(index))
    assert open_reader(index).nearest(spikes[0], 2, COLUMNS)[1]["_distance"] == pytest.approx(0, abs=1e-6)


def test_a_vector_that_is_no_direction_hides_no_other(index):
    """LanceDB itself refuses those that are not numbers."""
    table = create_image_table(Storage(index), WIDTH)
    add(table, np.arange(ROWS, ROWS + 3), seed=3)
    update_rows(table, "id", [{"id": ROWS, "vector": [np.inf] * WIDTH}], ("id", "vector"))
    write(index)
    reader = open_reader(index)
    for query in vectors(20, seed=7):
        rows = reader.nearest(query, 10, COLUMNS)
        assert len(rows) == 10
        assert ROWS not in {row["id"] for row in rows}
    assert read_record(Storage(index)).recall >= 0.99


def test_the_form_of_vectors_is_kept_from_files_that_are_not_whole(index):
    write(index, VectorSettings("binary", 16))
    shutil.rmtree(index / read_record(Storage(index)).folder)
    assert read_record(Storage(index)) is None
    write(index)
    assert read_record(Storage(index)).settings == VectorSettings("binary", 16)
    (index / "vectors.json").write_bytes(b"\xff\xfe")
    assert open_reader(index).nearest(vectors(1)[0], 5, COLUMNS) is None
    write(index)
    assert read_record(Storage(index)).settings == VectorSettings()


def counted_reads(files: MappedFiles) -> list[int]:
    """The numbers of codes that searches compare from now on, a number for each part that is read."""
    read: list[int] = []
    encoder = files.encoder

    class Counting:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def scorer(self, query):
            score = encoder.scorer(query)
            return lambda parts: [read.extend(len(codes) for codes in parts), score(parts)][1]

    files.encoder = Counting()
    return read


def test_of_a_few_rows_that_a_filter_leaves_their_codes_alone_are_read(index):
    files = MappedFiles(Storage(index), read_record(Storage(index)))
    mask = np.zeros(ROWS, dtype=bool)
    mask[::10] = True
    few, many = Selection(files, mask), Selection(files, ~mask)
    assert (few.is_sparse, many.is_sparse) == (True, False)
    assert np.array_equal(np.flatnonzero(few.members), few.slots)
    for selection in (few, many):
        members = np.repeat(np.arange(len(files.centroids)), np.diff(files.offsets))[selection.members]
        assert np.array_equal(np.diff(selection.offsets), np.bincount(members, minlength=len(files.centroids)))
    read = counted_reads(files)
    positions, _ = mapped_search.by_lists(files, vectors(1)[0], 10, np.inf, few)
    assert sum(read) == few.count
    assert mask[positions].all()


def test_a_search_reads_a_part_of_the_lists_and_none_without_rows_that_may_be_found(index, monkeypatch):
    files = MappedFiles(Storage(index), read_record(Storage(index)))
    read = counted_reads(files)
    for query in vectors(20, seed=7):
        mapped_search.search_files(files, query, 10)
    assert 0 < sum(read) < 0.7 * 20 * ROWS
    lists = np.repeat(np.arange(len(files.centroids)), np.diff(files.offsets))
    for chosen in ([3], list(range(len(files.centroids) // 2))):
        mask = np.zeros(ROWS, dtype=bool)
        mask[files.members[np.isin(lists, chosen)]] = True
        read.clear()
        mapped_search.by_lists(files, vectors(1)[0], 10, np.inf, Selection(files, mask))
        assert sum(read) == int(mask.sum())


@pytest.mark.parametrize(("needed", "least_filtered"), [(1.25, 1.25), (0.25, 0.5)])
def test_a_filter_has_a_reach_of_its_own_by_rows_that_are_near_each_other(index, monkeypatch, needed, least_filtered):
    files = MappedFiles(Storage(index), read_record(Storage(index)))
    live = np.flatnonzero(~files.deleted)
    near, random = recall._rows_near_each_other(files, live), recall._random_rows(live)
    assert len(random) / 2 < len(near) == len(set(near.tolist())) <= len(random)
    assert set(near.tolist()) <= set(live.tolist())
    nearest = [-np.sort(-files.vectors[rows] @ files.vectors[rows].T, axis=1)[:, 1:4].mean() for rows in (near, random)]
    assert nearest[0] > nearest[1] + 0.02
    measured = []
    monkeypatch.setattr(
        recall,
        "measure_recall",
        lambda files, queries, last, rows, reach: (
            measured.append((rows is None, reach)),
            1.0 if reach >= (0.5 if rows is None else needed) else 0.5,
        )[1],
    )
    assert recall.choose_reach(files, lambda: vectors(3, seed=9)) == (0.5, least_filtered, 1.0)
    # Words and vectors of images, among all rows and among the two selections.
    assert measured.count((True, 0.5)) == 2
    assert measured.count((False, 0.25)) == 4


@pytest.mark.parametrize("of_before", [False, True])
def test_searches_with_a_filter_read_on_as_filters_need(index, monkeypatch, of_before):
    record = read_record(Storage(index))
    assert record.filtered_reach is not None
    written = json.loads(record.to_json()) | {"reach": 0.5, "filtered_reach": 1.5}
    if of_before:
        del written["filtered_reach"]
    (index / "vectors.json").write_text(json.dumps(written))
    read, by_lists = [], mapped_search.by_lists
    monkeypatch.setattr(mapped_search, "by_lists", lambda *args: read.append(args[3]) or by_lists(*args))
    reader = open_reader(index)
    reader.nearest(vectors(1)[0], 5, COLUMNS)
    reader.nearest(vectors(1)[0], 5, COLUMNS, "size > 100")
    assert read == [0.5, 0.5 if of_before else 1.5]
    # Rows that are gone are no filter.
    delete_rows(create_image_table(Storage(index), WIDTH), [3])
    open_reader(index).nearest(vectors(1)[0], 5, COLUMNS)
    assert read.pop() == 0.5
    # An update without new rows keeps both.
    write(index)
    assert read_record(Storage(index)).filtered_reach == (None if of_before else 1.5)


@pytest.mark.parametrize("code", mapped.CODES)
def test_what_a_form_has_of_cosines(code):
    rows, queries = vectors(2000), vectors(20, seed=7)
    for width in (0, 16):
        given_settings = VectorSettings(code, width)
        encoder = make_encoder(given_settings, WIDTH, int8_scale(rows, given_settings))
        true = encoder.shorten(queries) @ encoder.shorten(rows).T
        scores = np.stack(
            [encoder.scorer(query)([encoder.encode(rows[:7]), encoder.encode(rows[7:])]) for query in queries]
        )
        if code != "binary":
            assert np.abs(scores - true).max() <= {"float32": 1e-6, "float16": 2e-3, "int8": 3e-2}[code]
        # A query may have a number that is greater than any of the rows.
        spike = np.zeros(WIDTH, dtype=np.float32)
        spike[0] = 1.0
        if code != "binary":
            cosines = encoder.scorer(spike)([encoder.encode(rows)])
            np.testing.assert_allclose(cosines, encoder.shorten(rows)[:, 0], atol=2e-2)
        assert np.corrcoef(scores.ravel(), true.ravel())[0, 1] > (0.6 if code == "binary" else 0.999)


def test_files_of_the_format_before_are_written_anew(index):
    record = json.loads((index / "vectors.json").read_text())
    names = ("centroids", "clustered", "reach")
    (index / "vectors.json").write_text(
        json.dumps({key: value for key, value in record.items() if key not in names} | {"expansion": 96, "format": 1})
    )
    assert open_reader(index).nearest(vectors(1)[0], 5, COLUMNS) is None
    write(index)
    assert read_record(Storage(index)).format == 2
    assert [path.name for path in index.glob("vectors-*")] == [read_record(Storage(index)).folder]
    assert_as_exact(index, open_reader(index))


def test_whoever_has_mapped_the_former_files_keeps_them(index):
    files = MappedFiles(Storage(index), read_record(Storage(index)))
    query = vectors(1)[0]
    before = mapped_search.search_files(files, query, 5)[0].tolist()
    delete_rows(create_image_table(Storage(index), WIDTH), before)
    write(index)
    assert [path.name for path in index.glob("vectors-*")] == [read_record(Storage(index)).folder]
    assert mapped_search.search_files(files, query, 5)[0].tolist() == before
    assert files.rows(np.array(before))[0]["id"] == before[0]


def test_the_files_are_mapped(written):
    reader = open_reader(written)
    reader.nearest(vectors(1)[0], 1, COLUMNS)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc")
    mappings = maps.read_text()
    assert all(name in mappings for name in FILES)


@pytest.mark.parametrize("name", [*FILES, "vectors.json"])
def test_without_a_file_or_with_a_part_of_one_the_table_is_searched(index, name):
    path = index / name if name == "vectors.json" else index / read_record(Storage(index)).folder / name
    path.write_bytes(path.read_bytes()[:-1] if name != "vectors.json" else b"{}")
    assert open_reader(index).nearest(vectors(1)[0], 5, COLUMNS) is None
    write(index)
    assert_as_exact(index, open_reader(index))


def test_without_numkong_the_table_is_searched(index, monkeypatch):
    monkeypatch.setattr("clipvisionalign.search.mapped.reader.can_map", lambda storage: False)
    reader = open_reader(index)
    assert reader.nearest(vectors(1)[0], 5, COLUMNS) is None
    table, query = read_image_table(index), vectors(1)[0]
    assert table.nearest(query, 5, "exact", COLUMNS) == table.nearest(query, 5, mapped.MAPPED_KIND, COLUMNS)


def test_many_new_rows_make_the_table_be_searched(index, monkeypatch):
    monkeypatch.setattr("clipvisionalign.search.mapped.reader.MAX_UNMAPPED_ROWS", 3)
    reader = open_reader(index)
    table = create_image_table(Storage(index), WIDTH)
    add(table, np.arange(ROWS, ROWS + 3), seed=3)
    assert reader.nearest(vectors(1)[0], 5, COLUMNS) is not None
    add(table, np.arange(ROWS + 3, ROWS + 4), seed=4)
    assert reader.nearest(vectors(1)[0], 5, COLUMNS) is None
    write(index)
    assert reader.nearest(vectors(1, seed=4)[0], 1, COLUMNS)[0]["id"] == ROWS + 3


@pytest.mark.parametrize(
    "settings", [VectorSettings(code) for code in mapped.CODES] + [VectorSettings("int8", 16)], ids=str
)
def test_every_form_of_vectors_finds_and_is_kept(index, settings):
    write(index, settings)
    record = read_record(Storage(index))
    assert record.settings == settings
    coarse = settings.code == "binary" or settings.width
    assert_as_exact(index, open_reader(index), least=0.9 if coarse else 0.98)
    assert_as_exact(index, open_reader(index), "id < 300", least=0.8 if coarse else 0.98)
    add(create_image_table(Storage(index), WIDTH), np.arange(ROWS, ROWS + 5), seed=3)
    write(index)
    assert read_record(Storage(index)).settings == settings
    sizes = {"float32": 4, "float16": 2, "int8": 1, "binary": 1 / 8}
    assert record.sizes["codes.npy"] >= ROWS * (settings.width or WIDTH) * sizes[settings.code]


def test_rows_of_one_vector_are_all_found(index):
    table = create_image_table(Storage(index), WIDTH)
    rows = np.arange(ROWS, ROWS + 40)
    add(table, rows, seed=3)
    same = vectors(1, seed=3)[0].tolist()
    update_rows(table, "id", [{"id": number, "vector": same} for number in rows.tolist()], ("id", "vector"))
    write(index)
    assert {row["id"] for row in open_reader(index).nearest(np.array(same), 40, COLUMNS)} == set(rows.tolist())


def test_an_index_of_before_is_brought_up_to_date(index):
    """LanceDB's own index of the vectors, as versions before wrote it, is replaced; what is encoded stays."""
    shutil.rmtree(index / read_record(Storage(index)).folder)
    (index / "vectors.json").unlink()
    table = create_image_table(Storage(index), WIDTH)
    table.create_index(metric="dot", index_type="IVF_HNSW_SQ", num_partitions=1, vector_column_name="vector")
    write_manifest(Storage(index), IndexManifest("", "", "", WIDTH, "IVF_HNSW_SQ", 0.99, {"partitions": 1, "m": 24}))
    assert open_reader(index).nearest(vectors(1)[0], 5, COLUMNS) is None
    assert len(read_image_table(index).nearest(vectors(1)[0], 5, "IVF_HNSW_SQ", COLUMNS)) == 5
    write(index)
    assert read_manifest(index).kind == mapped.MAPPED_KIND
    assert not table.list_indices()
    assert_as_exact(index, open_reader(index))


def test_files_of_a_table_that_was_removed_are_not_used(index):
    """The versions of a new table are counted from 1 again, so that a version says nothing of which table it is."""
    storage = Storage(index)
    version = read_record(storage).version
    shutil.rmtree(index / "pictures.lance")
    table = create_image_table(storage, WIDTH)
    add(table, np.arange(ROWS - 100), 5)
    while read_image_table(index).version < version:
        table.update(where="id = 0", values={"size": 1})
    assert read_image_table(index).version == version
    assert_as_exact(index, open_reader(index))
    write(index)
    assert read_record(storage).live == ROWS - 100
    assert_as_exact(index, open_reader(index))


def test_damaged_files_of_the_same_size_are_written_by_the_next_update(index):
    record = read_record(Storage(index))
    codes = index / record.folder / "codes.npy"
    size = codes.stat().st_size
    with codes.open("r+b") as file:
        file.write(b"\0" * 64)
    assert codes.stat().st_size == size
    assert open_reader(index).nearest(vectors(1)[0], 5, COLUMNS) is None
    write(index)
    assert read_record(Storage(index)).folder != record.folder
    assert_as_exact(index, open_reader(index))


def test_an_index_that_becomes_small_has_no_files(index):
    table = create_image_table(Storage(index), WIDTH)
    delete_rows(table, range(50, ROWS))
    write(index)
    assert read_manifest(index).kind == "exact"
    assert sorted(path.name for path in index.iterdir()) == ["index.json", "pictures.lance"]


def test_many_threads_search_at_once(written):
    reader = open_reader(written)
    queries = vectors(200, seed=8)

    def ids(query: np.ndarray) -> list[int]:
        return [row["id"] for row in reader.nearest(query, 10, COLUMNS)]

    one_by_one = [ids(query) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ids, queries)) == one_by_one


@pytest.mark.parametrize(
    ("code", "width", "message"),
    [("int4", 0, "one of float32"), ("", 20, "multiple of 8"), ("", 64, "from 8 to 32"), ("", -8, "from 8 to 32")],
)
def test_settings_that_fit_no_vectors_are_refused(code, width, message, tmp_path, monkeypatch):
    if code:
        # A form that there is not is refused before a model is loaded.
        monkeypatch.setattr("clipvisionalign.search.indexer.load_aligner", lambda run: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=message):
            build_index("run", tmp_path, tmp_path / "index", vectors=code)
    with pytest.raises(ValueError, match=message):
        mapped.check_settings(code, width, WIDTH)
    assert mapped.check_settings("", 0, WIDTH, VectorSettings("binary", 16)) == VectorSettings("binary", 16)
    assert mapped.check_settings("int8", WIDTH, WIDTH, VectorSettings("binary", 16)) == VectorSettings("int8")


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import test_mapped as given
folder = given.Path(sys.argv[1])
rng = np.random.default_rng(int(sys.argv[3]))
table = given.create_image_table(given.Storage(folder), given.WIDTH)
print("ready", flush=True)
for turn in range(1000):
    ids = table.search().select(["id"]).limit(100_000).to_arrow()["id"].to_numpy()
    given.delete_rows(table, rng.choice(ids, 20 + 400 * (turn % 3 == 2), replace=False).tolist())
    ids = table.search().select(["id"]).limit(100_000).to_arrow()["id"].to_numpy()
    count = given.ROWS - len(ids) + int(rng.integers(20))
    given.add(table, np.arange(ids.max() + 1, ids.max() + 1 + count), seed=int(rng.integers(1_000_000)))
    given.write(folder)
"""


@pytest.mark.slow
def test_killed_while_writing_files_and_rows_agree(index):
    """Real processes and SIGKILL, at random moments of writing rows, lists and record."""
    rng = random.Random(2)
    moments = []
    for turn in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(index), str(Path(__file__).parent), str(turn)],
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        process.stdout.readline()
        reader = open_reader(index)
        reader.nearest(vectors(1)[0], 5, COLUMNS)
        folders = set(index.glob("vectors-*"))
        if turn % 2:
            # While the files are written.
            while set(index.glob("vectors-*")) <= folders and process.poll() is None:
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append(len(list(index.glob("vectors-*"))))
        for each in (reader, open_reader(index)):
            for where in ("", f"id > {ROWS}"):
                assert_as_exact(index, each, where, least=0.95, queries=5)
    print("folders left by each kill:", moments)
    write(index)
    assert len(list(index.glob("vectors-*"))) == 1
    assert json.loads((index / "vectors.json").read_text())["version"] == read_image_table(index).version
    assert_as_exact(index, open_reader(index))
