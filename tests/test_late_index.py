"""A whole index ranked by late interaction: by lists of centroids, then by patches, in step with its images."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.late import LateQuery, LateTerm, rank_images, read_late_record, score_images
from clipvisionalign.search.late.build import build_late, write_lists
from clipvisionalign.search.late.files import RECORD_FILE, LateFiles, LateRecord
from clipvisionalign.search.late.ranking import estimate
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.tables import delete_rows, open_image_table, read_columns
from clipvisionalign.search.terms import parse_term

QUERIES = (["a red circle"], ["^2 a blue star", "a green ring"], ["nothing"])


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def made_files(folder: Path, counts: list[int], width: int = 8, seed: int = 0, directions: int = 12) -> LateFiles:
    """Files of images with so many patches each, around a few directions."""
    rng = np.random.default_rng(seed)
    around = unit(rng.normal(size=(directions, width)))[rng.integers(directions, size=sum(counts))]
    patches = unit(around + 0.6 / width**0.5 * rng.normal(size=around.shape))
    codes = np.rint(127 * patches / np.abs(patches).max(axis=1, keepdims=True)).astype(np.int8)
    target = folder / "late-made"
    target.mkdir(parents=True)
    arrays = {
        "ids": np.arange(len(counts)) * 3, "contents": np.zeros(len(counts), dtype=np.int64), "codes": codes,
        "vectors": unit(rng.normal(size=(len(counts), 5))).astype(np.float32),
        "offsets": np.concatenate([[0], np.cumsum(counts)]), "assigned": np.full(len(codes), -1, dtype=np.int32),
        "norms": (1 / np.linalg.norm(codes.astype(float), axis=1)).astype(np.float32),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)
    write_lists(target, None)
    centroids = len(np.load(target / "centroids.npy"))
    record = LateRecord(target.name, len(counts), len(codes), width, centroids, len(counts), 1, 1, {})
    return LateFiles(Storage(folder), record)


def made_query(seed: int, terms: int = 2, width: int = 8) -> LateQuery:
    rng = np.random.default_rng(seed)
    return LateQuery(
        [
            LateTerm(unit(rng.normal(size=5)), unit(rng.normal(size=(3 + n, width))), rng.random(3 + n), 1.0 - 1.5 * n)
            for n in range(terms)
        ],
        scale=2.0, late_scale=3.0,
    )  # fmt: skip


def written_out_score(files: LateFiles, query: LateQuery, image: int, read: dict[tuple[int, int], set[int]] | None):
    """The score of an image by loops: of its patches; or, with the centroids that each token reads, of these alone."""
    total = 0.0
    rows = range(files.offsets[image], files.offsets[image + 1])
    for number, term in enumerate(query.terms):
        total += term.weight * query.scale * float(term.vector @ files.vectors[image])
        for token_number, (token, weight) in enumerate(zip(term.tokens, term.token_weights, strict=True)):
            if read is None:
                best = max(float(token @ (files.codes[row] * files.norms[row])) for row in rows)
            else:
                lists, floor = read[number, token_number]
                best = max([floor, *(float(token @ files.centroids[files.assigned[row]]) for row in rows
                                     if files.assigned[row] in lists)])  # fmt: skip
            total += term.weight * query.late_scale * weight * best
    return total


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=20), st.integers(0, 99), st.integers(1, 9))
def test_scores_and_estimates_are_what_loops_give(tmp_path_factory, counts, seed, probes):
    files, query = made_files(tmp_path_factory.mktemp("late"), counts, seed=seed), made_query(seed)
    every = np.arange(len(counts))
    expected = [written_out_score(files, query, image, None) for image in every]
    assert np.allclose(score_images(files, query, every), expected, atol=1e-4)
    lists = {}
    for number, term in enumerate(query.terms):
        for token_number, token in enumerate(term.tokens):
            cosines = files.centroids @ token
            order = np.argsort(-cosines, kind="stable")
            taken = min(probes, len(order) - 1)
            lists[number, token_number] = set(order[:taken].tolist()), float(cosines[order[taken]])
    expected = [written_out_score(files, query, image, lists) for image in every]
    assert np.allclose(estimate(files, query, probes), expected, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(0, 99), st.integers(1, 40))
def test_where_all_candidates_are_read_the_order_is_the_exact_one(tmp_path_factory, counts, seed, wanted):
    files, query = made_files(tmp_path_factory.mktemp("late"), counts, seed=seed), made_query(seed)
    scores = score_images(files, query, np.arange(len(counts)))
    allowed = np.random.default_rng(seed).random(len(counts)) < 0.6
    for mask in (None, allowed):
        positions, best = rank_images(files, query, wanted, mask)
        there = np.arange(len(counts)) if mask is None else np.flatnonzero(mask)
        assert np.allclose(best, np.sort(scores[there])[::-1][:wanted], atol=1e-5)
        assert np.allclose(scores[positions], best, atol=1e-5)
        assert set(positions) <= set(there)


def test_few_candidates_hold_nearly_all_of_the_first_ten(tmp_path):
    files = made_files(tmp_path, [9] * 3000, width=32, directions=200)
    every, by_lists, by_vectors = np.arange(3000), [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Tokens near patches of an image, and a vector that says nothing.
        start = 9 * rng.integers(3000)
        patches = files.codes[start : start + 5] * files.norms[start : start + 5, None]
        tokens = unit(patches + 0.3 * unit(rng.normal(size=patches.shape)))
        query = LateQuery([LateTerm(unit(rng.normal(size=5)), tokens, np.full(5, 0.2))], scale=0.2, late_scale=3.0)
        best = np.argsort(-score_images(files, query, every))[:10]
        positions, _ = rank_images(files, query, 10, probes=32, candidates=100)
        assert len(positions) == 10
        by_lists.append(len(np.intersect1d(best, positions)) / 10)
        nearest = np.argsort(-files.vectors @ query.terms[0].vector)[:100]
        by_vectors.append(len(np.intersect1d(best, nearest)) / 10)
    assert np.mean(by_lists) >= 0.95
    assert np.mean(by_vectors) < 0.5, "the nearest vectors alone would do"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scenes_folder):
    target = tmp_path_factory.mktemp("late") / "images"
    target.mkdir()
    for path in sorted((scenes_folder / "images").glob("*.png"))[:30]:
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def index(folder, tiny_runs):
    out = folder.with_name("index")
    build_index(tiny_runs["late"], folder, out, late=True)
    return out


def hits_of(index, terms, **options):
    result = Searcher(index).search_one(SearchQuery([parse_term(text) for text in terms], **options))
    return [(hit.path, hit.score, hit.pair_score) for hit in result]


def assert_same_hits(ones, others):
    assert [hit[0] for hit in ones] == [hit[0] for hit in others]
    for one, other in zip(ones, others, strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=2e-4)


@pytest.mark.parametrize("terms", QUERIES)
@pytest.mark.parametrize("where", ["", "width > 1", 'path like "*1.png"', "width > 99999"])
def test_all_images_are_ranked_as_if_all_were_re_ranked(index, terms, where):
    ranked = hits_of(index, terms, count=30, where=where, late=True)
    assert_same_hits(ranked, hits_of(index, terms, count=30, where=where, rerank=30))
    assert len(ranked) == (0 if "99999" in where else 3 if "like" in where else 30)
    # Of fewer results the first ones.
    assert hits_of(index, terms, count=2, where=where, late=True) == ranked[:2]


def test_unwanted_words_count_against_an_image(index):
    query = [parse_term("a red circle"), parse_term("a star", -1.0)]
    ranked = Searcher(index).search_one(SearchQuery(query, 30, late=True))
    reranked = Searcher(index).search_one(SearchQuery(query, 30, rerank=30))
    assert [hit.path for hit in ranked] == [hit.path for hit in reranked]


def test_an_update_keeps_it_in_step_and_computes_what_is_new_alone(tmp_path, folder, tiny_runs):
    images, out = tmp_path / "images", tmp_path / "index"
    shutil.copytree(folder, images)
    build_index(tiny_runs["late"], images, out, late=True)
    before = read_late_record(Storage(out))
    paths = sorted(images.glob("*.png"))
    build_index(tiny_runs["late"], images, out)
    assert read_late_record(Storage(out)) == before, "nothing has changed"
    paths[0].unlink()
    paths[1].rename(images / "moved.png")
    Image.open(paths[2]).rotate(90).save(paths[2])
    Image.open(paths[3]).rotate(180).save(images / "new.png")
    report = build_index(tiny_runs["late"], images, out)
    assert (report.encoded, report.moved, report.dropped) == (2, 1, 1)
    record = read_late_record(Storage(out))
    assert record is not None
    assert (record.images, record.clustered) == (30, before.clustered), "the centroids are kept"
    assert sorted(path.name for path in out.glob("late-files-*")) == [record.folder]
    build_index(tiny_runs["late"], images, tmp_path / "fresh", late=True)
    for terms in QUERIES:
        options = {"count": 30, "late": True}
        assert_same_hits(hits_of(out, terms, **options), hits_of(tmp_path / "fresh", terms, **options))


def test_rows_that_the_files_do_not_have_are_counted_and_those_that_are_gone_left_out(tmp_path, index):
    out = tmp_path / "index"
    shutil.copytree(index, out)
    rows = read_columns(open_image_table(out), ("id", "path"))
    # As after an update that was interrupted before the files were written: other rows than they were made of.
    delete_rows(open_image_table(out), [rows[0]["id"]])
    table = open_image_table(out)
    table.update(where=f"id = {rows[1]['id']}", values={"hash": "another"})
    result = Searcher(out).search_one(SearchQuery([parse_term("a red circle")], 30, late=True))
    assert {hit.path for hit in result} == {row["path"] for row in rows[2:]}
    assert any("1 image of the index cannot be ranked by late interaction" in note for note in result.notes)


def test_files_that_are_not_whole_are_not_used_and_written_again(tmp_path, index, folder, tiny_runs):
    out = tmp_path / "index"
    shutil.copytree(index, out)
    record = json.loads((out / RECORD_FILE).read_text())
    with (out / record["folder"] / "codes.npy").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InvalidIndexError, match=r"late.json: it or files that it names are not whole"):
        hits_of(out, ["a red circle"], late=True)
    assert build_index(tiny_runs["late"], folder, out).encoded == 0
    assert_same_hits(
        hits_of(out, ["a red circle"], count=30, late=True), hits_of(index, ["a red circle"], count=30, late=True)
    )


def test_an_index_with_patches_gets_the_files_without_encoding_anything(tmp_path, folder, tiny_runs):
    out = tmp_path / "index"
    build_index(tiny_runs["late"], folder, out, patches=2)
    with pytest.raises(InvalidIndexError, match=r"has no centroids of patches: 'clipvisionalign index .* --late"):
        hits_of(out, ["a red circle"], late=True)
    assert build_index(tiny_runs["late"], folder, out, late=True).encoded == 0
    assert_same_hits(
        hits_of(out, ["a red circle"], count=30, late=True), hits_of(out, ["a red circle"], count=30, rerank=30)
    )


def test_re_ranking_reads_the_mapped_patches_where_they_have_all_hits(tmp_path, index, folder, tiny_runs, monkeypatch):
    """The first hits by patches of the table, by those that are mapped, and where a mapped one is another image's."""
    from clipvisionalign.search import hit_reranker

    table_reads = []
    original = hit_reranker.read_stored
    monkeypatch.setattr(hit_reranker, "read_stored", lambda *args: table_reads.append(1) or original(*args))
    build_index(tiny_runs["late"], folder, tmp_path / "patches", patches=0)
    shutil.copytree(index, tmp_path / "changed")
    changed = open_image_table(tmp_path / "changed")
    for terms in QUERIES:
        expected = hits_of(tmp_path / "patches", terms, count=30, rerank=20)
        assert len(table_reads) == 1
        assert_same_hits(hits_of(index, terms, count=30, rerank=20), expected)
        assert len(table_reads) == 1, "the table of patches was read"
        assert_same_hits(hits_of(index, terms, count=30, within=5.0), hits_of(index, terms, count=30, rerank=30))
        table_reads.clear()
    changed.update(where="id = 3", values={"hash": "another"})
    hits_of(tmp_path / "changed", ["a red circle"], count=30, rerank=30)
    assert table_reads == [1]


def test_an_index_that_lost_all_images_ranks_them_again_once_they_are_back(tmp_path, folder, tiny_runs):
    images, out = tmp_path / "images", tmp_path / "index"
    shutil.copytree(folder, images)
    build_index(tiny_runs["late"], images, out, late=True)
    for path in images.glob("*.png"):
        path.rename(tmp_path / path.name)
    build_index(tiny_runs["late"], images, out, allow_drop=True)
    assert not list(out.glob("late-files-*"))
    for path in tmp_path.glob("*.png"):
        path.rename(images / path.name)
    build_index(tiny_runs["late"], images, out)
    assert_same_hits(
        hits_of(out, ["a red circle"], count=30, late=True), hits_of(out, ["a red circle"], count=30, rerank=30)
    )


@pytest.mark.parametrize("text", ["\u4f60\u597d", "??? !!!"])
def test_what_the_index_knows_no_word_of_gives_as_little_as_without(index, text):
    plain, late = (Searcher(index).search_one(SearchQuery([parse_term(text)], 5, late=late)) for late in (False, True))
    assert ([hit.path for hit in late], late.reason) == ([hit.path for hit in plain], plain.reason)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room on the disk is taken at once on POSIX alone")
def test_a_full_disk_is_an_error_and_what_was_there_stays(tmp_path, index, monkeypatch):
    out = tmp_path / "index"
    shutil.copytree(index, out)
    (out / RECORD_FILE).write_text('{"images": 0}')
    before = sorted(out.glob("late-files-*"))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        build_late(Storage(out))
    assert sorted(out.glob("late-files-*")) == before


@pytest.mark.parametrize("design", ["self", "cross"])
def test_another_design_is_refused_before_anything_is_written(tmp_path, folder, tiny_runs, design):
    with pytest.raises(ValueError, match=rf"--late needs a run of the design late.*this model's is {design}"):
        build_index(tiny_runs[design], folder, tmp_path / "index", late=True)
    assert not (tmp_path / "index").exists()


def test_shards_are_refused(tmp_path, folder, tiny_runs):
    with pytest.raises(ValueError, match=r"--late: an index in shards"):
        build_index(tiny_runs["late"], folder, tmp_path / "index", late=True, shards=2)
    build_index(tiny_runs["late"], folder, tmp_path / "index", patches=1, shards=2)
    with pytest.raises(ValueError, match="an index in shards is not ranked as a whole"):
        hits_of(tmp_path / "index", ["a red circle"], late=True)


@pytest.mark.parametrize("options", [{"rerank": 3}, {"within": 0.1}, {"captions": True}, {"promise": 0.9}])
def test_ways_that_exclude_each_other_are_refused(index, options):
    with pytest.raises(ValueError, match="late ranks all images by pair scores: it goes without"):
        hits_of(index, ["a red circle"], late=True, **options)


def test_the_command_and_the_service_rank_alike(index, capsys):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app

    assert main(["search", str(index), "a red circle", "--late", "--count", "5", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["found"]
    assert [(hit["path"], hit["score"], hit["pair_score"]) for hit in hits] == hits_of(
        index, ["a red circle"], count=5, late=True
    )
    with TestClient(create_app([Searcher(index)])) as client:
        answer = client.get("/search", params={"q": "a red circle", "count": 5, "late": True}).json()
        refused = client.get("/search", params={"q": "a red circle", "late": True, "rerank": 5})
    assert answer["found"] == hits
    assert refused.status_code == 422
    assert "late ranks all images" in refused.text
