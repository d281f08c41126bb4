"""An index in shards answers as a single one of the same images: ids, scores, order, ties, filters, verdicts, re-ranking.

Both are written by one update of the same files; each shard is an index of its own, and an update that was killed ends
as the undisturbed one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
from fastapi.testclient import TestClient

from clipvisionalign.cli import main
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.search import image_rows, table_reader
from clipvisionalign.search.calibration import UncalibratedError
from clipvisionalign.search.index_parts import NUMBERS_FILE
from clipvisionalign.search.index_reader import IndexReader, NearestRows, VectorQuery, merge_rows, nearest_in_order
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.judgements import Judgement, calibrate_index
from clipvisionalign.search.promise import SearchResult
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.sharded_reader import ShardedReader
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.tables import open_caption_table, open_image_table
from clipvisionalign.search.terms import Term, parse_term
from clipvisionalign.search.unreachable import MissingShard, ShardUnavailable
from clipvisionalign.search.vectors import InMemoryVectors

SHARDS = 3
WORDS = ["a red circle", "a dog", "^2 red", "blue ring", "^0.5 star", "left of"]
FILTERS = ["", "width > 17", 'path like "b/*" and not (id < 12 or height < 10)', "year >= 2010", "year is null"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    """An aligner of the design late with random weights."""
    folder = tmp_path_factory.mktemp("run")
    Aligner(tiny_model("late")).save(folder)
    return folder


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (16, 16 + seed % 4, 3), dtype=np.uint8)).save(path)
    return path


def fill(folder: Path) -> Path:
    """Forty images; eight of them are copies of one, whose scores are equal."""
    for number in range(32):
        draw(folder / "ab"[number % 2] / f"{number:02}.png", number)
    for number in range(8):
        shutil.copy(folder / "a" / "00.png", folder / "b" / f"copy {number}.png")
    return folder


def captioned(folder: Path) -> Path:
    """A table of the images with two captions and perhaps a year each."""
    lines = ["file_name,caption,year,split"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        year = 2000 + number if number % 3 else ""
        lines += [f"{path.relative_to(folder)},{kind} {WORDS[number % 6]},{year},train" for kind in ("this is", "here")]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory) -> tuple[Searcher, Searcher]:
    """A single index, and one in shards, of the same images with captions, metadata and patches."""
    folder = fill(tmp_path_factory.mktemp("source"))
    table, out = captioned(folder), tmp_path_factory.mktemp("out")
    reports = [
        build_index(run, table, out / name, captions=True, metadata=table, patches=0, shards=shards).to_dict()
        for name, shards in (("one", None), ("shards", SHARDS))
    ]
    for report in reports:
        report.pop("text_tower")
    assert reports[0] == reports[1]
    assert (reports[0]["there"], reports[0]["captions"]) == (40, 80)
    return Searcher(out / "one"), Searcher(out / "shards")


def contents(index: Path) -> dict[str, dict[str, Any]]:
    """The rows of an index or of all its shards, by path, without what may be rounded otherwise."""
    folders = sorted(index.glob("shard-*")) or [index]
    rows = [row for each in folders for row in open_image_table(each).search().limit(1000).to_list()]
    by_path = {row["path"]: {name: row[name] for name in ("id", "hash", "size", "width", "mtime_ns")} for row in rows}
    assert len(by_path) == len(rows), "an image is in two shards"
    return by_path


def assert_same_answers(one: Searcher, many: Searcher, queries: list[SearchQuery]) -> None:
    for query, alone, merged in zip(queries, one.search_batch(queries), many.search_batch(queries), strict=True):
        if isinstance(alone, Exception):
            assert (type(merged), str(merged).replace("shards", "one")) == (type(alone), str(alone)), query
            continue
        assert isinstance(alone, SearchResult)
        assert isinstance(merged, SearchResult), merged
        assert [hit.to_dict() for hit in merged] == [hit.to_dict() for hit in alone], query
        assert (merged.verdict(), merged.notes) == (alone.verdict(), alone.notes)


# --- the merge -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), max_size=40), st.integers(1, 5), st.integers(1, 12), st.randoms()
)
def test_merged_lists_are_the_list_of_all_rows(distances, shards, count, rng):
    rows = [{"id": number, "_distance": distance} for number, distance in enumerate(distances)]
    whole = sorted(rows, key=lambda row: (row["_distance"], row["id"]))
    parts: list[list[dict[str, Any]]] = [[] for _ in range(shards)]
    for row in whole:
        rng.choice(parts).append(row)
    assert merge_rows([part[:count] for part in parts], count) == whole[:count]


@given(st.lists(st.sampled_from([0.0, 0.5, 0.75]), max_size=60), st.integers(1, 12), st.randoms())
def test_ties_are_ordered_by_number_however_the_database_orders_them(distances, count, rng):
    rows = [{"id": number, "_distance": distance} for number, distance in enumerate(distances)]

    def nearest(wanted: int) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: (row["_distance"], rng.random()))[:wanted]

    expected = sorted(rows, key=lambda row: (row["_distance"], row["id"]))[:count]
    assert nearest_in_order(nearest, count) == expected


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(1, 9))
def test_a_row_has_the_same_cosine_in_memory_whichever_rows_are_beside_it(rows, seed, count):
    import pyarrow as arrow

    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, 24)).astype(np.float32)
    vectors[rng.integers(0, rows, rows // 3)] = vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    class Table:
        version = 1

        def __init__(self, ids: np.ndarray) -> None:
            self.ids = rng.permutation(ids)

        def read(self, columns: list[str]) -> Any:
            values = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors[self.ids].ravel()), 24)
            return arrow.table({"id": self.ids, "vector": values})

    queries = rng.standard_normal((2, 24)).astype(np.float32)
    whole = InMemoryVectors(Table(np.arange(rows)), ("id",)).search(queries, [count, count])  # type: ignore[arg-type]
    shard_of = rng.integers(0, 3, rows)
    parts = [
        InMemoryVectors(Table(ids), ("id",)).search(queries, [count, count])  # type: ignore[arg-type]
        for ids in (np.flatnonzero(shard_of == shard) for shard in range(3))
        if len(ids)
    ]
    for query in range(2):
        assert merge_rows([part[query] for part in parts], count) == whole[query]


# --- answers ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True), st.booleans(), st.integers(1, 45),
            st.sampled_from(FILTERS),
        ), min_size=1, max_size=4,
    )
)  # fmt: skip
def test_shards_answer_as_one_index(pair, drawn):
    queries = [
        SearchQuery([*map(parse_term, words), *([parse_term("green", -1.0)] if minus else [])], count, where)
        for words, minus, count, where in drawn
    ]
    assert_same_answers(*pair, queries)


def test_images_captions_reranking_and_errors_are_those_of_one_index(pair, tmp_path):
    like = Term(draw(tmp_path / "like.png", 5), is_image=True)
    term, vector = parse_term("a red circle"), pair[0].vector_of(3)
    assert np.array_equal(vector, pair[1].vector_of(3))
    assert_same_answers(*pair, [
        SearchQuery([like], 12), SearchQuery([like, term], 12), SearchQuery(vector=vector, count=12),
        SearchQuery([term], 20, rerank=16), SearchQuery([term, parse_term("a dog")], 9, "width > 17", rerank=5),
        SearchQuery(vector=vector, count=30, captions=True), SearchQuery([like], captions=True),
        SearchQuery([term], 3, "nothing = 2"), SearchQuery([]), SearchQuery([term], promise=0.9),
        SearchQuery([parse_term("日本")]),
    ])  # fmt: skip
    stored = pair[1].reader.patches
    assert stored is not None
    assert len(stored.read(pair[1].values(range(40), "hash"))) == 40


def test_shards_are_calibrated_as_one_index_and_promise_alike(pair):
    def judged(searcher: Searcher) -> Any:
        judgements = [Judgement((f"{word} {number}",), (number % 40,)) for number in range(12) for word in WORDS]
        return calibrate_index(searcher, judgements)

    one, many = map(judged, pair)
    assert np.allclose(one.scores, many.scores, atol=1e-6)
    assert one.calibrated_on == many.calibrated_on
    for searcher in pair:
        Storage(searcher.index).write("calibration.json", one.to_json())
    try:
        terms = [parse_term("a red circle")]
        queries = [SearchQuery(terms, promise=0.8), SearchQuery(terms, 3), SearchQuery(terms, 5, promise=0.9)]
        assert not any(isinstance(each, UncalibratedError) for each in pair[0].search_batch(queries))
        assert_same_answers(*pair, queries)
    finally:
        for searcher in pair:
            (Path(searcher.index) / "calibration.json").unlink()


def test_a_shard_is_an_index_of_its_own(pair):
    many = pair[1]
    counts = []
    for name in many.reader.names:
        shard = Searcher(Path(many.index) / name)
        hits = shard.search([parse_term("a dog")], 100)
        counts.append(len(hits))
        whole = {hit.id: hit for hit in many.search([parse_term("a dog")], 100)}
        assert all(whole[hit.id].path == hit.path for hit in hits)
        assert all(abs(whole[hit.id].score - hit.score) < 2e-6 for hit in hits)
    assert sum(counts) == 40
    assert min(counts) > 0


def test_a_shard_that_does_not_answer_is_named_and_nothing_is_promised(pair):
    many = pair[1]
    reader = many.reader
    assert isinstance(reader, ShardedReader)

    class Silent:
        def result(self) -> list[NearestRows | Exception]:
            raise ShardUnavailable

    silent = ShardedReader(many.index, lambda shard, *asked: Silent() if shard == 1 else reader.ask(shard, *asked))
    query = SearchQuery([parse_term("a dog")], 40)
    (partial,) = Searcher(many.index, reader=silent).search_batch([query])
    whole = many.search_one(query)
    held = {row["id"] for row in reader.readers[1].table.read(("id",)).to_pylist()}
    assert isinstance(partial, SearchResult)
    assert list(partial) == [hit for hit in whole if hit.id not in held]
    assert partial.missing == (MissingShard("shard-01", len(held)),)
    assert partial.verdict() == {"promise": None, "nothing": False, "reason": "",
                                 "incomplete": [{"shard": "shard-01", "images": len(held)}]}  # fmt: skip
    assert "shard-01" in partial.notes[-1]


def test_shards_that_cannot_be_read_are_named_until_they_can(pair, tmp_path, monkeypatch):
    index = Path(shutil.copytree(str(pair[1].index), tmp_path / "index"))
    searcher = Searcher(index)
    reader = searcher.reader
    assert isinstance(reader, ShardedReader)
    # So that each query is searched for as if the last one were long ago.
    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(0))
    queries = [
        SearchQuery([parse_term("a dog")], 40), SearchQuery([parse_term("a dog")], 7, "width > 17"),
        SearchQuery([parse_term("a red circle")], 5, rerank=4), SearchQuery([parse_term("a dog")], 9, captions=True),
    ]  # fmt: skip
    whole = [searcher.search_one(query) for query in queries]
    counts = {name: reader.table.counts[number] for number, name in enumerate(reader.names)}

    def away(gone: Sequence[str]) -> None:
        for name in reader.names:
            here, there = index / name, index / f"{name}.away"
            if name in gone and here.exists():
                here.rename(there)
            if name not in gone and there.exists():
                there.rename(here)

    with TestClient(create_app([searcher]), base_url="http://localhost") as client:
        for gone in (["shard-01"], ["shard-02", "shard-00"], [], ["shard-00"], []):
            away(gone)
            (info,) = client.get("/health").json()["indexes"]
            assert [each["up"] for each in info["shards"]] == [name not in gone for name in reader.names]
            held = [row["id"] for name in reader.names if name in gone
                    for row in IndexReader(index / f"{name}.away").table.read(("id",)).to_pylist()]  # fmt: skip
            missing = tuple(MissingShard(name, counts[name]) for name in reader.names if name in gone)
            # Each alone, and all together, which are searched for in memory.
            results = [searcher.search_one(query) for query in queries], searcher.search_batch(queries * 2)
            for result, expected in zip([*results[0], *results[1]], whole * 3, strict=True):
                assert isinstance(result, SearchResult)
                assert result.missing == missing
                if not missing:
                    assert result == expected
            assert list(results[0][0]) == [hit for hit in whole[0] if hit.id not in held]
            body = client.get("/search", params={"q": "a dog", "count": 40, "where": "width > 0"}).json()
            assert [each["shard"] for each in body.get("incomplete", [])] == sorted(gone)
            (info,) = client.get("/health").json()["indexes"]
            assert {each["shard"]: (each["images"], each["up"]) for each in info["shards"]} == {
                name: (count, name not in gone) for name, count in counts.items()
            }
            # All images and their counts are those of the others, which is told.
            for where, left in (("", None), ("width > 0", None), ("width > 17", "width > 17")):
                page = client.get("/browse", params={"count": 60, "where": where}).json()
                expected = [row["id"] for name in reader.names if name not in gone
                            for row in IndexReader(index / name).table.read(("id",), left or "").to_pylist()]  # fmt: skip
                assert sorted(image["id"] for image in page["found"]) == sorted(expected)
                assert page["total"] == len(expected)
                assert all(name in page.get("notes", [""])[0] for name in gone)
                assert ("notes" in page) == bool(gone)
            shown = client.get("/facets")
            assert shown.status_code == 200
            near = whole[0][[hit.id not in held for hit in whole[0]].index(True)]
            assert client.get("/captions", params={"id": near.id}).status_code == 200
            # What is left is shown, too; what is not is no fault of who asks.
            statuses = {client.get(f"/image/{hit.id}").status_code for hit in whole[0] if hit.id not in held}
            assert statuses == {200}
            assert {client.get(f"/image/{number}").status_code for number in held} <= {503}
        away(reader.names)
        for words in ({}, {"where": "width > 17"}):
            response = client.get("/search", params={"q": "a dog", **words})
            assert (response.status_code, response.json()["detail"][:33]) == (503, "the index cannot be read now; see")
        away([])


def test_a_table_that_cannot_be_read_is_so_for_every_query_until_it_can(pair, tmp_path):
    """Not for one of them in each interval between two checks, while others are answered from memory."""
    index = Path(shutil.copytree(str(pair[0].index), tmp_path / "index"))
    reader = Searcher(index).reader
    queries = [VectorQuery(np.eye(1, reader.manifest.width, dtype=np.float32)[0], 3)] * 2
    whole = reader.search(queries, ("id",))
    index.rename(tmp_path / "away")
    reader.table._checked -= 60
    for _ in range(3):
        with pytest.raises(OSError, match="Not found"):
            reader.search(queries, ("id",))
    (tmp_path / "away").rename(index)
    assert reader.search(queries, ("id",)) == whole


def test_an_error_of_a_query_is_no_shard_that_does_not_answer(pair):
    class Fails:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def result(self) -> list[NearestRows | Exception]:
            raise self.error

    many, query = pair[1], SearchQuery([parse_term("a dog")], 40)
    for silent in range(3):
        errors = [ShardUnavailable("gone") if shard == silent else RuntimeError("divide by zero") for shard in range(3)]
        reader = ShardedReader(many.index, lambda shard, *asked, errors=errors: Fails(errors[shard]))
        (result,) = Searcher(many.index, reader=reader).search_batch([query])
        assert str(result) == "divide by zero"
        # One that is slow is not said to be down.
        assert [state["up"] for state in reader.states()] == [True] * 3


def test_patches_that_cannot_be_read_are_an_error_and_no_other_order(run, tmp_path):
    folder, index = fill(tmp_path / "images"), tmp_path / "index"
    build_index(run, folder, index, shards=SHARDS, patches=0)
    searcher, query = Searcher(index), SearchQuery([parse_term("a dog")], 40, rerank=40)
    whole = searcher.search_one(query)
    (index / "shard-01" / "patches.lance").rename(tmp_path / "away")
    # Of those that are read once more.
    with pytest.raises((OSError, RuntimeError, ValueError), match="patches"):
        searcher.search_one(query)
    (tmp_path / "away").rename(index / "shard-01" / "patches.lance")
    assert searcher.search_one(query) == whole


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_updates_change_shards_as_one_index(run, tmp_path):
    folder = fill(tmp_path / "source")
    reports = []
    for number in range(3):
        if number == 1:
            (folder / "b").rename(folder / "c")
            (folder / "a" / "00.png").unlink()
            draw(folder / "a" / "02.png", 77)
            draw(folder / "new.png", 78)
            # Last: the number of a file that is not decoded stays free in shards.
            (folder / "c" / "zz.png").write_bytes(b"no image")
        if number == 2:
            draw(folder / "c" / "zz.png", 79)
        pair = [
            build_index(run, folder, tmp_path / name, shards=shards) for name, shards in (("one", None), ("many", 4))
        ]
        reports.append([each.to_dict() | {"text_tower": None} for each in pair])
        assert reports[-1][0] == reports[-1][1]
        assert contents(tmp_path / "one") == contents(tmp_path / "many")
        assert (tmp_path / "many" / "broken.jsonl").read_text() == (tmp_path / "one" / "broken.jsonl").read_text()
    assert (reports[1][0]["moved"], reports[1][0]["encoded"], reports[1][0]["broken"]) == (24, 2, 1)
    # Without the flag, and from the shell.
    assert main(["index", str(run), str(folder), "--out", str(tmp_path / "many")]) == 0
    assert main(["search", str(tmp_path / "many"), "a dog", "--paths"]) == 0
    # What would empty an index is refused whole.
    before = contents(tmp_path / "many")
    for path in [*(folder / "c").iterdir()][:12]:
        path.unlink()
    with pytest.raises(InvalidIndexError, match="12 of its 41 rows"):
        build_index(run, folder, tmp_path / "many")
    assert contents(tmp_path / "many") == before


@pytest.mark.slow
def test_a_lost_shard_alone_is_encoded_again(run, tmp_path):
    folder = fill(tmp_path / "source")
    build_index(run, folder, tmp_path / "many", shards=4)
    before = contents(tmp_path / "many")
    lost = {row["path"] for row in open_image_table(tmp_path / "many" / "shard-02").search().limit(100).to_list()}
    shutil.rmtree(tmp_path / "many" / "shard-02")
    with pytest.raises(InvalidIndexError, match="its shard-02 is missing"):
        Searcher(tmp_path / "many")
    report = build_index(run, folder, tmp_path / "many")
    assert (report.encoded, report.unchanged) == (len(lost), 40 - len(lost))
    after = contents(tmp_path / "many")
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before.keys() - lost)


@pytest.mark.parametrize("lost", ["shard", "table", "captions"])
def test_a_lost_shard_is_not_made_again_without_the_columns_and_captions_of_the_others(run, tmp_path, capsys, lost):
    folder, many = fill(tmp_path / "source"), tmp_path / "many"
    table = captioned(folder)
    build_index(run, table, many, captions=True, metadata=table, shards=3)
    assert build_index(run, folder, many).unchanged == 40, "an update of complete shards needs no flags"

    def values(index: Path) -> dict[str, tuple[Any, ...]]:
        rows = [
            row
            for shard in sorted(index.glob("shard-*"))
            for row in open_image_table(shard).search().limit(99).to_list()
        ]
        texts = [
            row
            for shard in sorted(index.glob("shard-*"))
            for row in open_caption_table(shard).search().limit(99).to_list()
        ]
        return {
            row["path"]: (
                row["year"],
                row["split"],
                sorted(each["text"] for each in texts if each["path"] == row["path"]),
            )
            for row in rows
        }

    before = values(many)
    shutil.rmtree(many / "shard-01" / {"shard": "", "table": "pictures.lance", "captions": "captions.lance"}[lost])
    capsys.readouterr()
    calls = {
        "": {"--metadata FILE", "--captions"}
        - {"captions": {"--metadata FILE"}, "table": {"--captions"}}.get(lost, set()),
        f"--metadata {table}": {"shard": {"--captions"}, "captions": {"--captions"}}.get(lost, set()),
    }
    for flags, asked in calls.items():
        if not asked:
            continue
        kept = {str(path): path.stat().st_mtime_ns for path in many.rglob("*")}
        assert main(["index", str(run), str(folder), "--out", str(many), *flags.split()]) == 1
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert error.startswith(f"clipvisionalign: error: {many}: its shard-01 ")
        assert {flag for flag in ("--metadata FILE", "--captions") if flag in error} == asked
        assert ("metadata columns" in error and "year" in error) == ("--metadata FILE" in asked)
        assert {str(path): path.stat().st_mtime_ns for path in many.rglob("*")} == kept, "something was written"
    if lost != "captions":
        with pytest.raises(InvalidIndexError, match=r"year.*give --metadata FILE as"):
            build_index(run, table, many, captions=True)
    build_index(run, table, many, captions=True, metadata=table)
    assert values(many) == before
    assert build_index(run, folder, many).unchanged == 40


@pytest.mark.parametrize("is_old", [False, True])
def test_a_lost_shard_is_made_again_by_the_table_whose_columns_have_names_of_a_data_set(run, tmp_path, is_old):
    folder, many = fill(tmp_path / "source"), tmp_path / "many"
    rows = [f"{path.relative_to(folder)},own {path.stem}" for path in sorted(folder.rglob("*.png"))]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["file_name,split", *rows]) + "\n")
    build_index(run, folder, many, metadata=table, shards=3)
    for shard in many.glob("shard-*") if is_old else ():
        # As an index of before: it is not known whose the column is.
        (shard / "camera.json").write_text('{"user_columns": [], "is_complete": true}')
    shutil.rmtree(many / "shard-01")
    with pytest.raises(InvalidIndexError, match="give the data set's file as" if is_old else "give --metadata FILE as"):
        build_index(run, folder, many)
    assert build_index(run, folder, many, metadata=table).there == 40
    rows_of = [row for shard in many.glob("shard-*") for row in open_image_table(shard).search().limit(99).to_list()]
    assert {row["split"] for row in rows_of} == {f"own {Path(row['path']).stem}" for row in rows_of}


def test_columns_that_cameras_fill_are_none_that_a_lost_shard_lacks(run, tmp_path):
    folder = fill(tmp_path / "source")
    exif = Image.Exif()
    exif[0x0110] = "Camera 1"
    Image.new("RGB", (20, 20), "red").save(folder / "a" / "shot.jpg", exif=exif)
    build_index(run, folder, tmp_path / "many", shards=3)
    names = {shard: open_image_table(tmp_path / "many" / shard).schema.names for shard in ("shard-00", "shard-01")}
    assert all("camera" in each for each in names.values())
    shutil.rmtree(tmp_path / "many" / "shard-01")
    assert build_index(run, folder, tmp_path / "many").there == 41
    assert set(open_image_table(tmp_path / "many" / "shard-01").schema.names) == set(names["shard-01"])


def index_until(run: Path, folder: Path, out: Path, moment: int) -> int:
    """Index into shards, killed when the disk is written to for the `moment`-th time."""
    moments = 0

    def counted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal moments
            moments += 1
            if moments == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        return call

    image_rows.IMAGES_PER_WRITE = 4
    image_rows._PartWriter.flush = counted(image_rows._PartWriter.flush)  # type: ignore[method-assign]
    Storage.write = counted(Storage.write)  # type: ignore[method-assign]
    build_index(run, folder, out, shards=SHARDS)
    (out / "moments").write_text(str(moments))
    return 0


@pytest.mark.slow
def test_a_killed_update_of_shards_ends_as_the_undisturbed_one(run, tmp_path):
    folder = fill(tmp_path / "source")
    whole = tmp_path / "whole"
    assert Forked(index_until, run, folder, whole, 0, out=tmp_path / "said").wait(300) == 0
    expected, moments = contents(whole), int((whole / "moments").read_text())
    rng = random.Random(21)
    kills = 0
    for attempt in range(2):
        out, last = tmp_path / f"killed {attempt}", 0
        # Once early, once late, and then to the end.
        for moment in (rng.randrange(1, moments // 3), rng.randrange(8, moments // 2), 0):
            status = Forked(index_until, run, folder, out, moment, out=tmp_path / "said").wait(300)
            kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
            last = status
        assert last == 0
        assert contents(out) == expected
        assert (out / NUMBERS_FILE).read_text().strip() == "{}"
        assert build_index(run, folder, out).unchanged == 40
    assert kills >= 2


def test_what_shards_are_not_for_is_refused_in_one_line(run, pair, tmp_path, capsys):
    folder = fill(tmp_path / "source")
    one, many = (str(searcher.index) for searcher in pair)
    build_index(run, folder, tmp_path / "single")
    calls = [
        (["index", str(run), str(folder), "--out", str(tmp_path / "single"), "--shards", "2"], "leave --shards out"),
        (["index", str(run), str(folder), "--out", str(tmp_path / "new"), "--shards", "0"], "1 to 100 shards"),
        (["index", str(run), str(folder), "--out", many, "--shards", "5"], f"in {SHARDS} shards, not 5"),
        (["index", str(run), str(folder), "--out", f"{many}/shard-00"], f"give --out {many}"),
        (["duplicates", many], "--out OTHER"),
        (["duplicates", many, "--decisions"], "--out OTHER"),
    ]
    for arguments, message in calls:
        assert main(arguments) in (1, 2), arguments
        stderr = capsys.readouterr().err.strip()
        assert message in stderr, stderr
        assert "Traceback" not in stderr
    assert not (tmp_path / "new").exists()
    assert one
