"""Ranks and metrics against brute force, against CLIP_benchmark, and in the properties that make them believable."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipvisionalign.retrieval import (
    metrics,
    metrics_of_ranks,
    ranks_of_scores,
    ranks_of_vectors,
    retrieval_metrics,
    rsum_gain,
)
from clipvisionalign.retrieval.metrics import MIN_IMAGES, average_precision_at_r, bootstrap_weights, unseen_share
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives, WorkerShard
from clipvisionalign.retrieval.rerank import rerank, rerank_at_depths


def brute_force_ranks(scores: np.ndarray, positive: np.ndarray) -> list[list[int]]:
    """For each row the ranks of its partners, from the definition: strangers at least as high stand before."""
    ranks = []
    for row, own in zip(scores, positive, strict=True):
        true = sorted(-row[c] for c in np.flatnonzero(own))
        negatives = row[~own]
        ranks.append([int((negatives >= -score).sum()) + position for position, score in enumerate(true, 1)])
    return ranks


@st.composite
def galleries(draw):
    """Whole-number vectors, so that ties are many and exact; ragged captions; perhaps identities."""
    images = draw(st.integers(1, 8))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=12))
    owners = np.array(draw(st.permutations([*range(images), *extra])))
    width = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    low = draw(st.integers(0, 2))
    identity = rng.integers(0, 3, images) if draw(st.booleans()) else None
    a = rng.integers(-low, low + 1, (images, width)).astype(np.float32)
    b = rng.integers(-low, low + 1, (len(owners), width)).astype(np.float32)
    return a, b, owners, identity


@settings(max_examples=300, deadline=None)
@given(galleries())
def test_ranks_equal_brute_force_ties_included(gallery):
    a, b, owners, identity = gallery
    group = np.arange(len(a)) if identity is None else identity
    positive = group[:, None] == group[owners][None, :]
    scores = a.astype(np.float64) @ b.astype(np.float64).T
    positives = Positives.of(owners, len(a), identity)
    for ranks in (ranks_of_vectors(a, b, positives), ranks_of_scores(scores.astype(np.float32), positives)):
        assert [[r for r in row if r] for row in ranks.image_to_text.tolist()] == brute_force_ranks(scores, positive)
        assert [[r for r in row if r] for row in ranks.text_to_image.tolist()] == brute_force_ranks(
            scores.T, positive.T
        )


@given(galleries(), st.integers(1, 4))
def test_ranks_that_several_count_together_are_the_ranks(gallery, workers):
    a, b, owners, identity = gallery
    positives = Positives.of(owners, len(a), identity)
    counts: list[np.ndarray] = []
    for number in range(workers):
        ranks_of_vectors(a, b, positives, WorkerShard(number, workers, lambda own: (counts.append(own), own)[1]))
    sums = iter([sum(counts[::2]), sum(counts[1::2])])
    actual = ranks_of_vectors(a, b, positives, WorkerShard(0, workers, lambda own: next(sums)))
    expected = ranks_of_vectors(a, b, positives)
    assert (actual.image_to_text == expected.image_to_text).all()
    assert (actual.text_to_image == expected.text_to_image).all()


def test_recall_equals_clip_benchmark():
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    for seed in range(5):
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((120, 16)).astype(np.float32)
        b = (np.repeat(a, 5, axis=0) + 2 * rng.standard_normal((600, 16))).astype(np.float32)
        owners = np.arange(600) // 5
        ours = retrieval_metrics(a, b, owners, resamples=0)
        scores = torch.from_numpy(b) @ torch.from_numpy(a).T
        positive = torch.from_numpy(owners[:, None] == np.arange(120)[None, :])
        for k in (1, 5, 10):
            t2i = float((recall_at_k(scores, positive, k) > 0).double().mean())
            i2t = float((recall_at_k(scores.T, positive.T, k) > 0).double().mean())
            assert ours.text_to_image[f"recall_at_{k}"].value == t2i
            assert ours.image_to_text[f"recall_at_{k}"].value == i2t


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((57, 8)), rng.standard_normal((131, 8))
    positives = Positives.of(np.concatenate([np.arange(57), rng.integers(0, 57, 74)]), 57)
    at_once = ranks_of_vectors(a, b, positives)
    monkeypatch.setattr("clipvisionalign.retrieval.ranks.SCORES_PER_BLOCK", 1000)
    monkeypatch.setattr("clipvisionalign.retrieval.ranks.CAPTIONS_PER_BLOCK", 17)
    parts = ranks_of_vectors(a, b, positives)
    assert (at_once.image_to_text == parts.image_to_text).all()
    assert (at_once.text_to_image == parts.text_to_image).all()


def test_one_score_for_every_pair_finds_nothing():
    metrics = retrieval_metrics(np.ones((50, 4)), np.ones((250, 4)), np.arange(250) // 5)
    assert metrics.rsum.value == 0
    assert metrics.image_to_text["median_rank"].value == 246
    assert metrics.text_to_image["mean_rank"].value == 50


def test_order_of_the_gallery_does_not_matter():
    rng = np.random.default_rng(3)
    a = rng.standard_normal((40, 8))
    b = np.repeat(a, 5, axis=0) + 1.5 * rng.standard_normal((200, 8))
    owners = np.arange(200) // 5
    plain = retrieval_metrics(a, b, owners, resamples=0).to_dict()
    rows, columns = rng.permutation(40), rng.permutation(200)
    inverse = np.argsort(rows)
    moved = retrieval_metrics(a[rows], b[columns], inverse[owners[columns]], resamples=0).to_dict()
    for way in ("image_to_text", "text_to_image"):
        for name, figure in plain[way].items():
            assert figure["value"] == pytest.approx(moved[way][name]["value"])


def test_equal_vectors_tie_wherever_they_stand():
    """A stranger with the partner's own vector stands before it, in every block and at every width."""
    rng = np.random.default_rng(0)
    for width in (3, 64, 255, 256):
        a = rng.standard_normal((33, width)).astype(np.float32)
        b = np.concatenate([a, a])
        owners = np.concatenate([np.arange(33), (np.arange(33) + 1) % 33])
        ranks = ranks_of_vectors(a, b, Positives.of(owners, 33))
        assert (ranks.image_to_text[:, 0] >= 2).all()


def test_map_at_r_by_hand():
    # Three partners at ranks 1, 3 and 7 of which the first 3 places count: (1/1 + 2/3) / 3.
    assert average_precision_at_r(np.array([[1, 3, 7]])) == pytest.approx([(1 + 2 / 3) / 3])
    # A query with fewer partners is padded with 0.
    assert average_precision_at_r(np.array([[2, 0], [1, 2]])) == pytest.approx([0.0, 1.0])


def test_bootstrap_draws_images_with_their_captions():
    """The interval of a recall over captions is as wide as its images vary, not as its captions do."""
    hits = np.repeat(np.arange(200) % 2, 5).astype(bool)
    from clipvisionalign.retrieval.ranks import PositiveRanks

    ranks = PositiveRanks(np.where(np.arange(200) % 2, 1, 50)[:, None], np.where(hits, 1, 50)[:, None])
    figures = metrics_of_ranks(ranks, np.arange(1000) // 5)
    i2t, t2i = figures.image_to_text["recall_at_1"], figures.text_to_image["recall_at_1"]
    assert i2t.value == t2i.value == 0.5
    assert t2i.high - t2i.low == pytest.approx(i2t.high - i2t.low, abs=1e-9)
    # 1.96 standard deviations of a share of one half among 200 on either side.
    assert i2t.high - i2t.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.1)


def test_bootstrap_median_equals_numpy():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 30, 41)
    from clipvisionalign.retrieval.metrics import _median

    weights = bootstrap_weights(41, 50, seed=1)
    ours = _median(ranks, np.arange(41), weights)
    for row, median in zip(weights.astype(int), ours, strict=True):
        assert np.median(np.repeat(ranks, row)) == median


@settings(max_examples=150, deadline=None)
@given(galleries(), st.integers(1, 30), st.integers(0, 1000))
def test_reranking_equals_brute_force(gallery, candidates, seed):
    """The first k in a new order, ties against the model; the rest where they were."""
    a, b, owners, identity = gallery
    rng = np.random.default_rng(seed)
    # Continuous dual scores, since which of two equal strangers is a candidate is nobody's promise.
    a, b = (x + 1e-3 * rng.standard_normal(x.shape) for x in (a, b))
    fused = rng.integers(0, 4, (len(a), len(b))).astype(np.float32)
    group = np.arange(len(a)) if identity is None else identity
    positive = group[:, None] == group[owners][None, :]
    positives = Positives.of(owners, len(a), identity)
    _, after = rerank(a, b, positives, lambda i, c: fused[i, c], candidates)
    dual = a.astype(np.float64) @ b.astype(np.float64).T
    for ranks, scores, new, own in (
        (after.image_to_text, dual, fused, positive),
        (after.text_to_image, dual.T, fused.T, positive.T),
    ):
        for row in range(len(scores)):
            order = np.argsort(-scores[row])
            first = order[:candidates]
            # On a tie of the fused score, strangers first.
            first = sorted(first, key=lambda item: (-new[row, item], own[row, item]))
            final = [*first, *order[candidates:]]
            expected = [rank for rank, item in enumerate(final, 1) if own[row, item]]
            assert [rank for rank in ranks[row].tolist() if rank] == expected


def test_every_depth_is_what_reranking_at_that_depth_gives_and_no_pair_is_scored_twice():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 8)), rng.standard_normal((150, 8))
    fused = rng.standard_normal((30, 150))
    positives = Positives.of(np.arange(150) // 5, 30)
    scored = []

    def score(i, c):
        scored.extend(zip(i.tolist(), c.tolist(), strict=True))
        return fused[i, c]

    before, results = rerank_at_depths(a, b, positives, score, [9, 3, 3, 200])
    assert [result.candidates for result in results] == [3, 9, 200]
    assert len(scored) == len(set(scored)) == 30 * 150 == results[-1].scored_pairs
    assert results[0].seconds < results[-1].seconds
    for result in results:
        dual, after = rerank(a, b, positives, lambda i, c: fused[i, c], result.candidates)
        assert (after.image_to_text == result.ranks.image_to_text).all()
        assert (after.text_to_image == result.ranks.text_to_image).all()
        assert (dual.text_to_image == before.text_to_image).all()


def test_a_paired_gain_is_the_difference_and_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 8)), rng.standard_normal((300, 8))
    owners = np.arange(300) // 5
    better = b + 0.5 * a[owners]
    first, second = (retrieval_metrics(a, x, owners) for x in (b, better))
    gain = rsum_gain(second.ranks, first.ranks, owners)
    assert gain.value == pytest.approx(second.rsum.value - first.rsum.value)
    assert gain.low < gain.value < gain.high
    assert gain.high - gain.low < (second.rsum.high - second.rsum.low) + (first.rsum.high - first.rsum.low)
    same = rsum_gain(first.ranks, first.ranks, owners)
    # None was seen to differ; of so many images a share may all the same.
    unseen = 600 * unseen_share(60)
    assert (same.value, same.low, same.high) == (0, pytest.approx(-unseen), pytest.approx(unseen))


def test_reranking_by_the_dual_score_changes_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 8)), rng.standard_normal((150, 8))
    positives = Positives.of(np.arange(150) // 5, 30)
    before, after = rerank(a, b, positives, lambda i, c: (a[i] * b[c]).sum(-1), 7)
    assert (before.image_to_text == after.image_to_text).all()
    assert (before.text_to_image == after.text_to_image).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, o: (a[:, :3], b, o), "3 wide"),
        (lambda a, b, o: (a, b, o[:-1]), "differ in number"),
        (lambda a, b, o: (a, b, np.where(o == 3, 99, o)), "0 to 99"),
        (lambda a, b, o: (a, b, np.where(o == 3, 2, o)), "image 3 has no caption"),
        (lambda a, b, o: (np.where(a > 0, np.nan, a), b, o), "not finite"),
        (lambda a, b, o: (a[0], b, o), "image"),
        (lambda a, b, o: (a, b, o.astype(float)), "whole numbers"),
        (lambda a, b, o: (a, b[:0], o[:0]), "nothing to rank"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    rng = np.random.default_rng(0)
    a, b, owners = change(rng.standard_normal((6, 4)), rng.standard_normal((12, 4)), np.arange(12) // 2)
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(a, b, owners)


@pytest.mark.slow
def test_memory_does_not_grow_with_gallery_times_queries():
    """6,000 x 30,000 scores would take 1.4 GB in float64; the ranks take a fraction of that."""
    program = """
import numpy as np
from clipvisionalign.retrieval import retrieval_metrics
def peak():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1024
rng = np.random.default_rng(0)
a = rng.standard_normal((6000, 64), dtype=np.float32); b = rng.standard_normal((30000, 64), dtype=np.float32)
before = peak(); retrieval_metrics(a, b, np.arange(30000) // 5, resamples=0); print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 450


@pytest.mark.parametrize("images", [6, 7, 60])
@pytest.mark.parametrize("highest", [2, 10, 1000])
def test_medians_are_the_same_however_queries_are_counted(monkeypatch, images, highest):
    rng = np.random.default_rng(images + highest)
    image = rng.permutation(np.arange(3 * images) // 3)
    ranks = rng.integers(1, highest, 3 * images)
    weights = bootstrap_weights(images, 200, 0)
    together = metrics._median(ranks, image, weights)
    monkeypatch.setattr(metrics, "_MAX_TABLE_ENTRIES", 0)
    assert np.array_equal(metrics._median(ranks, image, weights), together)
    drawn = np.repeat(ranks, weights[1][image].astype(int))
    assert together[1] == np.median(drawn)
    assert together[0] == np.median(ranks)


def test_an_image_without_identity_is_its_own():
    """As pandas has it (NaN), as JSON has it (None): no two of them are partners of each other's captions."""
    wrong, vectors = np.roll(np.eye(6), 1, axis=0), np.eye(6)
    owners = np.arange(6)
    for identity in (np.full(6, np.nan), [None] * 6, ["a", None, "b", float("nan"), None, "c"]):
        assert retrieval_metrics(wrong, vectors, owners, identity).image_to_text["recall_at_1"].value == 0
    both = retrieval_metrics(vectors[[1, 0, 2, 3, 4, 5]], vectors, owners, ["a", "a", None, None, "b", float("nan")])
    assert both.rsum.value == 600


@pytest.mark.parametrize("images", [1, 2, 5, 6, 40, 1000])
@pytest.mark.parametrize("all_found", [True, False])
def test_where_no_two_images_differ_an_interval_is_not_of_no_width(images, all_found):
    """All found, or none: of few images there is no interval, of more it is what may not have been seen, as in a study."""
    from clipvisionalign.study.statistics import estimate

    ranks = np.full((images, 1), 1 if all_found else 99)
    metrics = metrics_of_ranks(PositiveRanks(ranks, ranks), np.arange(images))
    recall, expected = metrics.image_to_text["recall_at_1"], estimate(np.full((1, images), 100.0 * all_found), (0, 100))
    if images < MIN_IMAGES:
        assert recall.low is recall.high is expected.low is expected.high is None
        assert metrics.rsum.low is None
        return
    assert (100 * recall.low, 100 * recall.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert recall.low < recall.high
    assert metrics.rsum.low < metrics.rsum.high
    assert 0 <= metrics.rsum.low <= metrics.rsum.value <= metrics.rsum.high <= 600
    # Of ranks nobody knows how high they could be.
    assert metrics.image_to_text["mean_rank"].low is None
