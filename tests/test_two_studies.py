"""What changed between two studies: images are paired, seeds are not, and the test keeps its level."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipvisionalign.cli import main
from clipvisionalign.study.config import Measurements, Plan, Variant
from clipvisionalign.study.runner import run_study
from clipvisionalign.study.statistics import half_width, mean_squares
from clipvisionalign.study.two_studies import change_half_width, changes_table, compare_tables


def two_tables(
    rng: np.random.Generator, seeds: tuple[int, int], images: int, of_seed: float, shared: float = 100.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of two studies that do not differ: what images share, what they do not, seeds, and the rest."""
    of_images = rng.normal(0, shared, images)
    return tuple(
        of_images + rng.normal(0, 20, images) + rng.normal(0, of_seed, (count, 1)) + rng.normal(0, 60, (count, images))
        for count in seeds
    )  # type: ignore[return-value]


@pytest.mark.parametrize("of_seed", [0.0, 3.0, 14.0])
@pytest.mark.parametrize("seeds", [(2, 2), (3, 5), (5, 3)], ids=str)
def test_no_change_is_shown_in_more_than_five_percent(seeds, of_seed):
    rng, number, images = np.random.default_rng(0), 800, 80
    shown = 0
    for _ in range(number):
        a, b = two_tables(rng, seeds, images, of_seed)
        shown += abs(b.mean() - a.mean()) > change_half_width(a, b)
    assert shown / number <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / number)


def test_what_the_images_share_does_not_widen_the_interval_and_seeds_do():
    rng = np.random.default_rng(1)
    a, b = two_tables(rng, (3, 3), 200, 3.0)
    common = rng.normal(0, 500, 200)
    assert change_half_width(a + common, b + common) == pytest.approx(change_half_width(a, b))
    spread = np.array([[-20.0], [0.0], [20.0]])
    assert change_half_width(a + spread, b) > 2 * change_half_width(a, b)
    # One seed each: the interval of the images, paired, and no test.
    assert [each.p_holm for each in compare_tables({"one": a[:1]}, {"one": b + 500})] == [None]
    assert change_half_width(a[:1], b[:1]) == pytest.approx(
        half_width(mean_squares((b - a)[:1]), 1, 200), rel=1e-9
    )  # fmt: skip


def test_p_is_corrected_and_goes_with_the_interval():
    rng = np.random.default_rng(2)
    a, b = ({}, {})
    for name, change in (("one", 0.0), ("two", 40.0), ("three", 12.0)):
        a[name], other = two_tables(rng, (4, 4), 150, 1.0)
        b[name] = other + change
    b["only in b"] = b["one"]
    changes = {each.variant: each for each in compare_tables(a, b)}
    assert list(changes) == ["one", "two", "three"]
    for each in changes.values():
        assert (each.estimate.p < 0.05) == (not each.estimate.low <= 0 <= each.estimate.high)
        assert each.p_holm >= each.estimate.p
    assert changes["two"].is_significant
    assert not changes["one"].is_significant
    assert [each.p_holm for each in compare_tables(a, a)] == [None] * 3, "the same figures: nothing to test"


@pytest.fixture(scope="module")
def pair(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two studies of one design, the second with another learning rate."""
    folder = tmp_path_factory.mktemp("pair")
    quick = replace(
        plan, variants={"self": Variant()}, settings={**plan.settings, "epochs": 1},
        measure=Measurements(rounds=0, brief=True, composition=0, audit_images=12, examples=0, protocol=False),
    )  # fmt: skip
    run_study(quick, folder / "a")
    run_study(replace(quick, settings={**quick.settings, "head_lr": 1e-2}), folder / "b")
    return folder / "a", folder / "b"


@pytest.mark.slow
def test_the_comparison_of_two_studies_has_the_change_of_each_variant(pair, tmp_path, capsys):
    a, b = pair
    assert main(["report", str(a), "--compare", str(b), "--json"]) == 0
    tables = {table["name"]: table for table in json.loads(capsys.readouterr().out)["tables"]}
    [row] = tables["changes"]["rows"]
    figures = [
        json.loads((each / "report.json").read_text())["results"]["variants"]["self"]["figures"] for each in pair
    ]
    difference = figures[1]["rsum"]["value"] - figures[0]["rsum"]["value"]
    assert tables["changes"]["sort"][0][1] == pytest.approx(difference)
    assert row[1].startswith(f"{difference:+.1f} [")
    assert row[2] == "2 and 2"
    assert "Rsum, B - A" in (a / "comparison.html").read_text()
    # The other way round it changes its sign alone.
    assert main(["report", str(b), "--compare", str(a), "--json"]) == 0
    other = {table["name"]: table for table in json.loads(capsys.readouterr().out)["tables"]}["changes"]
    assert other["sort"][0][1] == pytest.approx(-difference)
    assert other["sort"][0][3] == pytest.approx(tables["changes"]["sort"][0][3])
    # Without ranks beside the report nothing is tested, and that is said.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(b / "report.json", alone)
    reports = tuple(json.loads((each / "report.json").read_text()) for each in pair)
    assert str(changes_table(a, alone, reports)).startswith("not tested: ")
    assert main(["report", str(a), "--compare", str(alone), "--out", str(tmp_path / "c.html")]) == 0
    assert "Changes are not tested" in " ".join(capsys.readouterr().out.split())
