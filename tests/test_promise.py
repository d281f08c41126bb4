"""Promises: cut-offs keep what they promise, stay with their model and index, and nothing is called nothing."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as arrow
import pytest

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.model_calibration import unseen_images
from clipvisionalign.search import calibration_files
from clipvisionalign.search.calibrate import (
    answer_lengths,
    best_of_galleries,
    calibrate_captions,
    calibrate_judged,
)
from clipvisionalign.search.calibration import (
    CALIBRATION_FILE,
    LEVELS,
    Calibration,
    UncalibratedError,
    conformal_threshold,
    units_needed,
)
from clipvisionalign.search.calibration_files import (
    NULL_FILE,
    read_null_cosines,
    read_short_null_cosines,
    write_calibration,
    write_null_cosines,
)
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.judgements import Judgement, calibrate_index, parse_judgement, read_judgements
from clipvisionalign.search.null_queries import (
    NULL_SHARE,
    SHORT_LENGTHS,
    WORD_SHARE,
    chance_level,
    null_texts,
    short_null_texts,
)
from clipvisionalign.search.promise import ResultAssessor, SearchResult
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import connect
from clipvisionalign.search.terms import Term, parse_term
from clipvisionalign.search.unknown_words import check_words

WIDTH = 12


def world(rng: np.random.Generator, count: int, per_image: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images with captions near them, unit length; some images have much worse captions than others."""
    images = rng.normal(size=(count, WIDTH)) + 0.5
    owners = np.repeat(np.arange(count), per_image)
    noise = rng.exponential(0.8, size=count)[owners, None]
    captions = images[owners] + noise * rng.normal(size=(len(owners), WIDTH))
    unit = lambda rows: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    return unit(images), unit(captions), owners


# --- the cut-off -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_own_image_of_a_further_caption_reaches_the_cut_off_as_often_as_promised(level):
    """Mean over calibrations on 120 images, each tested on 200 further ones: within four standard errors."""
    shares = []
    for seed in range(60):
        images, captions, owners = world(np.random.default_rng(seed), 320)
        first, later = owners < 120, owners >= 120
        calibration = calibrate_captions(images[:120], captions[first], owners[first])
        scores = np.einsum("md,md->m", captions[later], images[owners[later]])
        shares.append((scores >= calibration.threshold(level)).mean())
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert level - 4 * error <= np.mean(shares) <= level + 2 / 121 + 4 * error


def test_captions_of_one_image_count_as_one():
    """A hundred captions of one image that is badly described do not lower the cut-off of fifty others."""
    rng = np.random.default_rng(0)
    scores, units = rng.normal(3, 1, 50), np.arange(50)
    cut = conformal_threshold(scores, units, 0.9)
    with_one_more = conformal_threshold(np.append(scores, np.full(100, -9.0)), np.append(units, np.full(100, 50)), 0.9)
    assert np.sort(scores)[0] <= with_one_more <= cut
    assert with_one_more > -9.0


def test_a_higher_level_has_a_lower_cut_off_and_a_longer_answer():
    images, captions, owners = world(np.random.default_rng(1), 150)
    calibration = calibrate_captions(images, captions, owners)
    cuts = [calibration.threshold(level) for level in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.96)]
    assert cuts == sorted(cuts, reverse=True)
    lengths = answer_lengths(images, captions, cuts).mean(axis=1)
    assert (np.diff(lengths) >= 0).all()
    assert [row["answer_length"] for row in calibration.measured] == sorted(
        row["answer_length"] for row in calibration.measured
    )


def test_the_cut_off_does_not_depend_on_the_size_of_the_gallery():
    """A score and no rank: further images neither add to what is kept of the others nor take away from it."""
    images, captions, owners = world(np.random.default_rng(2), 200)
    calibration = calibrate_captions(images[:100], captions[owners < 100], owners[owners < 100])
    query = captions[owners == 150][0]
    cut = calibration.threshold(0.9)
    small, large = images[100:], np.concatenate([images[100:], world(np.random.default_rng(3), 3000)[0]])
    reached = set(np.flatnonzero(small @ query >= cut))
    assert reached == {row for row in np.flatnonzero(large @ query >= cut) if row < 100}


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    images, captions, owners = world(np.random.default_rng(4), 60)
    with pytest.raises(UncalibratedError, match=r"24 images .* needs 25 .* 0.95 needs 100"):
        calibrate_captions(images[:24], captions[owners < 24], owners[owners < 24])
    calibration = calibrate_captions(images, captions, owners)
    assert [row["level"] for row in calibration.measured] == [0.8, 0.9]
    with pytest.raises(UncalibratedError, match=r"a promise of 0.95 needs 100 images to calibrate on; there are 60"):
        calibration.threshold(0.95)
    for level in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match=r"probability between 0 and 1"):
            units_needed(level)


def test_best_hits_are_of_galleries_that_hold_the_own_image():
    images, captions, owners = world(np.random.default_rng(5), 130)
    best = best_of_galleries(images, captions, owners)
    assert [size for size, _ in best] == [50, 100]
    calibration = calibrate_captions(images, captions, owners)
    assert calibration.best == best
    of_all = (captions @ images.T).max(axis=1)
    assert (of_all < best[-1][1]).mean() <= 0.01 + 1 / len(captions)
    assert calibration.chance_level(49) == -math.inf
    assert calibration.chance_level(50) <= calibration.chance_level(100) == calibration.chance_level(10**6)


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    images, captions, owners = world(np.random.default_rng(6), 120)
    order = np.random.default_rng(0).permutation(len(captions))
    calibration = calibrate_captions(images, captions[order], owners[order], "abc", {"data": "world", "split": "dev"})
    read = Calibration.from_json(calibration.to_json())
    assert [read.threshold(level) for level in LEVELS] == [calibration.threshold(level) for level in LEVELS]
    assert read.best == calibration.best
    assert (read.aligner, read.describe()) == ("abc", "world, dev: 120 images, 360 captions")
    assert read.to_json() == calibration.to_json()
    for broken in ("", "[]", "{}", calibration.to_json().replace('"format": 1', '"format": 2'),
                   calibration.to_json().replace('"scores": "', '"scores": "!')):  # fmt: skip
        with pytest.raises(UncalibratedError, match=r"cannot be read .*calibrate again"):
            Calibration.from_json(broken)


def test_of_judged_queries_the_mean_share_of_what_is_relevant_is_kept():
    """Queries with several relevant images, each query one unit: 60 simulated calibrations, four standard errors."""
    shares = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        images, queries, _ = world(rng, 300, per_image=1)
        relevant = [list({row, *rng.integers(0, 300, rng.integers(0, 3))}) for row in range(300)]
        calibration = calibrate_judged(images, queries[:100], relevant[:100])
        cut = calibration.threshold(0.9)
        shares.append(
            np.mean([
                np.mean(images[each] @ queries[row] >= cut)
                for row, each in enumerate(relevant[100:], 100)
            ])
        )  # fmt: skip
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert 0.9 - 4 * error <= np.mean(shares) <= 0.9 + 2 / 101 + 4 * error
    with pytest.raises(UncalibratedError, match=r"49 judged queries .* 0.9 needs 50, one of 0.95 needs 100"):
        calibrate_judged(images, queries[:60], [[0]] * 49 + [[]] * 11)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def english():
    """A tokenizer of English subwords with single letters of other scripts, as vocabularies of English have them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyzсобактрве狗上"
    words = ["a", "dog", "on", "the", "grass", "!", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["[UNK]", "[PAD]", *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


@pytest.mark.parametrize(
    ("text", "known", "unknown"),
    [
        ("a dog on the grass", 5, ()),
        ("xyz", 1, ()),
        ("собака на траве", 0, ("собака", "на", "траве")),
        ("🐶", 0, ("🐶",)),
        ("🐶 dog 🐶", 1, ("🐶",)),
        ("狗", 0, ("狗",)),
        ("!!! ?", 0, ()),
        (" \u200b ", 0, ()),
        ("dog!", 1, ()),
    ],
)
def test_words_of_another_script_emoji_and_mere_marks_are_not_known(english, text, known, unknown):
    from transformers import PreTrainedTokenizerFast

    english.enable_padding(pad_id=1, pad_token="[PAD]", length=8)
    of_transformers = PreTrainedTokenizerFast(tokenizer_object=english, unk_token="[UNK]", pad_token="[PAD]")
    for tokenizer in (english, of_transformers):
        check = check_words(tokenizer, text)
        assert (check.known, check.unknown) == (known, unknown)
        assert bool(check.reason) == (not known)
        assert bool(check.note) == bool(known and unknown)
    assert check_words(object(), "собака").known == 1, "of a tokenizer of another kind nothing is said"


# --- in an index -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    index = tmp_path_factory.mktemp("promise") / "index"
    build_index(tiny_runs["late"], scenes_folder, index, captions=True)
    return index


def calibration_of(searcher: Searcher, scenes_folder: Path) -> Calibration:
    """On all scenes, whatever they were used for: how a search takes it, not what it is worth."""
    data = read_captioned_images(scenes_folder)
    images = searcher.aligner.encode_images(data.images).numpy()
    captions = searcher.aligner.encode_captions(data.captions).numpy()
    about = {"data": "scenes", "split": "all"}
    return calibrate_captions(images, captions, data.caption_image, searcher.manifest.aligner, about)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, indexed, scenes_folder) -> Searcher:
    index = tmp_path_factory.mktemp("promise") / "calibrated"
    shutil.copytree(indexed, index)
    write_calibration(Storage(index), calibration_of(Searcher(index), scenes_folder))
    return Searcher(index)


QUERY = [parse_term("a red circle")]


def test_a_promise_gives_all_images_that_reach_its_cut_off_and_no_others(calibrated):
    everything = calibrated.search_one(SearchQuery(QUERY, 10_000))
    for level in (0.5, 0.8, 0.9, 0.99 if calibrated.assessor.calibration.count >= 500 else 0.9):
        result = calibrated.search_one(SearchQuery(QUERY, promise=level))
        cut = calibrated.assessor.calibration.threshold(level)
        assert list(result) == [hit for hit in everything if hit.score >= cut], "each hit as without a promise"
        assert result.promise.promised == len(result)
        assert result.promise.threshold == cut
        assert result.promise.calibrated_on.startswith("scenes, all: ")
        assert not result.nothing
    first = calibrated.search_one(SearchQuery(QUERY, 2, promise=0.9))
    assert len(first) == 2
    assert first.promise == calibrated.search_one(SearchQuery(QUERY, promise=0.9)).promise


def test_a_promise_holds_what_it_needs_however_few_hits_are_read_at_first(calibrated, monkeypatch):
    whole = calibrated.search_one(SearchQuery(QUERY, promise=0.9))
    monkeypatch.setattr("clipvisionalign.search.queries.FIRST_DEPTH", 1)
    assert calibrated.search_one(SearchQuery(QUERY, promise=0.9)) == whole
    batch = calibrated.search_batch([SearchQuery(QUERY, promise=0.9), SearchQuery(QUERY, promise=0.9)])
    assert [list(result) for result in batch] == [list(whole), list(whole)]


def test_a_promise_goes_with_filters_several_terms_and_reranking(calibrated):
    whole = calibrated.search_one(SearchQuery(QUERY, promise=0.9))
    where = 'path like "*1.png"'
    filtered = calibrated.search_one(SearchQuery(QUERY, where=where, promise=0.9))
    assert list(filtered) == [hit for hit in whole if hit.path.endswith("1.png")]
    terms = [*QUERY, Term("a star", -0.5)]
    several = calibrated.search_one(SearchQuery(terms, promise=0.9))
    assert any("single captions" in note for note in several.notes)
    assert not whole.notes
    reranked = calibrated.search_one(SearchQuery(QUERY, rerank=5, promise=0.9))
    assert {hit.id for hit in reranked} == {hit.id for hit in whole}
    assert sum(hit.pair_score is not None for hit in reranked) == min(5, len(whole))
    assert reranked.promise == whole.promise


def test_a_promise_is_for_words_that_images_are_searched_for_by(calibrated, scenes_folder):
    image = next((scenes_folder / "images").rglob("*.png"))
    queries = [
        SearchQuery([Term(image, is_image=True)], promise=0.9),
        SearchQuery([*QUERY, Term(image, is_image=True)], promise=0.9),
        SearchQuery(QUERY, captions=True, promise=0.9),
        SearchQuery(vector=calibrated.vector_of(0), promise=0.9),
    ]
    for result in calibrated.search_batch(queries):
        assert isinstance(result, ValueError)
        assert "a promise is for words" in str(result)
    for query in (replace(query, promise=0.0) for query in queries):
        result = calibrated.search_one(query)
        assert (result.promise, result.nothing) == (None, False)
        assert result
    for level in (-0.5, 1.0, 7.0, math.nan):
        with pytest.raises(ValueError, match=r"between 0 and 1"):
            calibrated.search_one(SearchQuery(QUERY, promise=level))


def test_without_a_promise_the_hits_are_as_before_and_the_line_is_marked(calibrated, indexed):
    plain = Searcher(indexed)
    for count in (1, 10, 10_000):
        result, before = (each.search_one(SearchQuery(QUERY, count)) for each in (calibrated, plain))
        # Vectors in memory and those of the table are multiplied in another order.
        scores = np.array([hit.score for hit in result])
        assert np.abs(scores - [hit.score for hit in before]).max() < 2e-6
        assert {hit.id for hit in result} == {hit.id for hit in before} or count < len(result)
        assert before.promise is None
        promise = result.promise
        assert promise.level == 0.9
        assert promise.promised == sum(hit.score >= promise.threshold for hit in result)
        assert promise.more == (promise.promised == len(result))


def test_without_a_calibration_a_promise_is_refused_in_one_line_with_the_way_out(indexed, tmp_path, capsys):
    assert main(["search", str(indexed), "a red circle", "--promise", "0.9"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"clipvisionalign calibrate {indexed} DATA" in line


def test_a_calibration_of_other_weights_gives_no_promise_and_disturbs_no_search(calibrated):
    index, original = Storage(calibrated.index), Storage(calibrated.index).read(CALIBRATION_FILE)
    try:
        for text, message in ((original.replace(calibrated.manifest.aligner, "0" * 32), "of another model"),
                              ("{", "cannot be read")):  # fmt: skip
            index.write(CALIBRATION_FILE, text)
            searcher = Searcher(calibrated.index)
            assert searcher.search_one(SearchQuery(QUERY))
            with pytest.raises(UncalibratedError, match=message):
                searcher.search_one(SearchQuery(QUERY, promise=0.9))
    finally:
        index.write(CALIBRATION_FILE, original)


def test_an_update_copies_the_calibration_of_a_run_once_and_an_old_index_opens(
    tmp_path, scenes_folder, tiny_runs, calibrated, capsys
):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs["late"], run)
    index = tmp_path / "index"
    build_index(run, scenes_folder / "images", index)
    (index / NULL_FILE).unlink()  # as an index of before
    assert Searcher(index).search_one(SearchQuery(QUERY))
    text = Storage(calibrated.index).read(CALIBRATION_FILE)
    (run / CALIBRATION_FILE).write_text(text)
    build_index(run, scenes_folder / "images", index)
    assert (index / CALIBRATION_FILE).read_text() == text
    assert (index / NULL_FILE).is_file()
    own = text.replace('"data": "scenes"', '"data": "own"')
    (index / CALIBRATION_FILE).write_text(own)
    build_index(run, scenes_folder / "images", index)
    assert (index / CALIBRATION_FILE).read_text() == own, "what is there is not overwritten unasked"
    assert Searcher(index).search_one(SearchQuery(QUERY, promise=0.9)).promise.calibrated_on.startswith("own")


def test_a_query_without_a_known_word_has_no_hits_and_one_with_some_names_the_others(calibrated):
    for text in ("🐶", "!!!", "草地上的狗"):
        result = calibrated.search_one(SearchQuery([Term(text)]))
        assert result.nothing
        assert list(result) == []
        assert result.reason
    partly = calibrated.search_one(SearchQuery([Term("a red circle 🐶")]))
    assert partly
    assert any("🐶" in note for note in partly.notes)


def test_what_is_no_better_than_words_that_mean_nothing_is_called_so(calibrated):
    assessor, captions = calibrated.assessor, calibrated.assessor.calibration
    null = calibrated.search_batch([SearchQuery([Term(text)], 1) for text in null_texts()])
    assert sorted(result[0].score for result in null) == pytest.approx(assessor.null_cosines, abs=2e-6)
    level = max(chance_level(assessor.null_cosines), captions.chance_level(calibrated.table.count_rows()))
    assert np.mean([result[0].score <= level for result in null]) >= NULL_SHARE, "most of these texts themselves are"
    longer = [result for text, result in zip(null_texts(), null, strict=True) if len(text.split()) > 2]
    assert [result.nothing for result in longer] == [result[0].score <= level for result in longer]
    for score, nothing in ((level - 1e-3, True), (level + 1e-3, False)):
        hits = [SimpleNamespace(score=score)]
        assert assessor.assess(SearchQuery(QUERY), hits, lambda depth, hits=hits: hits).nothing is nothing
        # Of what a filter leaves, and of several terms, the best is not comparable.
        for query in (SearchQuery(QUERY, where="width > 1"), SearchQuery([*QUERY, Term("a star")])):
            assert not assessor.assess(query, hits, lambda depth, hits=hits: hits).nothing


@pytest.mark.parametrize("words", SHORT_LENGTHS)
def test_short_queries_are_compared_with_texts_as_short_as_they_are(calibrated, words):
    assessor = calibrated.assessor
    texts = short_null_texts(words)
    results = calibrated.search_batch([SearchQuery([Term(text)], 1) for text in texts])
    assert {len(text.split()) for text in texts} == {words}
    cosines = assessor.short_null_cosines[words]
    assert sorted(result[0].score for result in results) == pytest.approx(cosines, abs=2e-6)
    assert np.mean([result.nothing for result in results]) >= (WORD_SHARE if words == 1 else NULL_SHARE)
    alone = ResultAssessor("index", None, assessor.tokenizer, [0.9], assessor.count, {words: [0.2]})
    query = SearchQuery([Term(" ".join(["ring"] * words))])
    for score, nothing in ((0.19, True), (0.21, False)):
        hits = [SimpleNamespace(score=score)]
        assert alone.assess(query, hits, lambda depth, hits=hits: hits).nothing is nothing
        # Of other lengths, and in indexes of before, all texts count.
        other = SearchQuery([Term(" ".join(["ring"] * 5))])
        assert alone.assess(other, hits, lambda depth, hits=hits: hits).nothing
        before = ResultAssessor("index", None, assessor.tokenizer, [0.9], assessor.count)
        assert before.assess(query, hits, lambda depth, hits=hits: hits).nothing


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_calibrates_an_index_and_search_says_what_it_promises(
    tmp_path, scenes_folder, tiny_runs, capsys, monkeypatch
):
    index = tmp_path / "index"
    build_index(tiny_runs["self"], scenes_folder / "images", index)
    call = ["calibrate", str(index), str(scenes_folder), "--split", "test", "--json"]
    assert main(call) == 1
    assert "needs 25" in capsys.readouterr().err
    # As many as the scenes of the tests are.
    monkeypatch.setattr("clipvisionalign.search.calibration.MISSES_NEEDED", 1)
    assert main(call) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["calibrated_on"]["left_out"]["trained_on"] == 0
    assert main(call) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["search", str(index), "a red circle", "--promise", "0.8", "--json"]) in (0, 1)
    answer = json.loads(capsys.readouterr().out)
    assert answer["promise"]["promised"] == len(answer["found"])


def test_images_that_a_run_was_trained_or_selected_on_are_not_calibrated_on(scenes_folder, tiny_runs, tmp_path):
    data = read_captioned_images(scenes_folder)
    for run in tiny_runs.values():
        with pytest.raises(DataError, match=r"trained"):
            unseen_images(str(run), data, data.split("train"))
        with suppress(DataError):  # where both halves of dev chose another epoch than the run's
            unseen = unseen_images(str(run), data, data.split("dev"))
            assert len(unseen.data) + sum(unseen.left_out.values()) == len(data.split("dev")), "counts add up"
    test = unseen_images(str(run), data, data.split("test"))
    assert len(test.data) == len(data.split("test"))
    assert not any(test.left_out.values())
    mixed = replace(data, rows=[*data.split("train").rows[:5], *data.split("test").rows])
    some = unseen_images(str(run), mixed, mixed)
    assert some.left_out["trained_on"] == 5
    assert len(some.data) == len(data.split("test"))


def test_judged_queries_are_read_with_their_lines_and_calibrate_an_index(indexed, tmp_path):
    searcher = Searcher(indexed)
    paths = searcher.search(QUERY, 60)
    colours, shapes = (
        ("red", "green", "blue", "yellow", "white", "purple", "orange", "cyan"),
        ("circle", "star", "ring"),
    )
    texts = [f"a {one} {shape} and {other}" for one in colours for other in colours for shape in shapes][:60]
    lines = [json.dumps({"query": text, "relevant": [paths[n % len(paths)].path, paths[-1].id]})
             for n, text in enumerate(texts)]  # fmt: skip
    file = tmp_path / "judged.jsonl"
    file.write_text("\n".join([*lines[:50], "", json.dumps({"query": "nothing of it", "relevant": []})]) + "\n")
    judgements = read_judgements(file)
    assert len(judgements) == 51
    calibration = calibrate_index(searcher, judgements, file.name)
    assert calibration.describe() == "judged.jsonl: 50 judged queries"
    assert calibration.threshold(0.9) > -math.inf
    with pytest.raises(UncalibratedError, match=r"0.95 needs 100 judged queries"):
        calibration.threshold(0.95)
    with pytest.raises(UncalibratedError, match=r"49 judged queries"):
        calibrate_index(searcher, judgements[1:])
    with pytest.raises(ValueError, match=r"line 1: the index has no image 'gone.jpg'"):
        calibrate_index(searcher, [Judgement(("x",), ("gone.jpg",), f"{file}, line 1"), *judgements])
    with pytest.raises(ValueError, match=r"judged more than once"):
        calibrate_index(searcher, [*judgements, judgements[0]])
    for fields in (3, {}, {"query": "x"}, {"query": [], "relevant": []}, {"query": "x", "relevant": "a"},
                   {"query": "x", "relevant": [True]}, {"query": "x", "relevant": [1.5]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"judged query|query|relevant"):
            parse_judgement(fields, "here")


def test_the_service_gives_the_verdict_beside_hits_that_stay_as_they_were(calibrated, indexed):
    from fastapi.testclient import TestClient

    from clipvisionalign.search.server.app import create_app

    with TestClient(create_app([calibrated], token="")) as client:
        plain = client.get("/search", params={"q": "a red circle", "count": 5}).json()
        promised = client.get("/search", params={"q": "a red circle", "count": 5, "promise": 0.9}).json()
        nothing = client.get("/search", params={"q": "🐶"}).json()
        assert client.get("/search", params={"q": "a red circle", "promise": 1}).status_code == 422
        similar = client.get("/similar", params={"id": 0}).json()
    assert {"found", "notes", "promise", "nothing", "reason"} <= set(plain)
    assert promised["found"] == [hit for hit in plain["found"] if hit["score"] >= promised["promise"]["threshold"]]
    assert promised["promise"]["promised"] >= len(promised["found"])
    assert (nothing["nothing"], nothing["found"]) == (True, [])
    assert (similar["promise"], similar["nothing"]) == (None, False)


def test_a_result_is_a_list_of_hits():
    result = SearchResult([1, 2, 3], notes=["a"])
    assert result == [1, 2, 3]
    assert (result.with_hits([1]), result.with_hits([1]).notes) == ([1], ("a",))
    assert result.verdict() == {"promise": None, "nothing": False, "reason": ""}


def test_what_chance_gives_is_the_best_of_all_rows_of_all_shards(tmp_path):
    rng = np.random.default_rng(0)

    def unit(count):
        vectors = rng.normal(size=(count, 16)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    count = len(null_texts())
    rows, texts = unit(5000), unit(count * (1 + len(SHORT_LENGTHS)))
    parts, storage = np.split(rows, [1, 4000]), Storage(tmp_path)
    tables = []
    for number, part in enumerate([*parts, rows[:0]]):
        columns = {"vector": arrow.FixedSizeListArray.from_arrays(arrow.array(part.ravel()), 16)}
        tables.append(connect(storage).create_table(f"part{number}", arrow.table(columns)))
        # Rows of two fragments come in more than one batch.
        tables[-1].add(arrow.table(columns))
    write_null_cosines(storage, tables, lambda _: texts)
    best = np.sort((texts @ rows.T).max(axis=1).reshape(-1, count), axis=1)
    assert read_null_cosines(storage) == pytest.approx(best[0], abs=2e-6)
    short = read_short_null_cosines(storage)
    assert [short[words] for words in SHORT_LENGTHS] == [pytest.approx(each, abs=2e-6) for each in best[1:]]
    write_null_cosines(storage, tables[-1:], lambda _: texts)
    assert read_null_cosines(storage) == [], "where there is no row"
    assert read_short_null_cosines(storage) == {}


def test_what_chance_gives_is_computed_again_only_for_another_table(tmp_path, scenes_folder, tiny_runs, monkeypatch):
    images, index, calls = tmp_path / "images", tmp_path / "index", []
    shutil.copytree(scenes_folder / "images", images)
    monkeypatch.setattr(calibration_files, "null_texts", lambda: calls.append(1) or ["zorb", "quix"])
    for computed, gone in ((1, False), (1, False), (2, True)):
        if gone:
            min(images.rglob("*.png")).unlink()
        build_index(tiny_runs["self"], images, index)
        assert len(calls) == computed
        assert len(read_null_cosines(index)) == 2
