"""What may be said over seeds: intervals that hold, differences that are not seen where there are none, Holm."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages
from clipvisionalign.retrieval.metrics import average_precision, metrics_of_ranks, retrieval_metrics
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives, ranks_of_vectors
from clipvisionalign.study.aggregate import TrialResult, aggregate_results
from clipvisionalign.study.config import Plan
from clipvisionalign.study.data import open_study_data
from clipvisionalign.study.statistics import (
    COMPARED_METRICS,
    MIN_IMAGES,
    estimate,
    half_width,
    holm_correction,
    image_contributions,
    mean_squares,
    p_value,
    pairwise_differences,
    unpaired_seeds,
)  # fmt: skip
from clipvisionalign.study.units import image_units, units_block

SIMULATIONS = 2000


def simulated(rng, seeds, images, by_image, by_seed, rest, mean):
    """A table (S, N) whose true mean over all images and all seeds there could be is `mean`."""
    return (
        mean
        + rng.normal(0, by_image, (1, images))
        + rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, rest, (seeds, images))
    )


def runs(table):
    """Rows of (S, N) as the runs of seeds 0 to S - 1."""
    return dict(enumerate(table))


@pytest.mark.parametrize(
    ("seeds", "images", "by_image", "by_seed", "rest"),
    [
        (1, 300, 150, 0, 100),  # one seed that is all there is
        (3, 1000, 50, 1, 30),
        (3, 300, 100, 5, 60),
        (3, 1000, 30, 3, 120),  # two trained models on Flickr8k's dev images differ about so in rsum
        (5, 300, 30, 8, 120),
    ],
)
def test_intervals_hold_95_percent_of_the_time(seeds, images, by_image, by_seed, rest):
    rng = np.random.default_rng(seeds * images)
    covered = 0
    for _ in range(SIMULATIONS):
        estimated = estimate(simulated(rng, seeds, images, by_image, by_seed, rest, mean=7.0))
        covered += estimated.low <= 7.0 <= estimated.high
    # Of several seeds at least 95 %, whatever share of the variance is theirs; of images alone exactly.
    assert covered / SIMULATIONS >= 0.935
    assert seeds > 1 or covered / SIMULATIONS <= 0.965


@pytest.mark.slow
def test_bootstrap_intervals_of_one_run_hold_95_percent_of_the_time():
    """Recall of a run whose images are found with a known chance, captions of an image more alike than of others."""
    rng = np.random.default_rng(5)
    covered = 0
    owners = np.repeat(np.arange(200), 5)
    for _ in range(SIMULATIONS):
        chance = rng.beta(2, 6, size=200)
        hits = rng.random((200, 5)) < chance[:, None]
        ranks = np.where(hits, 1, 50).reshape(-1, 1)
        i2t = np.where(hits.any(axis=1), 1, 50)[:, None]
        figure = metrics_of_ranks(PositiveRanks(i2t, ranks), owners, 200, seed=1).text_to_image["recall_at_1"]
        covered += figure.low <= 0.25 <= figure.high
    assert covered / SIMULATIONS == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
def test_without_a_difference_hardly_any_is_flagged():
    """Four variants that differ by chance alone: at most 5 % of studies flag any of their six differences."""
    rng = np.random.default_rng(11)
    flagged = 0
    for _ in range(SIMULATIONS):
        common = rng.normal(0, 150, (1, 200))
        tables = {name: runs(common + simulated(rng, 3, 200, 20, 3, 90, mean=0.0)) for name in "abcd"}
        flagged += any(each.is_significant for each in pairwise_differences({"rsum": tables}))
    assert flagged / SIMULATIONS <= 0.05


def test_a_difference_as_large_as_real_ones_is_found():
    rng = np.random.default_rng(12)
    shown = 0
    for _ in range(200):
        common = rng.normal(0, 150, (1, 1000))
        tables = {
            name: runs(common + simulated(rng, 3, 1000, 20, 1, 90, mean=mean))
            for name, mean in (("a", 300), ("b", 320))
        }
        (difference,) = pairwise_differences({"rsum": tables})
        shown += difference.is_significant and difference.estimate.value < 0
    assert shown > 150


def test_more_images_do_not_make_up_for_two_seeds():
    rng = np.random.default_rng(0)
    widths = [np.mean([e.high - e.low for e in (estimate(simulated(rng, 3, n, 0, 5, 20, 0.0)) for _ in range(100))])
              for n in (1000, 100_000)]  # fmt: skip
    assert widths[1] > 0.8 * widths[0]


def test_simulated_studies_hold_what_is_promised():
    """The cells of docs/results.md with fewer studies on fewer images: contributions as real ranks make them."""
    path = Path(__file__).parents[1] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("intervals", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = benchmark.simulate(1500, 200, shown=False)
    assert [(row["seeds"], row["effect"]) for row in rows] == [(s, e) for s in (2, 3, 5) for e in (0, 3, 7, 14)]
    for row in rows:
        assert row["rules"]["new"]["type_1"] <= 0.06, row
        assert row["rules"]["new"]["coverage"] >= 0.94, row
    # The rule before flags too many, so that the simulation can tell.
    assert max(row["rules"]["old"]["type_1"] for row in rows) > 0.09
    assert rows[-4]["rules"]["new"]["power"]["40"] > 0.95


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("level", [0.3, 0.05, 0.001, 1e-8])
def test_p_is_the_level_at_which_the_interval_ends_at_zero(seeds, level):
    squares = mean_squares(simulated(np.random.default_rng(seeds), seeds, 40, 3, 2, 5, 0.0))
    assert p_value(half_width(squares, seeds, 40, level), squares, seeds, 40) == pytest.approx(level, rel=1e-6)


def test_an_interval_is_never_narrower_than_that_of_the_images_alone():
    """Two seeds of the same mean by chance: their own variance is nothing, and says nothing."""
    row = np.random.default_rng(1).normal(0, 100, 50)
    table = np.stack([row, np.roll(row, 1)])
    estimated, alone = estimate(table), estimate(table.mean(axis=0)[None])
    assert estimated.spread == pytest.approx(0, abs=1e-9)
    assert (estimated.low, estimated.high, estimated.p) == pytest.approx((alone.low, alone.high, alone.p))


def test_two_seeds_have_one_degree_of_freedom():
    """All variance is between seeds: 12.7 standard errors each way, and p is that of Student's t."""
    by_image = np.random.default_rng(2).normal(0, 1e-6, 100)
    estimated = estimate(np.stack([10 + by_image, 30 + by_image]))
    assert (estimated.high - estimated.low) / 2 == pytest.approx(127.06, rel=1e-3)
    assert estimated.p == pytest.approx(2 * np.arctan(0.5) / np.pi, rel=1e-3)


@pytest.mark.parametrize("images", range(1, MIN_IMAGES))
@pytest.mark.parametrize("seeds", [1, 3])
def test_few_images_are_not_tested(images, seeds):
    """Three images with equal differences say nothing: p was 0."""
    for table in (np.full((seeds, images), 10.0), np.random.default_rng(0).normal(10, 1, (seeds, images))):
        estimated = estimate(table, (-600, 600))
        assert (estimated.low, estimated.high, estimated.p) == (None, None, None)
        assert estimated.value == pytest.approx(table.mean())
    (row,) = pairwise_differences({"rsum": {"a": runs(table + 10), "b": runs(np.zeros_like(table))}})
    assert not row.is_significant
    assert row.to_dict()["p_holm"] is None


def test_no_p_is_below_what_the_number_of_images_allows():
    table = 10 + np.linspace(0, 1e-3, 8)[None]
    assert estimate(table).p == pytest.approx(2.0**-7)


@settings(deadline=None)
@given(st.integers(MIN_IMAGES, 400), st.integers(1, 3), st.floats(-600, 600))
def test_without_variance_an_interval_is_of_what_was_not_seen(images, seeds, value):
    """No two images differ: a share of up to 1 - 0.025^(1/N) others may not have been seen (Clopper and Pearson)."""
    estimated = estimate(np.full((seeds, images), value), (-600, 600))
    unseen = 1 - 0.025 ** (1 / images)
    assert estimated.low == pytest.approx(value - unseen * (value + 600), abs=1e-6)
    assert estimated.high == pytest.approx(value + unseen * (600 - value), abs=1e-6)
    # p and the interval say the same.
    if abs(estimated.low) > 1e-6 and abs(estimated.high) > 1e-6:
        assert (estimated.p < 0.05) == (estimated.low > 0 or estimated.high < 0)
    assert (estimate(np.full((seeds, images), value)).low is None) or value == 0


def test_seeds_are_paired_by_their_number():
    """One variant lacks seed 0: its seed 1 is compared with seed 1 of the other, not with seed 0. Equal runs, equal
    figures; paired by position there were a difference of 9.5 and a p below 5 %."""
    rng = np.random.default_rng(3)
    all_runs = {seed: 10.0 * seed + rng.normal(200, 100, 300) for seed in range(5)}
    lacks = {seed: row for seed, row in all_runs.items() if seed != 0}
    (row,) = pairwise_differences({"rsum": {"a": all_runs, "b": lacks}})
    assert row.seeds == (1, 2, 3, 4)
    assert row.estimate.value == 0
    assert not row.is_significant
    backwards = dict(reversed(lacks.items()))
    assert pairwise_differences({"rsum": {"a": all_runs, "b": backwards}})[0].estimate == row.estimate
    assert unpaired_seeds({"a": list(all_runs), "b": list(lacks)}) == [
        {"a": "a", "b": "b", "paired": [1, 2, 3, 4], "only_a": [0], "only_b": []}
    ]


def test_variants_without_a_common_seed_are_not_compared():
    rows = {seed: np.arange(20.0) for seed in range(4)}
    tables = {"a": {0: rows[0], 1: rows[1]}, "b": {2: rows[2]}, "c": {1: rows[1], 2: rows[3]}}
    comparisons = pairwise_differences({"rsum": tables})
    assert [(each.a, each.b, each.seeds) for each in comparisons] == [("a", "c", (1,)), ("b", "c", (2,))]
    assert all(each.estimate.spread is None for each in comparisons)
    assert unpaired_seeds({name: list(table) for name, table in tables.items()})[0] == {
        "a": "a", "b": "b", "paired": [], "only_a": [0, 1], "only_b": [2],
    }  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_published_procedure(p):
    corrected = holm_correction(p)
    rejected = [value < 0.05 for value in corrected]
    # Step down: from the least p on, each against 5 % over what is left, until one holds.
    expected = [False] * len(p)
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - rank) >= 0.05:
            break
        expected[index] = True
    assert rejected == expected
    assert all(c >= value for c, value in zip(corrected, p, strict=True))


@pytest.mark.parametrize("figure", COMPARED_METRICS)
def test_shares_have_the_figure_as_their_mean(figure):
    """Images with unequal numbers of captions included."""
    rng = np.random.default_rng(3)
    owners = np.concatenate([np.arange(40), rng.integers(0, 40, 100)])
    images, captions = rng.normal(size=(40, 8)), rng.normal(size=(140, 8))
    captions += images[owners]
    metrics = retrieval_metrics(images, captions, owners, resamples=0)
    ranks = ranks_of_vectors(images, captions, Positives.of(owners, 40))
    if figure == "rsum":
        expected = metrics.rsum.value
    else:
        way, name = figure.split(" ")
        expected = 100 * getattr(metrics, way)[name].value
    assert image_contributions(ranks, owners, figure).mean() == pytest.approx(expected)


def test_two_ways_to_an_interval_agree_on_one_run():
    """The bootstrap over images and the variance of the shares: the same width, unequal numbers of captions or not."""
    rng = np.random.default_rng(4)
    owners = np.sort(np.concatenate([np.arange(400), rng.integers(0, 400, 1200)]))
    images = rng.normal(size=(400, 12))
    captions = images[owners] + 1.5 * rng.normal(size=(1600, 12))
    metrics = retrieval_metrics(images, captions, owners)
    ranks = ranks_of_vectors(images, captions, Positives.of(owners, 400))
    for figure, boot in (("rsum", metrics.rsum), ("text_to_image recall_at_1", metrics.text_to_image["recall_at_1"])):
        other = estimate(image_contributions(ranks, owners, figure)[None])
        factor = 1 if figure == "rsum" else 100
        assert other.high - other.low == pytest.approx(factor * (boot.high - boot.low), rel=0.12)


def test_a_thousand_resamples_take_less_than_half_of_measuring_each_anew():
    """5,000 captions; the plain way is timed on 20 resamples, in the same run on the same machine."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1000, 16)).astype(np.float32)
    owners = np.repeat(np.arange(1000), 5)
    captions = (images[owners] + rng.normal(size=(5000, 16))).astype(np.float32)
    ranks = ranks_of_vectors(images, captions, Positives.of(owners, 1000))
    start = time.perf_counter()
    metrics_of_ranks(ranks, owners, 1000)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(20):
        images = rng.integers(1000, size=1000)
        rows = (5 * images[:, None] + np.arange(5)).ravel()
        drawn = PositiveRanks(ranks.image_to_text[images], ranks.text_to_image[rows])
        metrics_of_ranks(drawn, owners, resamples=0)
    assert ours < 0.5 * 50 * (time.perf_counter() - start)


# --- people: RSTPReid's measures -------------------------------------------------------------------------------------


def test_identity_measures_equal_a_reference_from_the_definition():
    """R@k: an image of the identity within the first k. AP: mean over relevant images of the precision at each."""
    rng = np.random.default_rng(7)
    identity = rng.integers(0, 12, 60)
    identity[:12] = np.arange(12)
    images, captions = rng.normal(size=(60, 6)), rng.normal(size=(120, 6))
    owners = np.repeat(np.arange(60), 2)
    captions += 0.7 * images[owners]
    metrics = retrieval_metrics(images, captions, owners, identity, resamples=0)
    precisions, hits = [], {1: [], 5: [], 10: []}
    for caption, owner in zip(captions, owners, strict=True):
        relevant = identity[np.argsort(-(images @ caption), kind="stable")] == identity[owner]
        for k, several in hits.items():
            several.append(relevant[:k].any())
        ranks = np.flatnonzero(relevant) + 1
        precisions.append(np.mean([(ranks <= rank).sum() / rank for rank in ranks]))
    assert metrics.text_to_image["map"].value == pytest.approx(np.mean(precisions))
    for k, several in hits.items():
        assert metrics.text_to_image[f"recall_at_{k}"].value == pytest.approx(np.mean(several))


def people(known, each=10):
    """Ranks (N, each) of a model that finds all images of some persons at once, and none of the others."""
    ranks = np.tile(np.arange(1, each + 1), (len(known) * each, 1))
    ranks[~np.repeat(known, each)] += 60
    return PositiveRanks(ranks, ranks)


@pytest.mark.parametrize("by", ["identity", "near-duplicates"])
def test_images_that_depend_on_each_other_are_no_evidence_beside_each_other(by):
    """Equal models that each know a random half of the persons: hardly any difference is shown, in no third of lengths
    either, and the interval of a run holds, by mean squares and by bootstrap."""
    rng = np.random.default_rng(0)
    persons, each, studies = 30, 10, 60
    rows = [CaptionedImage(f"{i}.jpg", Path(f"{i}.jpg"), (f"person {i // each} seen" + " again" * (i % 3),), "dev",
                           identity=f"p{i // each}" if by == "identity" else None)
            for i in range(persons * each)]  # fmt: skip
    groups = tuple(tuple(row.name for row in rows[start : start + each]) for start in range(0, len(rows), each))
    part = CaptionedImages(rows, Path("x"), "folder", near_duplicates=() if by == "identity" else groups)
    shown, held = 0, np.zeros(2)
    passed = {"audit": {"passed": True, "checks": []}, "chosen": {}, "composition": {}, "candidates": 0}
    with patch("clipvisionalign.study.aggregate.RESAMPLES", 60):
        for _ in range(studies):
            cells = [TrialResult(name, 0, passed, {"ranks": people(rng.random(persons) < 0.5)}) for name in "ab"]
            results = aggregate_results(cells, part, "test")
            of = [row for row in results["differences"] if row["figure"] == "rsum"] + results["by_length_differences"]
            shown += any(row["shown"] for row in of)
            run = results["variants"]["a"]
            for way, estimate in enumerate((run["figures"]["rsum"], run["runs"][0]["rsum"])):
                held[way] += estimate["low"] <= 300 <= estimate["high"]
    assert results["units"] == persons
    assert results.get("identities") == (persons if by == "identity" else None)
    near = {"images": persons * each, "groups": persons}
    assert results.get("near_duplicates") == (None if by == "identity" else near)
    assert shown <= 7
    assert (held >= 52).all(), held


def test_identities_and_near_duplicates_join_to_units():
    identities = ["a", "a", None, None, "b", "b", None]
    rows = [CaptionedImage(f"{i}.jpg", b"", ("a dog",), "dev", identity=each) for i, each in enumerate(identities)]
    data = CaptionedImages(rows)
    assert units_of(data) == [{0, 1}, {2}, {3}, {4, 5}, {6}]
    # An image of each of two persons is nearly the same; and two of none are.
    joined = replace(data, near_duplicates=(("1.jpg", "4.jpg"), ("3.jpg", "6.jpg")))
    assert units_of(joined) == [{0, 1, 4, 5}, {2}, {3, 6}]
    assert units_block(joined, image_units(joined)) == {
        "identities": 5, "near_duplicates": {"images": 4, "groups": 2}, "units": 3,
    }  # fmt: skip
    assert units_of(replace(joined, rows=[replace(row, identity=None) for row in rows])) == [
        {0},
        {1, 4},
        {2},
        {3, 6},
        {5},
    ]


def units_of(data):
    """The images of each unit, in the order of their first."""
    units = image_units(data)
    return [set(np.flatnonzero(units == unit)) for unit in dict.fromkeys(units.tolist())]


def test_a_study_knows_the_near_duplicates_of_the_split_that_it_measures(tmp_path, scenes_folder):
    data = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    with (data / "metadata.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    firsts = {split: next(row for row in rows if row[2] == split) for split in ("train", "dev")}
    for split, row in firsts.items():
        with Image.open(data / row[0]) as image:
            image.convert("RGB").save(data / f"{split}.jpg", quality=70)
        rows += [[f"{split}.jpg", "another caption of it", split]]
    with (data / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    study_data = open_study_data(Plan(data=str(data)), tmp_path / "study", tmp_path / "scenes")
    pair = {firsts["dev"][0], "dev.jpg"}
    assert pair in [set(group) for group in study_data.near_duplicates]
    dev = study_data.split("dev")
    units = units_of(dev)
    assert {row.name for row in dev.rows} >= pair
    assert {index for index, row in enumerate(dev.rows) if row.name in pair} in units
    assert not any("train" in name for group in study_data.near_duplicates for name in group)


def test_an_identity_of_each_image_is_as_none():
    ranks, owners = people(np.random.default_rng(1).random(12) < 0.5, each=1), np.arange(12)
    alone, numbered = (metrics_of_ranks(ranks, owners, 50, unit=unit) for unit in (None, np.arange(12)))
    assert alone.to_dict() == numbered.to_dict()
    # Five persons are too few, however many images there are of them.
    several = metrics_of_ranks(people(np.arange(5) < 3), np.arange(50), 50, unit=np.repeat(np.arange(5), 10))
    assert several.rsum.low is None


def test_average_precision_by_hand():
    assert average_precision(np.array([[1, 3], [2, 0]])).tolist() == pytest.approx([(1 + 2 / 3) / 2, 0.5])


# --- how it is told --------------------------------------------------------------------------------------------------

PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "flickr8k-small" / "report.json"


def rendered_report(report, folder):
    """Words, tables as Markdown and LaTeX, the page: each as text."""
    from clipvisionalign.study.report.build import write_report
    from clipvisionalign.study.report.claims.claim import numbers_in
    from clipvisionalign.study.report.summary import report_claims

    report["claims"] = report_claims(report)
    for claim in report["claims"]:
        assert sorted(numbers_in(claim["text"])) == sorted(figure["shown"] for figure in claim["figures"])
    write_report(folder, report)
    names = ("report.html", "tables/differences.md", "tables/differences.tex", "tables/accuracy.md")
    return " ".join(claim["text"] for claim in report["claims"]), *((folder / name).read_text() for name in names)


@pytest.fixture
def report():
    return json.loads(PUBLISHED.read_text())


def test_what_was_not_tested_is_told_so_everywhere(report, tmp_path):
    nothing = {"low": None, "high": None, "p": None, "p_holm": None, "shown": False}
    results = report["results"]
    for row in results["differences"] + results["by_length_differences"]:
        row |= nothing | {"seeds": [0, 1, 2]}
    for variant in results["variants"].values():
        blocks = [variant["figures"], variant.get("dual", {}), *variant["by_length"].values()]
        for figure in [figure for block in blocks for figure in block.values() if isinstance(figure, dict)]:
            figure |= {"low": None, "high": None, "p": None}
        if "gain" in variant:
            variant["gain"] |= {"low": None, "high": None, "p": None}
    for row in [row for rows in results["composition"].values() for row in rows]:
        row |= {"low": None, "high": None, "p": None, "p_holm": None}
    for row in [row for rows in report["text_only"].values() for row in rows]:
        row |= {"low": None, "high": None, "p": None}
    summary, page, markdown, latex, accuracy = rendered_report(report, tmp_path)
    assert summary.count("not tested: the gallery has too few") == 6
    assert "finds more" not in summary
    for text in (page, markdown, latex):
        assert "not tested" in text
        text = text.replace("None of this is a result", "")
        assert not any(f"{before}None" in text for before in (">", "[", "| ", "& ", ": "))
        assert ", no interval" in text
    assert "no difference shown" not in markdown + summary
    assert "[" not in accuracy.replace("95", "")


@pytest.mark.slow
def test_missing_seeds_and_few_seeds_are_told(report, tmp_path):
    results = report["results"]
    results["variants"]["late"]["seeds"].remove(0)
    del results["variants"]["late"]["runs"][0]
    for figure_name in results["variants"]["late"]["figures"]:
        way, _, kind = figure_name.partition(" ")
        values = [
            run["rsum"] if figure_name == "rsum" else run[way][kind] for run in results["variants"]["late"]["runs"]
        ]
        factor = 1 if figure_name == "rsum" else 100
        results["variants"]["late"]["figures"][figure_name]["value"] = factor * np.mean(
            [each["value"] for each in values]
        )
    for row in results["differences"]:
        row["seeds"] = [1, 2] if "late" in (row["a"], row["b"]) else [0, 1, 2]
    results["unpaired"] = unpaired_seeds({name: variant["seeds"] for name, variant in results["variants"].items()})
    summary, page, markdown, _, accuracy = rendered_report(report, tmp_path)
    assert "`self` and `late` are compared on the seeds that both have: left out is `self` seed 0" in summary
    assert "one degree of freedom" in summary
    assert "self - late: seed 0 of self without a partner, left out" in markdown
    assert "late (2 of 3 seeds)" in accuracy
    assert "late (2 of 3 seeds)" in page
    assert "Two seeds leave one degree of freedom" in page


def test_one_seed_is_told_as_such_everywhere(report, tmp_path):
    results = report["results"]
    report["plan"]["seeds"] = [0]
    for variant in results["variants"].values():
        variant["seeds"], variant["runs"] = [0], variant["runs"][:1]
        for name, figure in variant["figures"].items():
            way, _, kind = name.partition(" ")
            value = variant["runs"][0]["rsum"] if name == "rsum" else variant["runs"][0][way][kind]
            figure |= {"value": (1 if name == "rsum" else 100) * value["value"], "spread": None}
    for row in results["differences"]:
        row |= {"seeds": [0], "spread": None}
    summary, page, markdown, latex, accuracy = rendered_report(report, tmp_path)
    assert "of one seed, its interval of the images only" in summary
    assert "another seed may give another difference" in summary
    for text in (page, markdown, latex):
        assert "another seed may give another difference" in text
    assert "one seed: 95% intervals of the images only" in accuracy
    assert "that count seeds and images" not in accuracy + page
