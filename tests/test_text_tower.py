"""The text tower beside an index: words are searched for without PyTorch, and find what PyTorch finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
pytest.importorskip("lance", reason="no lance: pip install 'clipvisionalign[search]'")
pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.export import text_tower as text_export
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search import fingerprint, text_tower
from clipvisionalign.search.fingerprint import aligner_fingerprint
from clipvisionalign.search.hits import CaptionHit, Hit
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.mapped import MAPPED_KIND, can_map
from clipvisionalign.search.queries import EncodedQuery, SearchQuery, encode_queries
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import LanceDBReader, LanceReader
from clipvisionalign.search.tables import open_image_table
from clipvisionalign.search.terms import Term, parse_term

#: What a search by words does without.
HEAVY = ("torch", "torchvision", "timm", "transformers", "lancedb", "open_clip")
DESIGNS = ("self", "sparse", "late", "cross")
TEXT_FILES = {"text.json", "text_tower.onnx", "tokenizer.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    """An index of each design, and one with captions and metadata."""
    folder = tmp_path_factory.mktemp("indexes")
    for design in DESIGNS:
        shutil.copytree(tiny_runs[design], folder / "runs" / design)
        build_index(folder / "runs" / design, scenes_folder / "images", folder / design)
    build_index(folder / "runs" / "self", scenes_folder, folder / "captions", captions=True)
    build_index(folder / "runs" / "late", scenes_folder / "images", folder / "patches", patches=1)
    build_index(folder / "runs" / "late", scenes_folder / "images", folder / "mapped", late=True)
    return folder


def by_pytorch(index: Path, run: str | Path = "") -> Searcher:
    """The index as if it had no text tower."""
    searcher = Searcher(index, run)
    searcher.encoder._text_manifest = None
    return searcher


def assert_same_hits(some: list[Hit] | list[CaptionHit], others: list[Hit] | list[CaptionHit]) -> None:
    """The same ids with the same scores, in one order but for scores that are one number in float32."""
    scores = {hit.id: hit.score for hit in others}
    assert sorted(hit.id for hit in some) == sorted(scores)
    assert np.allclose([scores[hit.id] for hit in some], [hit.score for hit in others], rtol=0, atol=2e-6)
    assert np.allclose([hit.score for hit in some], [scores[hit.id] for hit in some], rtol=0, atol=1e-4)


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_words_find_what_they_find_by_pytorch(world, design):
    here, torch_side = Searcher(world / design), by_pytorch(world / design)
    texts = ["a red circle", "Two STARS, left of a ring!", "x", "a dog on the grass " * 30, "\u72ac \U0001f415"]
    vectors = here.encoder.encode_words(texts)
    assert here.encoder.text_tower is not None
    assert np.abs(vectors - torch_side.encoder.encode_words(texts)).max() < 1e-4
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    terms = [parse_term("^2 red"), parse_term("ring"), parse_term("blue", -1.0)]
    queries = [
        SearchQuery(terms[:1], 7), SearchQuery(terms, 500), SearchQuery(terms[1:], 5, "id >= 10 and width >= 1"),
        SearchQuery([parse_term(texts[3])], 3, 'path like "*1*"'),
    ]  # fmt: skip
    for query, hits in zip(queries, here.search_batch(queries), strict=True):
        assert not isinstance(hits, Exception)
        assert len(hits) > 0
        assert_same_hits(hits, torch_side.search_one(query))
        assert_same_hits(hits, here.search_one(query))
    assert here.encoder._aligner is None, "words alone load no aligner"


def test_captions_are_found_by_words(world):
    query = SearchQuery([parse_term("two red circles")], 8, captions=True)
    hits = Searcher(world / "captions").search_one(query)
    assert len(hits) == 8
    assert_same_hits(hits, by_pytorch(world / "captions").search_one(query))


def test_images_and_re_ranking_load_the_aligner_and_find_the_same(world, scenes_folder):
    image = sorted((scenes_folder / "images").glob("*.png"))[5]
    here, torch_side = Searcher(world / "late"), by_pytorch(world / "late")
    like = SearchQuery([Term(image, is_image=True), parse_term("red")], 6)
    assert_same_hits(here.search_one(like), torch_side.search_one(like))
    assert here.encoder._aligner is not None
    again = SearchQuery([parse_term("red")], 6, rerank=4)
    assert_same_hits(here.search_one(again), torch_side.search_one(again))


def test_both_readers_and_all_kinds_of_index_find_the_same(tmp_path, scenes_folder, tiny_runs, monkeypatch):
    query = SearchQuery([parse_term("a red circle")], 10, "width > 10")
    ids = []
    graph = MAPPED_KIND if can_map(Storage(tmp_path / "index")) else "IVF_HNSW_SQ"
    for sizes, kind in (((1000, 2000), "exact"), ((50, 1000), graph)):
        build_index(tiny_runs["self"], scenes_folder / "images", tmp_path / "index", sizes=sizes)
        lance_side = Searcher(tmp_path / "index")
        assert lance_side.manifest.kind == kind
        assert isinstance(lance_side.table, LanceReader)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "lance", None)
            lancedb_side = Searcher(tmp_path / "index")
        assert isinstance(lancedb_side.table, LanceDBReader)
        assert lance_side.table.count_rows() == lancedb_side.table.count_rows() == 120
        hits = lance_side.search_one(query)
        assert_same_hits(hits, lancedb_side.search_one(query))
        rows = [
            sorted(side.table.read(["id", "path"], "id < 50", 7).to_pylist(), key=str)
            for side in (lance_side, lancedb_side)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 7
        ids.append([hit.id for hit in hits])
    assert ids[0] == ids[1]


def test_an_open_index_sees_later_what_is_written(tmp_path, scenes_folder, tiny_runs, monkeypatch):
    from datetime import timedelta

    from clipvisionalign.search import table_reader

    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(hours=1))
    source = tmp_path / "images"
    source.mkdir()
    files = sorted((scenes_folder / "images").glob("*.png"))[:3]
    shutil.copy(files[0], source)
    build_index(tiny_runs["self"], source, tmp_path / "index")
    searcher = Searcher(tmp_path / "index")
    version = searcher.table.version
    shutil.copy(files[1], source)
    build_index(tiny_runs["self"], source, tmp_path / "index")
    assert searcher.table.count_rows() == 1, "within the interval it is as it was"
    monkeypatch.setattr(table_reader, "READ_CONSISTENCY_INTERVAL", timedelta(0))
    assert searcher.table.count_rows() == 2
    assert searcher.table.version > version
    assert len(searcher.search([parse_term("red")])) == 2


# --- what is imported ------------------------------------------------------------------------------------------------

PROBE = """
import json, sys
from clipvisionalign.cli import main
if any(arguments[0] == "serve" for arguments in json.loads(sys.argv[1])):
    # It is about what is imported up to there: a service would not end.
    import uvicorn
    uvicorn.Server.run = lambda *_, **__: None
for arguments in json.loads(sys.argv[1]):
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    assert status in (0, 1), (arguments, status)
    print("heavy:", arguments[:4], [name for name in json.loads(sys.argv[2]) if name in sys.modules], file=sys.stderr)
"""


def probe(calls: list[list[str]], **environment: str) -> list[str]:
    """The lines that name the heavy modules after each call, all in one new process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(calls), json.dumps(HEAVY)],
        capture_output=True, text=True, env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stderr.splitlines() if line.startswith("heavy:")]


@pytest.mark.slow
def test_a_search_by_words_imports_neither_pytorch_nor_lancedb(world, tmp_path):
    (tmp_path / "queries.txt").write_text("a red circle\n^2 blue ring\n")
    index = str(world / "captions")
    calls = [
        ["search", index, "a red circle"],
        ["search", index, "^2 red", "ring", "--minus", "blue", "--count", "3"],
        ["search", index, "red", "--where", 'width >= 32 and split = "dev"', "--json"],
        ["search", index, "red", "--paths", "--null"],
        ["search", index, "--queries", str(tmp_path / "queries.txt"), "--json"],
        ["search", index, "two stars", "--captions"],
        ["search", str(world / "cross"), "a ring", "--run", str(world / "runs" / "cross")],
        ["search", index, "red", "--where", "nothing = 3"],
        ["serve", index, "--port", "1"],
    ]
    lines = probe(calls)
    assert len(lines) == len(calls)
    assert all(line.endswith("[]") for line in lines), lines
    # The probe sees them where they are needed.
    assert "'torch'" in probe([["search", str(world / "late"), "red", "--rerank", "3"]])[0]


# --- late interaction ------------------------------------------------------------------------------------------------

PAIR_QUERIES = (
    {"rerank": 20}, {"rerank": 5, "where": "id >= 10"}, {"within": 9.0, "rerank": 20}, {"late": True},
)  # fmt: skip


def assert_same_pair_scores(some: list[Hit], others: list[Hit]) -> None:
    scores = {hit.id: hit.pair_score for hit in others}
    assert scores.keys() == {hit.id for hit in some}
    assert [hit.pair_score is None for hit in some] == [hit.pair_score is None for hit in others]
    pairs = [(hit.pair_score, scores[hit.id]) for hit in some if hit.pair_score is not None]
    assert pairs
    assert np.allclose(*zip(*pairs, strict=True), rtol=0, atol=2e-3)
    scored = [score for score, _ in pairs]
    assert scored == sorted(scored, reverse=True)


@pytest.mark.parametrize(
    ("index", "options"),
    [(index, options) for index in ("patches", "mapped") for options in PAIR_QUERIES
     # That has no centroids.
     if index == "mapped" or "late" not in options],
    ids=str,
)  # fmt: skip
def test_words_are_compared_with_patches_as_by_pytorch(world, index, options):
    here, torch_side = Searcher(world / index), by_pytorch(world / index)
    for texts in (["a red circle"], ["^2 red", "a ring left of a star"]):
        terms = [*map(parse_term, texts), parse_term("blue", -1.0)]
        query = SearchQuery(terms, 25, **options)
        assert_same_pair_scores(here.search_one(query), torch_side.search_one(query))
    assert here.encoder._aligner is None
    assert torch_side.encoder._aligner is not None


@pytest.mark.parametrize("options", PAIR_QUERIES, ids=str)
def test_the_words_of_a_query_are_encoded_once(world, options, monkeypatch):
    searcher = Searcher(world / "mapped")
    searcher.search_one(SearchQuery([parse_term("a star")], 25, **options))
    session, runs = searcher.encoder.text_tower.session, []

    class Counted:
        def run(self, names, inputs):
            runs.append(len(inputs["ids"]))
            return session.run(names, inputs)

    monkeypatch.setattr(searcher.encoder.text_tower, "session", Counted())
    searcher.search_one(SearchQuery([parse_term("a red circle"), parse_term("blue", -1.0)], 25, **options))
    assert sum(runs) == 2


def test_tokens_that_are_left_out_count_neither_way(tmp_path, scenes_folder, tiny_model):
    config = tiny_model("late")
    aligner = Aligner(replace(config, late=replace(config.late, keep_tokens=2)))
    aligner.save(tmp_path / "run")
    build_index(tmp_path / "run", scenes_folder / "images", tmp_path / "index", patches=2)
    query = SearchQuery([parse_term("a red circle left of a blue star")], 10, rerank=10)
    here, torch_side = Searcher(tmp_path / "index"), by_pytorch(tmp_path / "index")
    (tokens,) = here.encoder.encode_for_pairs(["a red circle left of a blue star"])
    assert len(tokens.token_vectors) == 2
    assert_same_pair_scores(here.search_one(query), torch_side.search_one(query))


def test_an_image_without_patches_is_read_by_the_model(world, tmp_path):
    index = Path(shutil.copytree(world / "patches", tmp_path / "index"))
    query = SearchQuery([parse_term("a red circle")], 20, rerank=20)
    expected = Searcher(world / "patches").search_one(query)
    open_image_table(index).update(where=f"id = {expected[3].id}", values={"hash": "another"})
    searcher = Searcher(index)
    hits = searcher.search_one(query)
    assert searcher.encoder._aligner is not None
    scores = {hit.id: hit.pair_score for hit in expected}
    aligner = load_aligner(world / "runs" / "late")
    # A patch of 8 bits is off by half a step in each number, a step being 1/127 of its largest; a score is at most as far.
    off = aligner.late_scales[1] * aligner.config.late.width**0.5 / 254 * 1.05
    for hit in hits:
        assert abs(scores[hit.id] - hit.pair_score) < (off if hit.id == expected[3].id else 2e-3)
    assert {hit.id for hit in hits} == set(scores)


def test_a_text_tower_of_before_gives_tokens_after_the_next_update(world, tmp_path, scenes_folder, monkeypatch):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    index = Path(shutil.copytree(world / "patches", tmp_path / "index"))
    manifest = json.loads((index / "text" / "text.json").read_text())
    del manifest["late"]
    (index / "text" / "text.json").write_text(json.dumps(manifest))
    query = SearchQuery([parse_term("a red circle")], 20, rerank=20)
    before = Searcher(index)
    hits = before.search_one(query)
    assert before.encoder._aligner is not None
    report = build_index(world / "runs" / "late", scenes_folder / "images", index)
    assert (report.encoded, report.text_tower.state) == (0, "written")
    after = Searcher(index)
    assert_same_pair_scores(after.search_one(query), hits)
    assert after.encoder._aligner is None
    report = build_index(world / "runs" / "late", scenes_folder / "images", index)
    assert report.text_tower.state == "unchanged"


@pytest.mark.slow
def test_re_ranking_by_patches_imports_no_pytorch(world):
    calls = [
        ["search", str(world / "patches"), "a red circle", "--rerank", "20"],
        ["search", str(world / "patches"), "a red circle", "--within", "2s"],
        ["search", str(world / "mapped"), "red", "ring", "--minus", "blue", "--rerank", "5"],
        ["search", str(world / "mapped"), "a red circle", "--late"],
    ]
    lines = probe(calls)
    assert len(lines) == len(calls)
    assert all(line.endswith("[]") for line in lines), lines


# --- the run ---------------------------------------------------------------------------------------------------------


def test_a_moved_run_a_changed_run_and_no_run(world, tmp_path, scenes_folder, capsys):
    index, run = tmp_path / "index", tmp_path / "run"
    shutil.copytree(world / "runs" / "late", run)
    build_index(run, scenes_folder / "images", index)
    words = SearchQuery([parse_term("a red circle")], 5)
    expected = Searcher(index).search_one(words)
    run.rename(tmp_path / "moved")
    assert_same_hits(Searcher(index, tmp_path / "moved").search_one(words), expected)
    # Gone: words are searched for; what needs the aligner names it.
    searcher = Searcher(index)
    assert_same_hits(searcher.search_one(words), expected)
    image = str(next((scenes_folder / "images").glob("*.png")))
    for more in (["red", "--rerank", "3"], ["--like", image]):
        assert main(["search", str(index), *more]) == 1
        message = capsys.readouterr().err
        assert f"its aligner {run} is not there; give its path with --run" in message
    with pytest.raises(InvalidIndexError, match="is not there"):
        Searcher(index, tmp_path / "nowhere")
    # Other weights at its place are refused as ever, whatever is kept of the former.
    shutil.copytree(world / "runs" / "self", run)
    for given in ("", run):
        with pytest.raises(InvalidIndexError, match="made by another aligner"):
            Searcher(index, given)
    shutil.rmtree(run)
    (tmp_path / "moved").rename(run)
    assert_same_hits(Searcher(index).search_one(words), expected)


def test_a_fingerprint_that_is_kept_is_that_of_the_files(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    Aligner(tiny_model()).save(tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    first = aligner_fingerprint(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_weight_files", lambda run: pytest.fail("read again"))
        assert aligner_fingerprint(tmp_path / "run") == first
    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    # As large and as old as before; its entry was changed since.
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert aligner_fingerprint(tmp_path / "run") != first
    for record in (tmp_path / "cache").rglob("*.json"):
        record.write_text("{")
    assert aligner_fingerprint(tmp_path / "run") != first


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_written_once_for_an_aligner(tmp_path, scenes_folder, tiny_model, monkeypatch):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    Aligner(tiny_model()).save(tmp_path / "run")
    first, second = tmp_path / "first", tmp_path / "second"
    report = build_index(tmp_path / "run", scenes_folder / "images", first)
    assert report.text_tower.state == "written"
    assert {path.name for path in (first / "text").iterdir()} == TEXT_FILES
    written = sum((first / "text" / name).stat().st_size for name in TEXT_FILES - {"text.json"})
    assert report.text_tower.bytes == report.to_dict()["text_tower"]["bytes"] == written
    monkeypatch.setattr(text_export, "write_text_tower", lambda *_: pytest.fail("exported again"))
    assert build_index(tmp_path / "run", scenes_folder / "images", first).text_tower.state == "unchanged"
    assert build_index(tmp_path / "run", scenes_folder / "images", second).text_tower.state == "cached"
    assert os.path.samefile(first / "text" / "text_tower.onnx", second / "text" / "text_tower.onnx")
    shutil.rmtree(tmp_path / "cache")
    query = SearchQuery([parse_term("red")], 5)
    assert_same_hits(Searcher(first).search_one(query), Searcher(second).search_one(query))


def test_an_index_of_before_is_opened_and_brought_up_to_date(tmp_path):
    source = Path(__file__).parent / "data" / "v0.1"
    folder = shutil.copytree(source, tmp_path / "v0.1")
    manifest = folder / "index" / "index.json"
    manifest.write_text(manifest.read_text().replace("/home/reader/v0.1", str(folder)))
    query = SearchQuery([parse_term("a red circle")], 5)
    before = Searcher(folder / "index")
    expected = before.search_one(query)
    assert before.encoder.text_tower is None
    content = json.loads(manifest.read_text())
    report = build_index(content["run"], content["folder"], folder / "index", verify=True)
    assert (report.encoded, report.text_tower.state in ("written", "cached")) == (0, True)
    after = Searcher(folder / "index")
    assert_same_hits(after.search_one(query), expected)
    assert after.encoder._aligner is None


def test_without_onnx_the_index_is_searched_by_pytorch(tmp_path, scenes_folder, tiny_model, monkeypatch, caplog):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    Aligner(tiny_model()).save(tmp_path / "run")
    caplog.set_level("INFO")
    query = SearchQuery([parse_term("red")], 5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        report = build_index(tmp_path / "run", scenes_folder / "images", tmp_path / "index")
    assert report.there == 120
    assert (report.text_tower.state, 'pip install "clipvisionalign[search]"' in caplog.text) == ("none", True)
    assert "no onnx" in report.text_tower.reason
    expected = Searcher(tmp_path / "index").search_one(query)
    # Installed meanwhile: the next update writes it; where it cannot be run, a line says so.
    assert build_index(tmp_path / "run", scenes_folder / "images", tmp_path / "index").text_tower.state == "written"
    assert_same_hits(Searcher(tmp_path / "index").search_one(query), expected)
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert_same_hits(Searcher(tmp_path / "index").search_one(query), expected)
    assert caplog.text.count("pip install") == 1
    (tmp_path / "index" / "text" / "text_tower.onnx").unlink()
    (tmp_path / "index" / "text" / "text_tower.onnx").write_bytes(b"cut")
    assert_same_hits(Searcher(tmp_path / "index").search_one(query), expected)


def test_what_cannot_be_exported_is_said_once(tmp_path, scenes_folder, tiny_model, monkeypatch, caplog):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    Aligner(tiny_model()).save(tmp_path / "run")
    caplog.set_level("INFO")
    calls = []
    monkeypatch.setattr(text_export, "TEXT_TOLERANCE", -1.0)
    export = text_export._export_graph
    monkeypatch.setattr(
        text_export, "_export_graph", lambda *args: calls.append(args[-1]) or export(*args[:-1], trace=True)
    )
    for _ in range(2):
        report = build_index(tmp_path / "run", scenes_folder / "images", tmp_path / "index")
        assert (report.there, report.text_tower.state) == (120, "none")
        assert "differs from PyTorch's" in report.text_tower.reason
    assert calls == [True, False], "traced, exported, and not tried again by this version"
    assert caplog.text.count("no text tower") == 1
    assert not list((tmp_path / "cache" / "text_towers").iterdir()), "nothing is left of it"
    assert len(Searcher(tmp_path / "index").search([parse_term("red")], 5)) == 5


@pytest.mark.parametrize(("limit", "kept"), [(1000, ["2", "3"]), (100, ["3"]), (10**6, ["0", "1", "2", "3"])])
def test_the_cache_keeps_those_that_were_used_last(tmp_path, monkeypatch, limit, kept):
    """So many as fit, the last one in any case."""
    from clipvisionalign.search import text_tower

    monkeypatch.setattr(text_tower, "MAX_CACHED_BYTES", limit)
    for number in range(4):
        folder = tmp_path / str(number)
        text_tower._write_cached(folder, lambda aside: (aside / "text.json").write_text(400 * " "))
        os.utime(folder / "text.json", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.slow
def test_vectors_are_those_of_pytorch_on_other_processors(world):
    """PyTorch with the kernels of old processors, against the same text tower."""
    script = (
        "import sys, numpy as np\n"
        "from clipvisionalign.search.searcher import Searcher\n"
        "here, torch_side = Searcher(sys.argv[1]), Searcher(sys.argv[1])\n"
        "torch_side.encoder._text_manifest = None\n"
        "texts = ['a red circle', 'two blue stars left of a ring']\n"
        "print(np.abs(here.encoder.encode_words(texts) - torch_side.encoder.encode_words(texts)).max())\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(world / "sparse")], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip
    assert float(done.stdout) < 1e-4, done.stderr[-2000:]


def test_the_rows_are_those_that_were_written(world):
    written = open_image_table(world / "self").search().limit(1000).to_arrow().to_pylist()
    read = Searcher(world / "self").table.read(list(written[0]))
    assert sorted(read.to_pylist(), key=lambda row: row["id"]) == sorted(written, key=lambda row: row["id"])


def test_the_padded_vectors_are_those_of_each_alone(world):
    aligner = load_aligner(world / "runs" / "self")
    searcher = Searcher(world / "self")
    texts = ["red", "a red circle above two small blue squares, in front of a ring", "a ring"]
    together = searcher.encoder.encode_words(texts)
    alone = np.concatenate([searcher.encoder.encode_words([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(alone - aligner.encode_captions(texts).numpy()).max() < 1e-4
    assert searcher.encoder.encode_words([]).shape == (0, aligner.width)


# --- while a searcher is open, and by versions ------------------------------------------------------------------------


def test_patches_that_an_update_adds_are_read_by_a_searcher_that_is_open(world, tmp_path, scenes_folder):
    index = Path(shutil.copytree(world / "late", tmp_path / "index"))
    shutil.copytree(world / "patches" / "text", index / "text", dirs_exist_ok=True)
    searcher, query = Searcher(index), SearchQuery([parse_term("a red circle")], 20, rerank=20)
    searcher.search_one(query)
    assert searcher.encoder.late_scales is None
    build_index(world / "runs" / "late", scenes_folder / "images", index, patches=1)
    assert searcher.encoder.late_scales is not None
    afterwards = Searcher(index)
    assert_same_pair_scores(searcher.search_one(query), afterwards.search_one(query))
    assert afterwards.encoder._aligner is None


@pytest.mark.parametrize("asked_before", range(4))
def test_patches_that_come_while_queries_are_encoded_are_for_the_next_ones(world, asked_before):
    searcher, asked = Searcher(world / "mapped"), []
    searcher.encoder._ask_for_patches = lambda: asked.append(1) or len(asked) > asked_before
    queries = [SearchQuery([parse_term(text)], 5, within=1.0) for text in ("red", "a star")]
    for encoded in encode_queries(searcher.encoder, queries):
        assert isinstance(encoded, EncodedQuery)


def test_a_model_that_loads_for_one_image_is_not_counted(world, tmp_path, monkeypatch):
    index = Path(shutil.copytree(world / "patches", tmp_path / "index"))
    text = parse_term("a red circle")
    expected = Searcher(index).search_one(SearchQuery([text], 20, rerank=20))
    open_image_table(index).update(where=f"id = {expected[3].id}", values={"hash": "another"})
    from clipvisionalign.models import io

    load = io.load_aligner
    monkeypatch.setattr(io, "load_aligner", lambda *args: time.sleep(2) or load(*args))
    start = time.perf_counter()
    spent = Searcher(index).search_one(SearchQuery([text], 20, within=30.0)).spent
    assert spent.reranked == spent.unsure
    assert spent.seconds < time.perf_counter() - start - 2


def test_a_cached_text_tower_serves_indexes_of_before_too(world, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    old = Path(shutil.copytree(world / "patches", tmp_path / "old"))
    manifest = json.loads((old / "text" / "text.json").read_text())
    del manifest["late"]
    (old / "text" / "text.json").unlink()
    (old / "text" / "text.json").write_text(json.dumps(manifest))
    fetched: list[str] = []
    monkeypatch.setattr(
        Storage, "get_file",
        lambda self, name, target: fetched.append(name) or shutil.copy(Path(self.location) / name, target),
    )  # fmt: skip
    for index, files in ((old, 3), (world / "patches", 3), (old, 0), (world / "patches", 0)):
        fetched.clear()
        text_tower._fetch(Storage(index), manifest["aligner"])
        assert len(fetched) == files
