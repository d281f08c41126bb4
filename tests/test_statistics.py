"""What may be said over seeds: intervals that hold, differences that are not seen where there are none, Holm."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipvisionalign.retrieval.metrics import average_precision, metrics_of_ranks, retrieval_metrics
from clipvisionalign.retrieval.ranks import Partners, ranks_of_vectors
from clipvisionalign.study.statistics import FIGURES, differences, estimate, holm, shares

SIMULATIONS = 2000


def simulated(rng, seeds, images, by_image, by_seed, rest, mean):
    """A table (S, N) whose true mean over all images and all seeds there could be is `mean`."""
    return (
        mean
        + rng.normal(0, by_image, (1, images))
        + rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, rest, (seeds, images))
    )


@pytest.mark.parametrize(
    ("seeds", "images", "by_image", "by_seed", "rest"),
    [
        (1, 300, 150, 0, 100),  # one seed that is all there is
        (3, 1000, 50, 1, 30),
        (3, 300, 100, 5, 60),
        (3, 1000, 30, 3, 120),  # two trained models on Flickr8k's dev pictures differ about so in rsum
        (5, 300, 30, 8, 120),
    ],
)
def test_intervals_hold_95_percent_of_the_time(seeds, images, by_image, by_seed, rest):
    rng = np.random.default_rng(seeds * images)
    held = 0
    for _ in range(SIMULATIONS):
        found = estimate(simulated(rng, seeds, images, by_image, by_seed, rest, mean=7.0))
        held += found.low <= 7.0 <= found.high
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.015)


def test_bootstrap_intervals_of_one_run_hold_95_percent_of_the_time():
    """Recall of a run whose images are found with a known chance, captions of an image more alike than of others."""
    rng = np.random.default_rng(5)
    held = 0
    owners = np.repeat(np.arange(200), 5)
    for _ in range(SIMULATIONS):
        chance = rng.beta(2, 6, size=200)
        found = rng.random((200, 5)) < chance[:, None]
        ranks = np.where(found, 1, 50).reshape(-1, 1)
        forth = np.where(found.any(axis=1), 1, 50)[:, None]
        from clipvisionalign.retrieval.ranks import PartnerRanks

        figure = metrics_of_ranks(PartnerRanks(forth, ranks), owners, 200, seed=1).text_to_image["recall_at_1"]
        held += figure.low <= 0.25 <= figure.high
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.015)


def test_without_a_difference_hardly_any_is_flagged():
    """Four variants that differ by chance alone: at most 5 % of studies flag any of their six differences."""
    rng = np.random.default_rng(11)
    flagged = 0
    for _ in range(SIMULATIONS):
        common = rng.normal(0, 150, (1, 200))
        tables = {name: common + simulated(rng, 3, 200, 20, 3, 90, mean=0.0) for name in "abcd"}
        flagged += any(each.shown for each in differences({"rsum": tables}))
    assert flagged / SIMULATIONS <= 0.05


def test_a_difference_as_large_as_real_ones_is_found():
    rng = np.random.default_rng(12)
    shown = 0
    for _ in range(200):
        common = rng.normal(0, 150, (1, 1000))
        tables = {
            name: common + simulated(rng, 3, 1000, 20, 1, 90, mean=mean) for name, mean in (("a", 300), ("b", 320))
        }
        (found,) = differences({"rsum": tables})
        shown += found.shown and found.estimate.value < 0
    assert shown > 150


def test_more_pictures_do_not_make_up_for_two_seeds():
    rng = np.random.default_rng(0)
    widths = [np.mean([e.high - e.low for e in (estimate(simulated(rng, 3, n, 0, 5, 20, 0.0)) for _ in range(100))])
              for n in (1000, 100_000)]  # fmt: skip
    assert widths[1] > 0.8 * widths[0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_published_procedure(p):
    corrected = holm(p)
    rejected = [value < 0.05 for value in corrected]
    # Step down: from the least p on, each against 5 % over what is left, until one holds.
    expected = [False] * len(p)
    for place, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - place) >= 0.05:
            break
        expected[index] = True
    assert rejected == expected
    assert all(c >= value for c, value in zip(corrected, p, strict=True))


@pytest.mark.parametrize("figure", FIGURES)
def test_shares_have_the_figure_as_their_mean(figure):
    """Images with unequal numbers of captions included."""
    rng = np.random.default_rng(3)
    owners = np.concatenate([np.arange(40), rng.integers(0, 40, 100)])
    images, captions = rng.normal(size=(40, 8)), rng.normal(size=(140, 8))
    captions += images[owners]
    found = retrieval_metrics(images, captions, owners, resamples=0)
    ranks = ranks_of_vectors(images, captions, Partners.of(owners, 40))
    if figure == "rsum":
        expected = found.rsum.value
    else:
        way, name = figure.split(" ")
        expected = 100 * getattr(found, way)[name].value
    assert shares(ranks, owners, figure).mean() == pytest.approx(expected)


def test_two_ways_to_an_interval_agree_on_one_run():
    """The bootstrap over images and the variance of the shares: the same width, unequal numbers of captions or not."""
    rng = np.random.default_rng(4)
    owners = np.sort(np.concatenate([np.arange(400), rng.integers(0, 400, 1200)]))
    images = rng.normal(size=(400, 12))
    captions = images[owners] + 1.5 * rng.normal(size=(1600, 12))
    found = retrieval_metrics(images, captions, owners)
    ranks = ranks_of_vectors(images, captions, Partners.of(owners, 400))
    for figure, boot in (("rsum", found.rsum), ("text_to_image recall_at_1", found.text_to_image["recall_at_1"])):
        other = estimate(shares(ranks, owners, figure)[None])
        factor = 1 if figure == "rsum" else 100
        assert other.high - other.low == pytest.approx(factor * (boot.high - boot.low), rel=0.12)


def test_a_thousand_resamples_of_five_thousand_captions_within_two_seconds():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1000, 16)).astype(np.float32)
    owners = np.repeat(np.arange(1000), 5)
    captions = (images[owners] + rng.normal(size=(5000, 16))).astype(np.float32)
    ranks = ranks_of_vectors(images, captions, Partners.of(owners, 1000))
    start = time.perf_counter()
    metrics_of_ranks(ranks, owners, 1000)
    assert time.perf_counter() - start < 2.0


# --- people: RSTPReid's measures -------------------------------------------------------------------------------------


def test_identity_measures_equal_a_reference_from_the_definition():
    """R@k: a picture of the identity within the first k. AP: mean over relevant pictures of the precision at each."""
    rng = np.random.default_rng(7)
    identity = rng.integers(0, 12, 60)
    identity[:12] = np.arange(12)
    images, captions = rng.normal(size=(60, 6)), rng.normal(size=(120, 6))
    owners = np.repeat(np.arange(60), 2)
    captions += 0.7 * images[owners]
    found = retrieval_metrics(images, captions, owners, identity, resamples=0)
    precisions, hits = [], {1: [], 5: [], 10: []}
    for caption, owner in zip(captions, owners, strict=True):
        relevant = identity[np.argsort(-(images @ caption), kind="stable")] == identity[owner]
        for k, several in hits.items():
            several.append(relevant[:k].any())
        places = np.flatnonzero(relevant) + 1
        precisions.append(np.mean([(places <= place).sum() / place for place in places]))
    assert found.text_to_image["map"].value == pytest.approx(np.mean(precisions))
    for k, several in hits.items():
        assert found.text_to_image[f"recall_at_{k}"].value == pytest.approx(np.mean(several))


def test_average_precision_by_hand():
    assert average_precision(np.array([[1, 3], [2, 0]])).tolist() == pytest.approx([(1 + 2 / 3) / 2, 0.5])
