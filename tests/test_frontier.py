"""Re-ranking only where a search is unsure, in a study: by the definition, and in its report."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_reports import check_numbers, cost_round, made_report

from clipvisionalign import read_captioned_images
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.study.foils import HalfWeights
from clipvisionalign.study.frontier import measure_frontier, query_milliseconds, recall_difference
from clipvisionalign.study.report.html import render_page
from clipvisionalign.study.report.plots import draw_plots
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.tables import build_tables
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.pair_weights import PairWeights, get_pair_weights, set_pair_weights


@pytest.fixture(scope="module")
def dev(scenes_folder):
    data = read_captioned_images(scenes_folder).split("dev")
    return replace(data, rows=data.rows[:12])


def brute_force(aligner: Any, data: Any, weights: list[PairWeights] | None) -> tuple[Any, np.ndarray, Any]:
    """By caption: cosines of its images, best first; whether each is its own; pair scores."""
    own_weights, halves = get_pair_weights(aligner), split_halves(data)
    # The vectors themselves: margins are so close to cosines that another rounding is another number of hits.
    scorer = aligner.pair_scorer(data.images, data.captions)
    table = scorer.caption_vectors.numpy() @ scorer.image_vectors.numpy().T
    rows = []
    for caption, owner in enumerate(np.asarray(data.caption_image).tolist()):
        if weights is not None:
            set_pair_weights(aligner, weights[1 - int(halves.image_half[owner])])
        scores = np.asarray(aligner.score(data.images, [data.captions[caption]]))[:, 0]
        set_pair_weights(aligner, own_weights)
        cosines = table[caption].astype(np.float64)
        order = np.argsort(-cosines, kind="stable")
        rows.append((cosines[order], order == owner, scores[order]))
    return tuple(np.array(each) for each in zip(*rows, strict=True))


def brute_recall_sum(rows: Any, counts: Any) -> float:
    """Recall at 1, 5 and 10 once the first hits of each caption are ordered by their scores."""
    positions = []
    for (_, own, scores), count in zip(zip(*rows, strict=True), counts, strict=True):
        position = int(np.flatnonzero(own)[0])
        if position < count:
            position = sum(scores[other] >= scores[position] for other in range(count) if other != position)
        positions.append(position)
    return sum(100.0 * np.mean(np.array(positions) < k) for k in (1, 5, 10))


def unsure(cosines: np.ndarray, margin: float) -> list[int]:
    counts = [int(np.sum(row[0] - row <= margin)) if margin > 0 else 0 for row in cosines]
    return [count if count > 1 else 0 for count in counts]


@pytest.mark.parametrize(("design", "by_halves"), [("late", False), ("late", True), ("cross", True)])
def test_the_figures_are_those_of_the_definition(design, by_halves, dev, tiny_model):
    aligner = Aligner(tiny_model(design)).eval()
    own = PairWeights(late=0.75, fusion=1.0) if design == "cross" else PairWeights(late=0.75)
    set_pair_weights(aligner, own)
    weights = None
    if by_halves:
        weights = [own._replace(late=0.2), own._replace(late=1.4)]
    halves = weights and HalfWeights(dict(zip(dev.images, split_halves(dev).image_half.tolist(), strict=True)), weights)
    frontier = measure_frontier(aligner, dev, halves)
    assert get_pair_weights(aligner) == own
    rows = brute_force(aligner, dev, weights)
    cosines, depth, captions = rows[0], len(dev), len(dev.captions)
    assert (frontier["captions"], frontier["depth"]) == (captions, depth)
    assert [row["candidates"] for row in frontier["fixed"]] == [0, 3, 6, 12]
    for row in frontier["fixed"]:
        assert row["recall_sum"] == pytest.approx(brute_recall_sum(rows, [row["candidates"]] * captions))
    for row in frontier["margins"]:
        counts = unsure(cosines, row["margin"])
        assert row["images"] == pytest.approx(np.mean(counts))
        assert row["queries"] == pytest.approx(np.mean(np.array(counts) > 0))
        assert row["recall_sum"] == pytest.approx(brute_recall_sum(rows, counts))
    assert frontier["margins"][-1]["recall_sum"] == pytest.approx(frontier["fixed"][-1]["recall_sum"])
    chosen, half = frontier["chosen"], split_halves(dev).image_half[np.asarray(dev.caption_image)]
    by_margin = [unsure(cosines, margin) for margin in chosen["margins"]]
    counts = [by_margin[1 - each][caption] for caption, each in enumerate(half.tolist())]
    assert chosen["images"] == pytest.approx(np.mean(counts))
    assert chosen["recall_sum"] == pytest.approx(brute_recall_sum(rows, counts))
    for other, baseline in (("deepest", depth), ("vectors", 0)):
        gain = chosen["recall_sum"] - brute_recall_sum(rows, [baseline] * captions)
        assert chosen[f"against_{other}"]["value"] == pytest.approx(gain, abs=1e-4)


def test_captions_of_one_unit_are_drawn_together():
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(50), 4)
    # Captions of an image change alike: four times as many of them say no more.
    after = np.repeat(rng.integers(0, 12, 50), 4)
    together = recall_difference(after, np.full(200, 5), 32, unit)
    apart = recall_difference(after, np.full(200, 5), 32, np.arange(200))
    width = [float(each["high"]) - float(each["low"]) for each in (together, apart)]
    assert together["value"] == pytest.approx(apart["value"])
    assert width[0] / width[1] == pytest.approx(2.0, rel=0.2)


FRONTIER = {
    "captions": 80, "depth": 32,
    "fixed": [{"candidates": count, "recall_sum": total} for count, total in ((0, 150.0), (4, 154.0), (32, 160.0))],
    "margins": [{"margin": margin, "images": images, "queries": queries, "recall_sum": total}
                for margin, images, queries, total in ((0.0, 0.0, 0.0, 150.0), (0.1, 7.0, 0.6, 159.0), (0.3, 32.0, 1.0, 160.0))],
    "chosen": {"margins": [0.1, 0.12], "images": 8.0, "queries": 0.62, "recall_sum": 159.4,
               "against_deepest": {"value": -0.6, "low": -1.4, "high": 0.2},
               "against_vectors": {"value": 9.4, "low": 5.0, "high": 14.0}},
}  # fmt: skip


@pytest.mark.parametrize("is_timed", [True, False])
def test_the_report_has_it_as_a_table_a_plot_and_a_sentence(is_timed, tmp_path):
    costs = {name: [cost_round(2.0, pairs=500.0)] for name in ("self", "late")} if is_timed else None
    report = made_report(frontiers={"late": FRONTIER}, costs=costs)
    (frontier,) = report["frontier"].values()
    assert frontier["seed"] == 0
    if is_timed:
        # One caption takes 3 ms, 1,000 pairs 500.
        assert [row["ms_per_query"] for row in frontier["fixed"]] == [3.0, 5.0, 19.0]
        assert frontier["chosen"]["ms_per_query"] == 7.0
    (table,) = (each for each in build_tables(report) if each.name == "frontier")
    assert [row[:3] for row in table.rows] == [
        ["late", "vectors alone", "150.0"], ["late", "first 4", "154.0"], ["late", "first 32", "160.0"],
        ["late", "where unsure", "159.4"],
    ]  # fmt: skip
    assert table.rows[-1][3:5] == ["8.0", "62"]
    assert table.rows[-1][-1] == "-0.6 [-1.4, 0.2]"
    assert [row[6] for row in table.rows] == (["16", "26", "100", "37"] if is_timed else [""] * 4)
    (claim,) = (each for each in report["claims"] if "unsure" in each["text"])
    check_numbers(report, claim)
    assert ("7.0 instead of 19.0 ms" in claim["text"]) == is_timed
    plots = draw_plots(report, tmp_path)
    assert ("frontier" in plots) == is_timed
    if is_timed:
        # What does not re-rank stands beside it, by the recalls of the table of accuracy.
        total = sum(report["results"]["variants"]["self"]["figures"][f"text_to_image recall_at_{k}"]["value"]
                    for k in (1, 5, 10))  # fmt: skip
        assert f"self: {total:.1f} at 23.0 ms" in plots["frontier"].alt_text
    page = render_page(report, plots)
    assert "Re-ranking only where a search is unsure" in page
    assert len(re.findall(r'href="#cost"', page)) == 1
    assert StudyReport.of(report).frontier["late"].chosen is not None


def test_times_that_are_the_same_as_they_are_shown_are_not_compared():
    report = made_report(frontiers={"late": FRONTIER}, costs={"late": [cost_round(2.0, pairs=0.5)]})
    (claim,) = (each for each in report["claims"] if "unsure" in each["text"])
    assert claim["text"].endswith("by -0.6 [-1.4, 0.2].")
    check_numbers(report, claim)


def test_a_gallery_without_halves_has_no_margin_of_another_half():
    frontier = {key: value for key, value in FRONTIER.items() if key != "chosen"}
    report = made_report(frontiers={"late": frontier}, costs={"late": [cost_round()]})
    (table,) = (each for each in build_tables(report) if each.name == "frontier")
    assert len(table.rows) == 3
    assert not [each for each in report["claims"] if "unsure" in each["text"]]
    assert "chosen" not in query_milliseconds(frontier, 1.0, 2.0)
