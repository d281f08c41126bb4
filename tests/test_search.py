"""An index at work: every file once, updates, kills, filters, queries, why, the service and what it refuses."""

from __future__ import annotations

import json
import operator
import os
import random
import re
import shutil
import threading
import time
from datetime import timedelta
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import many_processes
import numpy as np
import pytest
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import encoded_image, write_odd_files
from PIL import Image
from tolerance import assert_as_exact, assert_rounds_to, assert_same, in_float64, rounding

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.explain.contact_sheet import thumbnail_sheet
from clipvisionalign.explain.heatmaps import explain, overlay
from clipvisionalign.images import open_image
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.ann import choose_index_type, search_table
from clipvisionalign.search.broken_files import read_broken_files
from clipvisionalign.search.duplicates import find_duplicates
from clipvisionalign.search.filters import FILTER_COLUMNS, FilterError, filter_sql
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.mapped import MAPPED_KIND, can_map, read_record
from clipvisionalign.search.patches import open_patch_reader
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import InvalidIndexError, Storage, list_local_images
from clipvisionalign.search.table_reader import LanceDBReader
from clipvisionalign.search.tables import create_image_table, open_caption_table, open_image_table
from clipvisionalign.search.terms import Term, parse_term

#: A cosine of two vectors of 32 numbers, each of which a network of some 30 layers has made and a length divided: how
#: far it may be off. See `tolerance.py`.
COSINE = {"terms": 32, "size": 1.0, "steps": 30}


@pytest.fixture
def folder(tmp_path: Path, scenes_folder: Path) -> Path:
    """Forty images in three folders."""
    source = tmp_path / "pictures"
    for number, path in enumerate(sorted((scenes_folder / "images").glob("*.png"))[:40]):
        subfolder = source / ("", "deep", "deep/er")[number % 3]
        subfolder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, subfolder / path.name)
    return source


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    index = tmp_path_factory.mktemp("index") / "late"
    build_index(tiny_runs["late"], scenes_folder / "images", index)
    return index


def rows_of(index: Path) -> dict[str, dict]:
    table = open_image_table(index)
    rows = table.search().limit(10_000).to_arrow().to_pylist()
    assert len({row["path"] for row in rows}) == len(rows), "an image stands there twice"
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


# --- files and updates -----------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_aligner(tiny_runs, folder, tmp_path):
    build_index(tiny_runs["self"], folder, tmp_path / "index")
    rows = rows_of(tmp_path / "index")
    paths = sorted(rows)
    aligner, files = load_aligner(tiny_runs["self"]), [folder / path for path in paths]
    exact = in_float64(aligner).encode_images(files)
    assert_as_exact(np.array([rows[path]["vector"] for path in paths]), aligner.encode_images(files), exact, size=1.0)


@pytest.mark.slow
def test_made_again_it_does_only_what_changed(tiny_runs, folder, tmp_path):
    index = tmp_path / "index"
    first = build_index(tiny_runs["self"], folder, index)
    assert (first.there, first.encoded) == (40, 40)
    again = build_index(tiny_runs["self"], folder, index)
    assert (again.encoded, again.unchanged) == (0, 40)
    before = rows_of(index)
    files = sorted(folder.rglob("*.png"))
    files[0].unlink()
    files[1].rename(folder / "moved.png")
    Image.new("RGB", (70, 50), "red").save(files[2])
    Image.new("RGB", (80, 50), "blue").save(folder / "new.png")
    os.utime(files[3])
    third = build_index(tiny_runs["self"], folder, index)
    assert (third.there, third.encoded, third.moved, third.dropped, third.unchanged) == (40, 2, 1, 1, 37)
    rows = rows_of(index)
    old = str(files[1].relative_to(folder))
    assert rows["moved.png"]["vector"] == before[old]["vector"]
    changed = str(files[2].relative_to(folder))
    assert rows[changed]["vector"] != before[changed]["vector"]
    assert (rows[changed]["width"], rows[changed]["height"]) == (70, 50)
    assert set(rows) == {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    # An index made from nothing of what is there now holds the same.
    build_index(tiny_runs["self"], folder, tmp_path / "fresh")
    fresh = rows_of(tmp_path / "fresh")
    assert set(fresh) == set(rows)
    exact = in_float64(load_aligner(tiny_runs["self"])).encode_images([folder / path for path in rows])
    both = (np.array([index_rows[path]["vector"] for path in rows]) for index_rows in (rows, fresh))
    assert_same(*both, exact, size=1.0)


def test_every_file_is_indexed_or_listed_once(tiny_runs, tmp_path):
    """Odd names, loops, links, and images broken in twelve ways."""
    source = tmp_path / "odd"
    names, bad = write_odd_files(source)
    report = build_index(tiny_runs["self"], source, tmp_path / "index")
    rows = rows_of(tmp_path / "index")
    assert {row["raw"] for row in rows.values()} == names
    listed = [entry["path"] for entry in read_broken_files(tmp_path / "index")]
    assert sorted(listed) == sorted(bad)
    assert (report.encoded, report.broken) == (len(names), 13)
    assert all(entry["reason"] for entry in read_broken_files(tmp_path / "index"))
    # A search shows them, and finds where they are.
    searcher = Searcher(tmp_path / "index")
    hits = searcher.search([parse_term("a green picture")], count=20)
    assert len(hits) == len(names)
    raws = [row["raw"] for row in searcher.rows([each.id for each in hits], ("raw",))]
    assert all(searcher.storage.image_source(raw).is_file() for raw in raws)
    # Mended, it is indexed; nothing else is looked at again.
    (source / "text.jpg").write_bytes(encoded_image() + b"mended")
    again = build_index(tiny_runs["self"], source, tmp_path / "index")
    assert (again.encoded, again.broken) == (1, 12)
    assert "text.jpg" not in [entry["path"] for entry in read_broken_files(tmp_path / "index")]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("a/1.png", "elsewhere/2.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "a" / "link2").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [file.raw for file in list_local_images(tmp_path / "a")] == [b"1.png", b"link/2.png"]


def test_another_aligner_and_another_folder_are_refused(tiny_runs, indexed, folder):
    with pytest.raises(InvalidIndexError, match="an index of another aligner"):
        build_index(tiny_runs["self"], read_manifest(indexed).folder, indexed)
    with pytest.raises(InvalidIndexError, match="an index of "):
        build_index(tiny_runs["late"], folder, indexed)
    with pytest.raises(InvalidIndexError, match="made by another aligner"):
        Searcher(indexed, run=tiny_runs["self"])
    with pytest.raises(InvalidIndexError, match="no index there"):
        Searcher(folder)
    with pytest.raises(InvalidIndexError, match="is there already and no index"):
        build_index(tiny_runs["late"], folder, folder)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_and_nothing_twice(tiny_runs, tmp_path):
    """Real processes and SIGKILL; rows are written eight at a time, so that there is much to cut off."""
    source = tmp_path / "many"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(source / f"{number:03}.png")
    index = tmp_path / "index"
    draw = random.Random(1)
    kills = 0
    for turn in range(4):
        process = Forked(
            many_processes.index, str(tiny_runs["self"]), str(source), str(index), out=tmp_path / f"said {turn}.txt"
        )
        # Killed while it writes: some lines after it began.
        lines = draw.randint(2, 7)
        while process.said.count("\n") < lines and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        if process.poll() is None:
            process.kill()
            kills += 1
        if (index / "index.json").is_file() and list(index.glob("*.lance")):
            assert len(rows_of(index)) <= 300
            Searcher(index).search([parse_term("anything")])
    assert kills >= 3
    report = build_index(tiny_runs["self"], source, index)
    assert report.there == 300
    assert len(rows_of(index)) == 300


def test_two_do_not_write_one_index_and_one_that_is_open_sees_what_is_written(tiny_runs, folder, tmp_path, monkeypatch):
    from clipvisionalign.search import table_reader
    from clipvisionalign.search.storage import Storage

    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(0))
    index = tmp_path / "index"
    build_index(tiny_runs["self"], folder, index)
    searcher = Searcher(index)
    Image.new("RGB", (64, 64), "red").save(folder / "new.png")
    with Storage(index).lock(), pytest.raises(InvalidIndexError, match="another process is writing"):
        build_index(tiny_runs["self"], folder, index)
    (tmp_path / "years.csv").write_text("path,year\nnew.png,1999\n")
    build_index(tiny_runs["self"], folder, index, metadata=tmp_path / "years.csv")
    hits = searcher.search([Term(folder / "new.png", is_image=True)], 1, "year = 1999")
    assert [each.path for each in hits] == ["new.png"]


# --- data sets, captions, metadata, other places and machines --------------------------------------------------------


def test_captions_of_a_data_set_are_found_by_an_image(tiny_runs, scenes_folder, tmp_path, capsys):
    index = tmp_path / "index"
    data = read_captioned_images(scenes_folder)
    report = build_index(tiny_runs["self"], scenes_folder, index, captions=True)
    expected = {(path.name, text) for row in data for path in [row.image] for text in row.captions}
    assert (report.there, report.captions) == (len(data), len(expected))
    rows = open_caption_table(index).search().limit(10_000).to_arrow().to_pylist()
    assert {(row["path"], row["text"]) for row in rows} == expected
    # The nearest are those of the aligner's own order.
    searcher, image = Searcher(index), data.rows[7].image
    vector = searcher.encode([Term(image, is_image=True)])
    texts = [row["text"] for row in rows]
    scores = load_aligner(tiny_runs["self"]).encode_captions(texts).numpy() @ vector
    hits = searcher.captions(vector, 15)
    assert_rounds_to(np.array([each.score for each in hits]), np.sort(scores)[::-1][:15].copy(), **COSINE)
    assert hits[0].text in {texts[i] for i in np.flatnonzero(scores >= scores.max() - rounding(**COSINE))}
    # The split is metadata; an image whose captions changed loses the old ones; nothing is encoded twice.
    dev = searcher.search([parse_term("red")], count=500, where='split = "dev"')
    assert {each.path for each in dev} == {row.image.name for row in data.split("dev")}
    copy = shutil.copytree(scenes_folder, tmp_path / "copy")
    lines = (copy / "metadata.csv").read_text().splitlines()
    (copy / "metadata.csv").write_text("\n".join([lines[0], lines[1].replace("a ", "a mended ", 1), *lines[2:]]))
    shutil.copytree(index, tmp_path / "other")
    with pytest.raises(InvalidIndexError):
        build_index(tiny_runs["self"], copy, index, captions=True)
    manifest = json.loads((tmp_path / "other" / "index.json").read_text()) | {
        "folder": str((copy / "images").resolve())
    }
    (tmp_path / "other" / "index.json").write_text(json.dumps(manifest))
    again = build_index(tiny_runs["self"], copy / "metadata.csv", tmp_path / "other", captions=True)
    assert (again.encoded, again.unchanged) == (0, len(data))
    now = open_caption_table(tmp_path / "other").search().limit(10_000).to_arrow().to_pylist()
    assert {(row["path"], row["text"]) for row in now} == {
        (row.image.name, text) for row in read_captioned_images(copy) for text in row.captions
    }
    assert main(["search", str(index), "--like", str(image), "--captions", "--count", "3"]) == 0
    assert hits[0].text in capsys.readouterr().out
    assert main(["search", str(index), "--like", str(image), "--captions", "--paths"]) == 1


@pytest.mark.slow
def test_metadata_becomes_columns_to_filter_by(tiny_runs, folder, tmp_path):
    index, table_path = tmp_path / "index", tmp_path / "told.csv"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    years = {name: 2000 + number for number, name in enumerate(names)}
    rows = [f'{name},{year},"it\'s {year % 3}"' for name, year in years.items()]
    table_path.write_text("\n".join(["file_name,Year,Place name", *rows[:-1]]))
    build_index(tiny_runs["self"], folder, index, metadata=table_path)

    def paths_where(where: str) -> set[str]:
        return {each.path for each in Searcher(index).search([parse_term("red")], count=500, where=where)}

    assert paths_where("year > 2020") == {name for name in names[:-1] if years[name] > 2020}
    assert paths_where('place_name = "it\'s 1" and year <= 2010') == {
        n for n in names if years[n] % 3 == 1 and years[n] <= 2010
    }
    first = Searcher(index).search([parse_term("red")], where="year = 2003")[0]
    assert first.to_dict()["metadata"] == {"year": 2003.0, "place_name": f"it's {2003 % 3}"}
    # Without a table the columns stay as they are, also those of an image that was changed or moved.
    Image.new("RGB", (70, 50), "red").save(folder / names[3])
    (folder / names[4]).rename(folder / "moved.png")
    build_index(tiny_runs["self"], folder, index)
    assert paths_where("year = 2003") == {names[3]}
    assert paths_where("year = 2004") == {"moved.png"}
    # Another table: other columns, other values; a column of the index's own is refused.
    table_path.write_text(
        "\n".join(["path\tstars", *(f"{name}\t{'many' if n else '3'}" for n, name in enumerate(names))])
    )
    table_path = table_path.rename(tmp_path / "told.tsv")
    report = build_index(tiny_runs["self"], folder, index, metadata=table_path)
    assert report.encoded == 0
    assert paths_where('stars = "3"') == {names[0]}
    with pytest.raises(FilterError, match="no column 'year'"):
        paths_where("year > 2000")
    for head in ("path\thash", "name\tyear", "path\t1"):
        table_path.write_text(f"{head}\na\tb")
        with pytest.raises(DataError):
            build_index(tiny_runs["self"], folder, index, metadata=table_path)


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket of an S3 service on this machine."""
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'clipvisionalign[s3]'")
    server = pytest.importorskip(
        "moto.server", reason="no moto.server: pip install 'clipvisionalign[test]'"
    ).ThreadedMotoServer(port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_images_and_index_behind_a_url(tiny_runs, folder, tmp_path, bucket, user_cache, monkeypatch):
    import s3fs

    from clipvisionalign.search import table_reader

    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(hours=1))

    storage = s3fs.S3FileSystem()
    storage.put(f"{folder}/", "bucket/pictures/", recursive=True)
    (tmp_path / "bad").write_bytes(b"no picture")
    storage.put(str(tmp_path / "bad"), "bucket/pictures/bad.jpg")
    images_url, index = f"{bucket}/pictures", f"{bucket}/index"
    report = build_index(tiny_runs["late"], images_url, index)
    assert (report.there, report.encoded, report.broken) == (40, 40, 1)
    build_index(tiny_runs["late"], folder, tmp_path / "here")
    here, there = Searcher(tmp_path / "here"), Searcher(index)
    # The text tower lies there too, and is fetched once.
    assert report.text_tower.state in ("written", "cached")
    shutil.rmtree(user_cache / "text_towers")
    assert there.encoder.text_tower is not None
    assert len(list((user_cache / "text_towers").glob("*/text_tower.onnx"))) == 1
    for rerank in (0, 5):
        hits = [searcher.search([parse_term("a red circle")], 40, rerank=rerank) for searcher in (here, there)]
        assert [each.path for each in hits[0]] == [each.path for each in hits[1]]
    storage.rm("bucket/pictures/" + hits[0][0].path)
    storage.mv("bucket/pictures/" + hits[0][1].path, "bucket/pictures/moved.png")
    again = build_index(tiny_runs["late"], images_url, index)
    assert (again.there, again.encoded, again.moved, again.dropped, again.unchanged) == (39, 0, 1, 1, 38)
    with pytest.raises(KeyError, match="no longer where it was"):
        there.image_source(hits[0][1].id)
    with pytest.raises(FileNotFoundError):
        build_index(tiny_runs["late"], f"{bucket}/nothing", f"{bucket}/other")


@pytest.mark.slow
def test_two_workers_of_ray_give_the_same_index(tiny_runs, folder, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="no ray: pip install 'clipvisionalign[ray]'")
    # Ray's workers have the lowest priority otherwise, and get no time beside other tests.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    (folder / "bad.jpg").write_bytes(b"no picture")
    # More than one batch, so that both have to do.
    for number in range(150):
        Image.new("RGB", (40, 30 + number % 50), (number, 90, 200)).save(folder / f"drawn {number}.png")
    one = build_index(tiny_runs["late"], folder, tmp_path / "one", patches=0)
    two = build_index(tiny_runs["late"], folder, tmp_path / "two", ray="local", workers=2, patches=0)
    reports = [each.to_dict() for each in (one, two)]
    for report in reports:
        # Written for the one, taken from the cache for the other, in some seconds.
        report.pop("text_tower")
    assert reports[0] == reports[1]
    first, second = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert first.keys() == second.keys()
    exact = in_float64(load_aligner(tiny_runs["late"])).encode_images([folder / path for path in first])
    patches = [
        open_patch_reader(Storage(tmp_path / name)).read({row["id"]: row["hash"] for row in rows.values()})
        for name, rows in (("one", first), ("two", second))
    ]
    assert len(patches[0]) == len(first)
    for path in first:
        here, there = patches[0][first[path]["id"]], patches[1][second[path]["id"]]
        assert np.abs(here - there).max() <= 2 / 127 * np.abs(here).max(), path
    assert_same(*(np.array([row.pop("vector") for row in rows.values()]) for rows in (first, second)), exact, size=1.0)
    assert first == second
    assert read_broken_files(tmp_path / "one") == read_broken_files(tmp_path / "two")


# --- searching -------------------------------------------------------------------------------------------------------


def test_a_search_is_the_exact_order_of_cosines(indexed, tiny_runs):
    searcher = Searcher(indexed)
    rows = rows_of(indexed)
    query = load_aligner(tiny_runs["late"]).encode_captions(["a red circle"])[0].numpy()
    expected = sorted(rows, key=lambda path: -float(np.dot(rows[path]["vector"], query)))
    hits = searcher.search([parse_term("a red circle")], count=12)
    assert [each.path for each in hits] == expected[:12]
    assert hits[0].score == pytest.approx(float(np.dot(rows[expected[0]]["vector"], query)), abs=rounding(**COSINE))


def test_queries_that_are_answered_together_find_what_each_alone_finds(indexed):
    together, alone = Searcher(indexed), Searcher(indexed)
    terms = [[parse_term(text) for text in texts] for texts in (["a red circle"], ["^2 two stars", "blue"], ["ring"])]
    counts = [3, 20, 1000]
    queries = [
        SearchQuery(*query) for query in zip(terms, counts, ["", 'path like "00001*"', ""], [5, 0, 0], strict=True)
    ]
    refused = [
        SearchQuery([parse_term("red", -1.0)]),
        SearchQuery(terms[0], 0),
        SearchQuery(terms[0], where="colour = 3"),
    ]
    results = together.search_batch([*queries, *refused])
    for query, hits in zip(queries, results, strict=False):
        expected = alone.search(query.terms, query.count, query.where, query.rerank)
        assert [each.id for each in hits] == [each.id for each in expected]
        scores = ([each.score for each in some] for some in (hits, expected))
        assert next(scores) == pytest.approx(next(scores), abs=rounding(**COSINE))
        assert len(hits) == (len(expected) if query.where else min(query.count, 120))
    messages = ("something to look for", "at least 1 image", "no column 'colour'")
    assert all(message in str(error) for message, error in zip(messages, results[3:], strict=True))


def test_a_caption_is_tokenised_and_encoded_once_re_ranking_included(indexed, monkeypatch):
    searcher = Searcher(indexed)
    searcher.encoder._text_manifest = None  # as an index without a text tower
    tower = searcher.aligner.text_tower
    tokenized: list[str] = []
    tokenize = tower.tokenize
    monkeypatch.setattr(tower, "tokenize", lambda captions: tokenized.extend(captions) or tokenize(captions))
    encoded_counts: list[int] = []
    tower.register_forward_pre_hook(lambda module, given: encoded_counts.append(len(given[0])))
    terms = [parse_term("a red circle"), parse_term("blue", -1.0)]
    assert all(each.pair_score is not None for each in searcher.search(terms, 5, rerank=5))
    assert (tokenized, sum(encoded_counts)) == (["a red circle", "blue"], 2)
    searcher.search_batch([SearchQuery(terms), SearchQuery(terms, where="width = 64"), SearchQuery(terms[:1])])
    assert (tokenized[2:], sum(encoded_counts)) == (["a red circle", "blue"], 4)


@pytest.mark.slow
def test_an_approximate_index_is_built_by_size_and_measured(tiny_runs, tmp_path):
    source, index = tmp_path / "many", tmp_path / "index"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(300):
        noise = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        noise.resize((48, 48)).save(source / f"{number:03}.png")
    build_index(tiny_runs["self"], source, index)
    term = [parse_term("a red circle")]
    right = [each.id for each in Searcher(index).search(term, 10)]
    graph = MAPPED_KIND if can_map(Storage(index)) else "IVF_HNSW_SQ"
    for sizes, kind in (((100, 1000), graph), ((100, 200), "IVF_PQ"), ((1000, 2000), "exact")):
        build_index(tiny_runs["self"], source, index, sizes=sizes)
        manifest = read_manifest(index)
        assert manifest.kind == kind
        assert manifest.recall > 0.9
        ids = [each.id for each in Searcher(index).search(term, 10)]
        assert len(set(ids) & set(right)) >= 8
    assert manifest.recall == 1.0
    # What comes later is found as well, before and after the next building.
    build_index(tiny_runs["self"], source, index, sizes=(100, 1000))
    Image.new("RGB", (48, 48), "red").save(source / "new.png")
    build_index(tiny_runs["self"], source, index, sizes=(100, 1000))
    assert Searcher(index).search([Term(source / "new.png", is_image=True)], 1)[0].path == "new.png"
    assert choose_index_type(1_000_000, 256)[1]["partitions"] == 122


def test_the_form_of_vectors_is_kept_and_nothing_is_encoded_for_another(tiny_runs, scenes_folder, tmp_path):
    index, sizes = Storage(tmp_path / "index"), (50, 1000)
    if not can_map(index):
        pytest.skip("no numkong: pip install 'clipvisionalign[search]'")
    half = ("float16", 16)
    for options, expected in (({}, ("int8", 0)), ({"vectors": "float16", "vector_width": 16}, half), ({}, half)):
        report = build_index(tiny_runs["self"], scenes_folder / "images", index.location, sizes=sizes, **options)
        settings = read_record(index).settings
        assert (settings.code, settings.width) == expected
    assert (report.encoded, report.unchanged) == (0, report.there)


def test_terms_add_up_by_weight_and_minus_takes_away(indexed):
    searcher = Searcher(indexed)
    red, blue = (searcher.encode([parse_term(word)]) for word in ("red", "blue"))
    both = searcher.encode([parse_term("^2 red"), parse_term("blue", -1.0)])
    expected = 2 * red - blue
    assert both == pytest.approx(expected / np.linalg.norm(expected), abs=rounding(**COSINE))
    for terms, message in (([parse_term("red", -1.0)], "something to look for"),
                        ([parse_term("red"), parse_term("red", -1.0)], "take each other away")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            searcher.encode(terms)


@pytest.mark.parametrize(
    ("text", "words", "weight", "noted"),
    [
        ("^2 red", "red", 2.0, False), ("  ^2.5\ta big  dog ", "a big  dog", 2.5, False), ("^0.5 ^2 red", "^2 red", 0.5, False),
        ("^1 10:30", "10:30", 1.0, False), ("2:red", "red", 2.0, True), ("2.5:a big dog", "a big dog", 2.5, True),
        # Sentences, times, ratios, and what looks like a weight and is none.
        ("10:30 on a station clock", "10:30 on a station clock", 1.0, False), ("time 12:30", "time 12:30", 1.0, False),
        ("16:9", "16:9", 1.0, False), ("3:1 a ratio", "3:1 a ratio", 1.0, False), ("2: red", "2: red", 1.0, True),
        ("a sign with 2:red", "a sign with 2:red", 1.0, False), ("x^2 on a board", "x^2 on a board", 1.0, False),
        ("red^2", "red^2", 1.0, False), ("^_^ a face", "^_^ a face", 1.0, False), ("^ up", "^ up", 1.0, False),
        (":red", ":red", 1.0, False), ("٢:red", "٢:red", 1.0, False), ("2:30pm", "2:30pm", 1.0, False), ("2", "2", 1.0, False),
    ],
)  # fmt: skip
def test_a_weight_has_a_form_that_no_sentence_has(text, words, weight, noted):
    for sign in (1.0, -1.0):
        term = parse_term(text, sign)
        assert term == Term(words, sign * weight)
        assert bool(term.note) is noted
        assert not noted or "^2" in term.note


@pytest.mark.parametrize(
    "text",
    [f"^{'9' * 400} red", f"{'9' * 400}:red", "^inf red", "^nan red", "^-1 red", "^0 red", "0:red", "^1e3 red", "^2x red",
     "^1001 red", f"^0.{'0' * 50}1 red", "^2", "^2 ", "2:", "2: ", "", "  ", "^.5 red", "\udcff"],
)  # fmt: skip
def test_a_term_without_words_or_with_a_weight_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"a weight is a number|needs words|no UTF-8"):
        parse_term(text)


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -float("inf")])
def test_no_weight_makes_a_score_nan(indexed, weight):
    with pytest.raises(ValueError, match="neither infinite nor nan"):
        Searcher(indexed).search([Term("red", weight)])


def test_the_heaviest_weights_leave_scores_that_are_numbers(indexed):
    terms = [parse_term(text) for text in ("^1000 red", "^0.001 blue")]
    assert all(-1.001 <= each.score <= 1.001 for each in Searcher(indexed).search(terms, 5))


def test_an_image_finds_itself_first(indexed, scenes_folder):
    searcher = Searcher(indexed)
    path = sorted((scenes_folder / "images").glob("*.png"))[5]
    hits = searcher.search([Term(path, is_image=True)], count=3)
    assert hits[0].path == path.name
    assert hits[0].score == pytest.approx(1.0, abs=rounding(**COSINE))


def test_re_ranking_is_the_order_of_pair_scores(indexed, tiny_runs):
    searcher = Searcher(indexed)
    hits = searcher.search([parse_term("a red circle")], count=8, rerank=8)
    plain = searcher.search([parse_term("a red circle")], count=8)
    assert {each.id for each in hits} == {each.id for each in plain}
    folder = Path(read_manifest(indexed).folder)
    pairs = load_aligner(tiny_runs["late"]).pair_scorer([folder / each.path for each in plain], ["a red circle"])
    scores = pairs(np.arange(8), np.zeros(8, dtype=int))
    assert [each.path for each in hits] == [plain[i].path for i in np.argsort(-scores, kind="stable")]


def test_duplicates_by_bytes_and_by_sight(tiny_runs, tmp_path):
    source = tmp_path / "twice"
    source.mkdir()
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    for number, each in enumerate(images):
        each.save(source / f"{number}.png")
    shutil.copy(source / "0.png", source / "copy.png")
    images[1].save(source / "again.bmp")
    build_index(tiny_runs["self"], source, tmp_path / "index")
    groups = find_duplicates(Searcher(tmp_path / "index"), threshold=0.99999)
    assert {frozenset(row["path"] for row in group) for group in groups} == {
        frozenset({"0.png", "copy.png"}), frozenset({"1.png", "again.bmp"}),
    }  # fmt: skip


@pytest.mark.parametrize("block", [7, 64, 500])
def test_duplicates_are_the_components_of_near_pairs_for_any_block(tmp_path, block):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 8))[rng.integers(0, 20, 150)] + 0.2 * rng.normal(size=(150, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    table = create_image_table(Storage(tmp_path / "index"), 8)
    rows = [{"id": row, "path": f"{row * 7 % 150:03}", "raw": b"%d" % row, "hash": str(row // 2), "size": 1, "vector": vector}
            for row, vector in enumerate(vectors)]  # fmt: skip
    table.add(rows)
    near = vectors @ vectors.T >= 0.95
    near |= np.arange(150)[:, None] // 2 == np.arange(150) // 2
    while (wider := near @ near).sum() > near.sum():
        near = wider
    expected = {frozenset(np.flatnonzero(row).tolist()) for row in near}
    groups = find_duplicates(SimpleNamespace(table=LanceDBReader(table)), 0.95, block)
    assert {frozenset(row["id"] for row in group) for group in groups} == expected
    assert [len(group) for group in groups] == sorted(map(len, expected), reverse=True)


# --- filters ---------------------------------------------------------------------------------------------------------


def test_a_filter_keeps_what_it_says(indexed):
    searcher = Searcher(indexed)
    everything = {each.path for each in searcher.search([parse_term("red")], count=200)}
    some = {each.path for each in searcher.search([parse_term("red")], count=200, where='path like "00001*"')}
    assert some == {path for path in everything if path.startswith("00001")}
    assert not searcher.search([parse_term("red")], where="width > 64")
    assert searcher.search([parse_term("red")], where='width = 64 and path != "x"')


@pytest.mark.parametrize(
    "text",
    [
        "1 = 1", "path = 'a' or 1 = 1", "width > 1; drop table pictures", "path = 'a' --", "vector = 1", "hash = 'a'",
        "width > 'a'", "path > 3", "path = 'it''s' and", "(width > 1", "width > (select 1)", "width", "= 3", "x" * 600,
        "raw = X'00'", "path like 5", "width like 'a'", "width > ٣", "width > 1e3", "width > 0x10", "width > NaN", "width > .5",
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(FilterError):
        filter_sql(text, FILTER_COLUMNS)


@settings(deadline=None)
@given(st.text(max_size=30).filter(lambda text: '"' not in text))
def test_a_text_in_a_filter_stays_a_text(text):
    sql = filter_sql(f'path = "{text}"', FILTER_COLUMNS)
    assert sql.startswith("`path` = '")
    inner = sql[len("`path` = '") : -1]
    assert "'" not in inner.replace("''", "")
    assert inner.replace("''", "'") == text


NUMBERS = {
    "width": [0, 5, 10, 11, 2**31 - 1, -(2**31)],
    "size": [0, 7, 2**31, 2**40, 2**53, -3],
    "year": [0.0, 0.1, -1.5, 1e300, None, 7.0],
}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """A table of whole numbers of 32 and 64 bits, floating ones and nothing, and texts."""
    import lancedb
    import pyarrow as arrow

    kinds = {"width": arrow.int32(), "size": arrow.int64(), "year": arrow.float64(), "path": arrow.string()}
    columns = {name: arrow.array(values, kinds[name]) for name, values in NUMBERS.items()}
    columns["path"] = arrow.array(["a", "A%b", "x_y", "日本", "it's", "back\\slash"])
    columns["vector"] = arrow.array([[1.0, 0.0]] * 6, arrow.list_(arrow.float32(), 2))
    return lancedb.connect(tmp_path_factory.mktemp("filtered")).create_table("table", arrow.table(columns))


def kept(table, where: str) -> list[str]:
    sql = filter_sql(where, {"width": True, "size": True, "year": True, "path": False})
    return sorted(row["path"] for row in search_table(table, np.ones(2), 10, columns=("path",), where=sql))


SIGNS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
LITERALS = st.one_of(
    st.integers(-(10**450), 10**450).map(str), st.sampled_from([10, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64]).map(str),
    st.decimals(-(2**40), 2**40, places=3).map("{:f}".format), st.sampled_from(["10.5", "10.0", "-0.0", "0.1", "-1.5", "007", "1" + "0" * 300]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.sampled_from([*NUMBERS]), st.sampled_from([*SIGNS]), LITERALS)
def test_a_number_of_any_size_or_fraction_is_compared_as_numbers_are(filtered, column, sign, literal):
    expected = [
        path for path, value in zip(filtered.to_arrow()["path"].to_pylist(), NUMBERS[column], strict=True)
        if value is not None and SIGNS[sign](value, float(literal) if column == "year" else Fraction(literal))
    ]  # fmt: skip
    assert kept(filtered, f"{column} {sign} {literal}") == sorted(expected)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.text(alphabet=st.sampled_from("aAbxy%_*\\'`日\x00\n;-"), max_size=5),
    st.sampled_from(["=", "!=", "<", ">", "like"]),
)
def test_a_text_of_any_characters_is_compared_as_it_stands(filtered, text, sign):
    paths = filtered.to_arrow()["path"].to_pylist()
    pattern = re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)
    expected = [path for path in paths if (pattern.fullmatch(path) if sign == "like" else SIGNS[sign](path, text))]
    assert kept(filtered, f'path {sign} "{text}"') == sorted(expected)


# --- why -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_an_explanation_has_the_pairs_score_and_changes_with_the_weights(tiny_runs, scenes_folder, design):
    import torch

    aligner = load_aligner(tiny_runs[design])
    path = sorted((scenes_folder / "images").glob("*.png"))[0]
    explanation = explain(aligner, path, "a red circle")
    index = np.zeros(1, dtype=int)
    expected = float(aligner.score_pairs([path], ["a red circle"], index, index)[0])
    assert explanation.score == pytest.approx(expected, rel=1e-3, abs=1e-3)
    side = explanation.heatmap.shape[0]
    assert explanation.heatmap.shape == (side, side)
    assert explanation.heatmap.min() >= 0
    assert explanation.heatmap.max() <= 1
    assert [word for word, _ in explanation.word_heatmaps] == (
        [] if design in ("self", "sparse") else ["a", "red", "circle"]
    )
    assert (
        overlay(path, explanation.heatmap).shape == (224, 224, 3)
        or max(overlay(path, explanation.heatmap).shape[:2]) <= 224
    )
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in aligner.image_tower.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    other = explain(aligner, path, "a red circle")
    assert np.abs(other.heatmap - explanation.heatmap).max() > 0.05


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_commands(tiny_runs, folder, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert main(["index", str(tiny_runs["late"]), str(folder), "--out", index]) == 0
    assert "40 images: 40 encoded" in capsys.readouterr().out
    assert main(["search", index, "^2 red", "circle", "--minus", "blue", "--count", "3", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["query"] == "^2 red + circle"
    assert main(["search", index, "2:red", "circle", "--minus", "blue", "--count", "3", "--json"]) == 0
    before = capsys.readouterr()
    assert json.loads(before.out)["found"] == output["found"]
    assert "note: '2:red' counts 2 times; write '^2 red'" in before.err
    assert len(output["found"]) == 3
    assert main(["search", index, "red", "--paths", "--count", "4", "--rerank", "4"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(paths) == 4
    assert all(Path(path).is_file() for path in paths)
    assert main(["search", index, "red", "--paths", "--null", "--count", "4", "--rerank", "4"]) == 0
    assert capsys.readouterr().out.split("\0") == [*paths, ""]
    assert main(["search", index, "red", "--count", "2"]) == 0
    plain = capsys.readouterr().out
    assert main(["search", index, "red", "--count", "2", "--previews"]) == 0
    shown = capsys.readouterr().out
    assert "image" in shown
    assert len(shown.splitlines()) > len(plain.splitlines()) + 8
    assert main(["search", index, "--like", paths[0], "--sheet", str(tmp_path / "found.png")]) == 0
    assert Image.open(tmp_path / "found.png").width > 500
    sheet = thumbnail_sheet([(encoded_image("JPEG"), "one"), (b"\xff\xd8 damaged", "two"), (b"", "three")], "")
    assert [sheet.getpixel((12 + 232 * cell + 110, 12 + 110)) == (221, 221, 221) for cell in range(3)] == [0, 1, 1]
    capsys.readouterr()
    (tmp_path / "queries.txt").write_text(
        "\ufeffa star\r\n\r\nthree\u2028rings\x0b\rcafé", encoding="utf-8", newline=""
    )
    assert main(["search", index, "--queries", str(tmp_path / "queries.txt"), "--json"]) == 0
    assert [each["query"] for each in json.loads(capsys.readouterr().out)] == ["a star", "three\u2028rings", "café"]
    assert main(["search", index, "red", "--where", "width > 5000"]) == 1
    assert main(["search", index, "red", "--where", "colour = 3"]) == 1
    assert "no column 'colour'" in capsys.readouterr().err
    assert main(["explain", str(tiny_runs["late"]), paths[0], "a red circle", "--out", str(tmp_path / "why.png")]) == 0
    assert Image.open(tmp_path / "why.png").width > 500
    assert main(["duplicates", index, "--json"]) == 0


# --- the service -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(indexed):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app
    from clipvisionalign.search.server.limits import Limits

    with TestClient(create_app([Searcher(indexed)], limits=Limits(upload_bytes=200_000))) as test_client:
        yield test_client


def test_the_service_finds_what_the_search_finds(client, indexed):
    asked = {"q": ["^2 red", "circle"], "minus": "blue", "count": 7}
    body = client.get("/search", params=asked).json()
    hits = body["found"]
    assert body["notes"] == []
    former = client.get("/search", params=asked | {"q": ["2:red", "circle"]}).json()
    assert former["found"] == hits
    assert "counts 2 times" in former["notes"][0]
    searcher = Searcher(indexed)
    terms = [parse_term("^2 red"), parse_term("circle"), parse_term("blue", -1.0)]
    assert [each["path"] for each in hits] == [each.path for each in searcher.search(terms, 7)]
    again = client.get("/search", params={"q": "red", "rerank": 5, "count": 5}).json()["found"]
    assert all("pair_score" in each for each in again)
    similar = client.get("/similar", params={"id": hits[0]["id"], "count": 3}).json()["found"]
    assert hits[0]["id"] not in [each["id"] for each in similar]
    assert client.get("/captions", params={"id": hits[0]["id"]}).status_code == 422  # this index has none
    thumbnail = client.get(f"/image/{hits[0]['id']}")
    assert open_image(thumbnail.content).width > 10
    uploaded = client.post("/similar", files={"picture": thumbnail.content}).json()["found"]
    assert uploaded[0]["id"] == hits[0]["id"]
    why = client.get("/explain", params={"id": hits[0]["id"], "caption": "a red circle"})
    assert open_image(why.content).width > 300
    assert client.get("/health").json()["indexes"][0]["pictures"] == 120
    assert 'clipvisionalign_requests_total{path="/search",status="200"}' in client.get("/metrics").text


def bomb() -> bytes:
    out = BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/image/999999", 404), ("/image/-1", 404), ("/image/99999999999999999999", 404), ("/image/../../etc/passwd", 404),
        ("/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404), ("/image//etc/passwd", 404), ("/image/abc", 422),
        ("/page/../app.py", 404), ("/page/%2e%2e/app.py", 404), ("/search", 422), ("/search?q=", 422),
        ("/search?q=" + "a" * 10_000, 422), ("/search?q=a&count=1000000", 422), ("/search?q=a&count=0", 422),
        ("/search?q=a&where=1=1;drop table pictures", 422), ("/search?q=a&where=path='a' or '1'='1'", 422),
        ("/search?q=a&rerank=100000", 422), ("/search?q=a&index=7", 422), ("/similar?id=99999999", 404),
        ("/explain?id=0&caption=", 422), ("/explain?id=0&caption=%20", 422), ("/nothing", 404),
    ],
)  # fmt: skip
def test_the_service_refuses(client, path, status):
    response = client.get(path)
    assert response.status_code in ({status, 404, 422} if status == 422 and "abc" in path else {status}), response.text[
        :300
    ]
    assert "root:" not in response.text


def test_the_service_refuses_uploads_that_are_no_images(client):
    for data, status in ((b"", 422), (b"no picture", 422), (os.urandom(300_000), 413), (bomb(), 422)):
        assert client.post("/similar", files={"picture": data}).status_code == status
    assert client.post("/similar").status_code == 422


def test_a_token_is_asked_of_everything_but_health(indexed):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app
    from clipvisionalign.search.server.run import run_server

    with TestClient(create_app([Searcher(indexed)], token="secret")) as client:
        assert client.get("/health").status_code == 200
        for path in ("/", "/search?q=a", "/image/0", "/metrics", "/openapi.json", "/page/page.js"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/search?q=a", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/?token=secret").status_code == 200
        # The page's own requests come with the cookie.
        assert client.get("/image/0").status_code == 200
    with pytest.raises(ValueError, match="set a --token"):
        run_server([str(indexed)], host="0.0.0.0")


def test_a_request_that_takes_too_long_is_told_so(indexed, monkeypatch):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app
    from clipvisionalign.search.server.limits import Limits

    searcher = Searcher(indexed)
    monkeypatch.setattr(searcher, "search_batch", lambda queries: [time.sleep(0.5)])
    with TestClient(create_app([searcher], limits=Limits(seconds=0.2))) as client:
        response = client.get("/search?q=a")
        assert response.status_code == 503
        assert "not done within 0.2 s" in response.text
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert 'requests_total{path="/search",status="503"} 1' in client.get("/metrics").text


def test_another_host_name_is_refused(indexed):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app

    with TestClient(create_app([Searcher(indexed)], hosts=["localhost"])) as client:
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
        assert client.get("/health", headers={"Host": "localhost"}).status_code == 200


def test_queries_that_wait_together_are_answered_together():
    from clipvisionalign.search.server.batching import Batcher

    gate, sizes = threading.Event(), []

    def search_batch(queries):
        gate.wait(5)
        sizes.append(len(queries))
        return [ValueError("seven") if query.count == 7 else query.count for query in queries]

    batcher = Batcher(search_batch)
    waiting = {n: batcher(SearchQuery([Term("x")], n)) for n in range(1, 21)}
    gate.set()
    with pytest.raises(ValueError, match="seven"):
        waiting.pop(7).result(5)
    assert all(future.result(5) == n for n, future in waiting.items())
    assert len(sizes) <= 3
    assert sum(sizes) == 20

    def broken(queries):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Batcher(broken)(SearchQuery([Term("x")], 1)).result(5)
    batcher.close()
