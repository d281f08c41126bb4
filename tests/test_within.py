"""Re-ranking within a time: what margins cost and find, and that whatever the time allows is a part of the whole."""

from __future__ import annotations

import json
import math
import shutil
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from asked import ask
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.cli import main
from clipvisionalign.cli.calibrate import margin_line
from clipvisionalign.cli.search import _print_verdict
from clipvisionalign.log import log_to
from clipvisionalign.model_calibration import rerank_margin
from clipvisionalign.search import hit_reranker
from clipvisionalign.search.calibrate import calibrate_captions, first_images
from clipvisionalign.search.calibration import Calibration, UncalibratedError
from clipvisionalign.search.calibration_files import write_calibration
from clipvisionalign.search.hit_reranker import UNCALIBRATED_NOTE
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.promise import Promise, SearchResult
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.rerank_margin import MARGIN_LOSS, RerankMargin, measure_margins, unsure_hits
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.terms import parse_term
from clipvisionalign.search.time_limit import MAX_SECONDS, TimedReranker, TimeSpent, parse_seconds

QUERIES = ("a red circle", "a blue star and a green ring", "two squares", "a small cross left of a ring")
#: More than any test takes, and less than anything does.
AMPLE, NONE = 20.0, 1e-6


# --- the margin ------------------------------------------------------------------------------------------------------


def one_by_one(cosines: np.ndarray, pair_scores: np.ndarray, own: np.ndarray, margin: float) -> tuple[float, float]:
    """Recall at 1, 5 and 10 added up and images re-ranked a query, caption by caption, as a search orders them."""
    depth, recall, images = cosines.shape[1], 0.0, 0
    for row, scores, position in zip(cosines, pair_scores, own, strict=True):
        count = unsure_hits(row.tolist(), margin, depth)
        images += count
        order = list(range(depth))
        # Of equal scores the own image comes last.
        order[:count] = sorted(range(count), key=lambda each: (-scores[each], each == position))
        recall += sum(position in order[:k] for k in (1, 5, 10))
    return 100 * recall / len(own), images / len(own)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 14), st.booleans())
def test_what_a_margin_costs_and_finds_is_what_searches_with_it_do(seed, count, depth, coarse):
    rng = np.random.default_rng(seed)
    cosines = -np.sort(-rng.uniform(-1, 1, (count, depth)), axis=1)
    pair_scores = 5 * cosines + rng.normal(size=(count, depth))
    if coarse:
        cosines, pair_scores = cosines.round(1), pair_scores.round(0)
    own = rng.integers(0, depth + 1, count)
    margin = measure_margins(cosines, pair_scores, own)
    for row in margin.curve:
        assert (row.recall_sum, row.images) == pytest.approx(one_by_one(cosines, pair_scores, own, row.margin))
    assert [row.margin for row in margin.curve] == sorted({row.margin for row in margin.curve})
    assert [row.images for row in margin.curve] == sorted(row.images for row in margin.curve)
    assert margin.curve[0].images == margin.curve[0].queries == 0
    assert margin.curve[-1].images in (0, depth)
    best, chosen = max(row.recall_sum for row in margin.curve), margin.margin
    enough = [row.margin for row in margin.curve if row.recall_sum >= best - MARGIN_LOSS]
    assert chosen == enough[0]
    assert RerankMargin.from_dict(json.loads(json.dumps(margin.to_dict()))) == margin


def test_where_pair_scores_are_noise_none_are_re_ranked_and_where_they_decide_all_close_ones_are():
    rng = np.random.default_rng(0)
    cosines = -np.sort(-rng.uniform(0, 1, (300, 20)), axis=1)
    own = np.zeros(300, dtype=np.int64)
    assert measure_margins(cosines, rng.normal(size=(300, 20)), own).margin == 0
    own = rng.integers(0, 3, 300)
    knows = np.where(np.arange(20) == own[:, None], 9.0, 0.0)
    chosen = measure_margins(cosines, knows, own)
    assert chosen.margin > 0
    # Nothing beyond the third image is needed.
    assert chosen.margin < (cosines[:, 0] - cosines[:, 4]).max()
    assert max(row.recall_sum for row in chosen.curve) == 300


@pytest.mark.parametrize(("count", "expected"), [(2, 0.0), (3, 0.5)])
def test_a_margin_is_widened_only_for_what_is_worth_it(count, expected):
    """Of 1,000 captions `count` have their image at the second position, 0.5 behind: 0.1 of recall at 1 each."""
    cosines = np.tile([0.9, 0.4], (1000, 1))
    own = (np.arange(1000) < count).astype(np.int64)
    knows = (np.arange(2) == own[:, None]).astype(float)
    assert measure_margins(cosines, knows, own).margin == pytest.approx(expected, abs=1e-5)


def test_the_first_images_of_captions_are_the_best_ones_with_the_position_of_their_own():
    rng = np.random.default_rng(1)
    images, captions = rng.normal(size=(50, 8)), rng.normal(size=(120, 8))
    owners = rng.integers(0, 50, 120)
    cosines, numbers, own = first_images(images, captions, owners, 12)
    table = captions @ images.T
    assert np.allclose(cosines, -np.sort(-table, axis=1)[:, :12])
    ranks = (table > table[np.arange(120), owners][:, None]).sum(axis=1)
    assert own.tolist() == np.minimum(ranks, 12).tolist()
    assert (numbers[own < 12, own[own < 12]] == owners[own < 12]).all()


@pytest.mark.parametrize(
    "fields", [{"margin": -0.1}, {"margin": math.nan}, {"depth": 1}, {"curve": [{}]}, {"margin": None}]
)
def test_a_margin_that_is_none_is_refused_with_its_file(fields):
    margin = measure_margins(np.array([[0.5, 0.4]]), np.array([[1.0, 2.0]]), np.array([1]))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60, 8)).astype(np.float32)
    calibration = replace(calibrate_captions(images, images, np.arange(60)), rerank=margin)
    text = calibration.to_json()
    assert Calibration.from_json(text).rerank == margin
    content = json.loads(text)
    content["rerank"] |= fields
    with pytest.raises(UncalibratedError, match=r"calibration.json: cannot be read .*calibrate again"):
        Calibration.from_json(json.dumps(content))
    del content["rerank"]
    assert Calibration.from_json(json.dumps(content)).rerank is None


# --- the time --------------------------------------------------------------------------------------------------------


def hits(count: int) -> list[Hit]:
    return [Hit(number, f"{number}.png", 1.0 - number / 100, 1, 1, 1) for number in range(count)]


def scored(some, seconds: float = 0.0):
    time.sleep(seconds * len(some))
    return [replace(hit, pair_score=float(hit.id * 7 % 11) - 5.5) for hit in some]


@pytest.mark.parametrize("unsure", [0, 1, 2, 3, 17, 40])
def test_with_ample_time_all_unsure_hits_and_no_others_are_re_ranked(unsure):
    ordered, count = TimedReranker().rerank(hits(40), unsure, time.perf_counter() + AMPLE, lambda: scored)
    assert count == (unsure if unsure > 1 else 0)
    whole = sorted(scored(hits(count)), key=lambda hit: -hit.pair_score)
    assert ordered == [*whole, *hits(40)[count:]]


def test_it_ends_with_the_time_and_does_not_begin_where_there_is_none_left():
    timed, limit, each = TimedReranker(), 0.25, 0.02
    counts = []
    for _ in range(4):
        start = time.perf_counter()
        ordered, count = timed.rerank(hits(40), 40, start + limit, lambda: lambda some: scored(some, each))
        took = time.perf_counter() - start
        assert [hit.id for hit in ordered[count:]] == list(range(count, 40))
        assert {hit.id for hit in ordered[:count]} == set(range(count))
        assert 2 <= count < 40
        # One lot more at the most, on a machine that stops for a moment.
        assert took < limit + 16 * each
        counts.append(count)
    assert max(counts) >= 4
    begun = []
    ordered, count = timed.rerank(hits(40), 40, time.perf_counter() + each / 2, lambda: begun.append(1) or scored)
    assert (ordered, count, begun) == (hits(40), 0, [])


def test_what_was_slow_once_is_tried_again():
    timed, counts = TimedReranker(), []

    def slow():
        time.sleep(0.3)
        return scored

    # The first time of a process counts for nothing, the second one is slow.
    for begin in (slow, slow, *[lambda: scored] * 40):
        limit = AMPLE if begin is slow else 0.1
        counts.append(timed.rerank(hits(9), 9, time.perf_counter() + limit, begin)[1])
    assert counts[:3] == [9, 9, 0]
    assert 9 in counts[3:]
    assert counts[counts.index(9, 3) :].count(9) >= 10
    # A query whose time is over is no reason to try sooner.
    before = timed.expected_seconds()
    timed.rerank(hits(9), 9, time.perf_counter() - 1, lambda: scored)
    assert timed.expected_seconds() == before


def test_images_that_are_gone_come_behind_those_that_were_scored():
    def some_gone(some):
        there = scored([hit for hit in some if hit.id % 3])
        return [*there, *(hit for hit in some if not hit.id % 3)]

    ordered, count = TimedReranker().rerank(hits(12), 9, time.perf_counter() + AMPLE, lambda: some_gone)
    assert count == 9
    assert [hit.id for hit in ordered[6:]] == [0, 3, 6, 9, 10, 11]
    assert sorted(hit.id for hit in ordered) == list(range(12))


@pytest.mark.parametrize(
    "text", ["50", "ms", "", "fifty ms", "-5ms", "0ms", "0.0s", "31s", "1e3ms", "5 min", "nan s", "1m"]
)
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 50ms|more than 0, and 30 s at most"):
        parse_seconds(text)


def test_a_time_is_read_with_its_unit():
    assert [parse_seconds(text) for text in ("50ms", " 50 MS ", "0.05s", ".5s", "2.s", "30s")] == [
        0.05, 0.05, 0.05, 0.5, 2.0, MAX_SECONDS,
    ]  # fmt: skip


# --- an index --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timed_indexes(tmp_path_factory, tiny_runs, scenes_folder) -> dict[str, Path]:
    """Indexes of the same images: by late interaction with patches and without, in shards, by fusion, by vectors alone."""
    folder, images = tmp_path_factory.mktemp("within"), tmp_path_factory.mktemp("images")
    for path in sorted(scenes_folder.rglob("*.png"))[:50]:
        shutil.copy(path, images)
    for name, design, more in (
        ("late", "late", {"patches": 0}), ("opened", "late", {}), ("shards", "late", {"patches": 0, "shards": 2}),
        ("cross", "cross", {"patches": 0}), ("self", "self", {}),
    ):  # fmt: skip
        build_index(tiny_runs[design], images, folder / name, **more)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def calibrated(index: Path, searcher: Searcher, margin: RerankMargin | None) -> Calibration:
    """The index calibrated on made-up scores, with this margin."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 8)).astype(np.float32)
    made = calibrate_captions(images, images, np.arange(200), searcher.manifest.aligner)
    calibration = replace(made, rerank=margin)
    write_calibration(Storage(index), calibration)
    return calibration


def as_pairs(result) -> list[tuple[int, float | None]]:
    return [(hit.id, None if hit.pair_score is None else round(hit.pair_score, 3)) for hit in result]


@pytest.mark.parametrize("name", ["late", "opened", "shards", "cross"])
@pytest.mark.parametrize("where", ["", "id % 2 = 0"])
def test_ample_time_gives_what_re_ranking_of_that_depth_gives_and_no_time_what_vectors_give(timed_indexes, name, where):
    searcher = Searcher(timed_indexes[name])
    where = where and "width > 0"
    for text in QUERIES:
        terms = [parse_term(text), parse_term("a brown ring", -0.5)]
        whole = searcher.search_one(SearchQuery(terms, 40, where, rerank=12))
        ample = searcher.search_one(SearchQuery(terms, 40, where, rerank=12, within=AMPLE))
        assert sorted(as_pairs(ample)) == sorted(as_pairs(whole))
        # Scored some at a time, equal ones but for rounding may change places.
        assert [hit.pair_score for hit in ample[:12]] == pytest.approx([hit.pair_score for hit in whole[:12]], abs=1e-3)
        assert [hit.id for hit in ample[12:]] == [hit.id for hit in whole[12:]]
        assert (ample.spent.unsure, ample.spent.reranked) == (12, 12)
        assert UNCALIBRATED_NOTE in ample.notes
        none = searcher.search_one(SearchQuery(terms, 40, where, within=NONE))
        assert as_pairs(none) == as_pairs(searcher.search_one(SearchQuery(terms, 40, where)))
        assert (none.spent.unsure, none.spent.reranked) == (min(32, len(none)), 0)


@pytest.mark.parametrize("name", ["late", "opened", "shards", "cross"])
def test_hits_beyond_the_margin_are_not_re_ranked_and_a_sure_query_loads_no_model(timed_indexes, name):
    index = timed_indexes[name]
    searcher = Searcher(index)
    query = SearchQuery([parse_term(QUERIES[1])], 40)
    cosines = [hit.score for hit in searcher.search_one(query)]
    wide = cosines[0] - (cosines[8] + cosines[9]) / 2
    narrow = (cosines[0] - cosines[1]) / 2
    for margin, expected in ((wide, 9), (narrow, 0), (0.0, 0), (2.0, 20)):
        calibration = calibrated(index, searcher, RerankMargin(margin, 20))
        fresh = Searcher(index)
        result = fresh.search_one(replace(query, within=AMPLE))
        assert (result.spent.unsure, result.spent.reranked) == (expected, expected)
        assert sum(hit.pair_score is not None for hit in result) == expected
        assert result.notes == ()
        # By late interaction, and with patches, the text tower beside the index is enough.
        assert (fresh.encoder._aligner is None) == (not expected or name in ("late", "shards"))
        # The promise is as without a time.
        promised = fresh.search_one(SearchQuery([parse_term(QUERIES[1])], promise=0.9, within=AMPLE))
        assert {hit.id for hit in promised} == {
            hit.id for hit in fresh.search_one(replace(query, count=-1, promise=0.9))
        }
        assert promised.promise.threshold == calibration.threshold(0.9)
    (index / "calibration.json").unlink()


def test_more_than_was_calibrated_are_re_ranked_where_that_is_asked_for(timed_indexes):
    searcher = Searcher(timed_indexes["late"])
    calibrated(timed_indexes["late"], searcher, RerankMargin(2.0, 8))
    for rerank, expected in ((0, 8), (20, 20), (5, 5)):
        result = searcher.search_one(SearchQuery([parse_term(QUERIES[0])], 40, rerank=rerank, within=AMPLE))
        assert (result.spent.unsure, result.spent.reranked) == (expected, expected)
    (timed_indexes["late"] / "calibration.json").unlink()


def test_loading_is_not_counted_and_waiting_is(timed_indexes):
    first = Searcher(timed_indexes["late"])
    start = time.perf_counter()
    query = SearchQuery([parse_term(QUERIES[0])], 40, within=AMPLE)
    spent = first.search_one(query).spent
    assert spent.seconds < time.perf_counter() - start
    with_load = time.perf_counter() - start
    again = first.search_one(query).spent
    assert spent.seconds - again.seconds < with_load - again.seconds
    late = first.search_one(query, waited=3.0).spent
    assert 3.0 < late.seconds < 3.0 + AMPLE
    assert first.search_one(query, waited=AMPLE).spent.reranked == 0
    # Of a batch each has its share of what is done for all.
    queries = [replace(query, terms=[parse_term(f"a ring and {number} stars")]) for number in range(40)]
    whole = time.perf_counter()
    batch = [result.spent.seconds for result in first.search_batch(queries)]
    assert sum(batch) < 1.5 * (time.perf_counter() - whole)


def test_queries_of_a_batch_each_have_their_own_time(timed_indexes, monkeypatch):
    searcher = Searcher(timed_indexes["late"])
    queries = [
        SearchQuery([parse_term(text)], 40, rerank=8, within=AMPLE if text == QUERIES[2] else 0.4) for text in QUERIES
    ]
    searcher.search_batch(queries[:1])
    slow = hit_reranker.HitReranker.scorer

    def scorer(self, query, captions, some):
        score = slow(self, query, captions, some)
        return lambda few: time.sleep(0.03 * len(few)) or score(few)

    monkeypatch.setattr(hit_reranker.HitReranker, "scorer", scorer)
    for result in searcher.search_batch(queries):
        assert result.spent.reranked == 8
    with pytest.raises(ValueError, match="at least 0 hits can be re-ranked, not -3"):
        searcher.search_one(SearchQuery([parse_term("red")], rerank=-3))
    assert "the order is by cosine alone" in TimeSpent(0.02, 0.01, 8, 0).describe()
    assert "cosine" not in TimeSpent(0.02, 0.05, 8, 3).describe()
    with pytest.raises(ValueError, match="give words only"):
        searcher.search_one(SearchQuery(within=0.1, vector=np.ones(32, dtype=np.float32)))


def test_the_margin_of_a_run_is_that_of_its_own_re_ranking(tiny_runs, scenes_folder):
    """Of all margins the widest finds what `evaluate` finds of captions to images, re-ranked."""
    from clipvisionalign.retrieval.evaluate import evaluate

    data = read_captioned_images(scenes_folder).split("train")
    data = replace(data, rows=data.rows[:40])
    aligner = load_aligner(tiny_runs["late"])
    scorer = aligner.pair_scorer(data.images, data.captions)
    margin = rerank_margin(
        scorer, scorer.image_vectors.numpy(), scorer.caption_vectors.numpy(), np.asarray(data.caption_image)
    )
    result = evaluate(aligner, data.images, data.captions, data.caption_image, candidates=margin.depth, resamples=10)
    for block, row in (("reranked", margin.curve[-1]), ("dual", margin.curve[0])):
        recalls = result.to_dict()[block]["text_to_image"]
        expected = sum(100 * recalls[f"recall_at_{k}"]["value"] for k in (1, 5, 10))
        # Captions of two scenes may be equal, and count as theirs there.
        assert row.recall_sum == pytest.approx(expected, abs=8)


def test_commands_and_service_say_what_was_done_in_the_time(timed_indexes, capsys, caplog):
    assert main(["search", str(timed_indexes["late"]), QUERIES[0], "--within", "20s", "--rerank", "6", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    within = answer["within"]
    assert (within["unsure"], within["reranked"], within["limit_milliseconds"]) == (6, 6, 20000.0)
    assert 0 < within["milliseconds"] < 20000
    assert sum("pair_score" in hit for hit in answer["found"]) == 6
    assert main(["search", str(timed_indexes["late"]), QUERIES[0], "--within", "20s"]) == 0
    assert "re-ranked 32 of 32 hits of unsure order" in capsys.readouterr().err
    app = create_app([Searcher(timed_indexes["late"])])
    words = "q=a%20red%20circle"
    result = json.loads(ask(app, "/search", f"{words}&within=20s&rerank=6&count=40").body)
    assert [hit["id"] for hit in result["found"]][:10] == [hit["id"] for hit in answer["found"]]
    assert result["within"]["reranked"] == 6
    for query, message in (
        ("within=5", "such as 50ms"), ("within=99s", "30 s at most"), ("within=1s&offset=5", "ask for more at once by count"),
    ):  # fmt: skip
        refused = ask(app, "/search", f"{words}&{query}")
        assert refused.status == 422
        assert message in refused.body.decode()
    later, plain = (
        json.loads(ask(app, "/search", f"{words}&offset=32&count=5{more}").body) for more in ("&within=1s", "")
    )
    assert later["found"] == plain["found"]


@pytest.mark.parametrize(
    ("scored", "reason", "promised", "line"),
    [
        (False, "", 2, "is among the first 2 of these"), (False, "", 9, "more than these may fit"),
        (False, "", 0, "none of these fits"), (True, "", 2, ""), (False, "no such thing", 2, ""),
    ],
)  # fmt: skip
def test_the_line_of_a_promise_is_drawn_through_hits_in_the_order_of_cosines_alone(scored, reason, promised, line):
    images = [replace(hit, pair_score=1.0 if scored else None) for hit in hits(4)]
    result = SearchResult(images, Promise(0.9, 0.5, promised, False, "a data set"), reason)
    lines: list[str] = []
    with log_to(lines.append):
        _print_verdict(Namespace(promise=0.0, queries="", json=False), "a ring", result)
    printed = "\n".join(lines)
    assert ("in collections like a data set" in printed) == bool(line)
    assert line in printed


def test_judged_queries_keep_the_margin_which_they_do_not_measure(timed_indexes, capsys):
    index = timed_indexes["late"]
    calibrated(index, Searcher(index), RerankMargin(2.0, 8))
    judged = index.parent / "judged.jsonl"
    ids = [hit.id for hit in Searcher(index).search([parse_term("a ring")], 50)]
    lines = [
        json.dumps({"query": f"{text} {n}", "relevant": [ids[n]]}) for n in range(30) for text in ("a ring", "a star")
    ]
    judged.write_text("\n".join(lines))
    assert main(["calibrate", str(index), "--judged", str(judged), "--overwrite"]) == 0, capsys.readouterr().err
    assert Searcher(index).assessor.rerank_margin == RerankMargin(2.0, 8, [])
    (index / "calibration.json").unlink()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("self", ["a ring", "--within", "50ms"], "has nothing to re-rank with"),
        ("late", ["a ring", "--within", "50"], "such as 50ms"),
        ("late", ["--like", "IMAGE", "--within", "50ms"], "give words only"),
        ("late", ["a ring", "--captions", "--within", "50ms"], "leave --where, --rerank, --within"),
    ],
)
def test_what_no_time_can_be_spent_on_is_refused(timed_indexes, scenes_folder, capsys, name, arguments, message):
    image = next(Path(scenes_folder).rglob("*.png"))
    assert (
        main(["search", str(timed_indexes[name]), *(str(image) if each == "IMAGE" else each for each in arguments)])
        == 1
    )
    assert message in capsys.readouterr().err


def test_the_line_of_calibrate_names_what_the_margin_costs_and_finds():
    rng = np.random.default_rng(0)
    cosines = -np.sort(-rng.uniform(0, 1, (300, 20)), axis=1)
    own = rng.integers(0, 3, 300)
    margin = measure_margins(cosines, np.where(np.arange(20) == own[:, None], 9.0, 0.0), own)
    line = margin_line(margin.to_dict())
    (chosen,) = (row for row in margin.curve if row.margin == margin.margin)
    assert f"within {margin.margin:.3f} of the first one" in line
    assert f"{chosen.images:.1f} of 20 a query" in line
    assert "all: 300.0" in line
    noise = measure_margins(cosines, rng.normal(size=(300, 20)), np.zeros(300, dtype=np.int64))
    assert margin_line(noise.to_dict()).endswith("brings next to nothing; none are")
